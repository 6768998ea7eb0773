//! An agent's status as one page of text.

use std::collections::BTreeMap;

use admin::{PodStatus, Status};
use capture::Outcome;

use super::{
    WIDTH, duration,
    table::{Cell, lines, table, wrap},
};

/// Pods and problems that are listed; of more, how many.
const LISTED: usize = 40;

/// The page; `now` in seconds since 1970.
pub fn page(status: &Status, now: u64, colours: bool) -> String {
    let mut text = format!("{}\n", Cell::bold(format!("node {}", status.node)).shown(colours));
    let ready = match status.pending.is_empty() {
        true => Cell::good("ready"),
        false => Cell::bad(format!("waiting for {}", status.pending.join(", "))),
    };
    let up = format!(
        "undercurrent {}, process {}, up {}",
        status.version,
        status.pid,
        duration(status.uptime_seconds)
    );
    let rows = [
        vec![Cell::dim("  agent"), ready],
        vec![Cell::dim(""), Cell::plain(up)],
        vec![Cell::dim("  mesh"), source(status)],
        vec![
            Cell::dim(""),
            Cell::plain(format!("{} workloads known", status.knowledge.workloads)),
        ],
        vec![Cell::dim("  capture"), capture(status)],
        vec![Cell::dim("  certificates"), certificates(status, now)],
        vec![
            Cell::dim("  connections"),
            Cell::plain(connections(&status.connections)),
        ],
        vec![Cell::dim("  failed"), failures(&status.connections)],
        vec![Cell::dim("  passed by"), passed_by(status)],
        vec![Cell::dim("  dropped"), dropped(status)],
    ];
    for row in rows {
        text.push_str(&wrapped(&row, colours));
    }
    text.push('\n');
    text.push_str(&pods(&status.pods, now, colours));
    let rejected = &status.knowledge.rejected;
    if !rejected.is_empty() {
        let title = format!("{} objects of the mesh were not taken:", rejected.len());
        text.push_str(&format!("\n{}\n", Cell::bad(title).shown(colours)));
        for one in rejected.iter().take(LISTED) {
            text.push_str(&indented(one));
        }
    }
    text
}

/// A name and a text that may need more lines than one.
fn wrapped(row: &[Cell], colours: bool) -> String {
    let [name, Cell(words, style)] = row else {
        return lines(&[row.to_vec()], colours);
    };
    let mut rows = Vec::new();
    for (index, line) in wrap(words, WIDTH - 16).into_iter().enumerate() {
        let name = if index == 0 { name.clone() } else { Cell::plain("") };
        let Cell(padded, dim) = name;
        rows.push(vec![Cell(format!("{padded:14}"), dim), Cell(line, *style)]);
    }
    lines(&rows, colours)
}

fn indented(words: &str) -> String {
    let mut text = String::new();
    for (index, line) in wrap(words, WIDTH - 6).into_iter().enumerate() {
        let mark = if index == 0 { "  - " } else { "    " };
        text.push_str(&format!("{mark}{}\n", Cell::plain(line).shown(false)));
    }
    text
}

fn source(status: &Status) -> Cell {
    let source = &status.knowledge.source;
    let why = source
        .last_error
        .as_deref()
        .map(|error| format!(": {error}"))
        .unwrap_or_default();
    match (source.kind.as_str(), source.connected) {
        ("static", true) => Cell::good(format!("from the file {}", source.address)),
        ("static", false) => Cell::bad(format!("the file {} can't be used", source.address)),
        (_, true) => Cell::good(format!("control plane {}", source.address)),
        (_, false) => Cell::bad(format!(
            "no control plane at {}{why}; what was known holds",
            source.address
        )),
    }
}

fn capture(status: &Status) -> Cell {
    let captured = status.pods.iter().filter(|pod| pod.captured).count();
    let with_problem = |captured: bool| {
        let pods = status.pods.iter().filter(|pod| pod.captured == captured);
        pods.filter(|pod| pod.problem.is_some()).count()
    };
    let text = format!(
        "{}, {captured} of {} pods in the mesh",
        status.capture.mode,
        status.pods.len()
    );
    match (with_problem(false), with_problem(true)) {
        (0, 0) => Cell::good(text),
        (0, ignored) => Cell::warn(format!("{text}, {ignored} not as their annotations ask")),
        (missing, _) => Cell::bad(format!("{text}, {missing} should be and are not")),
    }
}

