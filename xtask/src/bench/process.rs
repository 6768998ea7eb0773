//! What a process costs, as the kernel counts it, and processes that end with their owner.
//!
//! CPU is user + system time of all threads. Work that the kernel does in softirq for a socket counts for whoever was
//! running then, usually the sender: so the whole machine's time is reported beside it, which misses nothing.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The kernel's clock tick for /proc, on every Linux there is.
const TICKS_PER_SECOND: f64 = 100.0;

/// A child that is killed when its owner lets go.
pub struct Running(Child);

impl Running {
    /// Starts a program, its output into a file.
    pub fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let file = std::fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn();
        Ok(Running(child.with_context(|| {
            format!("start {}", command.get_program().display())
        })?))
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// An error if it has ended by itself.
    pub fn alive(&mut self) -> Result<()> {
        match self.0.try_wait()? {
            Some(status) => bail!("it ended by itself ({status})"),
            None => Ok(()),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// CPU seconds that a process has used.
pub fn cpu_seconds(id: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).with_context(|| format!("process {id} is gone"))?;
    cpu_seconds_in(&stat).with_context(|| format!("/proc/{id}/stat"))
}

fn cpu_seconds_in(stat: &str) -> Option<f64> {
    // The name may hold spaces and parentheses: count from the last one. utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    Some(ticks as f64 / TICKS_PER_SECOND)
}

/// CPU seconds of the whole machine that were not idle.
pub fn machine_cpu_seconds() -> Result<f64> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    busy_seconds_in(&stat).context("/proc/stat")
}

fn busy_seconds_in(stat: &str) -> Option<f64> {
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq
    let busy = fields.get(..3)?.iter().sum::<u64>() + fields.get(5..7)?.iter().sum::<u64>();
    Some(busy as f64 / TICKS_PER_SECOND)
}

/// The resident memory of the processes of one proxy, MiB: what it takes that is alone on its node. What its processes
/// share (their program) is counted with the largest.
pub fn memory_mib(ids: &[u32]) -> Result<f64> {
    let mut processes = Vec::new();
    for id in ids {
        let path = format!("/proc/{id}/smaps_rollup");
        let rollup = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let kib = |name: &str| {
            let line = rollup
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
            kib.with_context(|| format!("{path} has no {name}"))
        };
        processes.push((kib("Rss")?, kib("Private_Clean")? + kib("Private_Dirty")?));
    }
    processes.sort_by(|one, other| other.0.total_cmp(&one.0));
    let largest = processes.first().map_or(0.0, |(rss, _)| *rss);
    let others: f64 = processes.iter().skip(1).map(|(_, own)| *own).sum();
    Ok((largest + others) / 1024.0)
}

/// Processes in a named network namespace whose command line passes a test.
pub fn in_namespace(namespace: &str, test: impl Fn(&[String]) -> bool) -> Result<Vec<u32>> {
    use std::os::unix::fs::MetadataExt;
    let wanted = std::fs::metadata(format!("/run/netns/{namespace}"))
        .with_context(|| format!("network namespace {namespace}"))?
        .ino();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Ok(id) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let here = std::fs::metadata(entry.path().join("ns/net")).is_ok_and(|link| link.ino() == wanted);
        let words: Vec<String> = std::fs::read(entry.path().join("cmdline"))
            .unwrap_or_default()
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect();
        if here && test(&words) {
            found.push(id);
        }
    }
    Ok(found)
}

/// Asks until `ready` says so; how long it took since `start`.
pub fn wait_ready(start: Instant, limit: Duration, mut ready: impl FnMut() -> Result<bool>) -> Result<Duration> {
    loop {
        if ready()? {
            return Ok(start.elapsed());
        }
        if start.elapsed() > limit {
            bail!("not ready after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether an HTTP server on a unix socket answers 200.
pub fn answers_ok(socket: &Path, path: &str) -> bool {
    let ask = || -> std::io::Result<bool> {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").as_bytes())?;
        let mut status = [0; 12];
        stream.read_exact(&mut status)?;
        Ok(status.ends_with(b" 200"))
    };
    ask().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) b (c)) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 100 1 1";
        assert_eq!(cpu_seconds_in(stat), Some(3.0));
        assert_eq!(cpu_seconds_in("nonsense"), None);
    }

    #[test]
    fn idle_and_waiting_are_not_busy() {
        assert_eq!(busy_seconds_in("cpu  100 0 200 5000 900 10 90 0 0 0\n"), Some(4.0));
    }

    #[test]
    fn a_live_process_has_a_cost() {
        let id = std::process::id();
        assert!(cpu_seconds(id).unwrap() >= 0.0);
        assert!(memory_mib(&[id]).unwrap() > 0.1);
        assert!(machine_cpu_seconds().unwrap() > 0.0);
    }
}
