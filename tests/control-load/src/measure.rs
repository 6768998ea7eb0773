//! What a process costs, and quantiles.

use std::time::Duration;

use anyhow::{Context, Result};

/// A process on this machine.
#[derive(Clone, Debug)]
pub struct Process(String);

impl Process {
    /// This one.
    pub fn this() -> Self {
        Self("self".to_owned())
    }

    /// A child.
    pub fn of(child: &tokio::process::Child) -> Result<Self> {
        Ok(Self(child.id().context("it has ended")?.to_string()))
    }

    /// Resident memory now, MiB.
    pub fn memory_mib(&self) -> Result<f64> {
        self.status("VmRSS:")
    }

    /// The most that it ever was.
    pub fn peak_mib(&self) -> Result<f64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0))?;
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line
            .and_then(|line| line.split_whitespace().next())
            .context("/proc/PID/status")?;
        Ok(kib.parse::<f64>()? / 1024.0)
    }

    /// CPU seconds so far.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0))?;
        let fields: Vec<&str> = stat
            .rsplit_once(')')
            .context("/proc/PID/stat")?
            .1
            .split_whitespace()
            .collect();
        let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
        Ok(ticks / 100.0)
    }
}

/// The value below which this part of the samples is, in milliseconds.
pub fn quantile(samples: &mut [Duration], part: f64) -> f64 {
    samples.sort_unstable();
    let at = ((samples.len() as f64 * part).ceil() as usize).clamp(1, samples.len().max(1)) - 1;
    samples.get(at).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1000.0)
}
