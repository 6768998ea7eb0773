//! The process as its host sees it: `process_*`, as Prometheus' client libraries name them. Read from /proc when scraped;
//! what can't be read is left out.

use std::{fmt, fs, path::Path};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};

/// Clock ticks in a second in /proc, whatever the kernel's own are (`USER_HZ`, on every architecture that is built for).
const TICKS: f64 = 100.0;
/// A page in /proc/self/statm where nothing larger is built for.
const PAGE: u64 = 4096;

/// Collects `process_*`.
#[derive(Debug, Default)]
pub struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let own = Path::new("/proc/self");
        if let Some((cpu, start)) = times(own) {
            let help = "User and system CPU time in seconds";
            let counter = encoder.encode_descriptor("process_cpu_seconds", help, None, MetricType::Counter)?;
            ConstCounter::new(cpu).encode(counter)?;
            let help = "Start of the process, in seconds since 1970";
            let gauge = encoder.encode_descriptor("process_start_time_seconds", help, None, MetricType::Gauge)?;
            ConstGauge::new(start).encode(gauge)?;
        }
        let (virtual_bytes, resident) = memory(own).unzip();
        for (name, help, value) in [
            ("process_virtual_memory_bytes", "Virtual memory", virtual_bytes),
            ("process_resident_memory_bytes", "Resident memory", resident),
            ("process_open_fds", "Open file descriptors", open_files(own)),
            ("process_max_fds", "The limit of open file descriptors", max_files(own)),
            ("process_threads", "Threads", threads(own)),
        ] {
            if let Some(value) = value {
                ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
            }
        }
        Ok(())
    }
}

/// CPU time in seconds, and the start in seconds since 1970.
fn times(own: &Path) -> Option<(f64, f64)> {
    let stat = fs::read_to_string(own.join("stat")).ok()?;
    // The name, in parentheses, may hold anything: the fields are counted after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .parse()
        .ok()?;
    Some(((ticks(11)? + ticks(12)?) / TICKS, boot + ticks(19)? / TICKS))
}

fn memory(own: &Path) -> Option<(u64, u64)> {
    let statm = fs::read_to_string(own.join("statm")).ok()?;
    let mut pages = statm.split(' ').map(|pages| pages.parse::<u64>().ok());
    Some((pages.next()?? * PAGE, pages.next()?? * PAGE))
}

fn open_files(own: &Path) -> Option<u64> {
    Some(fs::read_dir(own.join("fd")).ok()?.count() as u64)
}

fn max_files(own: &Path) -> Option<u64> {
    let limits = fs::read_to_string(own.join("limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn threads(own: &Path) -> Option<u64> {
    Some(fs::read_dir(own.join("task")).ok()?.count() as u64)
}
