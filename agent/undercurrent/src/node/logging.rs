//! The process's own log, on standard error; connections are in the access log, on standard output. What is logged can be
//! changed while the process runs.

use anyhow::Context;
use tracing_subscriber::{
    EnvFilter, Registry, filter::LevelFilter, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

/// What is logged, and the means to change it. Cheap to clone.
#[derive(Clone)]
pub struct LogLevel {
    filter: reload::Handle<EnvFilter, Registry>,
    at_start: String,
}

/// `RUST_LOG` says what is logged [default: info]; `LOG_FORMAT=json` how.
pub fn start() -> anyhow::Result<LogLevel> {
    let filter = EnvFilter::builder()
        .with_default_directive(tracing::Level::INFO.into())
        .from_env()
        .context("RUST_LOG can't be understood")?;
    let at_start = filter.to_string();
    let (filter, handle) = reload::Layer::new(filter);
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
    Ok(LogLevel {
        filter: handle,
        at_start,
    })
}

impl LogLevel {
    /// What is logged now.
    pub fn current(&self) -> String {
        let current = self.filter.with_current(ToString::to_string);
        current.unwrap_or_else(|error| format!("unknown: {error}"))
    }

    /// Logs this from now on; what the process was started with where it is empty.
    pub fn change(&self, level: &str) -> Result<String, String> {
        let level = match level {
            "" => self.at_start.as_str(),
            level => checked(level)?,
        };
        let filter = EnvFilter::try_new(level).map_err(|error| format!("{level:?}: {error}"))?;
        self.filter.reload(filter).map_err(|error| error.to_string())?;
        let now = self.current();
        tracing::info!(level = now, "what is logged was changed");
        Ok(now)
    }
}

/// A level, or `part=level` for parts, comma-separated. Without this a typing error would be taken for a part's name.
fn checked(level: &str) -> Result<&str, String> {
    for directive in level.split(',') {
        let (part, level) = directive.split_once('=').unwrap_or(("all", directive));
        // An empty level is one to the parser.
        if part.is_empty() || level.is_empty() || level.parse::<LevelFilter>().is_err() {
            return Err(format!(
                "{directive:?} is not a level: give error, warn, info, debug or off, or PART=LEVEL, such as l4=debug"
            ));
        }
    }
    Ok(level)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_typing_error_is_not_taken_for_a_part() {
        for good in ["debug", "info,l4=debug", "off", "hbone::pool=trace,warn"] {
            assert!(checked(good).is_ok(), "{good}");
        }
        for bad in ["", "degub", "l4=", "=debug", "info,,"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
