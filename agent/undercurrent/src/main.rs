//! Undercurrent: a service mesh without sidecars, in one binary. This is where the roles are chosen and wired.

mod app;
mod cli;
mod cni;
mod control;
mod node;
mod store;
mod uninstall;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// The system's, with samples for `/debug/pprof/heap`.
#[global_allocator]
static ALLOCATOR: heap::Sampled = heap::Sampled;

/// A service mesh without sidecars.
#[derive(Parser)]
#[command(name = "undercurrent", version, max_term_width = 110, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    role: Role,
}

#[derive(Subcommand)]
enum Role {
    /// The node agent: captures the traffic of this node's opted-in pods and carries it through the mesh.
    Node(Box<node::NodeArgs>),
    /// The control plane: what agents know, and who they are, from the objects of a Kubernetes API.
    Control(Box<control::ControlArgs>),
    /// What a node's agent is at, on one page.
    Status(cli::StatusArgs),
    /// What a node's agent knows: workloads, services, policies, certificates, connections.
    Get(cli::GetArgs),
    /// Whether a connection may be, and what decides it, step by step.
    Why(cli::WhyArgs),
    /// What a container runtime calls for each pod (a chained CNI plugin); also installs itself.
    Cni(cni::CniArgs),
    /// Take a node's capture down for good, once its agent has ended.
    Uninstall(uninstall::UninstallArgs),
    /// A whole mesh on this machine: nodes and pods as network namespaces.
    Playground(playground::Args),
    /// A small, Kubernetes-shaped API for a machine without Kubernetes.
    Store(store::StoreArgs),
    /// Programs to put into pods: an echo server and client that report what they saw.
    App(app::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    if cni::is_plugin() {
        return Ok(cni::run_plugin());
    }
    match Cli::parse().role {
        Role::Node(args) => node::run(*args),
        Role::Control(args) => control::run(*args),
        Role::Status(args) => cli::status(&args),
        Role::Get(args) => cli::get(&args),
        Role::Why(args) => return Ok(cli::why(&args)),
        Role::Cni(args) => return cni::run(args),
        Role::Uninstall(args) => uninstall::run(&args),
        Role::Playground(args) => playground::run(args),
        Role::Store(args) => store::run(args),
        Role::App(args) => app::run(args),
    }?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