fn certificates(status: &Status, now: u64) -> Cell {
    let valid = |identity: &&admin::IdentityStatus| {
        identity
            .certificate
            .as_ref()
            .is_some_and(|certificate| certificate.not_after > now)
    };
    let held = status.certificates.iter().filter(valid).count();
    let ends = status
        .certificates
        .iter()
        .filter_map(|identity| Some(identity.certificate.as_ref()?.not_after));
    let soonest = ends
        .min()
        .map(|end| format!(", the first ends in {}", duration(end.saturating_sub(now))));
    let text = format!("{held} of {}{}", status.certificates.len(), soonest.unwrap_or_default());
    let error = status
        .certificates
        .iter()
        .find_map(|identity| Some(format!("{}: {}", identity.identity, identity.last_error.as_ref()?)));
    match (held == status.certificates.len(), error) {
        (true, None) => Cell::good(text),
        (true, Some(error)) => Cell::warn(format!("{text}; {error}")),
        (false, error) => Cell::bad(format!(
            "{text}; {}",
            error.unwrap_or_else(|| "being fetched".to_owned())
        )),
    }
}

fn connections(counts: &BTreeMap<String, u64>) -> String {
    let count = |name: &str| counts.get(name).copied().unwrap_or_default();
    format!(
        "{} by pods, {} to pods ({} in plaintext), {} joined",
        count("outbound"),
        count("inbound_streams") + count("inbound_plaintext"),
        count("inbound_plaintext"),
        count("established"),
    )
}

fn failures(counts: &BTreeMap<String, u64>) -> Cell {
    let failed = counts
        .iter()
        .filter_map(|(name, count)| Some((name.strip_prefix("failed_")?, *count)));
    let words: Vec<_> = failed
        .filter(|(_, count)| *count > 0)
        .map(|(kind, count)| format!("{kind}={count}"))
        .collect();
    match words.is_empty() {
        true => Cell::good("none"),
        false => Cell::warn(words.join(" ")),
    }
}

/// What the kernel's hooks counted of which this became.
fn counted(status: &Status, outcome: Outcome) -> Vec<String> {
    let counts = status.counters.iter();
    let counts = counts.filter(|(why, count)| **count > 0 && Outcome::of_label(why) == outcome);
    counts.map(|(why, count)| format!("{why}={count}")).collect()
}

/// What went past the agent.
fn passed_by(status: &Status) -> Cell {
    let words = counted(status, Outcome::PassedBy);
    match words.is_empty() {
        true => Cell::good("nothing"),
        false => Cell::plain(words.join(" ")),
    }
}

fn dropped(status: &Status) -> Cell {
    let mut words = counted(status, Outcome::Dropped);
    if status.access_log_dropped > 0 {
        words.push(format!("access-log lines={}", status.access_log_dropped));
    }
    match words.is_empty() {
        true => Cell::good("nothing"),
        false => Cell::warn(words.join(" ")),
    }
}

fn pods(pods: &[PodStatus], now: u64, colours: bool) -> String {
    if pods.is_empty() {
        return "no pods\n".to_owned();
    }
    let rows = pods.iter().take(LISTED).map(|pod| {
        let addresses = pod.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        vec![
            Cell::plain(format!("{}/{}", pod.namespace, pod.name)),
            Cell::dim(addresses.first().cloned().unwrap_or_default()),
            match (&pod.problem, pod.captured) {
                (Some(problem), false) => Cell::bad(format!("no: {problem}")),
                (Some(ignored), true) => Cell::warn(format!("yes, but: {ignored}")),
                (None, true) => Cell::good("yes"),
                (None, false) => Cell::dim("no"),
            },
            match (&pod.certificate, pod.captured) {
                (Some(certificate), _) if certificate.not_after > now => {
                    Cell::plain(duration(certificate.not_after - now))
                }
                (Some(_), _) => Cell::bad("expired"),
                (None, true) => Cell::bad("none"),
                (None, false) => Cell::dim("-"),
            },
            Cell::plain(pod.identity.clone().unwrap_or_default()),
        ]
    });
    let mut text = table(
        &["POD", "ADDRESS", "MESH", "CERTIFICATE", "IDENTITY"],
        rows.collect(),
        colours,
    );
    if pods.len() > LISTED {
        text.push_str(&format!("… and {} more\n", pods.len() - LISTED));
    }
    text
}

