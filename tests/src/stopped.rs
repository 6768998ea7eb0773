//! A process that stands still for as long as a scenario needs it to: what would be a race with it is an order.

use std::fs;

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::wait;

/// While this lives, the process does nothing; then it goes on, however the scenario ended.
#[must_use = "the process goes on at once"]
pub struct Stopped(Pid);

impl Stopped {
    /// Returns when all of its threads stand still.
    pub fn at(pid: i32) -> Result<Self> {
        kill(Pid::from_raw(pid), Signal::SIGSTOP).with_context(|| format!("cannot stop process {pid}"))?;
        let stopped = Self(Pid::from_raw(pid));
        wait::until_true(&format!("process {pid} stands still"), || stands_still(pid))?;
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Who has ended needs no telling.
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

fn stands_still(pid: i32) -> Result<bool> {
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread that ended since stands still, too.
        let stat = fs::read_to_string(task?.path().join("stat")).unwrap_or_default();
        if stat.rsplit_once(") ").is_some_and(|(_, after)| !after.starts_with('T')) {
            return Ok(false);
        }
    }
    Ok(true)
}
