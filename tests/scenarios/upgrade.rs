//! One agent follows another, after an upgrade or a crash, under load: no new connection fails, and those that live end
//! when they want to.

use std::{
    collections::BTreeSet,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use system_tests::{Mesh, Pod, Stopped, netns, scenarios, suite::note, wait};

scenarios![
    an_upgrade_under_load_fails_no_connection,
    a_crash_under_load_refuses_no_connection,
    a_crash_is_repaired_while_the_former_agent_finishes_its_connections,
    a_pod_that_starts_while_the_agent_changes_is_captured,
    ten_upgrades_leave_nothing_behind,
    an_agent_that_cannot_take_over_leaves_the_other_in_charge,
];

/// Longer than any start of an agent on a busy machine.
const PATIENCE: &str = "20";
const NODES: [&str; 2] = ["node-1", "node-2"];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

/// What became of a storm: how many connections, and the longest time without one, in milliseconds.
fn judged(result: &Value) -> Result<(usize, u64)> {
    let good = result["good"]
        .as_array()
        .with_context(|| format!("no storm: {result}"))?;
    let good: Vec<u64> = good.iter().filter_map(Value::as_u64).collect();
    let gap = good.windows(2).map(|two| two[1] - two[0]).max();
    Ok((good.len(), gap.context("fewer than two connections")?))
}

fn failures(result: &Value) -> Vec<(String, u64)> {
    let failures = result["failures"].as_object().into_iter().flatten();
    failures
        .map(|(why, count)| (why.clone(), count.as_u64().unwrap_or(0)))
        .collect()
}

/// The process is gone.
fn ended(pid: i32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}/fd/0")).exists()
}

/// Does something while a node's agent is asked all the time what a kubelet, Prometheus and people ask it: what was not
/// answered.
fn while_asked(mesh: &Mesh, node: &'static str, does: impl FnOnce() -> Result<String>) -> Result<Vec<String>> {
    let done = AtomicBool::new(false);
    let netns = mesh.node(node).netns();
    let ask = || {
        let mut failed = Vec::new();
        while !done.load(Ordering::Relaxed) {
            for url in [
                "http://127.0.0.1:15021/healthz/ready",
                "http://[::1]:15021/healthz/ready",
                "http://127.0.0.1:15020/stats/prometheus",
                "http://127.0.0.1:15000/logging",
            ] {
                let arguments = ["-sS", "--fail", "--max-time", "20", "-o", "/dev/null", url];
                match netns::command(&netns, "curl").args(arguments).output() {
                    Ok(answer) if answer.status.success() => {}
                    Ok(answer) => failed.push(format!("{url}: {}", String::from_utf8_lossy(&answer.stderr))),
                    Err(error) => failed.push(format!("curl: {error}")),
                }
            }
        }
        failed
    };
    thread::scope(|scope| {
        let asking = scope.spawn(ask);
        let outcome = does();
        done.store(true, Ordering::Relaxed);
        let failed = asking.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?;
        outcome.map(|_| failed)
    })
}

fn an_upgrade_under_load_fails_no_connection(mesh: &Mesh) -> Result<()> {
    let address = server(mesh).v4()?.to_string();
    let (address6, near) = (
        server(mesh).v6()?.to_string(),
        mesh.pod("mesh", "near").v4()?.to_string(),
    );
    for node in NODES {
        let storm = |to: &str| client(mesh).start("client.py", &["storm", to, "8001", "60", "upgraded", PATIENCE]);
        let storms = [storm(&address)?, storm(&address6)?, storm(&near)?];
        let talks = [
            client(mesh).start("client.py", &["talk", &address, "8001"])?,
            client(mesh).start("client.py", &["talk", &near, "8001"])?,
        ];
        let asking = client(mesh).start("dns.py", &["storm", "10.96.0.10", "server.mesh.svc.cluster.local"])?;
        for one in storms.iter().chain(&talks).chain([&asking]) {
            one.next()?;
        }
        mesh.node(node).access_log()?.line_with(&["direction="])?;
        let (holder, worker) = (mesh.node(node).holder_pid()?, mesh.node(node).agent_pid()?);
        let unanswered = while_asked(mesh, node, || mesh.playground(&["upgrade", node]))?;
        ensure!(
            unanswered.is_empty(),
            "the endpoints of {node} did not answer: {unanswered:?}"
        );
        ensure!(mesh.node(node).agent_pid()? != worker, "the same process answers");
        ensure!(!ended(worker), "the former agent did not wait for its connections");
        for talk in talks {
            let result = talk.finish()?;
            ensure!(
                result["end"] == "eof",
                "a connection that lived was cut off on {node}: {result}"
            );
        }
        // They were the last.
        wait::until_true("the former agent has ended", || Ok(ended(worker) && ended(holder)))?;
        let asked = asking.finish()?;
        ensure!(failures(&asked).is_empty(), "queries failed on {node}: {asked}");
        let mut tried = 0;
        let mut longest = 0;
        for storm in storms {
            let result = storm.finish()?;
            ensure!(
                failures(&result).is_empty(),
                "connections failed on {node}: {}",
                result["failures"]
            );
            let (good, gap) = judged(&result)?;
            (tried, longest) = (tried + good, longest.max(gap));
        }
        note(&format!(
            "upgrade of {node}: {tried} connections, 0 failed, longest gap {longest} ms; {} queries, 0 failed",
            asked["answered"]
        ));
    }
    Ok(())
}

