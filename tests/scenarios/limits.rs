//! Where something ends: file descriptors, ports. Who comes too late is refused and told why, who is there goes on, and
//! with room again all is as before. What thousands of connections of one pod cost, and who goes first.

use std::{collections::BTreeSet, process::Command};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Background, Mesh, Pod, mesh::Node, netns, scenarios, suite::note, wait};

scenarios![
    four_thousand_connections_of_a_pod_are_all_answered,
    a_clients_agent_without_file_descriptors_refuses_and_recovers,
    a_servers_agent_without_file_descriptors_refuses_and_recovers,
    a_pod_without_ports_fails_by_that_name_and_recovers,
    an_agent_without_ports_to_a_destination_refuses_and_recovers,
    an_agent_without_ports_to_the_application_refuses_and_recovers,
    shards_of_a_pod_that_asks_for_much_are_not_urgent,
];

/// Echo, on one thread.
const ECHO: &str = "8015";

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

/// Connections of the client, as `crowd.py` holds them.
struct Crowd(Background);

impl Crowd {
    fn of(from: Pod<'_>, arguments: &[&str]) -> Result<Self> {
        from.start("crowd.py", arguments).map(Self)
    }

    fn told(&mut self, line: &str) -> Result<Value> {
        self.0.say(line)?;
        self.0.next_within(wait::LONG * 3).with_context(|| line.to_owned())
    }

    /// Opens so many, none of which may fail.
    fn grow(&mut self, count: u64) -> Result<()> {
        let result = self.told(&format!("add {count}"))?;
        ensure!(result["answered"] == count, "of {count} more: {result}");
        Ok(())
    }

    /// Opens more than there can be: some are answered and the others fail in this way.
    fn overflow(&mut self, count: u64, how: &str) -> Result<u64> {
        let result = self.told(&format!("add {count}"))?;
        let answered = result["answered"].as_u64().context("no number")?;
        ensure!(answered > 10 && answered < count, "of {count}: {result}");
        ensure!(result["failures"][how] == count - answered, "of {count}: {result}");
        Ok(answered)
    }

    /// Everybody who is there is answered.
    fn all_answer(&mut self) -> Result<()> {
        let result = self.told("say")?;
        ensure!(
            result["failures"].as_object().is_some_and(serde_json::Map::is_empty),
            "{result}"
        );
        ensure!(result["answered"] == result["live"], "{result}");
        Ok(())
    }

    /// Some end, and others are served in their place.
    fn makes_room(&mut self, count: u64) -> Result<()> {
        self.told(&format!("drop {count}"))?;
        wait::until_true("there is room again", || Ok(self.told("add 1")?["answered"] == 1))?;
        self.all_answer()
    }
}

/// What an agent may take for a connection that waits, both of its ends and its part of a tunnel.
const KIB_FOR_EACH: u64 = 64;

fn four_thousand_connections_of_a_pod_are_all_answered(mesh: &Mesh) -> Result<()> {
    const MANY: u64 = 4000;
    let nodes = ["node-1", "node-2"].map(|name| mesh.node(name));
    let sizes = || -> Result<Vec<_>> {
        nodes
            .iter()
            .map(|node| Ok((node.agent_rss()?, node.agent_files()?)))
            .collect()
    };
    let before = sizes()?;
    let mut crowd = Crowd::of(client(mesh), &[&server(mesh).v4()?.to_string(), ECHO])?;
    crowd.grow(MANY)?;
    for _ in 0..3 {
        crowd.all_answer()?;
    }
    let during = sizes()?;
    let counted = nodes[0].status()?;
    drop(crowd);
    for (index, node) in nodes.iter().enumerate() {
        let (rss, files) = (during[index].0 - before[index].0, during[index].1 - before[index].1);
        ensure!(
            rss < MANY * KIB_FOR_EACH,
            "the agent of {} grew by {rss} KiB",
            node.name
        );
        ensure!(
            files as u64 >= MANY,
            "{} took {files} files: it does not carry them",
            node.name
        );
        wait::until_true(&format!("the agent of {} has let them go", node.name), || {
            Ok(node.agent_files()? <= before[index].1 + 64)
        })?;
    }
    ensure!(counted.access_log_dropped == 0, "lines of the access log were dropped");
    note(&format!(
        "{MANY} connections, KiB and files of the agents: {before:?} -> {during:?} -> {:?}",
        sizes()?
    ));
    Ok(())
}

/// The limit of an agent's open files, until this is dropped.
struct FileLimit<'m> {
    node: Node<'m>,
    before: String,
}

