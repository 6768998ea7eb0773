//! The load of `cargo xtask bench control`: a control plane with a mesh of many pods, and agents that learn it.
//!
//! | command | is | says, in lines of JSON |
//! |---|---|---|
//! | `plane` | the index, the cache and the xDS server, in one process; starts the others and measures | rows of the report |
//! | `agents` | many clients that decode, count and acknowledge, and keep nothing but what some need to come back | times, bytes |
//! | `agent` | one real agent's discovery and mesh | its memory |
//!
//! Objects enter at the index, as the API would have written them; the wire is HTTP/2 on loopback without TLS. So this is
//! the control plane's own work: the API's and TLS's come on top. Each run is bounded in counts and in time. On one
//! machine the agents compete with the control plane for its processors: with many of them a time is theirs as well.

mod agent;
mod agents;
mod measure;
mod plane;
mod world;

use std::net::SocketAddr;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about = "Load of `cargo xtask bench control`")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The control plane, which measures itself.
    Plane(plane::Options),
    /// Many simulated agents.
    Agents(agents::Options),
    /// One real agent.
    Agent {
        /// The control plane.
        #[arg(long)]
        control: SocketAddr,
        /// How many workloads, services and policies there are.
        #[arg(long)]
        resources: usize,
    },
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match Arguments::parse().command {
            Command::Plane(options) => plane::run(&options).await,
            Command::Agents(options) => agents::run(options).await,
            Command::Agent { control, resources } => agent::run(control, resources).await,
        }
    })
}
