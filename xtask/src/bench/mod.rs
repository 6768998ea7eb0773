//! `cargo xtask bench l4`: no mesh, undercurrent, a pair of Envoys and any other node proxy, in one lab and in turn;
//! `cargo xtask bench control` is all in [`mod@control`].
//!
//! [`lab`] is where, [`contender`] (and [`envoy`], [`ztunnel`]) who, [`measure`] what, [`report`] and [`chart`] the
//! outcome. Load goes only from pod to pod inside the lab, each run bounded in time and count.

mod agent;
mod chart;
mod contender;
mod control;
mod envoy;
mod lab;
mod measure;
mod process;
mod report;
mod ztunnel;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use contender::{Contender, NoMesh, Undercurrent};
pub use control::{Control, control};
use envoy::Envoy;
use lab::{Lab, Pair};
use measure::MEASURES;
use report::Report;
use ztunnel::Ztunnel;

use crate::setup::Purpose;
use crate::step::{Steps, done, failed, note};
use crate::workspace::Workspace;
use crate::{build, preflight};

/// What `bench l4` is told.
#[derive(Debug, clap::Args)]
pub struct L4 {
    /// Another node proxy with ztunnel's environment: `ztunnel=/path/to/ztunnel` (built with its feature `testing`).
    #[arg(long = "peer", value_name = "NAME=PATH", value_parser = peer)]
    peers: Vec<(String, String)>,
    /// Only these contenders, by name.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Only measurements whose titles have one of these words in them, as `quiet` or `connections`.
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    measure: Vec<String>,
    /// How often everything is measured.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Seconds of load for each measurement.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// One short run: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
    /// Worker threads of each Envoy.
    #[arg(long, default_value_t = 1)]
    envoy_concurrency: u32,
    /// Measure this binary instead of building one.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
    /// Where the results go.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

impl L4 {
    /// How often everything is measured, and for how many seconds.
    fn extent(&self) -> (usize, f64) {
        match self.quick {
            true => (1, 1.0),
            false => (self.runs.max(1), self.seconds),
        }
    }

    fn wants(&self, title: &str) -> bool {
        self.measure.is_empty() || self.measure.iter().any(|words| title.contains(&**words))
    }
}

fn peer(text: &str) -> Result<(String, String), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=PATH")?;
    let plain =
        !name.is_empty() && name.len() <= 16 && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
    if !plain {
        return Err("the name becomes a namespace: lower-case letters and hyphens, 16 at the most".to_owned());
    }
    let path = std::path::absolute(path).map_err(|error| error.to_string())?;
    if !path.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    Ok((name.to_owned(), path.to_string_lossy().into_owned()))
}

/// Runs it all.
pub fn l4(workspace: &Workspace, options: &L4) -> Result<()> {
    let missing = preflight::missing();
    if !missing.is_empty() {
        bail!("the benchmark can't run here; missing: {}", missing.join("; "));
    }
    let binary = prepare(workspace, options)?;
    let mut contenders = contenders(workspace, options);
    if contenders.is_empty() {
        bail!("--only left nothing to measure");
    }
    let pairs = contenders.iter().map(|contender| contender.pair());
    let neighbours = contenders.iter().filter_map(|contender| contender.neighbour());
    let pairs: Vec<Pair> = pairs.chain(neighbours).collect();
    let lab = Lab::up(workspace, binary, &pairs)?;
    let about = contenders
        .iter()
        .map(|contender| (contender.name().to_owned(), contender.about()))
        .collect();
    let (runs, seconds) = options.extent();
    let mut report = Report::new(machine(runs, seconds), about);
    contenders.retain_mut(|contender| match contender.start(&lab) {
        Ok(()) => true,
        Err(error) => {
            report.fail(contender.name(), "start", &error);
            false
        }
    });
    measure_all(&lab, &contenders, options, &mut report);
    report.add_slowdowns();
    drop(contenders);
    drop(lab);
    // Measured first, while the proxies were fresh; told last.
    report.rows.sort_by_key(|row| row.name.starts_with("memory"));
    write(workspace, options, &report)
}

