//! `status`: what runs, as a table for a person, or JSON.

use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write, stdout},
};

use abi::Outcome;
use admin::Status;
use anyhow::Result;
use owo_colors::{OwoColorize, Style};
use serde::Serialize;

use crate::{
    agent,
    desired::{Desired, Phase, PodStatus},
    layout::{Layout, node_addresses, node_name},
    preflight,
    process::Process,
    state::State,
};

/// Options of `status`.
#[derive(clap::Args, Clone, Debug)]
pub struct StatusArgs {
    /// JSON instead of a table.
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    capture: String,
    nodes: Vec<NodeReport>,
    pods: Vec<PodReport>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeReport {
    name: String,
    addresses: Vec<String>,
    kubelet: bool,
    /// Why there is no status of the agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<Status>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodReport {
    namespace: String,
    name: String,
    node: String,
    addresses: Vec<String>,
    captured: bool,
    identity: Option<String>,
    ready: bool,
    restarts: u32,
    phase: Phase,
    message: String,
    counters: BTreeMap<String, u64>,
}

pub(crate) fn run(layout: &Layout, args: &StatusArgs) -> Result<()> {
    preflight::root()?;
    let report = gather(layout, &State::expect(layout)?);
    let mut out = stdout();
    if args.json {
        writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?;
    } else {
        write!(out, "{}", table(&report, out.is_terminal()))?;
    }
    Ok(())
}

fn gather(layout: &Layout, state: &State) -> Report {
    let mut report = Report {
        capture: state.capture.clone(),
        nodes: Vec::new(),
        pods: Vec::new(),
    };
    for index in 1..=state.nodes {
        let name = node_name(index);
        let files = layout.node(&name);
        let runs = |name: &str| Process::read(&files.process(name)).is_some_and(|process| process.is_alive());
        let (agent, problem) = if state.capture == "none" {
            (None, None)
        } else if !runs("agent") {
            (None, Some("does not run".to_owned()))
        } else {
            match agent::status(&files.agent_socket()) {
                Ok(status) => (Some(status), None),
                Err(error) => (None, Some(format!("{error:#}"))),
            }
        };
        for (id, desired) in Desired::read_all(&files) {
            let status = PodStatus::read(&files.pod(&id)).unwrap_or_default();
            report.pods.push(pod(&name, &desired, &status, agent.as_ref()));
        }
        report.nodes.push(NodeReport {
            addresses: node_addresses(index).iter().map(ToString::to_string).collect(),
            kubelet: runs("kubelet"),
            name,
            problem,
            agent,
        });
    }
    report
        .pods
        .sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    report
}

fn pod(node: &str, desired: &Desired, status: &PodStatus, agent: Option<&Status>) -> PodReport {
    let metadata = &desired.pod.metadata;
    let known = agent.and_then(|agent| {
        let mut pods = agent.pods.iter();
        pods.find(|pod| pod.namespace == metadata.namespace && pod.name == metadata.name)
    });
    let ready = status.is_ready(desired);
    let mut message = if ready { String::new() } else { status.why() };
    if let Some(problem) = known.and_then(|pod| pod.problem.as_ref()) {
        message = [message, problem.clone()]
            .iter()
            .filter(|text| !text.is_empty())
            .cloned()
            .collect::<Vec<_>>()
            .join("; ");
    }
    PodReport {
        namespace: metadata.namespace.clone(),
        name: metadata.name.clone(),
        node: node.to_owned(),
        addresses: desired.addresses.iter().map(ToString::to_string).collect(),
        captured: known.is_some_and(|pod| pod.captured),
        identity: known.and_then(|pod| pod.identity.clone()),
        ready,
        restarts: status.containers.iter().map(|container| container.restarts).sum(),
        phase: status.phase,
        message,
        counters: known.map(|pod| pod.counters.clone()).unwrap_or_default(),
    }
}

/// A cell: its text, and how it looks on a terminal.
struct Cell(String, Style);

fn plain(text: impl Into<String>) -> Cell {
    Cell(text.into(), Style::new())
}

fn table(report: &Report, colour: bool) -> String {
    let (good, bad, dim) = (Style::new().green(), Style::new().red(), Style::new().dimmed());
    let mut nodes = vec![header(&[
        "NODE",
        "ADDRESSES",
        "AGENT",
        "CAPTURE",
        "UP",
        "PODS",
        "KUBELET",
    ])];
    for node in &report.nodes {
        let agent = node.agent.as_ref();
        let said = match (&node.problem, agent) {
            (Some(problem), _) => Cell(problem.clone(), bad),
            (None, Some(status)) if status.pending.is_empty() => Cell(format!("ready, v{}", status.version), good),
            (None, Some(status)) => Cell(format!("waiting for {}", status.pending.join(", ")), bad),
            (None, None) => Cell("none".to_owned(), dim),
        };
        let captured = agent.map_or(0, |agent| agent.pods.iter().filter(|pod| pod.captured).count());
        let pods = report.pods.iter().filter(|pod| pod.node == node.name).count();
        nodes.push(vec![
            plain(&node.name),
            Cell(node.addresses.join(" "), dim),
            said,
            plain(agent.map_or("-", |agent| agent.capture.mode.as_str())),
            plain(agent.map_or("-".to_owned(), |agent| duration(agent.uptime_seconds))),
            plain(format!("{pods}, {captured} in the mesh")),
            if node.kubelet {
                Cell("runs".to_owned(), good)
            } else {
                Cell("does not run".to_owned(), bad)
            },
        ]);
    }
    let mut pods = vec![header(&[
        "POD",
        "NODE",
        "ADDRESSES",
        "MESH",
        "IDENTITY",
        "READY",
        "RESTARTS",
        "PASSED BY",
        "DROPPED",
    ])];
    for pod in &report.pods {
        pods.push(vec![
            plain(format!("{}/{}", pod.namespace, pod.name)),
            plain(&pod.node),
            Cell(pod.addresses.join(" "), dim),
            if pod.captured {
                Cell("yes".to_owned(), good)
            } else {
                Cell("no".to_owned(), dim)
            },
            plain(pod.identity.as_deref().filter(|_| pod.captured).unwrap_or("-")),
            if pod.ready {
                Cell("yes".to_owned(), good)
            } else {
                Cell(format!("no: {}", pod.message), bad)
            },
            plain(pod.restarts.to_string()),
            plain(counted(pod, Outcome::PassedBy)),
            plain(counted(pod, Outcome::Dropped)),
        ]);
    }
    format!("{}\n{}", lines(&nodes, colour), lines(&pods, colour))
}

/// What the kernel's hooks counted of which this became.
fn counted(pod: &PodReport, outcome: Outcome) -> String {
    let counts = pod.counters.iter();
    let counts = counts.filter(|(why, count)| **count > 0 && Outcome::of_label(why) == outcome);
    let words: Vec<_> = counts.map(|(why, count)| format!("{why}={count}")).collect();
    match words.is_empty() {
        true => "-".to_owned(),
        false => words.join(" "),
    }
}

fn header(names: &[&str]) -> Vec<Cell> {
    names
        .iter()
        .map(|name| Cell((*name).to_owned(), Style::new().bold()))
        .collect()
}

/// Columns as wide as their widest cell; the last is as long as it is.
fn lines(rows: &[Vec<Cell>], colour: bool) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.0.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (Cell(cell, style), width) in row.iter().zip(&widths) {
            let padding = " ".repeat(width - cell.chars().count() + 2);
            let shown = if colour {
                cell.style(*style).to_string()
            } else {
                cell.clone()
            };
            line.push_str(&shown);
            line.push_str(&padding);
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn duration(seconds: u64) -> String {
    match seconds {
        ..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec![plain("A"), plain("B")], vec![plain("long"), plain("x")]];
        assert_eq!(lines(&rows, false), "A     B\nlong  x\n");
    }

    #[test]
    fn what_passes_the_agent_by_is_not_dropped() {
        let counters = [
            ("captured", 7),
            ("dns_captured", 5),
            ("excluded_bytes_sent", 9),
            ("tcp_no_socket", 0),
        ];
        let pod = PodReport {
            namespace: "shop".to_owned(),
            name: "web-0".to_owned(),
            node: "node-1".to_owned(),
            addresses: Vec::new(),
            captured: true,
            identity: None,
            ready: true,
            restarts: 0,
            phase: Phase::default(),
            message: String::new(),
            counters: counters.map(|(why, count)| (why.to_owned(), count)).into(),
        };
        assert_eq!(counted(&pod, Outcome::PassedBy), "excluded_bytes_sent=9");
        assert_eq!(counted(&pod, Outcome::Dropped), "-");
    }
}