impl<'m> FileLimit<'m> {
    /// So that about so many more may be opened by connections.
    fn leaving(node: Node<'m>, more: usize) -> Result<Self> {
        // Of the limit the last quarter is not for connections.
        let limit = (node.agent_files()? + more) * 4 / 3;
        let file = std::fs::read_to_string(format!("/proc/{}/limits", node.agent_pid()?))?;
        let line = file.lines().find_map(|line| line.strip_prefix("Max open files"));
        let mut words = line.context("no limit")?.split_whitespace();
        let (soft, hard) = (words.next().context("no limit")?, words.next().context("no limit")?);
        let this = Self {
            node,
            before: format!("{soft}:{hard}"),
        };
        this.set(&format!("{limit}:{hard}"))?;
        Ok(this)
    }

    fn set(&self, limit: &str) -> Result<()> {
        let pid = self.node.agent_pid()?.to_string();
        let status = Command::new("prlimit")
            .args(["--pid", &pid, &format!("--nofile={limit}")])
            .status();
        ensure!(status.context("cannot run prlimit")?.success(), "prlimit failed");
        Ok(())
    }
}

impl Drop for FileLimit<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.set(&self.before) {
            eprintln!("the limit of files stays low: {error:#}");
        }
    }
}

fn out_of_descriptors(mesh: &Mesh, name: &'static str, direction: &str) -> Result<()> {
    let node = mesh.node(name);
    let log = node.access_log()?;
    let exhausted = || -> Result<u64> {
        let counters = node.status()?.connections;
        counters.get("failed_exhausted").copied().context("no such counter")
    };
    let before = exhausted()?;
    let mut crowd = Crowd::of(client(mesh), &[&server(mesh).v4()?.to_string(), ECHO])?;
    crowd.grow(20)?;
    let limit = FileLimit::leaving(node, 150)?;
    let more = crowd.overflow(400, "ECONNRESET")?;
    let line = log.line_with(&["RLIMIT_NOFILE", direction])?;
    ensure!(line.contains("raise the limit"), "{line}");
    ensure!(exhausted()? > before, "it is not counted");
    crowd.all_answer()?;
    // The agent itself still has what it needs: it answers, and takes a pod in.
    ensure!(node.is_ready(), "the agent is not ready");
    if name == "node-1" {
        mesh.enrol("comer", true)?;
        mesh.enrol("comer", false)?;
    }
    crowd.makes_room(more / 2)?;
    note(&format!("{name}: {more} of 400 connections with 150 files left"));
    drop(limit);
    crowd.grow(400)
}

fn a_clients_agent_without_file_descriptors_refuses_and_recovers(mesh: &Mesh) -> Result<()> {
    out_of_descriptors(mesh, "node-1", "direction=\"outbound\"")
}

fn a_servers_agent_without_file_descriptors_refuses_and_recovers(mesh: &Mesh) -> Result<()> {
    out_of_descriptors(mesh, "node-2", "direction=\"inbound\"")
}

/// The ports that a pod's sockets get by themselves, until this is dropped.
struct PortRange {
    netns: String,
    before: String,
}

const RANGE: &str = "net.ipv4.ip_local_port_range";
/// How many there are of them.
const PORTS: u64 = 64;

impl PortRange {
    fn small(pod: Pod<'_>) -> Result<Self> {
        let netns = pod.netns();
        let before = netns::says(&netns, "sysctl", &["-n", RANGE])?.trim().replace('\t', " ");
        let this = Self { netns, before };
        this.set("40000 40063")?;
        Ok(this)
    }

    fn set(&self, range: &str) -> Result<()> {
        let said = netns::says(&self.netns, "sysctl", &["-w", &format!("{RANGE}={range}")])?;
        ensure!(said.contains("="), "sysctl: {said}");
        Ok(())
    }
}

impl Drop for PortRange {
    fn drop(&mut self) {
        if let Err(error) = self.set(&self.before) {
            eprintln!("the range of ports stays small: {error:#}");
        }
    }
}

fn a_pod_without_ports_fails_by_that_name_and_recovers(mesh: &Mesh) -> Result<()> {
    let mut crowd = Crowd::of(client(mesh), &[&server(mesh).v4()?.to_string(), ECHO])?;
    crowd.grow(1)?;
    let _range = PortRange::small(client(mesh))?;
    let more = crowd.overflow(PORTS * 2, "EADDRNOTAVAIL")?;
    ensure!(more <= PORTS, "{more} connections from {PORTS} ports");
    crowd.all_answer()?;
    // Elsewhere the same ports are free, but for the one destination in 16 that has the same capture port.
    let mut elsewhere = Vec::new();
    for pod in [
        mesh.pod("mesh", "near"),
        mesh.pod("outside", "server"),
        mesh.pod("outside", "near"),
    ] {
        for port in ["8001", ECHO] {
            elsewhere.push(client(mesh).client(&["echo", &pod.v4()?.to_string(), port])?);
        }
    }
    ensure!(elsewhere.iter().any(|result| result["same"] == true), "{elsewhere:?}");
    crowd.makes_room(more / 2)
}

