//! Crashes, enrolment and removal: nothing leaks meanwhile, and nothing is left afterwards.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use system_tests::{Capture, Mesh, Pod, machine, netns, scenarios, suite::note, wait};

scenarios![
    a_killed_agent_lets_nothing_out_and_its_successor_takes_over,
    a_killed_agent_of_the_server_is_survived,
    pods_are_found_again_without_being_told,
    a_restarted_agent_lets_nothing_out,
    an_address_that_went_to_another_pod_has_its_identity,
    a_running_pod_is_enrolled_without_disturbing_its_connections,
    a_released_pod_is_as_if_it_had_never_been_enrolled,
    up_after_everything_was_killed_works,
    down_leaves_nothing_and_may_be_said_twice,
];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

/// CLOCK_MONOTONIC, in milliseconds, as the scripts have it.
fn now() -> Result<u64> {
    let uptime = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(u64::try_from(uptime.tv_sec())? * 1000 + u64::try_from(uptime.tv_nsec())? / 1_000_000)
}

/// Kills the agent of a node while connections are made through it, and starts another.
fn killed_under_load(mesh: &Mesh, node: &'static str, marker: &str) -> Result<()> {
    let address = server(mesh).v4()?.to_string();
    let capture = Capture::on_fabric()?;
    let storm = client(mesh).start("client.py", &["storm", &address, "8001", "40", marker])?;
    storm.next()?;
    let agent = mesh.node(node);
    let log = agent.access_log()?;
    log.line_with(&["direction="])?;
    agent.kill_agent()?;
    let dead = now()?;
    // While nobody serves, connections are tried and fail.
    let result = client(mesh).client(&["refused", &address, "8001", "2"])?;
    ensure!(
        result["bytes"].as_u64().unwrap_or(0) == 0,
        "without an agent there was an answer: {result}"
    );
    agent.start_agent()?;
    let ready = now()?;
    wait::until_true("connections are served again", || {
        Ok(client(mesh).client(&["echo", &address, "8001", marker])?["same"] == true)
    })?;
    let result = storm.finish()?;
    let good: Vec<u64> = result["good"]
        .as_array()
        .context("no list")?
        .iter()
        .filter_map(serde_json::Value::as_u64)
        .collect();
    ensure!(good.iter().any(|at| *at < dead), "no load before the crash: {result}");
    // It may end with an attempt that began while nobody served.
    let first = good.iter().find(|at| **at > dead);
    let served = first.map_or("had no more".to_owned(), |first| {
        format!("was served {} ms after readiness was seen", first.saturating_sub(ready))
    });
    note(&format!("dead for {} ms, the load {served}", ready - dead));
    let packets = capture.stop()?;
    ensure!(!packets.contain(marker), "the marker was on the fabric in clear");
    Ok(())
}

fn a_killed_agent_lets_nothing_out_and_its_successor_takes_over(mesh: &Mesh) -> Result<()> {
    killed_under_load(mesh, "node-1", "kX3-client-side-")
}

fn a_killed_agent_of_the_server_is_survived(mesh: &Mesh) -> Result<()> {
    killed_under_load(mesh, "node-2", "kX4-server-side-")
}

fn pods_are_found_again_without_being_told(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let names = || -> Result<Vec<_>> {
        let pods = node.status()?.pods.into_iter();
        Ok(pods
            .map(|pod| (pod.namespace, pod.name, pod.captured, pod.identity))
            .collect())
    };
    let before = names()?;
    ensure!(before.len() > 5, "{before:?}");
    node.kill_agent()?;
    // A capture that stays without its agent is the point of pinning it.
    let result = client(mesh).client(&["connect", &server(mesh).v4()?.to_string(), "8001", "2"])?;
    ensure!(
        result["error"].is_string(),
        "a connection was accepted while nobody was there: {result}"
    );
    node.start_agent()?;
    let after = names()?;
    ensure!(before == after, "{before:?} became {after:?}");
    for address in server(mesh).addresses()? {
        ensure!(client(mesh).client(&["echo", &address.to_string(), "8001"])?["same"] == true);
    }
    // Towards its pods, too, and the probes.
    let result = server(mesh).client(&["echo", &mesh.pod("mesh", "near").v4()?.to_string(), "8001"])?;
    ensure!(result["same"] == true, "{result}");
    Ok(())
}

