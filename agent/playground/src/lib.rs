//! A whole mesh on one machine: nodes and pods as network namespaces, from Kubernetes YAML.
//!
//! ```text
//! up ── starts ──> cluster (API, scheduler, controllers), control plane, agents and kubelets, one of each per node
//!    ── applies ─> manifests, by the API, as kubectl would; and waits until they are in force
//! cluster ── desired/*.json ──> kubelets (hidden subcommand) ── undercurrent cni ──> agents;  status.json ──> the API
//! status, exec, logs, capture-packets: read what these wrote, enter where they are
//! down: removes all of it, from any state
//! ```
//! For developers and tests: it calls `ip`, `nft` and `tcpdump` and says so where they are missing. A pod is a network,
//! process, mount, host-name and IPC namespace, with the capabilities that a mesh must expect of a hostile one. It has
//! addresses of both families, or of the one that its annotation `playground.undercurrent.io/ip-family` names. What it
//! does not do: images, volumes, resource limits, and controllers for other kinds than Deployment and ReplicaSet. It knows
//! the agents and the control plane only through their command lines, their sockets and their logs.
//!
//! Invariants: nothing runs, is mounted or is pinned after `down`; no process is ended that is not ours (by id and start
//! time, or by its cgroup); a pod's containers do not start before its node's agent agreed.

mod agent;
mod apply;
mod capabilities;
mod cgroup;
mod cluster;
mod control;
mod demo;
mod desired;
mod down;
mod exec;
mod files;
mod hosts;
mod in_force;
mod kubelet;
mod launch;
mod layout;
mod manifests;
mod netns;
mod network;
mod owner;
mod pause;
mod preflight;
mod process;
mod progress;
mod proxy;
mod ready;
mod state;
mod status;
mod up;

use std::{path::PathBuf, time::Duration};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use nix::sys::signal::Signal;

pub use demo::DemoArgs;
pub use exec::{ExecArgs, LogsArgs, PacketsArgs};
pub use status::StatusArgs;
pub use up::UpArgs;

use crate::{layout::Layout, state::State};

/// A whole mesh on this machine.
#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Where the playground keeps its state.
    #[arg(
        long,
        global = true,
        env = "UNDERCURRENT_PLAYGROUND",
        value_name = "DIR",
        default_value = "/var/lib/undercurrent/playground"
    )]
    state: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Make what the manifests say, and return when it is ready. Again after a change: only what changed is touched.
    #[command(alias = "apply")]
    Up(UpArgs),
    /// End and remove everything.
    Down,
    /// The samples on two nodes, and what to see of them: every claim is checked.
    Demo(DemoArgs),
    /// What runs: nodes, agents, pods, who is in the mesh with which identity, and what the guard dropped.
    Status(StatusArgs),
    /// Print a kubeconfig for the playground's API, for kubectl and other clients.
    Kubeconfig,
    /// Run a program in a pod; the exit code is the program's.
    Exec(ExecArgs),
    /// What a pod's containers wrote; or, for a node, its agent.
    Logs(LogsArgs),
    /// Every packet between the nodes, by tcpdump.
    CapturePackets(PacketsArgs),
    /// End a node's agent with all that could start it again (SIGKILL).
    KillAgent {
        /// The node.
        node: String,
    },
    /// Start a node's agent that was ended, and wait until it is ready.
    StartAgent {
        /// The node.
        node: String,
    },
    /// End a node's agent (SIGTERM), start it again, and wait until it is ready.
    RestartAgent {
        /// The node.
        node: String,
    },
    /// End a node's agent as a crash would: its holder starts it again, and connections wait for it.
    CrashAgent {
        /// The node.
        node: String,
    },
    /// Start another agent on a node, which takes over from the one that runs: no connection fails.
    Upgrade {
        /// The node.
        node: String,
    },
    /// End the control plane as a crash would (SIGKILL): the mesh goes on with what it knows.
    KillControl,
    /// Start the control plane that was ended, and wait until it is ready.
    StartControl,
    #[command(hide = true)]
    Cluster(cluster::ClusterArgs),
    #[command(hide = true)]
    Launch(launch::LaunchArgs),
    #[command(hide = true)]
    Pause(pause::PauseArgs),
    #[command(hide = true)]
    Kubelet(desired::KubeletArgs),
}