/// The application has chosen its ports itself, and has enough; the agent has not.
fn an_agent_without_ports_to_a_destination_refuses_and_recovers(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-1").access_log()?;
    let outside = mesh.pod("outside", "server").v4()?.to_string();
    let mut crowd = Crowd::of(client(mesh), &[&outside, ECHO, "20000"])?;
    let _range = PortRange::small(client(mesh))?;
    let more = crowd.overflow(PORTS * 2, "ECONNRESET")?;
    ensure!(more <= PORTS, "{more} connections from {PORTS} ports");
    let line = log.line_with(&["no port is left to connect to", RANGE])?;
    ensure!(
        line.contains(&outside) && line.contains("direction=\"outbound\""),
        "{line}"
    );
    crowd.all_answer()?;
    crowd.makes_room(more / 2)
}

/// How many ports there are above the usual range: from those agents dial applications, before they let the kernel choose.
const ABOVE: u64 = 65_536 - 61_000;

fn an_agent_without_ports_to_the_application_refuses_and_recovers(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-2").access_log()?;
    let mut crowd = Crowd::of(client(mesh), &[&server(mesh).v4()?.to_string(), ECHO])?;
    let _range = PortRange::small(server(mesh))?;
    let more = crowd.overflow(ABOVE + PORTS * 2, "ECONNRESET")?;
    ensure!(
        more <= ABOVE + PORTS,
        "{more} connections from {ABOVE} and {PORTS} ports"
    );
    let line = log.line_with(&["no port is left to connect to", RANGE])?;
    ensure!(line.contains("direction=\"inbound\""), "{line}");
    crowd.all_answer()?;
    crowd.makes_room(more / 2)
}

/// The agent's shards that go before other processes.
fn urgent_shards(node: &Node<'_>) -> Result<BTreeSet<u64>> {
    const SCHED_RR: &str = "2";
    let mut urgent = BTreeSet::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", node.agent_pid()?))? {
        let Ok(stat) = std::fs::read_to_string(task?.path().join("stat")) else {
            // The thread has ended meanwhile.
            continue;
        };
        let (name, after) = stat.rsplit_once(')').context("no name")?;
        let policy = after.split_whitespace().nth(38).context("no policy")?;
        if let Some((_, index)) = name.split_once("(shard-").filter(|_| policy == SCHED_RR) {
            urgent.insert(index.parse()?);
        }
    }
    Ok(urgent)
}

/// The shards that carry the client's connections to a port, and how many those are.
fn carried(mesh: &Mesh, port: &str) -> Result<(BTreeSet<u64>, usize)> {
    let connections = mesh.node("node-1").connections()?;
    let target = format!("{}:{port}", server(mesh).v4()?);
    let carried = connections.iter().filter(|one| one["hboneTarget"] == target);
    let shards: Vec<_> = carried.filter_map(|one| one["shard"].as_u64()).collect();
    Ok((shards.iter().copied().collect(), shards.len()))
}

fn shards_of_a_pod_that_asks_for_much_are_not_urgent(mesh: &Mesh) -> Result<()> {
    const DRINKERS: usize = 8;
    let node = mesh.node("node-1");
    let address = server(mesh).v4()?.to_string();
    let mut crowd = Crowd::of(client(mesh), &[&address, ECHO])?;
    crowd.grow(8)?;
    let (quiet, count) = carried(mesh, ECHO)?;
    ensure!(count >= 8, "only {count} connections are listed");
    let mut until_urgent = || {
        wait::until_true("who asks for little is urgent", || {
            crowd.all_answer()?;
            Ok(urgent_shards(&node)?.is_superset(&quiet))
        })
    };
    until_urgent()?;
    let drinker = client(mesh).start("drink.py", &[&address, "8008", &DRINKERS.to_string()])?;
    // They need not be on the shards that the others are on.
    let noisy = wait::until("all drinkers are carried", || {
        let (shards, count) = carried(mesh, "8008")?;
        Ok((count == DRINKERS).then_some(shards))
    })?;
    // Each for itself: on a busy machine one may have little to do while another has much.
    let mut usual = BTreeSet::new();
    wait::until_true("who asks for much is not", || {
        usual.extend(noisy.difference(&urgent_shards(&node)?));
        Ok(usual == noisy)
    })
    .with_context(|| format!("of {noisy:?} only {usual:?} were usual for a while"))?;
    ensure!(drinker.finish()?["bytes"].as_u64() > Some(0), "nothing came");
    until_urgent()
}
