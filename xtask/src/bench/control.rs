//! `cargo xtask bench control`: meshes of two sizes, and ten to a thousand agents that learn them.
//!
//! `tests/control-load` does the work: with the store and the control plane as processes of the release binary, agents
//! over TLS with tokens, and changes as writes at the API. Here it is started, its rows are gathered over some runs, and
//! medians are printed and written. Where a figure is asked for (the issue's), it stands beside the row. The whole is
//! bounded in time: what is not measured by then is said to be missing.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build;
use crate::setup::Purpose;
use crate::step::{Steps, done, failed, note};
use crate::workspace::Workspace;

/// What `bench control` is told.
#[derive(Debug, clap::Args)]
pub struct Control {
    /// How often everything is measured.
    #[arg(long, default_value_t = 1)]
    runs: usize,
    /// Where changes are made: at the API, and the whole way is measured, or at the control plane's index, in plaintext.
    #[arg(long, default_value = "api", value_parser = ["api", "index"])]
    from: String,
    /// Services, of ten pods each.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 10_000])]
    services: Vec<usize>,
    /// Numbers of agents.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1000])]
    agents: Vec<usize>,
    /// Seconds of a hundred changes each.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Single changes: each in force everywhere before the next.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Seconds for everything but the build.
    #[arg(long, default_value_t = 600)]
    within: u64,
    /// The small mesh, ten and a hundred agents, one run of at most a hundred seconds: to see that it works.
    #[arg(long)]
    quick: bool,
    /// Measure this binary instead of building one.
    #[arg(long, value_name = "PATH")]
    binary: Option<PathBuf>,
}

/// A line of the load's output.
#[derive(Deserialize)]
struct Measured {
    what: String,
    agents: usize,
    values: BTreeMap<String, f64>,
}

/// What is written of a measurement: its field, with what is asked for.
struct Shown {
    of: &'static str,
    field: &'static str,
    title: &'static str,
    unit: &'static str,
    /// With so many services and agents: a bound.
    asked: Option<(usize, usize, f64)>,
}

const fn shown(of: &'static str, field: &'static str, title: &'static str, unit: &'static str) -> Shown {
    Shown {
        of,
        field,
        title,
        unit,
        asked: None,
    }
}

const fn asked(shown: Shown, services: usize, agents: usize, bound: f64) -> Shown {
    Shown {
        asked: Some((services, agents, bound)),
        ..shown
    }
}

const FIRST: &str = "first synchronisation";
const ONE: &str = "one change";
const STEADY: &str = "100 changes a second";
const AGENT: &str = "one agent";
const AGAIN: &str = "reconnect, nothing changed";
const NOT_MEASURED: &str = "not measured for lack of time";
const TEN: &str = "reconnect, ten changed";

const SHOWN: &[Shown] = &[
    shown("start", "seconds", "control plane: from its start to serving", "s"),
    shown("start", "memory_mib", "control plane: memory with the mesh", "MiB"),
    shown("start", "store_memory_mib", "store: memory with the mesh", "MiB"),
    asked(
        shown(AGENT, "seconds", "a real agent: first synchronisation", "s"),
        1000,
        1,
        1.0,
    ),
    shown(AGENT, "memory_mib", "a real agent: memory", "MiB"),
    asked(
        shown(AGENT, "bytes_per_workload", "a real agent: memory for a workload", "B"),
        10_000,
        1,
        1536.0,
    ),
    asked(
        shown(FIRST, "seconds", "first synchronisation of all", "s"),
        1000,
        10,
        1.0,
    ),
    shown(FIRST, "bytes", "first synchronisation: bytes to an agent", "B"),
    shown(
        FIRST,
        "cpu_seconds",
        "first synchronisation: CPU of the control plane",
        "s",
    ),
    shown(FIRST, "memory_mib", "control plane: memory then", "MiB"),
    shown(FIRST, "peak_mib", "control plane: most memory so far", "MiB"),
    shown(ONE, "written_p50_ms", "a write at the API, p50", "ms"),
    shown(ONE, "written_p99_ms", "a write at the API, p99", "ms"),
    shown(ONE, "p50_ms", "from the write to in force at the last agent, p50", "ms"),
    asked(
        shown(ONE, "p99_ms", "from the write to in force at the last agent, p99", "ms"),
        1000,
        100,
        100.0,
    ),
    shown(ONE, "bytes", "one changed endpoint: bytes to an agent", "B"),
    shown(
        STEADY,
        "cpu_percent",
        "100 changes a second: CPU of the control plane",
        "% of a core",
    ),
    shown(
        STEADY,
        "store_cpu_percent",
        "100 changes a second: CPU of the store",
        "% of a core",
    ),
    shown(STEADY, "p50_ms", "100 changes a second: at the last agent, p50", "ms"),
    shown(STEADY, "p99_ms", "100 changes a second: at the last agent, p99", "ms"),
    shown(AGAIN, "seconds", "reconnect of some, nothing changed", "s"),
    shown(AGAIN, "bytes", "reconnect, nothing changed: bytes to an agent", "B"),
    shown(
        AGAIN,
        "uploaded",
        "reconnect, nothing changed: bytes from an agent",
        "B",
    ),
    shown(TEN, "bytes", "reconnect, ten endpoints changed: bytes to an agent", "B"),
];

