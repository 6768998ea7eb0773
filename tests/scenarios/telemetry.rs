//! What the agents say of what they do: counters with Istio's labels, what they know without any secret, and why a
//! connection is allowed or not, which has to be what really happens.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Mesh, Pod, netns, scenarios, wait};

use crate::policy;

scenarios![
    both_ends_count_a_connection_with_its_labels,
    a_dump_has_no_secret,
    what_is_logged_changes_at_run_time,
    why_says_what_happens,
    what_agents_know_is_listed,
    profiles_are_taken_while_it_runs,
];

const ADMIN: &str = "http://127.0.0.1:15000";

fn fetch(mesh: &Mesh, node: &'static str, arguments: &[&str]) -> Result<String> {
    let curl = [&["-sS", "--max-time", "20"], arguments].concat();
    netns::says(&mesh.node(node).netns(), "curl", &curl)
}

/// The sum of a counter's series that have all these labels.
fn count(text: &str, name: &str, labels: &[&str]) -> f64 {
    let series = text.lines().filter(|line| line.split('{').next() == Some(name));
    let of_these = series.filter(|line| labels.iter().all(|label| line.contains(label)));
    of_these
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
        .sum()
}

fn echoes(from: Pod<'_>, to: &str, port: u16) -> Result<bool> {
    Ok(from.client(&["echo", to, &port.to_string()])?["same"] == true)
}

fn both_ends_count_a_connection_with_its_labels(mesh: &Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    let both = [
        "source_workload=\"client\"",
        "source_workload_namespace=\"mesh\"",
        "source_principal=\"spiffe://cluster.local/ns/mesh/sa/client\"",
        "destination_workload=\"server\"",
        "destination_principal=\"spiffe://cluster.local/ns/mesh/sa/server\"",
        "request_protocol=\"tcp\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    for (node, reporter) in [
        ("node-1", "reporter=\"source\""),
        ("node-2", "reporter=\"destination\""),
    ] {
        let scrape = || fetch(mesh, node, &["http://127.0.0.1:15020/stats/prometheus"]);
        let labels = [&both[..], &[reporter]].concat();
        let opened = |text: &str| count(text, "istio_tcp_connections_opened_total", &labels);
        let before = opened(&scrape()?);
        ensure!(echoes(client, &server.v4()?.to_string(), 8001)?, "no answer");
        wait::until_true(&format!("{node} counts it"), || {
            let text = scrape()?;
            let labels = [&labels[..], &["response_flags=\"-\""]].concat();
            let closed = count(&text, "istio_tcp_connections_closed_total", &labels);
            let bytes = count(&text, "istio_tcp_sent_bytes_total", &labels[..labels.len() - 1]);
            Ok(opened(&text) > before && closed > 0.0 && bytes > 0.0)
        })?;
    }
    Ok(())
}

/// Of the CPU and of the heap, in the form that `pprof` reads: a message that has its strings as they are.
fn profiles_are_taken_while_it_runs(mesh: &Mesh) -> Result<()> {
    for (profile, unit) in [("profile", "nanoseconds"), ("heap", "bytes")] {
        let url = format!("{ADMIN}/debug/pprof/{profile}?seconds=1");
        let count = format!("set -o pipefail; curl -sSf --max-time 20 '{url}' | grep -a -c {unit}");
        let lines = netns::says(&mesh.node("node-1").netns(), "bash", &["-c", &count])?;
        ensure!(lines.trim().parse::<u32>()? > 0, "{profile}: {lines}");
    }
    Ok(())
}

fn a_dump_has_no_secret(mesh: &Mesh) -> Result<()> {
    let dump = fetch(mesh, "node-1", &[&format!("{ADMIN}/config_dump")])?;
    let parsed: Value = serde_json::from_str(&dump).with_context(|| format!("{dump:.300}"))?;
    for key in [
        "workloads",
        "services",
        "policies",
        "certificates",
        "workloadState",
        "config",
        "version",
    ] {
        ensure!(!parsed[key].is_null(), "{key} is not in it");
    }
    for secret in ["PRIVATE KEY", "LS0tLS1CRUdJTiBQUklWQVRF", "Bearer ", "eyJhbGciOi"] {
        ensure!(!dump.contains(secret), "{secret} is in it");
    }
    let elsewhere = fetch(
        mesh,
        "node-1",
        &["-H", "Host: attacker.example", &format!("{ADMIN}/config_dump")],
    )?;
    ensure!(
        !elsewhere.contains("workloads"),
        "a page of another origin reads it: {elsewhere:.200}"
    );
    Ok(())
}

