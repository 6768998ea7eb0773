//! What a playground leaves on a machine: nothing, after `down`. Counted, not believed.

use std::{
    collections::BTreeSet,
    fmt, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::machine;

/// Namespaces, interfaces, cgroups, pins, processes, mounts and files, each with its kind before it.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Leftovers(BTreeSet<String>);

impl Leftovers {
    /// What there is.
    pub fn now() -> Result<Self> {
        let mut found = BTreeSet::new();
        let mut add = |kind: &str, names: Vec<String>| {
            found.extend(names.into_iter().map(|name| format!("{kind} {name}")));
        };
        add("network namespace", children(Path::new("/run/netns")));
        add("interface", interfaces()?);
        if let Some(root) = machine::cgroup_root() {
            add("cgroup", tree(&root.join("undercurrent"), true));
        }
        add("pin", tree(Path::new("/sys/fs/bpf"), false));
        add("mount", mounts()?);
        add("process", processes()?);
        add("file", tree(Path::new("/var/lib/undercurrent/system-tests"), false));
        Ok(Self(found))
    }

    /// What is here and not there.
    pub fn without(self, other: &Self) -> Self {
        Self(self.0.difference(&other.0).cloned().collect())
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Leftovers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|line| writeln!(f, "{line}"))
    }
}

fn children(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

fn tree(directory: &Path, only_directories: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut waiting: Vec<PathBuf> = vec![directory.to_owned()];
    while let Some(next) = waiting.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if is_directory {
                waiting.push(entry.path());
            }
            if is_directory || !only_directories {
                found.push(entry.path().display().to_string());
            }
        }
    }
    found
}

fn interfaces() -> Result<Vec<String>> {
    let output = Command::new("ip")
        .args(["-o", "link"])
        .output()
        .context("cannot run ip")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let names = text.lines().filter_map(|line| line.split(": ").nth(1));
    Ok(names
        .map(|name| name.split('@').next().unwrap_or(name).to_owned())
        .collect())
}

fn mounts() -> Result<Vec<String>> {
    let table = fs::read_to_string("/proc/self/mounts")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(1));
    Ok(points.map(str::to_owned).collect())
}

/// Processes that run the binary, and those in our cgroups whatever they run.
fn processes() -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
        let ours = cgroup.lines().any(|line| line.starts_with("0::/undercurrent/"));
        let state = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let zombie = state
            .rsplit_once(')')
            .is_some_and(|(_, rest)| rest.trim_start().starts_with('Z'));
        if ours && !zombie {
            found.push(format!("{name} {command}"));
        }
    }
    Ok(found)
}
