//! The client: one call or many, and what came of them.

use std::{
    collections::BTreeMap,
    io::Write,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use serde::Serialize;
use tokio::task::JoinSet;

use super::{connect::Url, grpc, http, report::Called, tcp, udp, websocket};

/// Options of `app call`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct CallArgs {
    /// http:// h2c:// grpc:// ws:// tcp:// or udp://, with host, port and for HTTP a path.
    url: Url,
    /// Print JSON: one object for one call, a summary for many.
    #[arg(long)]
    json: bool,
    /// How many calls, each on a connection of its own.
    #[arg(long, short = 'n', default_value_t = 1)]
    count: u64,
    /// How many of them at once.
    #[arg(long, short = 'p', default_value_t = 1)]
    parallel: usize,
    /// What to send.
    #[arg(long, short)]
    pub body: Option<String>,
    /// Send so many random bytes instead, and compare what comes back by hash (`1M`, `1G`).
    #[arg(long, value_parser = size)]
    pub bytes: Option<u64>,
    /// With --bytes: this is always done; accepted for clarity.
    #[arg(long, requires = "bytes")]
    hash: bool,
    /// TCP: how many bytes each write has; 1 for one-byte writes.
    #[arg(long)]
    pub chunk: Option<usize>,
    /// TCP: `client` ends the sending side after the last byte and reads on to the end; `server` first reads to the end
    /// of what the server sends (mode farewell), and then sends.
    #[arg(long = "half-close", value_name = "SIDE", value_parser = ["client", "server"])]
    half_close_of: Option<String>,
    #[arg(skip)]
    pub half_close: bool,
    #[arg(skip)]
    pub wait_for_end_first: bool,
    /// TCP: first read a line (mode greet).
    #[arg(long)]
    pub server_first: bool,
    /// TCP: send and never read, until nothing more is taken for a second; prints how much was.
    #[arg(long)]
    pub never_read: bool,
    /// TCP: end with a reset.
    #[arg(long)]
    pub reset: bool,
    /// TCP: keep the connection so many seconds after all else.
    #[arg(long, value_name = "SECONDS")]
    pub hold: Option<f64>,
    /// HTTP: a header, as `NAME: VALUE`.
    #[arg(long, short = 'H')]
    pub header: Vec<String>,
    /// HTTP: the method [default: GET, or POST with a body].
    #[arg(long, short = 'X')]
    pub method: Option<String>,
    /// Seconds until a call has failed: to connect, and while nothing comes.
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
    /// Begin again with a failed call after so many seconds, for ever.
    #[arg(long, value_name = "SECONDS")]
    every: Option<f64>,
}

impl CallArgs {
    pub fn timeout(&self) -> Duration {
        Duration::from_secs_f64(self.timeout.clamp(0.0, 1e6))
    }

    /// How many bytes are sent, and so come back from an echo.
    pub fn payload_length(&self) -> u64 {
        self.bytes
            .unwrap_or(self.body.as_ref().map_or(0, |body| body.len() as u64))
    }

    pub fn without_body(&self) -> Self {
        Self {
            body: None,
            bytes: None,
            ..self.clone()
        }
    }
}

/// `1M` and the like.
fn size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last().map(u8::to_ascii_uppercase) {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift));
    number.ok_or_else(|| format!("{text:?} is not a size"))
}

#[derive(Serialize, Default)]
struct Summary {
    url: String,
    calls: u64,
    ok: u64,
    failed: u64,
    /// What went wrong, and how often.
    errors: BTreeMap<String, u64>,
    bytes_sent: u64,
    bytes_received: u64,
    p50_milliseconds: f64,
    p99_milliseconds: f64,
    seconds: f64,
}

