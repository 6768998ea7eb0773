//! The node agents, seen from outside: started in their place, asked over their socket, followed by others, ended.
//!
//! An agent is a holder, whose process is recorded, and its worker, which dies with it. One that takes over from another
//! is started in a cgroup of its own, as a DaemonSet's surge does it; the other one ends by itself.

use std::{
    path::Path,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use admin::{ClientError, Status};
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use crate::{
    cgroup::{self, Cgroup},
    cluster::{AGENT_ACCOUNT, SYSTEM, agent_pod},
    control,
    launch::Launch,
    layout::{Layout, node_addresses, node_name, node_netns},
    process::{Process, last_lines, spawn_detached},
    state::State,
};

/// Below it are the pins of each node.
pub(crate) const PINS: &str = "/sys/fs/bpf/undercurrent";

fn ask<T>(future: impl Future<Output = Result<T, ClientError>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.context("cannot start a runtime")?.block_on(future)?)
}

/// Options of the node role that an agent is told by the environment of whoever starts it.
const PASSED_ON: [&str; 4] = [
    "UNDERCURRENT_SHARDS",
    "UNDERCURRENT_EBPF_LOG",
    "UNDERCURRENT_EXCLUDE_NAMESPACES",
    "UNDERCURRENT_DNS_CAPTURE",
];

/// What the agent says of itself.
pub(crate) fn status(socket: &Path) -> Result<Status> {
    Ok(serde_json::from_str(&ask(admin::get(socket, "/status"))?)?)
}

/// Whether the agent is ready, and what it waits for if not.
pub(crate) fn readiness(socket: &Path) -> Result<()> {
    ask(admin::get(socket, "/healthz/ready")).map(drop)
}

/// A node's cgroup.
pub(crate) fn node_cgroup(node: &str) -> Result<Cgroup> {
    Ok(cgroup::root()?.child(node))
}

/// The cgroups of a node's agents: the first, and those of agents that took over from one that still drained.
pub(crate) const CGROUPS: [&str; 3] = ["agent", "agent-2", "agent-3"];

/// Starts a node's agent, if it does not run. Tells whether it did not.
pub(crate) fn start(layout: &Layout, state: &State, node: &str) -> Result<bool> {
    let record = layout.node(node).process("agent");
    if Process::read(&record).is_some_and(|process| process.is_alive()) {
        return Ok(false);
    }
    let group = node_cgroup(node)?;
    // What is left in their groups are agents that nobody recorded.
    for name in CGROUPS {
        group.child(name).kill()?;
    }
    spawn(layout, state, node, &group.child(CGROUPS[0]))?;
    Ok(true)
}

/// Starts another agent beside the one that runs, to take over from it, and waits until it has and is ready. The former
/// one finishes its connections and ends by itself. Both processes' ids.
pub(crate) fn upgrade(layout: &Layout, state: &State, node: &str, at_most: Duration) -> Result<(i32, i32)> {
    let files = layout.node(node);
    let record = files.process("agent");
    let Some(former) = Process::read(&record).filter(Process::is_alive) else {
        bail!("the agent of {node} does not run: start it with start-agent");
    };
    let worker = status(&files.agent_socket())
        .with_context(|| format!("asking the agent of {node}"))?
        .pid;
    let group = node_cgroup(node)?;
    let Some(free) = CGROUPS
        .iter()
        .map(|name| group.child(name))
        .find(|group| !group.is_populated())
    else {
        bail!(
            "{node} has {} agents that still finish their connections",
            CGROUPS.len() - 1
        );
    };
    // A new one, as a new container has: what the former agents opened there keeps the old one.
    free.remove()?;
    spawn(layout, state, node, &free)?;
    let deadline = Instant::now() + at_most;
    let taken_over = || status(&files.agent_socket()).is_ok_and(|status| status.pid != worker);
    while !taken_over() {
        let new = Process::read(&record).filter(Process::is_alive);
        let log = || last_lines(&files.agent_log(), 15);
        if new.is_none() {
            former.write(&record)?;
            bail!("the new agent of {node} ended, and the former one goes on:\n{}", log());
        }
        if Instant::now() > deadline {
            free.kill()?;
            former.write(&record)?;
            bail!(
                "the new agent of {node} does not take over, and the former one goes on:\n{}",
                log()
            );
        }
        sleep(Duration::from_millis(10));
    }
    wait_ready(layout, node, at_most)?;
    let new = Process::read(&record).with_context(|| format!("no record of the agent of {node}"))?;
    Ok((former.pid, new.pid))
}

/// Ends the worker of a node's agent as a crash would, and leaves its holder to start it again. Its process id.
pub(crate) fn crash(layout: &Layout, node: &str) -> Result<u32> {
    let socket = layout.node(node).agent_socket();
    let pid = status(&socket)
        .with_context(|| format!("asking the agent of {node}"))?
        .pid;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)
        .with_context(|| format!("cannot kill process {pid}"))?;
    Ok(pid)
}

fn spawn(layout: &Layout, state: &State, node: &str, agent: &Cgroup) -> Result<()> {
    let files = layout.node(node);
    let pods = node_cgroup(node)?.child("pods");
    agent.create()?;
    pods.create()?;
    let words = [
        layout.binary().into_os_string(),
        "node".into(),
        "--node".into(),
        node.into(),
        "--xds".into(),
        control::address().into(),
        "--token".into(),
        files.token().into_os_string(),
        "--roots".into(),
        files.roots().into_os_string(),
        "--kubeconfig".into(),
        files.kubeconfig().into_os_string(),
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
    // What the playground itself was told by its environment is not meant for the agents, but their log level is, and
    // these are.
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("UNDERCURRENT_") && !PASSED_ON.contains(&&*name) {
            command.env_remove(&*name);
        }
    }
    // As a DaemonSet's pod has it from the downward API.
    let index = (1..=state.nodes).find(|index| node_name(*index) == node).unwrap_or(1);
    command
        .env("POD_NAMESPACE", SYSTEM)
        .env("POD_NAME", agent_pod(node))
        .env("SERVICE_ACCOUNT", AGENT_ACCOUNT)
        .env("INSTANCE_IP", node_addresses(index)[0].to_string());
    spawn_detached(command, &files.access_log(), &files.agent_log())?.write(&files.process("agent"))
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

/// Ends a node's agent, worker and all, with a signal and waits until it is gone. Tells whether it ran.
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
    if signal == Signal::SIGKILL {
        // The kernel kills the worker with its holder, a moment later.
        for name in CGROUPS {
            node_cgroup(node)?.child(name).kill()?;
        }
    }
    Ok(true)
}
