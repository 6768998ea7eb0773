//! The measurements, each on one contender: load from the client's pod, and what the proxies spent on it.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::contender::{Contender, Sides};
use super::lab::Lab;
use super::process::{cpu_seconds, machine_cpu_seconds, memory_mib};

/// Something to do to every contender, in turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Bytes on so many streams.
    Bulk(u32),
    /// Requests on so many kept-alive connections.
    Requests(u32),
    /// New connections.
    Connections,
    /// Requests with pauses by a pod whose neighbour on both nodes makes this noise. A pod that asks as fast as it can takes
    /// a processor for itself, and is not quiet.
    Beside(Option<Noise>),
    /// One more proxy's start.
    Start,
}

/// What a pod's neighbour does meanwhile, the same way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Noise {
    /// Bytes on eight streams.
    Bulk,
    /// New connections, 64 at a time.
    Storm,
    /// Requests on 256 connections.
    Crowd,
    /// Much to read on 64 connections, and little of it read.
    SlowReaders,
}

/// All of them, in the order of the report.
pub const MEASURES: [Measure; 12] = [
    Measure::Bulk(1),
    Measure::Bulk(8),
    Measure::Requests(1),
    Measure::Requests(16),
    Measure::Requests(64),
    Measure::Connections,
    Measure::Beside(None),
    Measure::Beside(Some(Noise::Bulk)),
    Measure::Beside(Some(Noise::Storm)),
    Measure::Beside(Some(Noise::Crowd)),
    Measure::Beside(Some(Noise::SlowReaders)),
    Measure::Start,
];

/// How many idle connections memory is looked at with.
pub const IDLE: [u32; 3] = [0, 1000, 4000];

/// Which of two values is the better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    /// As in speed.
    Higher,
    /// As in cost.
    Lower,
}

/// One value of one contender.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The row it belongs to.
    pub row: String,
    /// Of the value.
    pub unit: &'static str,
    /// How to compare it.
    pub better: Better,
    /// The value.
    pub value: f64,
}

fn sample(row: impl Into<String>, unit: &'static str, better: Better, value: f64) -> Sample {
    Sample {
        row: row.into(),
        unit,
        better,
        value,
    }
}

#[derive(Deserialize)]
struct Bulk {
    bytes: u64,
    seconds: f64,
}

#[derive(Deserialize)]
struct Requests {
    count: u64,
    failed: u64,
    seconds: f64,
    p50_us: f64,
    p99_us: f64,
}

/// Of a quiet pod before each request, microseconds.
const PAUSE: &str = "500";

/// Connections at a time while new ones are counted.
const AT_A_TIME: &str = "16";

impl Measure {
    /// Measures one contender, for about so many seconds.
    pub fn run(self, lab: &Lab, contender: &dyn Contender, seconds: f64) -> Result<Vec<Sample>> {
        use Better::{Higher, Lower};
        match self {
            Measure::Bulk(streams) => {
                let words = ["bulk", "--streams", &streams.to_string()];
                let (bulk, cost): (Bulk, Cost) = load(lab, contender, &words, seconds)?;
                let row = format!("bulk, {streams} {}", if streams == 1 { "stream" } else { "streams" });
                let speed = bulk.bytes as f64 * 8.0 / bulk.seconds / 1e9;
                let mut samples = vec![sample(&row, "Gb/s", Higher, speed)];
                samples.extend(cost.samples(&row, "CPU s/GB", bulk.bytes as f64 / 1e9));
                Ok(samples)
            }
            Measure::Requests(connections) => {
                let words = ["requests", "--connections", &connections.to_string()];
                let (got, cost): (Requests, Cost) = load(lab, contender, &words, seconds)?;
                let row = format!("requests, {connections} conn");
                let mut samples = vec![
                    sample(&row, "req/s", Higher, got.rate()?),
                    sample(format!("{row}, p50"), "µs", Lower, got.p50_us),
                    sample(format!("{row}, p99"), "µs", Lower, got.p99_us),
                ];
                samples.extend(cost.samples(&row, "CPU s/100k", got.count as f64 / 1e5));
                Ok(samples)
            }
            Measure::Connections => {
                let words = ["connections", "--concurrency", AT_A_TIME];
                let (got, cost): (Requests, Cost) = load(lab, contender, &words, seconds)?;
                let row = "new connections";
                let mut samples = vec![
                    sample(row, "conn/s", Higher, got.rate()?),
                    sample(format!("{row}, p50"), "µs", Lower, got.p50_us),
                    sample(format!("{row}, p99"), "µs", Lower, got.p99_us),
                ];
                samples.extend(cost.samples(row, "CPU s/100k", got.count as f64 / 1e5));
                Ok(samples)
            }
            Measure::Beside(noise) => quiet(lab, contender, noise, seconds),
            Measure::Start => {
                let took = contender.time_to_ready(lab)?;
                Ok(took
                    .map(|took| sample("start to ready", "ms", Lower, took.as_secs_f64() * 1e3))
                    .into_iter()
                    .collect())
            }
        }
    }