/// Memory first, while the proxies are fresh; then every measurement on every contender, again and again.
fn measure_all(lab: &Lab, contenders: &[Box<dyn Contender>], options: &L4, report: &mut Report) {
    let (runs, seconds) = options.extent();
    for contender in contenders.iter().filter(|_| options.wants("memory")) {
        match measure::memory(lab, contender.as_ref()) {
            Ok(samples) => report.add(contender.name(), samples),
            Err(error) => report.fail(contender.name(), "memory", &error),
        }
        done(&format!("memory, {}", contender.name()));
    }
    // A first touch of every path, not counted: pools, caches and the CPU's clock.
    for contender in contenders {
        if let Err(error) = MEASURES[2].run(lab, contender.as_ref(), 0.3) {
            report.fail(contender.name(), "warm-up", &error);
        }
    }
    for run in 1..=runs {
        for measure in MEASURES.into_iter().filter(|measure| options.wants(&measure.title())) {
            for contender in contenders {
                match measure.run(lab, contender.as_ref(), seconds) {
                    Ok(samples) => {
                        let first = samples
                            .first()
                            .map(|one| format!("{} {}", report::number(one.value), one.unit));
                        let first = first.unwrap_or_else(|| "–".to_owned());
                        done(&format!(
                            "run {run}/{runs}  {:26} {:14} {first}",
                            measure.title(),
                            contender.name()
                        ));
                        report.add(contender.name(), samples);
                    }
                    Err(error) => report.fail(contender.name(), &measure.title(), &error),
                }
            }
        }
    }
}

impl Report {
    fn fail(&mut self, contender: &str, what: &str, error: &anyhow::Error) {
        let line = format!("{contender}, {what}: {error:#}");
        failed(&line);
        self.failures.push(line);
    }
}

fn prepare(workspace: &Workspace, options: &L4) -> Result<PathBuf> {
    crate::setup::run(workspace, Purpose::BENCH)?;
    let mut load = build::cargo(workspace);
    load.args(["build", "--release", "--locked", "--package", "load"]);
    Steps::new(workspace).run("build-load", "build the load generator", &mut load)?;
    match &options.binary {
        Some(binary) => Ok(std::path::absolute(binary)?),
        None => {
            build::ebpf(workspace)?;
            build::binary(workspace)?;
            Ok(workspace.binary())
        }
    }
}

fn contenders(workspace: &Workspace, options: &L4) -> Vec<Box<dyn Contender>> {
    let envoy = Envoy::new(
        workspace.envoy().to_string_lossy().into_owned(),
        options.envoy_concurrency,
    );
    let mut all: Vec<Box<dyn Contender>> = vec![Box::new(NoMesh), Box::new(Undercurrent), Box::new(envoy)];
    for (name, path) in &options.peers {
        all.push(Box::new(Ztunnel::new(name.clone(), path.clone())));
    }
    all.retain(|contender| options.only.is_empty() || options.only.iter().any(|name| name == contender.name()));
    all
}

fn machine(runs: usize, seconds: f64) -> Vec<(String, String)> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .unwrap_or("unknown");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let date = std::process::Command::new("date")
        .args(["-u", "+%Y-%m-%d %H:%M UTC"])
        .output();
    let load = read("/proc/loadavg");
    let date = date
        .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
        .unwrap_or_default();
    vec![
        ("when".to_owned(), date),
        (
            "machine".to_owned(),
            format!("{cores} cores, {}", model.trim_start_matches([' ', '\t', ':'])),
        ),
        (
            "load before".to_owned(),
            format!("{} (other work on the machine makes the results noisy)", load.trim()),
        ),
        (
            "kernel".to_owned(),
            read("/proc/sys/kernel/osrelease").trim().to_owned(),
        ),
        (
            "runs".to_owned(),
            format!("{runs}, {seconds} s of load for each measurement"),
        ),
    ]
}

fn write(workspace: &Workspace, options: &L4, report: &Report) -> Result<()> {
    let directory = options.out.clone().unwrap_or_else(|| workspace.target("bench"));
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    std::fs::write(directory.join("l4.json"), serde_json::to_string_pretty(report)?)?;
    std::fs::write(directory.join("l4.md"), report.markdown())?;
    std::fs::write(directory.join("l4.svg"), chart::svg(report))?;
    println!("\n{}", report.table());
    note(&format!("l4.json, l4.md and l4.svg are in {}", directory.display()));
    if report.failures.is_empty() {
        return Ok(());
    }
    bail!("{} measurements failed", report.failures.len())
}