fn a_crash_under_load_refuses_no_connection(mesh: &Mesh) -> Result<()> {
    let address = server(mesh).v4()?.to_string();
    for node in NODES {
        let storm = client(mesh).start("client.py", &["storm", &address, "8001", "60", "crashed", PATIENCE])?;
        storm.next()?;
        mesh.node(node).access_log()?.line_with(&["direction="])?;
        let (holder, worker) = (mesh.node(node).holder_pid()?, mesh.node(node).agent_pid()?);
        mesh.playground(&["crash-agent", node])?;
        wait::until_true("another worker answers and is ready", || {
            let next = mesh.node(node).agent_pid().unwrap_or(worker);
            Ok(next != worker && mesh.node(node).is_ready())
        })?;
        ensure!(
            mesh.node(node).holder_pid()? == holder && !ended(holder),
            "the holder is another"
        );
        let log = mesh.node(node).access_log()?;
        log.line_with(&["direction="])?;
        let result = storm.finish()?;
        let (good, gap) = judged(&result)?;
        let failed = failures(&result);
        note(&format!(
            "crash on {node}: {good} connections, longest gap {gap} ms, lost inside it: {failed:?}"
        ));
        ensure!(
            !failed
                .iter()
                .any(|(why, _)| why.contains("REFUSED") || why.contains("TIMEDOUT")),
            "connections did not wait: {failed:?}"
        );
        let lost: u64 = failed.iter().map(|(_, count)| count).sum();
        ensure!(
            lost <= 1,
            "more than the connection inside the process was lost: {failed:?}"
        );
    }
    Ok(())
}

fn a_crash_is_repaired_while_the_former_agent_finishes_its_connections(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let address = server(mesh).v4()?.to_string();
    let talk = client(mesh).start("client.py", &["talk", &address, "8001"])?;
    talk.next()?;
    let (holder, worker) = (node.holder_pid()?, node.agent_pid()?);
    let log = node.agent_log()?;
    mesh.playground(&["upgrade", "node-1"])?;
    log.line_with(&["a new agent serves"])?;
    let crashed = node.agent_pid()?;
    mesh.playground(&["crash-agent", "node-1"])?;
    wait::until_true("another worker answers and is ready", || {
        let next = node.agent_pid().unwrap_or(crashed);
        Ok(next != crashed && node.is_ready())
    })?;
    ensure!(!ended(worker), "the former agent did not wait for its connection");
    ensure!(client(mesh).client(&["echo", &address, "8001"])?["same"] == true);
    let result = talk.finish()?;
    ensure!(
        result["end"] == "eof",
        "the former agent's connection was cut off: {result}"
    );
    wait::until_true("the former agent has ended", || Ok(ended(worker) && ended(holder)))?;
    log.line_with(&["the agent before this one has ended"])?;
    ensure!(client(mesh).client(&["echo", &address, "8001"])?["same"] == true);
    Ok(())
}

/// Told while nobody is in charge, a plugin asks again: the pod starts, and is captured by the new agent.
fn a_pod_that_starts_while_the_agent_changes_is_captured(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let pod = "---
apiVersion: v1
kind: Pod
metadata: {name: newcomer, namespace: mesh}
spec:
  nodeName: node-1
  serviceAccountName: client
  containers:
  - {name: idle, command: [sleep, infinity]}
";
    let mut before = String::new();
    let (upgraded, changed) = thread::scope(|scope| {
        let upgrading = scope.spawn(|| mesh.playground(&["upgrade", "node-1"]));
        let changed = mesh.change("mesh.yaml", |text| {
            before.clone_from(&text);
            text + pod
        });
        (upgrading.join(), changed)
    });
    changed?;
    upgraded.map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    let captured = node
        .status()?
        .pods
        .into_iter()
        .any(|one| one.name == "newcomer" && one.captured);
    ensure!(captured, "the new agent does not capture the pod");
    let newcomer = mesh.pod("mesh", "newcomer");
    let result = newcomer.client(&["echo", &server(mesh).v4()?.to_string(), "8001"])?;
    ensure!(result["same"] == true, "{result}");
    mesh.change("mesh.yaml", |_| before)
}

