//! Doing things from inside a network namespace, as a process of the host.

use std::{fs::File, path::PathBuf, process::Command};

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};

/// Where a namespace of this name is mounted.
pub fn path(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Does something in a namespace, on a thread of its own: sockets that it makes belong there, in the cgroup of this
/// process, which is no pod's.
pub fn inside<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = path(name);
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace (setns)")?;
            work()
        });
        there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A program to be run in a namespace.
pub fn command(name: &str, program: &str) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", path(name).display()))
        .arg("--")
        .arg(program);
    command
}

/// What a program says that is run in a namespace, whether it succeeds or not.
pub fn says(name: &str, program: &str, arguments: &[&str]) -> Result<String> {
    let output = command(name, program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}