    /// In words, for the progress line.
    pub fn title(self) -> String {
        match self {
            Measure::Bulk(streams) => format!("bulk, streams: {streams}"),
            Measure::Requests(connections) => format!("requests, connections: {connections}"),
            Measure::Connections => "new connections".to_owned(),
            Measure::Beside(None) => "quiet pod alone".to_owned(),
            Measure::Beside(Some(noise)) => format!("quiet pod, {}", noise.title()),
            Measure::Start => "start to ready".to_owned(),
        }
    }
}

impl Requests {
    fn rate(&self) -> Result<f64> {
        if self.failed > self.count / 100 {
            bail!("{} of {} connections failed", self.failed, self.count + self.failed);
        }
        Ok(self.count as f64 / self.seconds)
    }
}

/// CPU seconds spent while something ran.
struct Cost {
    /// By the proxies, where there are any.
    proxies: Option<(f64, f64)>,
    machine: f64,
}

impl Cost {
    fn now(sides: &Sides) -> Result<Self> {
        let sum = |ids: &[u32]| ids.iter().map(|id| cpu_seconds(*id)).sum::<Result<f64>>();
        let there = !sides.client.is_empty();
        let proxies = if there {
            Some((sum(&sides.client)?, sum(&sides.server)?))
        } else {
            None
        };
        Ok(Cost {
            proxies,
            machine: machine_cpu_seconds()?,
        })
    }

    fn since(self, before: &Cost) -> Cost {
        let proxies = self.proxies.zip(before.proxies);
        Cost {
            proxies: proxies.map(|(now, then)| (now.0 - then.0, now.1 - then.1)),
            machine: self.machine - before.machine,
        }
    }

    fn samples(&self, row: &str, unit: &'static str, work: f64) -> Vec<Sample> {
        let mut samples = Vec::new();
        if let Some((client, server)) = self.proxies {
            samples.push(sample(
                format!("{row}, both proxies"),
                unit,
                Better::Lower,
                (client + server) / work,
            ));
            samples.push(sample(
                format!("{row}, client's proxy"),
                unit,
                Better::Lower,
                client / work,
            ));
            samples.push(sample(
                format!("{row}, server's proxy"),
                unit,
                Better::Lower,
                server / work,
            ));
        }
        samples.push(sample(
            format!("{row}, whole machine"),
            unit,
            Better::Lower,
            self.machine / work,
        ));
        samples
    }
}

fn load<T: DeserializeOwned>(lab: &Lab, contender: &dyn Contender, words: &[&str], seconds: f64) -> Result<(T, Cost)> {
    let command = lab.load(&contender.pair().client());
    load_by(command, lab, contender, words, seconds)
}

fn load_by<T: DeserializeOwned>(
    mut command: Command,
    lab: &Lab,
    contender: &dyn Contender,
    words: &[&str],
    seconds: f64,
) -> Result<(T, Cost)> {
    let sides = contender.sides()?;
    command.args(words).args([
        "--target",
        &contender.target(lab, &contender.pair())?.to_string(),
        "--seconds",
        &seconds.to_string(),
    ]);
    let before = Cost::now(&sides)?;
    let output = command
        .stdin(Stdio::null())
        .output()
        .context("start the load generator")?;
    let cost = Cost::now(&sides)?.since(&before);
    if !output.status.success() {
        bail!(
            "{}: {}",
            words.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    let answer = serde_json::from_slice(&output.stdout);
    let answer = answer.with_context(|| format!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stdout)))?;
    Ok((answer, cost))
}

impl Noise {
    fn words(self) -> [&'static str; 3] {
        match self {
            Noise::Bulk => ["bulk", "--streams", "8"],
            Noise::Storm => ["connections", "--concurrency", "64"],
            Noise::Crowd => ["requests", "--connections", "256"],
            Noise::SlowReaders => ["sip", "--connections", "64"],
        }
    }