/// Told to end, an agent drains; what captures stays, and the next one takes over.
fn a_restarted_agent_lets_nothing_out(mesh: &Mesh) -> Result<()> {
    let (address, marker) = (server(mesh).v4()?.to_string(), "rS5-restarted-");
    for node in ["node-1", "node-2"] {
        let capture = Capture::on_fabric()?;
        let storm = client(mesh).start("client.py", &["storm", &address, "8001", "40", marker])?;
        storm.next()?;
        mesh.node(node).access_log()?.line_with(&["direction="])?;
        mesh.playground(&["restart-agent", node])?;
        wait::until_true("connections are served again", || {
            Ok(client(mesh).client(&["echo", &address, "8001", marker])?["same"] == true)
        })?;
        let result = storm.finish()?;
        note(&format!("restarted {node}: {}", result["failures"]));
        ensure!(
            !capture.stop()?.contain(marker),
            "the marker was on the fabric in clear"
        );
    }
    Ok(())
}

/// The pool's tunnels are to an identity, not to an address: the newcomer must not get what was meant for the old pod.
fn an_address_that_went_to_another_pod_has_its_identity(mesh: &Mesh) -> Result<()> {
    let first = mesh.pod("life", "first");
    let addresses = first.addresses()?;
    for address in addresses {
        ensure!(client(mesh).client(&["echo", &address.to_string(), "8001"])?["same"] == true);
    }
    let watcher = client(mesh).start("client.py", &["watch", &addresses[0].to_string(), "8013"])?;
    ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    let log = mesh.node("node-1").access_log()?;
    // Its address is free once it is gone.
    let mut with_first = String::new();
    mesh.change("lifecycle.yaml", |text| {
        let without = text
            .split("---\napiVersion: v1\nkind: Pod")
            .next()
            .unwrap_or_default()
            .to_owned();
        with_first = text;
        without
    })?;
    let end = watcher.next()?;
    ensure!(
        end["end"].is_string(),
        "a connection to a pod that is gone lives on: {end}"
    );
    mesh.change("lifecycle.yaml", |_| {
        with_first
            .replace(
                "{name: first, namespace: life}\nspec",
                "{name: second, namespace: life}\nspec",
            )
            .replace("serviceAccountName: first", "serviceAccountName: second")
    })?;
    let second = mesh.pod("life", "second");
    ensure!(
        second.addresses()? == addresses,
        "the newcomer has another address: this shows nothing"
    );
    for address in addresses {
        let result = client(mesh).client(&["echo", &address.to_string(), "8001"])?;
        ensure!(result["same"] == true, "{result}");
    }
    let line = log.line_with(&["dst.workload=\"second\"", "direction=\"outbound\""])?;
    ensure!(line.contains("spiffe://cluster.local/ns/life/sa/second"), "{line}");
    Ok(())
}

/// Rules, routes, links, settings: what a capture may have changed in a pod.
fn network_of(pod: Pod<'_>) -> Result<String> {
    let name = pod.netns();
    let mut all = String::new();
    for arguments in [
        ["-4", "rule"].as_slice(),
        &["-6", "rule"],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["-br", "link"],
        &["-br", "addr"],
    ] {
        all += &netns::says(&name, "ip", arguments)?;
    }
    all += &netns::says(
        &name,
        "sysctl",
        &[
            "net.ipv4.tcp_fwmark_accept",
            "net.ipv4.fwmark_reflect",
            "net.ipv6.fwmark_reflect",
            "net.ipv4.conf.all.rp_filter",
        ],
    )?;
    all += &netns::says(&name, "ss", &["-Htln"])?;
    // Routes that come and go by themselves: the neighbourhood's multicast.
    Ok(all
        .lines()
        .filter(|line| !line.starts_with("multicast") && !line.contains("cache"))
        .collect::<Vec<_>>()
        .join("\n"))
}

fn a_running_pod_is_enrolled_without_disturbing_its_connections(mesh: &Mesh) -> Result<()> {
    let comer = mesh.pod("late", "comer");
    let before = network_of(comer)?;
    let address = mesh.pod("outside", "server").v4()?.to_string();
    let far = server(mesh).v4()?.to_string();
    let own = comer.v4()?.to_string();
    // One that it opened, to the mesh and out of it; one that was opened to it.
    let mut out = comer.start("client.py", &["watch", &address, "8013"])?;
    let mut in_mesh = comer.start("client.py", &["watch", &far, "8013"])?;
    let mut inward = mesh
        .pod("outside", "client")
        .start("client.py", &["watch", &own, "8013"])?;
    for watcher in [&out, &in_mesh, &inward] {
        ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    }
    mesh.enrol("comer", true)?;
    // New ones are captured ...
    let capture = Capture::on_fabric()?;
    let marker = "eN7-enrolled-";
    let result = comer.client(&["echo", &far, "8001", marker, "100"])?;
    ensure!(result["same"] == true, "{result}");
    let result = client(mesh).client(&["echo", &own, "8001", marker, "100"])?;
    ensure!(result["same"] == true, "{result}");
    ensure!(
        !capture.stop()?.contain(marker),
        "an enrolled pod's connection is in clear"
    );
    // ... and the old ones live on: they still tick.
    let count = || ticks(mesh, comer);
    let before_wait = count()?;
    wait::until_true("the old connections still tick", || Ok(count()? > before_wait + 5))?;
    for watcher in [&mut out, &mut in_mesh, &mut inward] {
        ensure!(!watcher.ended()?, "a connection from before the enrolment was ended");
    }
    let during = network_of(comer)?;
    ensure!(
        during != before,
        "capture leaves a trace while it is there, or this comparison sees nothing"
    );
    mesh.enrol("comer", false)?;
    is_restored(comer, &before)
}

