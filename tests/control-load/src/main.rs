//! The load of `cargo xtask bench control`: a control plane with a mesh of many pods, and agents that learn it.
//!
//! | command | is | says, in lines of JSON |
//! |---|---|---|
//! | `measure` | starts the roles and the agents, makes the changes, measures | rows of the report |
//! | `agents` | many clients that decode, count and acknowledge, and keep nothing but what some need to come back | times, bytes |
//! | `agent` | one real agent's discovery and mesh | its memory |
//!
//! `measure --from api` ([`api`]) goes the whole way: a write at the embedded API, its watch, the control plane, TLS, the
//! agents; each role is a process of the release binary. `--from index` ([`plane`]) is the control plane alone.
//!
//! Each run is bounded in counts and in time. On one machine the agents compete with the control plane for its
//! processors: with many of them a time is theirs as well.

mod agent;
mod agents;
mod api;
mod child;
mod cluster;
mod measure;
mod plane;
mod roles;
mod wire;
mod world;

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

#[derive(Parser)]
#[command(about = "Load of `cargo xtask bench control`")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything, with agents of other processes.
    Measure(Options),
    /// Many simulated agents.
    Agents(agents::Options),
    /// One real agent.
    Agent(agent::Options),
}

/// Where changes are made.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Origin {
    /// At the API.
    Api,
    /// At the control plane's index.
    Index,
}

/// How large, how many, how long.
#[derive(clap::Args)]
struct Options {
    /// Where changes are made.
    #[arg(long, value_enum, default_value_t = Origin::Api)]
    from: Origin,
    /// The program whose roles are measured.
    #[arg(long, required_if_eq("from", "api"))]
    binary: Option<PathBuf>,
    /// Where the API's data, the agents' credentials and the roles' logs go. What is there is removed.
    #[arg(long, required_if_eq("from", "api"))]
    directory: Option<PathBuf>,
    /// Services, of ten pods each.
    #[arg(long)]
    services: usize,
    /// Numbers of agents, one after the other.
    #[arg(long, value_delimiter = ',')]
    agents: Vec<usize>,
    /// How many single changes.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// For how long a hundred changes a second are made.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Seconds after which the measurements that are left are given up.
    #[arg(long, default_value_t = 600.0)]
    within: f64,
}

impl Options {
    fn bound(&self) -> Duration {
        Duration::from_secs_f64(self.within.max(1.0))
    }
}

/// A row of the report.
fn say(what: &str, agents: usize, values: Value) {
    println!("{}", json!({"what": what, "agents": agents, "values": values}));
}

fn main() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match Arguments::parse().command {
            Command::Measure(options) => match options.from {
                Origin::Api => api::run(&options).await,
                Origin::Index => plane::run(&options).await,
            },
            Command::Agents(options) => agents::run(options).await,
            Command::Agent(options) => agent::run(options).await,
        }
    })
}
