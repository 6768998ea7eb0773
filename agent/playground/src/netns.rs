//! Network namespaces, through the `ip` program: the playground is a tool for a developer's machine, which has it.

use std::{
    fs::{self, File},
    io::Write,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};

use crate::layout::netns_path;

/// `NSFS_MAGIC` of linux/magic.h: what a mounted namespace's file is on.
const NSFS: i64 = 0x6e73_6673;

/// Whether a namespace of this name is there, as opposed to a file that one was once mounted on.
pub(crate) fn exists(name: &str) -> bool {
    nix::sys::statfs::statfs(&netns_path(name)).is_ok_and(|found| found.filesystem_type().0 == NSFS)
}

/// The names of all there are.
pub(crate) fn list() -> Vec<String> {
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Creates a namespace; tells whether it was not there.
pub(crate) fn create(name: &str) -> Result<bool> {
    if exists(name) {
        return Ok(false);
    }
    delete(name)?;
    ip(&["netns", "add", name])?;
    batch(Some(name), "link set lo up\n")?;
    Ok(true)
}

/// Deletes a namespace and what is in it, if it is there.
pub(crate) fn delete(name: &str) -> Result<()> {
    if netns_path(name).exists() {
        ip(&["netns", "del", name])?;
    }
    Ok(())
}

/// Deletes a link of the namespace that we are in, with its other end, if it is there.
pub(crate) fn delete_link(name: &str) {
    // If it is there and stays, whoever makes it anew says so.
    let _ = ip(&["link", "del", name]);
}

/// Runs `ip`.
fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("cannot run ip")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {}", arguments.join(" "), said.trim());
    }
    Ok(())
}

/// Runs lines of `ip` in a namespace (or where we are); at the first that fails, says which and why.
pub(crate) fn batch(netns: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = netns {
        command.args(["-n", name]);
    }
    let piped = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut child = piped.spawn().context("cannot run ip (Debian: apt install iproute2)")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it ended early its standard error says why.
        let _ = stdin.write_all(lines.as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for ip")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let number = said
        .rsplit_once("-:")
        .and_then(|(_, number)| number.trim().parse::<usize>().ok());
    let line = number
        .and_then(|number| lines.lines().nth(number.saturating_sub(1)))
        .unwrap_or(lines);
    bail!(
        "ip {}{line}: {}",
        netns.map_or(String::new(), |name| format!("-n {name} ")),
        said.trim()
    )
}

/// Does something in a namespace, on a thread of its own, so that nobody else is moved.
pub(crate) fn inside<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let path = netns_path(name);
    let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    std::thread::scope(|scope| {
        let there = scope.spawn(move || {
            setns(&file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace (setns)")?;
            work()
        });
        there.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Sets kernel parameters of a namespace: pairs of path below /proc/sys and value.
pub(crate) fn sysctl(name: &str, settings: &[(&str, &str)]) -> Result<()> {
    inside(name, || {
        for (key, value) in settings {
            let path = format!("/proc/sys/{key}");
            fs::write(&path, value).with_context(|| format!("cannot write {value} to {path}"))?;
        }
        Ok(())
    })
}