/// By services, agents, measurement and field.
type Samples = BTreeMap<(usize, usize, String, String), Vec<f64>>;

/// Runs it all.
pub fn control(workspace: &Workspace, options: &Control) -> Result<()> {
    let binary = prepare(workspace, options)?;
    let (runs, services, agents, within) = match options.quick {
        true => (1, vec![1000], vec![10, 100], options.within.min(100)),
        false => (
            options.runs.max(1),
            options.services.clone(),
            options.agents.clone(),
            options.within,
        ),
    };
    let until = Instant::now() + Duration::from_secs(within);
    let mut about = String::new();
    for (name, value) in super::machine(runs, options.seconds) {
        let _ = writeln!(about, "- {name}: {value}");
    }
    let mut samples = Samples::new();
    for run in 1..=runs {
        for services in &services {
            let what = format!("run {run}/{runs}, {services} services");
            let left = until.saturating_duration_since(Instant::now());
            if left < Duration::from_secs(5) {
                failed(&format!("{what}: not measured, the time is over"));
                continue;
            }
            measure(workspace, options, &binary, (*services, &agents), left, &mut samples)?;
            done(&what);
        }
    }
    let way = match options.from.as_str() {
        "index" => "Objects enter at the index; HTTP/2 on loopback, without TLS.",
        _ => WAY,
    };
    let markdown = format!("# Control plane\n\n{about}\n{way}\n{}\n{PUBLISHED}\n", tables(&samples));
    let directory = workspace.target("bench");
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    std::fs::write(directory.join("control.md"), &markdown)?;
    println!("\n{markdown}");
    note(&format!("control.md is in {}", directory.display()));
    Ok(())
}

const WAY: &str = "Medians over the runs. Objects are written at the embedded API over HTTPS; store, control plane, the \
simulated agents and a real one are processes of one machine and share its processors, so with many agents a time is \
theirs as well. Agents connect over TLS with tokens bound to their pods, decode and acknowledge. A change is a pod's \
readiness, from the sending of its PATCH until all agents have decoded it and the control plane has the last \
acknowledgement. Bytes are those of messages, without HTTP/2 and TLS.";

const PUBLISHED: &str = "For comparison, as published by Istio (Performance and Scalability; sidecars, and its machines, not \
this one): istiod with 1,000 services and 2,000 proxies uses 1 vCPU and 1.5 GB.";

/// Builds the load, and what is measured.
fn prepare(workspace: &Workspace, options: &Control) -> Result<PathBuf> {
    crate::setup::run(workspace, &[Purpose::Build])?;
    let mut load = build::cargo(workspace);
    load.args(["build", "--release", "--locked", "--package", "control-load"]);
    Steps::new(workspace).run("build-control-load", "build the control plane's load", &mut load)?;
    match &options.binary {
        Some(binary) => Ok(std::path::absolute(binary)?),
        None if options.from == "index" => Ok(workspace.binary()),
        None => {
            build::ebpf(workspace)?;
            build::binary(workspace)?;
            Ok(workspace.binary())
        }
    }
}

