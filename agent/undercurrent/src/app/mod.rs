//! `undercurrent app`: programs to put into pods. A server that echoes and says what it saw, and a client that calls it
//! and says what it saw: addresses, headers, bytes, each in the words of the socket itself. One file per protocol.
//!
//! It knows nothing of the mesh, on purpose: what it reports is what any application would see.

mod call;
mod connect;
mod grpc;
mod http;
mod payload;
mod report;
mod serve;
mod tcp;
mod udp;
mod websocket;

use anyhow::{Context, Result};
use clap::Subcommand;

/// Programs to put into pods.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// An echo server that reports what it saw, as JSON, to the client and on standard output.
    Serve(serve::ServeArgs),
    /// A client that calls it, or anything else, and prints what it saw.
    Call(Box<call::CallArgs>),
}

/// Runs the program; ends the process with 1 if a call failed.
pub fn run(args: Args) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    match args.command {
        Command::Serve(serve) => runtime.block_on(serve::run(serve)),
        Command::Call(call) => {
            let well = runtime.block_on(call::run(*call))?;
            std::process::exit(if well { 0 } else { 1 })
        }
    }
}
