//! What the playground needs of the machine: said in full, before anything is changed.

use std::{env, path::Path};

use anyhow::{Result, bail};
use nix::unistd::geteuid;

use crate::cgroup;

/// Whether a program is on the search path.
pub(crate) fn has_program(name: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|directory| directory.join(name).is_file())
}

/// What is missing for `up`.
fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    if !geteuid().is_root() {
        missing.push("root: namespaces, cgroups and eBPF need it (run it with sudo)".to_owned());
    }
    if !has_program("ip") {
        missing.push("the program `ip`, which sets up the network (Debian: apt install iproute2)".to_owned());
    }
    if cgroup::mount().is_none() {
        missing.push("a mounted cgroup2 file system (mount -t cgroup2 none /sys/fs/cgroup/unified)".to_owned());
    }
    for (kind, name) in [
        ("net", "network"),
        ("pid", "process"),
        ("mnt", "mount"),
        ("uts", "host name"),
        ("ipc", "IPC"),
    ] {
        if !Path::new("/proc/self/ns").join(kind).exists() {
            missing.push(format!("{name} namespaces in the kernel"));
        }
    }
    missing
}

/// Fails with everything that is missing.
pub(crate) fn check() -> Result<()> {
    let missing = missing();
    if missing.is_empty() {
        return Ok(());
    }
    bail!(
        "the playground can't run here; missing:\n  - {}",
        missing.join("\n  - ")
    )
}

/// For commands that only need to look into namespaces.
pub(crate) fn root() -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    bail!("this needs root: the playground's namespaces and files belong to it (run it with sudo)")
}