#[cfg(test)]
mod tests {
    use admin::{CaptureStatus, CertificateStatus, IdentityStatus, KnowledgeStatus, SourceStatus};

    use super::*;

    fn status() -> Status {
        let certificate = CertificateStatus {
            serial: "3f".to_owned(),
            not_after: 1_000_000 + 3600 * 11,
        };
        let identity = "spiffe://cluster.local/ns/shop/sa/web".to_owned();
        Status {
            version: "0.1.0".to_owned(),
            node: "node-1".to_owned(),
            pid: 7,
            uptime_seconds: 4000,
            capture: CaptureStatus {
                mode: "ebpf".to_owned(),
                ..CaptureStatus::default()
            },
            knowledge: KnowledgeStatus {
                workloads: 12,
                source: SourceStatus {
                    kind: "xds".to_owned(),
                    address: "istiod:15012 (10.0.0.1:15012)".to_owned(),
                    connected: true,
                    ..SourceStatus::default()
                },
                ..KnowledgeStatus::default()
            },
            certificates: vec![IdentityStatus {
                identity: identity.clone(),
                certificate: Some(certificate.clone()),
                ..IdentityStatus::default()
            }],
            pods: vec![PodStatus {
                namespace: "shop".to_owned(),
                name: "web-0".to_owned(),
                addresses: vec!["10.244.1.3".parse().unwrap()],
                captured: true,
                identity: Some(identity),
                certificate: Some(certificate),
                ..PodStatus::default()
            }],
            connections: [("outbound", 5), ("inbound_streams", 3), ("established", 7)]
                .map(|(name, count)| (name.to_owned(), count))
                .into(),
            ..Status::default()
        }
    }

    #[test]
    fn a_healthy_node() {
        insta::assert_snapshot!(page(&status(), 1_000_000, false));
    }

    #[test]
    fn a_pod_whose_annotation_is_ignored_is_in_the_mesh() {
        let mut status = status();
        status.pods[0].problem = Some("excludeOutboundPorts: not permitted".to_owned());
        let text = page(&status, 1_000_000, false);
        assert!(
            text.contains("1 of 1 pods in the mesh, 1 not as their annotations ask"),
            "{text}"
        );
        assert!(text.contains("yes, but: excludeOutboundPorts: not permitted"), "{text}");
    }

    #[test]
    fn what_passes_the_agent_by_is_not_dropped() {
        let mut status = status();
        let counters = [
            ("captured", 7),
            ("probe_admitted", 3),
            ("dns_captured", 5),
            ("excluded_outbound", 1),
            ("excluded_bytes_sent", 9),
            ("dns_no_listener", 2),
        ];
        status.counters = counters.map(|(name, count)| (name.to_owned(), count)).into();
        let text = page(&status, 1_000_000, false);
        assert!(text.contains("dropped       nothing\n"), "{text}");
        let passed = "passed by     dns_no_listener=2 excluded_bytes_sent=9 excluded_outbound=1\n";
        assert!(text.contains(passed), "{text}");
        assert!(!text.contains("captured=") && !text.contains("admitted"), "{text}");
    }

    #[test]
    fn a_node_in_trouble() {
        let mut status = status();
        status.pending = vec!["the pods that were known before the restart".to_owned()];
        status.knowledge.source.connected = false;
        status.knowledge.source.last_error = Some("istiod:15012 (10.0.0.1:15012): connection refused".to_owned());
        let long = "Authorization shop/web: rules[0].clauses[0]: the field extensions is one that this agent does not know, so \
                    that the policy may say more than can be seen";
        status.knowledge.rejected = vec![long.to_owned()];
        status.certificates[0].certificate = None;
        status.certificates[0].last_error = Some("the authority refuses: no such pod on this node".to_owned());
        status.pods[0].captured = false;
        status.pods[0].certificate = None;
        status.pods[0].problem = Some("no certificate".to_owned());
        status.connections.insert("failed_denied".to_owned(), 4);
        status.counters.insert("tcp_not_from_agent".to_owned(), 2);
        let text = page(&status, 1_000_000, false);
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        insta::assert_snapshot!(text);
    }
}
