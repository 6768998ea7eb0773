//! The benchmark's load generator and its server.
//!
//! One thread and bare epoll on each side, so that what is measured is what lies between. It knows nothing of meshes:
//! `cargo xtask bench l4` starts it inside the namespaces of the lab. Every run is bounded in time and in count, and
//! prints one line of JSON.
//!
//! | command | does | says |
//! |---|---|---|
//! | `serve` | answers all the others | |
//! | `bulk` | uploads on some streams, then waits for the server's count | bytes, seconds |
//! | `requests` | a request in flight on each of some kept-alive connections | count, seconds, p50, p99 |
//! | `unhurried` | requests on one kept-alive connection, with pauses | count, seconds, p50, p99 |
//! | `sip` | reads a little of a lot, on some connections | bytes, seconds |
//! | `connections` | connect, one request, close, with some at a time | count, seconds, p50, p99 |
//! | `idle` | opens connections, proves each by a request, holds them until stdin ends | held |

mod client;
mod histogram;
mod server;
mod slab;
mod wire;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Load generator and server of `cargo xtask bench`")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answers the other commands.
    Serve {
        /// Address to listen on.
        #[arg(long)]
        listen: SocketAddr,
    },
    /// Uploads as fast as the path allows.
    Bulk {
        #[command(flatten)]
        run: Run,
        /// Connections at a time.
        #[arg(long, default_value_t = 1)]
        streams: usize,
    },
    /// Requests over kept-alive connections.
    Requests {
        #[command(flatten)]
        run: Run,
        /// Connections, each with one request in flight.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        #[command(flatten)]
        sizes: Sizes,
    },
    /// Requests over one kept-alive connection, with a pause before each.
    Unhurried {
        #[command(flatten)]
        run: Run,
        /// The pause, in microseconds.
        #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u64).range(..=1_000_000))]
        pause: u64,
        #[command(flatten)]
        sizes: Sizes,
    },
    /// Slow readers: there is always more than they take.
    Sip {
        #[command(flatten)]
        run: Run,
        /// Connections.
        #[arg(long, default_value_t = 64)]
        connections: usize,
    },
    /// New connections, one request each.
    Connections {
        #[command(flatten)]
        run: Run,
        /// Connections at a time.
        #[arg(long, default_value_t = 16)]
        concurrency: usize,
        #[command(flatten)]
        sizes: Sizes,
    },
    /// Opens connections and holds them until stdin ends.
    Idle {
        #[command(flatten)]
        run: Run,
        /// Connections to hold.
        #[arg(long)]
        count: usize,
    },
}

#[derive(clap::Args, Clone, Copy)]
struct Run {
    /// The server, or what stands before it.
    #[arg(long)]
    target: SocketAddr,
    /// How long; for `idle` the longest time to hold.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Stop after so many requests or connections, whatever the time.
    #[arg(long, default_value_t = 20_000_000)]
    limit: u64,
}

impl Run {
    fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds.clamp(0.01, 600.0))
    }
}

#[derive(clap::Args, Clone, Copy)]
struct Sizes {
    /// Bytes in a request.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=i64::from(wire::MAX_MESSAGE)))]
    request: u32,
    /// Bytes in a response.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=i64::from(wire::MAX_MESSAGE)))]
    response: u32,
}

fn main() -> anyhow::Result<()> {
    raise_descriptor_limit()?;
    let answer = match Arguments::parse().command {
        Command::Serve { listen } => return Ok(server::serve(listen)?),
        Command::Bulk { run, streams } => serde_json::to_string(&client::bulk(&run, streams)?)?,
        Command::Requests {
            run,
            connections,
            sizes,
        } => serde_json::to_string(&client::requests(&run, connections, sizes, false)?)?,
        Command::Unhurried { run, pause, sizes } => {
            serde_json::to_string(&client::unhurried(&run, Duration::from_micros(pause), sizes)?)?
        }
        Command::Sip { run, connections } => serde_json::to_string(&client::sip(&run, connections)?)?,
        Command::Connections {
            run,
            concurrency,
            sizes,
        } => serde_json::to_string(&client::requests(&run, concurrency, sizes, true)?)?,
        Command::Idle { run, count } => return client::idle(&run, count),
    };
    println!("{answer}");
    Ok(())
}

/// Thousands of connections need as many descriptors; the usual soft limit is 1024.
fn raise_descriptor_limit() -> anyhow::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(())
}