/// Calls; tells whether all went well.
pub(super) async fn run(mut args: CallArgs) -> Result<bool> {
    match args.half_close_of.as_deref() {
        Some("client") => args.half_close = true,
        Some(_) => args.wait_for_end_first = true,
        None => {}
    }
    if args.wait_for_end_first {
        // What is sent after the server's end does not come back.
        args.half_close = true;
    }
    if let Some(seconds) = args.every {
        loop {
            print(&args, &once(&args).await);
            tokio::time::sleep(Duration::from_secs_f64(seconds.clamp(0.001, 1e6))).await;
        }
    }
    if args.count == 1 {
        let called = once(&args).await;
        print(&args, &called);
        return Ok(called.ok);
    }
    let summary = many(&args).await?;
    let well = summary.failed == 0;
    let mut out = std::io::stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string(&summary)?)?;
    } else {
        writeln!(
            out,
            "{}: {} calls, {} ok, {} failed, {:.1} s, p50 {:.2} ms, p99 {:.2} ms",
            summary.url,
            summary.calls,
            summary.ok,
            summary.failed,
            summary.seconds,
            summary.p50_milliseconds,
            summary.p99_milliseconds
        )?;
        for (error, count) in &summary.errors {
            writeln!(out, "  {count} x {error}")?;
        }
    }
    Ok(well)
}

fn print(args: &CallArgs, called: &Called) {
    let text = if args.json {
        serde_json::to_string(called).unwrap_or_default()
    } else {
        called.text()
    };
    // A closed standard output is the reader's decision.
    let _ = writeln!(std::io::stdout(), "{text}");
}

async fn once(args: &CallArgs) -> Called {
    let url = &args.url;
    let mut called = Called {
        url: format!(
            "{}://{}{}",
            url.scheme,
            url.authority,
            if url.path == "/" { "" } else { &url.path }
        ),
        ..Called::default()
    };
    let start = Instant::now();
    let result = attempt(args, &mut called).await;
    called.milliseconds = start.elapsed().as_secs_f64() * 1000.0;
    called.ok = result.is_ok();
    called.error = result.err().map(|error| format!("{error:#}"));
    called
}

async fn attempt(args: &CallArgs, called: &mut Called) -> Result<()> {
    let url = &args.url;
    let call = async {
        match url.scheme.as_str() {
            "http" => http::call(url, args, called, false).await,
            "h2c" => http::call(url, args, called, true).await,
            "grpc" => grpc::call(url, args, called).await,
            "ws" => websocket::call(url, args, called).await,
            "udp" => udp::call(url, args, called).await,
            // It has a limit of its own on every wait: a gigabyte may take longer than that.
            _ => return tcp::call(url, args, called).await,
        }
    };
    if url.scheme == "tcp" {
        return call.await;
    }
    tokio::time::timeout(args.timeout(), call)
        .await
        .context("no answer in time")?
}

async fn many(args: &CallArgs) -> Result<Summary> {
    let start = Instant::now();
    let mut summary = Summary {
        url: format!("{}://{}{}", args.url.scheme, args.url.authority, args.url.path),
        calls: args.count,
        ..Summary::default()
    };
    let mut times = Vec::new();
    let mut running = JoinSet::new();
    let mut left = args.count;
    loop {
        while left > 0 && running.len() < args.parallel.max(1) {
            left -= 1;
            let args = args.clone();
            running.spawn(async move { once(&args).await });
        }
        let Some(called) = running.join_next().await else { break };
        let called = called.context("a call ended by itself")?;
        summary.bytes_sent += called.bytes_sent;
        summary.bytes_received += called.bytes_received;
        times.push(called.milliseconds);
        match called.error {
            None => summary.ok += 1,
            Some(error) => {
                summary.failed += 1;
                // Bounded: a server may answer something else each time.
                if summary.errors.len() < 20 || summary.errors.contains_key(&error) {
                    *summary.errors.entry(error).or_default() += 1;
                }
            }
        }
    }
    times.sort_by(f64::total_cmp);
    let quantile = |part: f64| {
        times
            .get(((times.len() as f64 - 1.0) * part) as usize)
            .copied()
            .unwrap_or_default()
    };
    (summary.p50_milliseconds, summary.p99_milliseconds) = (quantile(0.5), quantile(0.99));
    summary.seconds = start.elapsed().as_secs_f64();
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!([size("5"), size("2k"), size("1G")], [Ok(5), Ok(2048), Ok(1 << 30)]);
        assert!(size("").is_err() && size("x").is_err() && size("99999999999G").is_err());
    }
}
