//! Takes a node's capture down: afterwards nothing of it is left in the kernel or on disk, and pods are as they were.
//!
//! A stopped agent leaves capture in place on purpose, so that pods wait for the next one; this is for leaving for good.
//! An agent that still runs would put everything back: it is asked for first, and then nothing is touched.

use std::{fs, io, path::PathBuf};

use anyhow::{Context, bail};
use clap::Args;

use crate::node::{CERTIFICATES, KNOWLEDGE, OUTBOUND, Records};

/// Options of `undercurrent uninstall`.
#[derive(Args, Clone, Debug)]
pub struct UninstallArgs {
    /// Where the agent pinned its eBPF links and maps.
    #[arg(
        long,
        env = "UNDERCURRENT_PIN_DIR",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/undercurrent"
    )]
    pin_dir: PathBuf,
    /// Where the agent kept its state.
    #[arg(
        long,
        env = "UNDERCURRENT_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/run/undercurrent"
    )]
    state_dir: PathBuf,
}

/// Takes capture down. To be run in the node's network namespace. Done again it finds nothing to do.
pub fn run(args: &UninstallArgs) -> anyhow::Result<()> {
    let socket = args.state_dir.join("agent.sock");
    if std::os::unix::net::UnixStream::connect(&socket).is_ok() {
        bail!(
            "an agent answers at {}: end it first, or it would put everything back",
            socket.display()
        );
    }
    capture::uninstall(&args.pin_dir).with_context(|| format!("cannot take down {}", args.pin_dir.display()))?;
    let pods = args.state_dir.join("pods");
    // The rules of a capture by iptables are in the pods themselves.
    let records = if pods.is_dir() {
        Records::open(&pods)?.1
    } else {
        Default::default()
    };
    let namespaces = records.into_values().map(|record| record.netns);
    capture::uninstall_iptables(namespaces).context("cannot take down the capture by iptables")?;
    let certificates = args.state_dir.join(CERTIFICATES);
    for removed in [
        fs::remove_file(&socket),
        fs::remove_dir_all(&pods),
        fs::remove_dir_all(&certificates),
        fs::remove_dir_all(args.state_dir.join(KNOWLEDGE)),
        fs::remove_file(args.state_dir.join(OUTBOUND)),
    ] {
        match removed {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove the state in {}", args.state_dir.display()));
            }
            _ => {}
        }
    }
    println!("Nothing is captured on this node any more.");
    Ok(())
}