fn measure(
    workspace: &Workspace,
    options: &Control,
    binary: &Path,
    (services, agents): (usize, &[usize]),
    within: Duration,
    samples: &mut Samples,
) -> Result<()> {
    let agents = agents.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new(workspace.target("release/control-load"));
    command.args(["measure", "--from", &options.from, "--agents", &agents]);
    command.args(["--services", &services.to_string()]);
    command.args(["--changes", &options.changes.to_string()]);
    command.args(["--seconds", &options.seconds.to_string()]);
    command.args(["--within", &within.as_secs().to_string()]);
    command.arg("--binary").arg(binary);
    command.arg("--directory").arg(workspace.target("bench/control"));
    let output = command.output().context("start control-load")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let line: Measured = serde_json::from_str(line).with_context(|| format!("control-load said {line:?}"))?;
        if line.what == NOT_MEASURED {
            failed(&format!("{services} services, {} agents: {NOT_MEASURED}", line.agents));
        }
        for (field, value) in line.values {
            let key = (services, line.agents, line.what.clone(), field);
            samples.entry(key).or_default().push(value);
        }
    }
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!(
            "control-load with {services} services ended with {}: {}",
            output.status,
            error.trim()
        );
    }
    Ok(())
}

fn tables(samples: &Samples) -> String {
    let mut sizes: Vec<usize> = samples.keys().map(|(services, ..)| *services).collect();
    sizes.dedup();
    let mut text = String::new();
    for services in sizes {
        let of = |(size, agents, ..): &(usize, usize, String, String)| (*size == services).then_some(*agents);
        let mut agents: Vec<usize> = samples.keys().filter_map(of).filter(|agents| *agents > 1).collect();
        agents.sort_unstable();
        agents.dedup();
        let _ = writeln!(text, "\n## {services} services, {} pods\n", services * 10);
        let heads: String = agents.iter().map(|agents| format!(" {agents} agents |")).collect();
        let rule = "---:|".repeat(agents.len());
        let _ = writeln!(text, "| |{heads}\n|---|{rule}");
        for row in SHOWN {
            text.push_str(&line(row, services, &agents, samples));
        }
    }
    text
}

/// A row; what does not depend on the number of agents stands in the first column.
fn line(row: &Shown, services: usize, agents: &[usize], samples: &Samples) -> String {
    let value = |agents: usize| {
        let values = samples.get(&(services, agents, row.of.to_owned(), row.field.to_owned()))?;
        let cell = format!("{} {}", super::report::number(median(values)), row.unit);
        let bound = row.asked.filter(|(of, with, _)| *of == services && *with == agents);
        Some(match bound {
            None => cell,
            Some((.., bound)) if median(values) < bound => format!("**{cell}** (asked: < {bound})"),
            Some((.., bound)) => format!("{cell}, **over {bound}**"),
        })
    };
    let alone = value(0).or_else(|| value(1));
    let cells: String = match alone {
        Some(cell) => format!(" {cell} |{}", " |".repeat(agents.len().saturating_sub(1))),
        None => {
            let cell = |agents: &usize| format!(" {} |", value(*agents).unwrap_or_else(|| "–".to_owned()));
            agents.iter().map(cell).collect()
        }
    };
    format!("| {} |{cells}\n", row.title)
}

fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => values[odd / 2],
        even => f64::midpoint(values[even / 2 - 1], values[even / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_what_was_asked_for_and_whether_it_is_there() {
        let key = |agents, what: &str, field: &str| (1000, agents, what.to_owned(), field.to_owned());
        let samples = Samples::from([
            (key(0, "start", "seconds"), vec![0.5]),
            (key(10, ONE, "p99_ms"), vec![3.0, 9.0, 5.0]),
            (key(100, ONE, "p99_ms"), vec![50.0, 70.0]),
            (key(10, FIRST, "seconds"), vec![2.0]),
        ]);
        let text = tables(&samples);
        assert!(text.contains("| 5.00 ms | **60.0 ms** (asked: < 100) |"), "{text}");
        assert!(text.contains("| 2.00 s, **over 1** | – |"), "{text}");
        assert!(text.contains("serving | 0.50 s | |"), "{text}");
        assert!(text.contains("| | 10 agents | 100 agents |"), "{text}");
    }
}
