//! What a process costs, and quantiles.

use std::time::Duration;

use anyhow::{Context, Result};

/// Resident memory of this process now, MiB.
pub fn memory_mib() -> Result<f64> {
    status("VmRSS:")
}

/// The most that it ever was.
pub fn peak_mib() -> Result<f64> {
    status("VmHWM:")
}

fn status(field: &str) -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    let kib = line
        .and_then(|line| line.split_whitespace().next())
        .context("/proc/self/status")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}

/// CPU seconds of this process.
pub fn cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .context("/proc/self/stat")?
        .1
        .split_whitespace()
        .collect();
    let ticks = fields[11].parse::<f64>()? + fields[12].parse::<f64>()?;
    Ok(ticks / 100.0)
}

/// The value below which this part of the samples is, in milliseconds.
pub fn quantile(samples: &mut [Duration], part: f64) -> f64 {
    samples.sort_unstable();
    let at = ((samples.len() as f64 * part).ceil() as usize).clamp(1, samples.len().max(1)) - 1;
    samples.get(at).map_or(f64::NAN, |sample| sample.as_secs_f64() * 1000.0)
}
