//! `cargo xtask bench control`: meshes of two sizes, and ten to a thousand agents that learn them.
//!
//! `tests/control-load` does the work and measures itself; here it is started, its rows are gathered over some runs, and
//! medians are printed and written. Where a figure is asked for (the issue's), it stands beside the row.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::build;
use crate::setup::Purpose;
use crate::step::{Steps, done, note};
use crate::workspace::Workspace;

/// What `bench control` is told.
#[derive(Debug, clap::Args)]
pub struct Control {
    /// How often everything is measured.
    #[arg(long, default_value_t = 3)]
    runs: usize,
    /// Services, of ten pods each.
    #[arg(long, value_delimiter = ',', default_values_t = [1000, 10_000])]
    services: Vec<usize>,
    /// Numbers of agents.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 100, 1000])]
    agents: Vec<usize>,
    /// Seconds of a hundred changes each.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// The small mesh, ten agents, one run: to see that it works, not to quote.
    #[arg(long)]
    quick: bool,
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

const SHOWN: &[Shown] = &[
    shown("start", "seconds", "from the objects to a mesh that is served", "s"),
    shown("start", "memory_mib", "control plane: memory with the mesh", "MiB"),
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
    shown(FIRST, "bytes", "first synchronisation: bytes for an agent", "B"),
    shown(
        FIRST,
        "cpu_seconds",
        "first synchronisation: CPU of the control plane",
        "s",
    ),
    shown(FIRST, "memory_mib", "control plane: memory then", "MiB"),
    shown(FIRST, "peak_mib", "control plane: most memory so far", "MiB"),
    shown(ONE, "p50_ms", "one change in force at the last agent, p50", "ms"),
    asked(
        shown(ONE, "p99_ms", "one change in force at the last agent, p99", "ms"),
        1000,
        100,
        100.0,
    ),
    shown(ONE, "bytes", "one changed endpoint: bytes for an agent", "B"),
    shown(
        STEADY,
        "cpu_percent",
        "100 changes a second: CPU of the control plane",
        "% of a core",
    ),
    shown(STEADY, "p50_ms", "100 changes a second: in force, p50", "ms"),
    shown(STEADY, "p99_ms", "100 changes a second: in force, p99", "ms"),
    shown(
        "reconnect, nothing changed",
        "seconds",
        "reconnect of some, nothing changed",
        "s",
    ),
    shown(
        "reconnect, nothing changed",
        "bytes",
        "reconnect, nothing changed: bytes for an agent",
        "B",
    ),
];

/// By services, agents, measurement and field.
type Samples = BTreeMap<(usize, usize, String, String), Vec<f64>>;

/// Runs it all.
pub fn control(workspace: &Workspace, options: &Control) -> Result<()> {
    crate::setup::run(workspace, &[Purpose::Build])?;
    let mut load = build::cargo(workspace);
    load.args(["build", "--release", "--locked", "--package", "control-load"]);
    Steps::new(workspace).run("build-control-load", "build the control plane's load", &mut load)?;
    let (runs, services, agents) = match options.quick {
        true => (1, vec![1000], vec![10]),
        false => (options.runs.max(1), options.services.clone(), options.agents.clone()),
    };
    let mut samples = Samples::new();
    for run in 1..=runs {
        for services in &services {
            measure(workspace, *services, &agents, options.seconds, &mut samples)?;
            done(&format!("run {run}/{runs}, {services} services"));
        }
    }
    let mut about = String::new();
    for (name, value) in super::machine(runs, options.seconds) {
        let _ = writeln!(about, "- {name}: {value}");
    }
    let markdown = format!(
        "# Control plane\n\n{about}\nMedians. Objects enter at the index; HTTP/2 on loopback, without TLS; the agents \
         share the machine with it.\n{}",
        tables(&samples)
    );
    let directory = workspace.target("bench");
    std::fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
    std::fs::write(directory.join("control.md"), &markdown)?;
    println!("\n{markdown}");
    note(&format!("control.md is in {}", directory.display()));
    Ok(())
}

fn measure(
    workspace: &Workspace,
    services: usize,
    agents: &[usize],
    seconds: f64,
    samples: &mut Samples,
) -> Result<()> {
    let agents = agents.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let mut command = Command::new(workspace.target("release/control-load"));
    command.args(["plane", "--services", &services.to_string(), "--agents", &agents]);
    command.args(["--seconds", &seconds.to_string()]);
    let output = command.output().context("start control-load")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let line: Measured = serde_json::from_str(line).with_context(|| format!("control-load said {line:?}"))?;
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
        assert!(text.contains("served | 0.50 s | |"), "{text}");
        assert!(text.contains("| | 10 agents | 100 agents |"), "{text}");
    }
}
