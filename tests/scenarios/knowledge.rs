//! The control plane and the API go away and come back: the mesh goes on with what it knows, and nothing leaks or spins.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use system_tests::{
    Background, Kubectl, Mesh, Pod, kubectl::is_captured, mesh::Log, netns, scenarios, suite::note, wait,
};

scenarios![
    without_a_control_plane_traffic_goes_on_and_new_connections_are_made,
    an_agent_that_starts_without_a_control_plane_serves_its_pods_from_the_disk,
    a_pod_that_comes_without_a_control_plane_waits_for_its_certificate_and_says_so,
    a_control_plane_that_comes_and_goes_leaves_nothing_behind_in_the_agents,
    agents_that_come_back_are_told_only_what_is_new,
    without_an_api_traffic_goes_on_and_nothing_that_was_taken_is_lost,
];

const NODES: [&str; 2] = ["node-1", "node-2"];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

/// New connections all the while, and one that lives through it.
struct Load {
    storm: Background,
    watch: Background,
}

impl Load {
    fn on(mesh: &Mesh) -> Result<Self> {
        let address = server(mesh).v4()?.to_string();
        let storm = client(mesh).start("client.py", &["storm", &address, "8001", "80", "kN1-"])?;
        let watch = client(mesh).start("client.py", &["watch", &address, "8013"])?;
        storm.next()?;
        ensure!(watch.next()?["first"] == "tick\n", "no connection");
        Ok(Self { storm, watch })
    }

    /// Nothing failed, and the one that began before is still there.
    fn was_undisturbed(mut self) -> Result<()> {
        ensure!(!self.watch.ended()?, "a connection from before was ended");
        let result = self.storm.finish()?;
        let good = result["good"].as_array().map_or(0, Vec::len);
        let failures = result["failures"].as_object().context("no account of the failures")?;
        ensure!(good > 0 && failures.is_empty(), "beside {good} good ones: {failures:?}");
        Ok(())
    }
}

fn works(mesh: &Mesh) -> Result<bool> {
    Ok(client(mesh).client(&["echo", &server(mesh).v4()?.to_string(), "8001"])?["same"] == true)
}

/// Longer than the agents' longest back-off, which an outage right after another may come to.
const RECONNECTED: Duration = Duration::from_secs(60);

fn until_connected(mesh: &Mesh, is: bool) -> Result<()> {
    for node in NODES {
        let words = if is { "has" } else { "misses" };
        wait::until_within(
            RECONNECTED,
            &format!("the agent of {node} {words} its control plane"),
            || {
                let connected = mesh.node(node).status()?.knowledge.source.connected;
                Ok((connected == is).then_some(()))
            },
        )?;
    }
    Ok(())
}

fn without_a_control_plane_traffic_goes_on_and_new_connections_are_made(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-1").access_log()?;
    let load = Load::on(mesh)?;
    mesh.kill_control()?;
    until_connected(mesh, false)?;
    log.line_with(&["direction=\"outbound\"", "src.workload=\"client\""])?;
    // By addresses that no connection was made to before, so that no kept tunnel stands for it.
    let near = mesh.pod("mesh", "near");
    for to in near.addresses()? {
        ensure!(
            server(mesh).client(&["echo", &to.to_string(), "8001"])?["same"] == true,
            "a new connection to {to} failed"
        );
    }
    for node in NODES {
        ensure!(
            mesh.node(node).is_ready(),
            "{node} is not ready without a control plane"
        );
    }
    mesh.start_control()?;
    until_connected(mesh, true)?;
    load.was_undisturbed()
}

/// Its knowledge is on the disk, and so are its pods' certificates: it serves them at once.
fn an_agent_that_starts_without_a_control_plane_serves_its_pods_from_the_disk(mesh: &Mesh) -> Result<()> {
    mesh.start_control()?;
    let out = mesh.pod("outside", "server").v4()?.to_string();
    for (how, node) in [("restart-agent", "node-1"), ("kill-agent", "node-1")] {
        mesh.kill_control()?;
        let node = mesh.node(node);
        let known = node.status()?.knowledge.workloads;
        let log = node.agent_log()?;
        mesh.playground(&[how, node.name])?;
        if how == "kill-agent" {
            node.start_agent()?;
        }
        // It said that it is ready: no wait from here on.
        log.line_with(&["known from the disk"])?;
        let status = node.status()?;
        ensure!(
            !status.knowledge.source.connected,
            "there is a control plane: nothing is shown"
        );
        ensure!(
            status.knowledge.workloads == known,
            "of {known} it knows {}",
            status.knowledge.workloads
        );
        ensure!(
            status.pods.iter().filter(|pod| pod.captured).count() > 1,
            "{:?}",
            status.pods
        );
        let result = client(mesh).client(&["echo", &out, "8001"])?;
        ensure!(
            result["same"] == true,
            "after {how} what leaves the mesh is not served: {result}"
        );
        ensure!(
            works(mesh)?,
            "after {how} the node's own pods are not served from the disk"
        );
        mesh.start_control()?;
        until_connected(mesh, true)?;
        wait::until_true("with the control plane the mesh is served", || works(mesh))?;
    }
    Ok(())
}