fn what_is_logged_changes_at_run_time(mesh: &Mesh) -> Result<()> {
    let logging = format!("{ADMIN}/logging");
    let post = |query: &str| fetch(mesh, "node-1", &["-X", "POST", &format!("{logging}?{query}")]);
    let before = fetch(mesh, "node-1", &[&logging])?;
    ensure!(post("level=debug")?.contains("debug"), "the level is not taken");
    ensure!(
        fetch(mesh, "node-1", &[&logging])?.contains("debug"),
        "the level did not stay"
    );
    let wrong = post("level=loud")?;
    ensure!(wrong.contains("loud"), "{wrong}");
    post("reset")?;
    let after = fetch(mesh, "node-1", &[&logging])?;
    ensure!(after == before, "{after} is not {before}");
    Ok(())
}

/// What `why` says is what happens, and it names the object behind it.
fn agree(mesh: &Mesh, from: Pod<'_>, to: Pod<'_>, port: u16, expected: bool, names: &str) -> Result<()> {
    let (source, destination) = (from.key(), format!("{}:{port}", to.key()));
    let address = to.v4()?.to_string();
    wait::until_true(&format!("{source} reaches {destination}: {expected}"), || {
        Ok(echoes(from, &address, port)? == expected)
    })?;
    let (code, said) = mesh.ask(&["why", &source, &destination])?;
    ensure!(
        code == Some(i32::from(!expected)) && said.contains(names),
        "{source} to {destination} is {expected}, and why ({code:?}) says:\n{said}"
    );
    Ok(())
}

fn why_says_what_happens(mesh: &Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    let (outside, friend) = (mesh.pod("outside", "server"), mesh.pod("policy", "friend"));
    let (stranger, guarded) = (mesh.pod("policy", "stranger"), mesh.pod("policy", "server"));
    policy::with_policies(mesh, "")?;
    agree(mesh, client, server, 8001, true, "mutual TLS")?;
    agree(mesh, client, outside, 8001, true, "plaintext")?;
    agree(mesh, friend, guarded, 8001, true, "mutual TLS")?;
    let spec = "{selector: {matchLabels: {app: server}}, action: DENY, rules: [{from: [{source: {principals: \
                [cluster.local/ns/policy/sa/stranger]}}]}]}";
    let strict = policy::peer_authentication("STRICT");
    policy::with_policies(mesh, &(policy::authorization("no-stranger", spec) + &strict))?;
    agree(mesh, stranger, guarded, 8001, false, "no-stranger")?;
    agree(mesh, friend, guarded, 8001, true, "mutual TLS")?;
    // What it dials of itself does not come to the agent.
    let themselves = spec.replace("sa/stranger", "sa/default");
    policy::with_policies(mesh, &(policy::authorization("not-itself", &themselves) + &strict))?;
    agree(mesh, stranger, guarded, 8001, true, "mutual TLS")?;
    agree(mesh, guarded, guarded, 8001, true, "the pod's own address")?;
    agree(
        mesh,
        mesh.pod("outside", "client"),
        guarded,
        8001,
        false,
        "PeerAuthentication",
    )?;
    policy::with_policies(mesh, "")?;
    let (code, said) = mesh.ask(&["why", "mesh/client", "server:81"])?;
    ensure!(code == Some(1) && said.contains("has no port 81"), "{code:?}: {said}");
    let (code, said) = mesh.ask(&["why", "mesh/nobody", "server:80"])?;
    ensure!(
        code != Some(0) && code != Some(1) && said.contains("mesh/nobody"),
        "{code:?}: {said}"
    );
    Ok(())
}

fn what_agents_know_is_listed(mesh: &Mesh) -> Result<()> {
    let address = mesh.pod("mesh", "server").v4()?.to_string();
    let live = mesh
        .pod("mesh", "client")
        .start("client.py", &["watch", &address, "8013"])?;
    ensure!(live.next()?["first"] == "tick\n", "no connection");
    for (kind, names) in [
        ("workloads", "server"),
        ("services", "server"),
        ("policies", "NAME"),
        ("certificates", "spiffe://cluster.local/ns/mesh/sa/client"),
        ("connections", "mesh/client"),
    ] {
        let (code, said) = mesh.ask(&["get", kind])?;
        ensure!(code == Some(0) && said.contains(names), "get {kind} ({code:?}): {said}");
        let (code, said) = mesh.ask(&["get", kind, "-o", "json"])?;
        let parsed: Result<Value, _> = serde_json::from_str(&said);
        ensure!(
            code == Some(0) && parsed.is_ok(),
            "get {kind} -o json ({code:?}): {said:.300}"
        );
    }
    let (code, said) = mesh.ask(&["status"])?;
    ensure!(
        code == Some(0) && said.contains("node-1") && said.contains("node-2"),
        "status ({code:?}): {said}"
    );
    live.kill()
}
