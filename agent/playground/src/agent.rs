//! The node agents, seen from outside: started in their place, asked over their socket, ended.

use std::{
    net::IpAddr,
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use admin::{ClientError, PodAdded, PodIp, PodRemoved, Status};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    cgroup::{self, Cgroup},
    launch::Launch,
    layout::{Layout, netns_path, node_netns},
    process::{Process, last_lines, spawn_detached},
    state::State,
};

/// Below it are the pins of each node.
pub(crate) const PINS: &str = "/sys/fs/bpf/undercurrent";

fn ask<T>(future: impl Future<Output = Result<T, ClientError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("cannot start a runtime")?.block_on(future)?)
}

/// What the agent says of itself.
pub(crate) fn status(socket: &Path) -> Result<Status> {
    Ok(serde_json::from_str(&ask(admin::get(socket, "/status"))?)?)
}

/// Whether the agent is ready, and what it waits for if not.
pub(crate) fn readiness(socket: &Path) -> Result<()> {
    ask(admin::get(socket, "/healthz/ready")).map(drop)
}

/// Tells the agent of a pod; returns once it is captured or known not to be.
pub(crate) fn pod_added(socket: &Path, namespace: &str, name: &str, netns: &str, addresses: &[IpAddr]) -> Result<()> {
    let host_prefix = |address: &IpAddr| if address.is_ipv4() { 32 } else { 128 };
    let event = PodAdded {
        netns: netns_path(netns),
        pod_name: name.to_owned(),
        pod_namespace: namespace.to_owned(),
        ips: addresses
            .iter()
            .map(|address| PodIp {
                address: format!("{address}/{}", host_prefix(address)),
            })
            .collect(),
    };
    ask(admin::post(socket, "/cmdadd", &event)).map(drop)
}

/// Tells the agent that a pod is gone.
pub(crate) fn pod_removed(socket: &Path, namespace: &str, name: &str) -> Result<()> {
    let event = PodRemoved {
        pod_name: name.to_owned(),
        pod_namespace: namespace.to_owned(),
    };
    ask(admin::post(socket, "/cmddel", &event)).map(drop)
}

/// A node's cgroup.
pub(crate) fn node_cgroup(node: &str) -> Result<Cgroup> {
    Ok(cgroup::root()?.child(node))
}

/// Starts a node's agent, if it does not run. Tells whether it did not.
pub(crate) fn start(layout: &Layout, state: &State, node: &str) -> Result<bool> {
    let files = layout.node(node);
    let record = files.process("agent");
    if Process::read(&record).is_some_and(|process| process.is_alive()) {
        return Ok(false);
    }
    let cgroup = node_cgroup(node)?;
    let (agent, pods) = (cgroup.child("agent"), cgroup.child("pods"));
    // What is left in its group is an agent that nobody recorded.
    agent.kill()?;
    agent.create()?;
    pods.create()?;
    let words = [
        layout.binary().into_os_string(),
        "node".into(),
        "--node".into(),
        node.into(),
        "--static".into(),
        layout.mesh().into_os_string(),
        "--ca-cert".into(),
        layout.ca_cert().into_os_string(),
        "--ca-key".into(),
        layout.ca_key().into_os_string(),
        "--state-dir".into(),
        files.agent_state().into_os_string(),
        "--pods-cgroup".into(),
        pods.0.clone().into_os_string(),
        "--pin-dir".into(),
        Path::new(PINS).join(node).into_os_string(),
        "--capture".into(),
        state.capture.clone().into(),
        "--access-log".into(),
        state.access_log.clone().into(),
    ];
    let words: Vec<String> = words
        .into_iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let netns = node_netns(node);
    let mut launch = Launch::new(&agent.0);
    launch.netns = Some(&netns);
    launch.session = true;
    let mut command: Command = launch.command(&layout.binary(), &words);
    // What the playground itself was told by its environment is not meant for the agents, but their log level is.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("UNDERCURRENT_") && name != "UNDERCURRENT_SHARDS" && name != "UNDERCURRENT_EBPF_LOG" {
            command.env_remove(&*name);
        }
    }
    spawn_detached(command, &files.access_log(), &files.agent_log())?.write(&record)?;
    Ok(true)
}

/// Waits until a node's agent is ready; fails with its last words if it ends or takes too long.
pub(crate) fn wait_ready(layout: &Layout, node: &str, at_most: Duration) -> Result<()> {
    let files = layout.node(node);
    let deadline = Instant::now() + at_most;
    loop {
        let Err(error) = readiness(&files.agent_socket()) else {
            return Ok(());
        };
        let alive = Process::read(&files.process("agent")).is_some_and(|process| process.is_alive());
        let log = || last_lines(&files.agent_log(), 15);
        if !alive {
            bail!("the agent of {node} ended:\n{}", log());
        }
        if Instant::now() > deadline {
            bail!("the agent of {node} is not ready: {error:#}\n{}", log());
        }
        sleep(Duration::from_millis(20));
    }
}

/// Ends a node's agent with a signal and waits until it is gone. Tells whether it ran.
pub(crate) fn stop(layout: &Layout, node: &str, signal: Signal, at_most: Duration) -> Result<bool> {
    let Some(process) = Process::read(&layout.node(node).process("agent")) else {
        return Ok(false);
    };
    if !process.signal(signal) {
        return Ok(false);
    }
    let deadline = Instant::now() + at_most;
    while process.is_alive() {
        if Instant::now() > deadline {
            bail!("the agent of {node} (process {}) does not end by {signal}", process.pid);
        }
        sleep(Duration::from_millis(5));
    }
    Ok(true)
}
