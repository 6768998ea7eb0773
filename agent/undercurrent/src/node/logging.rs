//! The process's own log, on standard error; connections are in the access log, on standard output.

use anyhow::Context;
use tracing_subscriber::{EnvFilter, fmt, layer::SubscriberExt, util::SubscriberInitExt};

/// `RUST_LOG` says what is logged [default: info]; `LOG_FORMAT=json` how.
pub fn start() -> anyhow::Result<()> {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env()
        .context("RUST_LOG can't be understood")?;
    let registry = tracing_subscriber::registry().with(filter);
    let json = std::env::var("LOG_FORMAT").is_ok_and(|format| format == "json");
    if json {
        registry
            .with(fmt::layer().json().with_writer(std::io::stderr))
            .try_init()?;
    } else {
        registry
            .with(fmt::layer().with_ansi(false).with_writer(std::io::stderr))
            .try_init()?;
    }
    Ok(())
}
