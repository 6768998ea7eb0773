//! Processes of ours: told apart from others that merely got the same number, and ended only when they are the same.

use std::{
    fs::{self, File, OpenOptions},
    io,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use nix::{sys::signal::Signal, unistd::Pid};
use serde::{Deserialize, Serialize};

use crate::files::write_atomically;

/// A process: its id, and when it started, since ids are used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub pid: i32,
    /// Clock ticks since the machine started (`/proc/PID/stat`, field 22).
    pub start: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn of(pid: i32) -> Option<Self> {
        let (state, start) = stat(pid)?;
        (state != 'Z').then_some(Self { pid, start })
    }

    /// Reads a process id that was recorded, if it was.
    pub fn read(path: &Path) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        write_atomically(path, &serde_json::to_string(self)?)
    }

    /// Whether this very process still runs.
    pub fn is_alive(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&self, signal: Signal) -> bool {
        self.is_alive() && nix::sys::signal::kill(Pid::from_raw(self.pid), signal).is_ok()
    }
}

fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything, parentheses too.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

/// Opens a log to append to.
pub(crate) fn open_log(path: &Path) -> io::Result<File> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    OpenOptions::new().create(true).append(true).open(path)
}

/// Starts a process that outlives us, with its output in these files.
pub(crate) fn spawn_detached(mut command: Command, stdout: &Path, stderr: &Path) -> Result<Process> {
    let out = open_log(stdout).with_context(|| format!("cannot open {}", stdout.display()))?;
    let err = open_log(stderr).with_context(|| format!("cannot open {}", stderr.display()))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let child = command
        .stdin(Stdio::null())
        .stdout(out)
        .stderr(err)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let pid = i32::try_from(child.id()).context("process ids fit an i32")?;
    Process::of(pid).with_context(|| format!("{program} ended at once"))
}

/// The last lines of a log, indented.
pub(crate) fn last_lines(path: &Path, count: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<_> = text.lines().collect();
    let from = lines.len().saturating_sub(count);
    lines[from..].iter().map(|line| format!("    {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_no_other() {
        let me = Process::of(std::process::id().try_into().unwrap()).unwrap();
        assert!(me.is_alive());
        let other = Process {
            start: me.start + 1,
            ..me
        };
        assert!(!other.is_alive(), "the same number at another time is another process");
    }
}