/// A name that no certificate is held for yet.
const NEWCOMER: &str = "apiVersion: v1
kind: ServiceAccount
metadata: {name: newcomer, namespace: apps}
---
apiVersion: v1
kind: Pod
metadata: {name: newcomer, namespace: apps}
spec:
  nodeName: node-2
  serviceAccountName: newcomer
  containers:
  - {name: idle, command: [sleep, infinity]}
";

fn a_pod_that_comes_without_a_control_plane_waits_for_its_certificate_and_says_so(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "a pod without a control plane")? else {
        return Ok(());
    };
    mesh.kill_control()?;
    kubectl.apply(NEWCOMER)?;
    let identity = "spiffe://cluster.local/ns/apps/sa/newcomer";
    let why = wait::until("the agent says why there is no certificate", || {
        let certificates = mesh.node("node-2").status()?.certificates;
        let its = certificates.into_iter().find(|one| one.identity == identity);
        Ok(its
            .filter(|one| one.certificate.is_none())
            .and_then(|one| one.last_error))
    })?;
    note(&format!("a certificate without a control plane: {why}"));
    let args = ["pod", "-n", "apps", "newcomer"];
    // The kubelet hears of it a moment later.
    let pod = kubectl.until("the pod says that it waits for its node's agent", &args, |pod| {
        let why = pod["status"]["message"].as_str();
        why.is_some_and(|why| why.contains("agent"))
    })?;
    ensure!(pod["status"]["phase"] == "Pending" && !is_captured(&pod), "{pod:#}");
    // An agent that finds it in the records knows that it does not run yet.
    let node = mesh.node("node-2");
    node.kill_agent()?;
    node.start_agent()?;
    wait::until_true("the next agent lets it wait, too", || {
        let pods = node.status()?.pods;
        let mut its = pods.iter().filter(|pod| pod.name == "newcomer");
        Ok(its.any(|pod| !pod.captured && pod.problem.as_ref().is_some_and(|why| why.contains("no certificate"))))
    })?;
    mesh.start_control()?;
    kubectl.until("the pod runs, and is captured", &args, |pod| {
        pod["status"]["phase"] == "Running" && is_captured(pod)
    })?;
    let to = server(mesh).v4()?.to_string();
    let result = mesh.pod("apps", "newcomer").client(&["echo", &to, "8001"])?;
    ensure!(result["same"] == true, "{result}");
    kubectl.with_input(&["delete", "-f", "-"], NEWCOMER)?;
    until_connected(mesh, true)
}

/// Processor time of a node's agent, in ticks of 10 ms.
fn ticks(mesh: &Mesh, node: &'static str) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", mesh.node(node).agent_pid()?))?;
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let fields: Vec<u64> = rest
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    Ok(fields[11] + fields[12])
}

fn failed_attempts(log: &Log) -> Result<usize> {
    Ok(log
        .lines()?
        .iter()
        .filter(|line| line.contains("discovery:") && line.contains("stays in force"))
        .count())
}