/// Runs a command of the playground. `exec` ends the process with the program's exit code.
pub fn run(args: Args) -> Result<()> {
    let layout = Layout::new(std::path::absolute(&args.state)?);
    match args.command {
        Command::Up(up) => up::run(&layout, &up),
        Command::Down => down::run(&layout),
        Command::Demo(demo) => demo::run(&layout, &demo),
        Command::Status(status) => status::run(&layout, &status),
        Command::Kubeconfig => kubeconfig(&layout),
        Command::Exec(exec) => std::process::exit(exec::run(&layout, &exec)?),
        Command::Logs(logs) => exec::logs(&layout, &logs),
        Command::CapturePackets(packets) => exec::capture_packets(&layout, &packets),
        Command::KillAgent { node } => {
            known_node(&layout, &node)?;
            if !agent::stop(&layout, &node, Signal::SIGKILL, AGENT_TIME)? {
                bail!("the agent of {node} does not run");
            }
            Ok(())
        }
        Command::StartAgent { node } => start_agent(&layout, &node),
        Command::RestartAgent { node } => {
            known_node(&layout, &node)?;
            agent::stop(&layout, &node, Signal::SIGTERM, AGENT_TIME)?;
            start_agent(&layout, &node)
        }
        Command::CrashAgent { node } => {
            known_node(&layout, &node)?;
            agent::crash(&layout, &node).map(drop)
        }
        Command::Upgrade { node } => {
            let state = known_node(&layout, &node)?;
            let (former, new) = agent::upgrade(&layout, &state, &node, AGENT_TIME)?;
            println!("process {new} took over from {former} on {node}, which ends when its connections have");
            Ok(())
        }
        Command::KillControl => {
            with_control(&layout)?;
            if !control::stop(&layout)? {
                bail!("the control plane does not run");
            }
            Ok(())
        }
        Command::StartControl => {
            with_control(&layout)?;
            control::start(&layout)?;
            control::wait_ready(&layout, AGENT_TIME)
        }
        Command::Cluster(cluster) => cluster::run(&cluster),
        Command::Launch(launch) => launch::run(&launch),
        Command::Pause(pause) => pause::run(&pause),
        Command::Kubelet(kubelet) => kubelet::run(&kubelet),
    }
}

/// The local socket of each node's agent, by the node's name, of the playground in this directory.
///
/// # Errors
/// There is none, or it has no agents.
pub fn agent_sockets(directory: &std::path::Path) -> Result<Vec<(String, PathBuf)>> {
    let layout = Layout::new(std::path::absolute(directory)?);
    let state = State::expect(&layout)?;
    if state.capture == "none" {
        bail!("there are no agents: the playground is up without capture");
    }
    let socket = |node: String| (node.clone(), layout.node(&node).agent_socket());
    Ok(state.node_names().map(|node| socket(node.to_string())).collect())
}

/// Where a playground keeps its state where nothing is said.
pub const STATE: &str = "/var/lib/undercurrent/playground";

fn kubeconfig(layout: &Layout) -> Result<()> {
    use std::io::Write;
    State::expect(layout)?;
    let path = layout.kubeconfig();
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    std::io::stdout().write_all(&text).context("cannot write it")
}

const AGENT_TIME: Duration = Duration::from_secs(30);

fn with_control(layout: &Layout) -> Result<()> {
    preflight::root()?;
    if State::expect(layout)?.capture == "none" {
        bail!("there is no control plane: the playground is up without capture");
    }
    Ok(())
}

fn known_node(layout: &Layout, node: &str) -> Result<State> {
    preflight::root()?;
    let state = State::expect(layout)?;
    if !state.node_names().any(|known| known == node) {
        bail!(
            "there is no node {node}; there are {}",
            state.node_names().collect::<Vec<_>>().join(", ")
        );
    }
    if state.capture == "none" {
        bail!("there are no agents: the playground is up without capture");
    }
    Ok(state)
}

fn start_agent(layout: &Layout, node: &str) -> Result<()> {
    let state = known_node(layout, node)?;
    agent::start(layout, &state, node)?;
    agent::wait_ready(layout, node, AGENT_TIME)
}