/// How many segments with data the pod has got: its old connections are the only ones that get any by themselves.
fn ticks(_mesh: &Mesh, pod: Pod<'_>) -> Result<u64> {
    let said = netns::says(&pod.netns(), "ss", &["-Htni", "dport", "=", ":8013"])?;
    let counts = said
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("bytes_received:")?.parse::<u64>().ok());
    let counts: Vec<u64> = counts.collect();
    ensure!(
        counts.len() == 2,
        "of two connections {} are there: {said}",
        counts.len()
    );
    counts.into_iter().min().context("no connection")
}

fn is_restored(pod: Pod<'_>, before: &str) -> Result<()> {
    let mut after = String::new();
    let restored = wait::until_true("the pod's network is as it was", || {
        after = network_of(pod)?;
        Ok(after == before)
    });
    restored.with_context(|| format!("before:\n{before}\nafter:\n{after}"))
}

fn a_released_pod_is_as_if_it_had_never_been_enrolled(mesh: &Mesh) -> Result<()> {
    let comer = mesh.pod("late", "comer");
    let before = network_of(comer)?;
    let interfaces = || netns::says("uc-node-1", "tc", &["filter", "show", "dev", "eth0", "ingress"]);
    let filters = interfaces()?;
    mesh.enrol("comer", true)?;
    let far = server(mesh).v4()?.to_string();
    // One that goes through the agent, and is to be finished by it.
    let mut carried = comer.start("client.py", &["watch", &far, "8013"])?;
    ensure!(carried.next()?["first"] == "tick\n", "no connection");
    mesh.enrol("comer", false)?;
    ensure!(interfaces()? == filters, "something was left on the node's link");
    let capture = Capture::on_fabric()?;
    let marker = "rL2-released-";
    let result = comer.client(&["echo", &far, "8001", marker, "100"])?;
    ensure!(result["same"] == true, "{result}");
    ensure!(capture.stop()?.contain(marker), "a released pod's traffic is not plain");
    ensure!(
        !carried.ended()?,
        "a connection that the agent carried was cut by the release"
    );
    carried.kill()?;
    comer.exec(&["pkill", "-f", "client.py"])?;
    is_restored(comer, &before)
}

fn works(mesh: &Mesh) -> Result<()> {
    for address in server(mesh).addresses()? {
        let result = client(mesh).client(&["echo", &address.to_string(), "8001", "works", "100"])?;
        ensure!(result["same"] == true, "{result}");
    }
    Ok(())
}

fn up_after_everything_was_killed_works(mesh: &Mesh) -> Result<()> {
    let group = machine::cgroup_root().context("no cgroup v2")?.join("undercurrent");
    fs::write(group.join("cgroup.kill"), "1").context("cannot kill everything")?;
    wait::until_true("everything is dead", || {
        Ok(fs::read_to_string(group.join("cgroup.events"))?.contains("populated 0"))
    })?;
    mesh.bring_up()?;
    works(mesh)
}

/// The kernel may be a moment behind with burying what was killed.
fn nothing_is_left(mesh: &Mesh) -> Result<()> {
    let mut left = mesh.left_over()?;
    let gone = wait::until_true("everything is gone", || {
        left = mesh.left_over()?;
        Ok(left.is_empty())
    });
    gone.with_context(|| format!("left over:\n{left}"))
}

fn down_leaves_nothing_and_may_be_said_twice(mesh: &Mesh) -> Result<()> {
    mesh.down()?;
    nothing_is_left(mesh)?;
    mesh.down()?;
    // With everything dead and half of it missing, too.
    mesh.bring_up()?;
    works(mesh)?;
    let group = machine::cgroup_root().context("no cgroup v2")?.join("undercurrent");
    fs::write(group.join("cgroup.kill"), "1").context("cannot kill everything")?;
    let deleted = Command::new("ip").args(["netns", "del", "uc-node-2"]).status()?;
    ensure!(deleted.success(), "cannot delete a node's namespace");
    mesh.down()?;
    nothing_is_left(mesh).context("after a crash")
}