fn a_control_plane_that_comes_and_goes_leaves_nothing_behind_in_the_agents(mesh: &Mesh) -> Result<()> {
    const TIMES: usize = 3;
    let flap = || -> Result<()> {
        mesh.kill_control()?;
        until_connected(mesh, false)?;
        mesh.start_control()?;
        until_connected(mesh, true)
    };
    // Once before counting: what is allocated once is no leak.
    flap()?;
    let nodes = NODES.map(|node| mesh.node(node));
    let mut before = Vec::new();
    for node in nodes {
        before.push((node.agent_files()?, node.agent_rss()?, node.agent_log()?));
    }
    for _ in 0..TIMES {
        flap()?;
    }
    for (node, (files, rss, log)) in nodes.into_iter().zip(before) {
        wait::until_true(
            &format!(
                "the agent of {} has no more files open than the {files} before",
                node.name
            ),
            || Ok(node.agent_files()? <= files + 2),
        )?;
        let (now, attempts) = (node.agent_rss()?, failed_attempts(&log)?);
        note(&format!(
            "{}: {TIMES} outages, {attempts} failed attempts, {rss} -> {now} KiB",
            node.name
        ));
        ensure!(now < rss + 8 * 1024, "{} grew from {rss} to {now} KiB", node.name);
        // One for the connection that broke and a few while it was away: more is spinning.
        ensure!(attempts <= TIMES * 8, "{attempts} failed attempts in {TIMES} outages");
    }
    ensure!(works(mesh)?, "afterwards nothing works");
    // While it is away for longer, an attempt costs little.
    mesh.kill_control()?;
    until_connected(mesh, false)?;
    let (log, before) = (mesh.node("node-1").agent_log()?, ticks(mesh, "node-1")?);
    wait::until_within(RECONNECTED, "it is tried again and again", || {
        Ok((failed_attempts(&log)? >= 3).then_some(()))
    })?;
    let (spent, attempts) = (ticks(mesh, "node-1")? - before, failed_attempts(&log)?);
    note(&format!("{attempts} attempts took {spent} ticks"));
    ensure!(
        spent < 25 * u64::try_from(attempts)?,
        "{attempts} attempts took {spent} ticks of 10 ms"
    );
    mesh.start_control()?;
    until_connected(mesh, true)
}

/// A number of the control plane's metrics, over all labels.
fn metric(name: &str) -> Result<f64> {
    let said = netns::says("uc-control", "curl", &["-sS", "http://172.30.0.254:15014/metrics"])?;
    let lines = said.lines().filter(|line| line.split([' ', '{']).next() == Some(name));
    let values: Vec<f64> = lines.filter_map(|line| line.rsplit(' ').next()?.parse().ok()).collect();
    ensure!(!values.is_empty(), "there is no {name}: {said}");
    Ok(values.iter().sum())
}

/// Everything that the agents know, in bytes on the wire, is what a control plane sends to agents that know nothing.
fn agents_that_come_back_are_told_only_what_is_new(mesh: &Mesh) -> Result<()> {
    let known = NODES.map(|node| mesh.node(node).status().map(|status| status.knowledge.source.resources));
    let known = known.into_iter().sum::<Result<usize>>()?;
    mesh.kill_control()?;
    until_connected(mesh, false)?;
    mesh.start_control()?;
    until_connected(mesh, true)?;
    wait::until_true("both are synchronised", || {
        let synced = NODES.map(|node| mesh.node(node).status().map(|status| status.knowledge.source.synced));
        Ok(synced
            .into_iter()
            .collect::<Result<Vec<_>>>()?
            .iter()
            .all(|synced| *synced))
    })?;
    let bytes = metric("undercurrent_xds_sent_bytes_total")?;
    note(&format!(
        "{known} resources were known; the new control plane sent {bytes} bytes"
    ));
    // A resource takes some 200 bytes.
    #[expect(clippy::cast_precision_loss, reason = "some hundreds")]
    let all = known as f64 * 100.0;
    ensure!(
        bytes < all / 4.0,
        "{bytes} bytes for agents that knew {known} resources"
    );
    Ok(())
}

fn without_an_api_traffic_goes_on_and_nothing_that_was_taken_is_lost(mesh: &Mesh) -> Result<()> {
    let Some(kubectl) = Kubectl::of(mesh, "without an API")? else {
        return Ok(());
    };
    let load = Load::on(mesh)?;
    for number in 0..5 {
        kubectl.says(&[
            "create",
            "configmap",
            "-n",
            "apps",
            &format!("taken-{number}"),
            "--from-literal=a=b",
        ])?;
    }
    let api = mesh.pid_of("cluster")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(api), nix::sys::signal::Signal::SIGKILL)?;
    wait::until_true("the API is gone", || Ok(kubectl.says(&["get", "namespaces"]).is_err()))?;
    for node in NODES {
        ensure!(mesh.node(node).is_ready(), "{node} is not ready without an API");
    }
    ensure!(works(mesh)?, "without an API there are no new connections");
    mesh.bring_up()?;
    for number in 0..5 {
        kubectl.says(&["get", "configmap", "-n", "apps", &format!("taken-{number}")])?;
        kubectl.says(&["delete", "configmap", "-n", "apps", &format!("taken-{number}")])?;
    }
    load.was_undisturbed()?;
    // What follows is learned as before.
    kubectl.apply(NEWCOMER)?;
    kubectl.until("a new pod is captured", &["pod", "-n", "apps", "newcomer"], is_captured)?;
    kubectl.with_input(&["delete", "-f", "-"], NEWCOMER).map(drop)
}