fn pins(node: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut left = vec![std::path::PathBuf::from("/sys/fs/bpf/undercurrent").join(node)];
    while let Some(directory) = left.pop() {
        for entry in std::fs::read_dir(&directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                left.push(entry.path());
            } else {
                // An agent's own cgroup is in the name of its link.
                let path = entry.path().display().to_string();
                found.insert(path.split("sock_ops_agent-").next().unwrap_or_default().to_owned());
            }
        }
    }
    found
}

fn ten_upgrades_leave_nothing_behind(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let address = server(mesh).v4()?.to_string();
    let mut counted = Vec::new();
    for _ in 0..10 {
        let (holder, worker) = (node.holder_pid()?, node.agent_pid()?);
        mesh.playground(&["upgrade", "node-1"])?;
        wait::until_true("the former agent has ended", || Ok(ended(worker) && ended(holder)))?;
        ensure!(client(mesh).client(&["echo", &address, "8001"])?["same"] == true);
        let log = std::fs::read_to_string(mesh.file("nodes/node-1/agent.log"))?;
        ensure!(log.contains("the agent before this one has ended"), "it is not told");
        counted.push((node.files_of(node.holder_pid()?)?, pins("node-1")));
    }
    let (first, last) = (&counted[0], &counted[9]);
    ensure!(
        last.0 <= first.0,
        "holders keep more and more: {} became {}",
        first.0,
        last.0
    );
    let pins_same = || Ok(pins("node-1") == first.1);
    wait::until_true("the pins are as they were", pins_same)
        .with_context(|| format!("{:?} became {:?}", first.1, pins("node-1")))?;
    note(&format!(
        "ten upgrades: the holder has {} files open, {} KiB in use; the worker {} files",
        last.0,
        memory(node.holder_pid()?)?,
        node.agent_files()?
    ));
    Ok(())
}

/// What a process keeps in memory for itself alone, in KiB.
fn memory(pid: i32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    Ok(line
        .context("no RssAnon")?
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()?)
}

/// Kills a new agent of node-1: when it has said this, else while it waits for the first word of the holder in charge. That
/// one stands still until there is a new agent, and then the worker does, which would have to yield: the new one can't have
/// taken over before it is killed. What the upgrade came to.
fn killed_half_way(mesh: &Mesh, said: Option<&str>) -> Result<Result<String>> {
    let node = mesh.node("node-1");
    let (holder, worker, log) = (node.holder_pid()?, node.agent_pid()?, node.agent_log()?);
    thread::scope(|scope| {
        let mut stopped = Stopped::at(holder)?;
        let upgrading = scope.spawn(|| mesh.playground(&["upgrade", "node-1"]));
        let new = wait::until("a new agent is started", || {
            Ok(node.holder_pid().ok().filter(|pid| *pid != holder))
        })?;
        if let Some(said) = said {
            // From here on the holder goes on.
            stopped = Stopped::at(worker)?;
            log.line_with(&[said])?;
        }
        kill(Pid::from_raw(new), Signal::SIGKILL)?;
        wait::until_true("the new agent is dead", || Ok(ended(new)))?;
        drop(stopped);
        upgrading.join().map_err(|_| anyhow::anyhow!("the thread panicked"))
    })
}

/// Killed before it serves, a new agent changes nothing: at once, when it has been told what is held, and when it is ready.
fn an_agent_that_cannot_take_over_leaves_the_other_in_charge(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let address = server(mesh).v4()?.to_string();
    let (holder, worker) = (node.holder_pid()?, node.agent_pid()?);
    let storm = client(mesh).start("client.py", &["storm", &address, "8001", "60", "half-way", PATIENCE])?;
    storm.next()?;
    for said in [None, Some("taking over from it"), Some("ready to take over")] {
        let upgraded = killed_half_way(mesh, said)?;
        let why = upgraded.err().context("a new agent that was killed took over")?;
        ensure!(why.to_string().contains("the former one goes on"), "{why}");
        // Who had yielded answers again in a moment.
        let answers = wait::until("an agent is in charge", || Ok(node.agent_pid().ok()))?;
        ensure!(
            answers == worker && node.holder_pid()? == holder && !ended(holder),
            "the former agent is not in charge"
        );
    }
    let result = storm.finish()?;
    ensure!(
        failures(&result).is_empty(),
        "connections failed: {}",
        result["failures"]
    );
    // And it is followed by the next.
    mesh.playground(&["upgrade", "node-1"])?;
    ensure!(client(mesh).client(&["echo", &address, "8001"])?["same"] == true);
    wait::until_true("the former agent has ended", || Ok(ended(worker) && ended(holder)))
}