    fn title(self) -> &'static str {
        match self {
            Noise::Bulk => "bulk on 8 streams",
            Noise::Storm => "a storm of connections",
            Noise::Crowd => "requests on 256 conn",
            Noise::SlowReaders => "slow readers on 64 conn",
        }
    }
}

/// How long a pod's requests take while its neighbour makes noise.
fn quiet(lab: &Lab, contender: &dyn Contender, noise: Option<Noise>, seconds: f64) -> Result<Vec<Sample>> {
    let Some(neighbour) = contender.neighbour() else {
        return Ok(Vec::new());
    };
    let noisy = noise
        .map(|noise| {
            let target = contender.target(lab, &neighbour)?;
            // The load's own share of the processor is not what is asked about.
            let mut command = lab.nice_load(&neighbour.client());
            let longer = (seconds + 1.0).to_string();
            command.args(noise.words());
            command.args(["--target", &target.to_string(), "--seconds", &longer]);
            Noisy::start(&mut command)
        })
        .transpose()?;
    // Nor is how long the quiet pod's own programs wait for a processor.
    let _server = Lab::urgent_server(&contender.pair().server())?;
    let command = lab.urgent_load(&contender.pair().client());
    let (got, _): (Requests, Cost) = load_by(command, lab, contender, &["unhurried", "--pause", PAUSE], seconds)?;
    got.rate()?;
    drop(noisy);
    let beside = noise.map_or_else(|| "alone".to_owned(), |noise| format!("beside {}", noise.title()));
    Ok(vec![
        sample(format!("quiet pod {beside}, p50"), "µs", Better::Lower, got.p50_us),
        sample(format!("quiet pod {beside}, p99"), "µs", Better::Lower, got.p99_us),
    ])
}

/// A neighbour's load; its end is waited for when dropped.
struct Noisy(std::process::Child);

impl Noisy {
    fn start(command: &mut Command) -> Result<Self> {
        let silent = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = silent.spawn().context("start the noise")?;
        // It connects, and the pools are warm.
        std::thread::sleep(Duration::from_millis(500));
        Ok(Self(child))
    }
}

impl Drop for Noisy {
    fn drop(&mut self) {
        // It ends by itself, half a second after the quiet one; ended from outside, its load would go on in the pod.
        let _ = self.0.wait();
    }
}

/// Memory of a contender's fresh proxies without, and with more and more, idle connections through them.
pub fn memory(lab: &Lab, contender: &dyn Contender) -> Result<Vec<Sample>> {
    let sides = contender.sides()?;
    if sides.client.is_empty() {
        return Ok(Vec::new());
    }
    let mut samples = Vec::new();
    let mut first = None;
    for count in IDLE {
        let held = if count == 0 {
            None
        } else {
            Some(hold(lab, contender, count)?)
        };
        let (client, server) = (memory_mib(&sides.client)?, memory_mib(&sides.server)?);
        drop(held);
        for (side, value) in [("client's proxy", client), ("server's proxy", server)] {
            samples.push(sample(
                format!("memory, {count} idle conn, {side}"),
                "MiB",
                Better::Lower,
                value,
            ));
        }
        let (client0, server0) = *first.get_or_insert((client, server));
        if count == IDLE[IDLE.len() - 1] {
            let each = |more: f64| more.max(0.0) * 1024.0 / f64::from(count);
            samples.push(sample(
                "memory per idle conn, client's proxy",
                "KiB",
                Better::Lower,
                each(client - client0),
            ));
            samples.push(sample(
                "memory per idle conn, server's proxy",
                "KiB",
                Better::Lower,
                each(server - server0),
            ));
        }
    }
    Ok(samples)
}

/// Idle connections; closed when dropped.
struct Held(std::process::Child);

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.0.stdin.take()); // the load generator ends with its standard input
        let _ = self.0.wait();
    }
}

fn hold(lab: &Lab, contender: &dyn Contender, count: u32) -> Result<Held> {
    let mut command = lab.load(&contender.pair().client());
    command.args(["idle", "--seconds", "60", "--count", &count.to_string()]);
    command.args(["--target", &contender.target(lab, &contender.pair())?.to_string()]);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the load generator")?;
    let mut line = String::new();
    let output = child.stdout.take().context("its output is a pipe")?;
    BufReader::new(output).read_line(&mut line)?;
    let held = Held(child);
    if !line.contains("held") {
        bail!("{count} idle connections could not be opened");
    }
    Ok(held)
}
