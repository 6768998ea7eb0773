//! `undercurrent cni`: the plugin that a container runtime calls for each pod, last in a chain.
//!
//! ```text
//! runtime ─ CNI_COMMAND, configuration on stdin ─► plugin ─ agent.sock ─► node agent
//!    ADD     cmdadd; answers once the pod is captured, or known not to be: before that no container starts
//!    CHECK   cmdcheck      DEL  cmddel, never fails        GC  gc        STATUS  /healthz/ready        VERSION
//! ◄─ the previous plugin's result, as it came ── or an error ──┘
//! ```
//! One process for each call: nothing is kept here. It knows nothing of capture; it decides only whether a pod is the
//! agent's business at all (in Kubernetes), and whether its start waits for the agent: that of a pod in an excluded namespace
//! does not. The agent is told of it in passing, for a second at most, and finds it by itself where it does not hear it
//! (`node::pods::untold`); until it knows the pod, eBPF capture lets it connect nowhere.
//!
//! Fails closed: without an agent ADD fails, the runtime tries again, and no pod starts uncaptured. DEL succeeds whatever
//! happens (`a_pod_is_let_go_without_an_agent`): a dead pod's namespace vanishes, which the agent sees for itself.
//!
//! <https://github.com/containernetworking/cni/blob/main/SPEC.md>; versions 0.3.1 to 1.1.0.

mod answer;
mod conflist;
mod install;
mod plugin;
mod request;

use std::{io, path::Path, process::ExitCode};

use clap::{Args, Subcommand};

/// What the plugin is called in a directory of plugins, and so in a configuration's `type`.
pub const PLUGIN: &str = "undercurrent-cni";

/// Options of `undercurrent cni`.
#[derive(Args, Clone, Debug)]
pub struct CniArgs {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Put the plugin into this node's chain of plugins, and keep it there until told to end.
    Install(install::InstallArgs),
    /// Take the plugin out of the chain again.
    Uninstall(install::InstallArgs),
}

/// Whether this process was started by the plugin's name, as runtimes do.
pub fn is_plugin() -> bool {
    let name = std::env::args_os().next();
    name.is_some_and(|name| Path::new(&name).file_name().is_some_and(|name| name == PLUGIN))
}

/// Runs the plugin, with the environment that a runtime sets, or one of the subcommands.
pub fn run(args: CniArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        None => Ok(run_plugin()),
        Some(Command::Install(args)) => install::install(&args).map(|()| ExitCode::SUCCESS),
        Some(Command::Uninstall(args)) => install::uninstall(&args).map(|()| ExitCode::SUCCESS),
    }
}

/// Answers one call of a runtime on standard output.
pub fn run_plugin() -> ExitCode {
    let environment = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let outcome = plugin::run(&environment, &mut io::stdin().lock());
    answer::print(&mut io::stdout().lock(), outcome)
}
