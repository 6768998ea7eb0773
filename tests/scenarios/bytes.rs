//! Bytes: whatever applications send arrives, whole, in order, both ways, with both ends seeing the truth.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use system_tests::{Mesh, Pod, pod::no_error, scenarios, wait};

scenarios![
    a_gibibyte_each_way_at_once_arrives_whole,
    ten_thousand_short_connections_all_work,
    a_server_that_speaks_first_is_heard,
    one_byte_writes_arrive,
    a_client_may_end_first_and_still_be_answered,
    a_server_may_end_first_and_still_be_sent_to,
    a_client_that_never_reads_holds_the_sender_back,
    a_server_that_never_reads_holds_the_client_back,
    a_server_that_resets_is_seen_as_a_reset,
    a_client_that_resets_is_seen_as_a_reset,
    a_port_that_nobody_serves_is_a_failed_connection,
    an_address_that_nobody_has_is_a_failed_connection,
    a_killed_server_ends_its_connections,
    a_killed_pod_ends_its_connections_and_comes_back,
    a_killed_client_ends_its_connections,
    agents_keep_nothing_of_connections_that_ended,
];

/// Large enough to wrap every window many times; both ways at once.
const BULK: &str = "1073741824";

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

fn text(address: IpAddr) -> String {
    address.to_string()
}

/// What became of a connection, as the server has it.
fn outcome(mesh: &Mesh, server: &str, token: &str) -> Result<Value> {
    wait::until(&format!("the server's word on {token}"), || {
        let outcome = no_error(client(mesh).client(&["outcome", server, "8006", token])?)?;
        Ok(outcome.get("end").is_some().then_some(outcome))
    })
}

fn a_gibibyte_each_way_at_once_arrives_whole(mesh: &Mesh) -> Result<()> {
    let server = text(server(mesh).v4()?);
    let result = client(mesh).client(&["bulk", &server, "8003", BULK])?;
    ensure!(
        result == json!({"whole": true, "missing": 0, "peer_whole": true}),
        "{result}"
    );
    Ok(())
}

fn ten_thousand_short_connections_all_work(mesh: &Mesh) -> Result<()> {
    let server = text(server(mesh).v4()?);
    let result = client(mesh).client(&["short", &server, "8001", "10000", "16"])?;
    ensure!(result == json!({"done": 10000, "failures": {}}), "{result}");
    Ok(())
}

fn a_server_that_speaks_first_is_heard(mesh: &Mesh) -> Result<()> {
    for server in server(mesh).addresses()? {
        let result = client(mesh).client(&["speaks-first", &text(server), "8002"])?;
        ensure!(result["end"] == "eof" && result["server"].is_object(), "{result}");
    }
    Ok(())
}

fn one_byte_writes_arrive(mesh: &Mesh) -> Result<()> {
    let server = text(server(mesh).v4()?);
    let result = client(mesh).client(&["one-byte", &server, "8001", "5000"])?;
    ensure!(result == json!({"same": true, "bytes": 5000, "end": "eof"}), "{result}");
    Ok(())
}

fn a_client_may_end_first_and_still_be_answered(mesh: &Mesh) -> Result<()> {
    for server in server(mesh).addresses()? {
        let result = client(mesh).client(&["half-close", &text(server), "8004", "300000"])?;
        ensure!(
            result["answer"]["bytes"] == 300_000 && result["answer"]["end"] == "eof",
            "{result}"
        );
    }
    Ok(())
}

fn a_server_may_end_first_and_still_be_sent_to(mesh: &Mesh) -> Result<()> {
    let server = text(server(mesh).v4()?);
    let token = "server-ends-first";
    let result = client(mesh).client(&["server-closes-first", &server, "8005", token, "300000"])?;
    ensure!(result == json!({"said": "bye\n", "end": "eof"}), "{result}");
    let outcome = outcome(mesh, &server, token)?;
    ensure!(outcome["bytes"] == 300_000 && outcome["end"] == "eof", "{outcome}");
    Ok(())
}

/// The memory that an agent may take for one connection whose reader does not read: its windows (4 MiB each way and hop)
/// several times over, and nothing like what a sender without limits would give it.
const STALLED_KIB: u64 = 64 << 10;

fn agents_stay_small(mesh: &Mesh, before: [u64; 2]) -> Result<()> {
    for (node, before) in ["node-1", "node-2"].into_iter().zip(before) {
        let now = mesh.node(node).agent_rss()?;
        ensure!(
            now < before + STALLED_KIB,
            "the agent of {node} grew from {before} to {now} KiB"
        );
    }
    Ok(())
}

fn memory(mesh: &Mesh) -> Result<[u64; 2]> {
    Ok([mesh.node("node-1").agent_rss()?, mesh.node("node-2").agent_rss()?])
}

/// Waits until a sender's count stands still, and returns it.
fn settled(mut count: impl FnMut() -> Result<u64>) -> Result<u64> {
    let mut last = (count()?, 0);
    wait::until("the sender is held back", || {
        let now = count()?;
        last = if now == last.0 && now > 0 {
            (now, last.1 + 1)
        } else {
            (now, 0)
        };
        Ok((last.1 >= 5).then_some(now))
    })
}

/// What may be under way to a reader that does not read: socket buffers at four sockets and the windows of the tunnel.
const UNDER_WAY: u64 = 128 << 20;

fn a_client_that_never_reads_holds_the_sender_back(mesh: &Mesh) -> Result<()> {
    let address = text(server(mesh).v4()?);
    let token = "never-reads";
    let before = memory(mesh)?;
    let holder = client(mesh).start("client.py", &["hold", &address, "8008", token])?;
    no_error(holder.next()?)?;
    let sent = settled(|| {
        let outcome = client(mesh).client(&["outcome", &address, "8006", token])?;
        Ok(outcome["bytes"].as_u64().unwrap_or(0))
    })?;
    ensure!(sent < UNDER_WAY, "{sent} bytes went to a client that does not read");
    agents_stay_small(mesh, before)?;
    drop(holder);
    let outcome = outcome(mesh, &address, token)?;
    ensure!(
        outcome["end"].is_string(),
        "the sender was not told that its reader is gone: {outcome}"
    );
    Ok(())
}

fn a_server_that_never_reads_holds_the_client_back(mesh: &Mesh) -> Result<()> {
    let address = text(server(mesh).v4()?);
    let before = memory(mesh)?;
    let sender = client(mesh).start("client.py", &["stuff", &address, "8009", "never-read-from"])?;
    let sent = no_error(sender.next()?)?["sent"].as_u64().context("no count")?;
    ensure!(sent < UNDER_WAY, "{sent} bytes went to a server that does not read");
    agents_stay_small(mesh, before)?;
    // Meanwhile others of the same tunnel go on.
    let result = client(mesh).client(&["echo", &address, "8001", "beside", "1000"])?;
    ensure!(result["same"] == true, "{result}");
    Ok(())
}

fn a_server_that_resets_is_seen_as_a_reset(mesh: &Mesh) -> Result<()> {
    for server in server(mesh).addresses()? {
        let result = client(mesh).client(&["reset-us", &text(server), "8007"])?;
        ensure!(result["end"] == "ECONNRESET", "{result}");
    }
    Ok(())
}

fn a_client_that_resets_is_seen_as_a_reset(mesh: &Mesh) -> Result<()> {
    for (number, server) in server(mesh).addresses()?.into_iter().enumerate() {
        let token = format!("client-resets-{number}");
        no_error(client(mesh).client(&["reset-it", &text(server), "8010", &token])?)?;
        let outcome = outcome(mesh, &text(server), &token)?;
        ensure!(outcome["end"] == "reset" && outcome["bytes"] == 3, "{outcome}");
    }
    Ok(())
}

/// With capture, connect() itself succeeds: the agent answers before it knows. What the application must see is a reset
/// instead of an orderly end, so that nothing takes the silence for an empty answer.
fn is_failed_connection(result: &Value) -> bool {
    let failed = ["ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETUNREACH", "ETIMEDOUT"];
    failed.iter().any(|name| result["end"] == *name) && result.get("bytes").is_none_or(|bytes| *bytes == 0)
}

fn a_port_that_nobody_serves_is_a_failed_connection(mesh: &Mesh) -> Result<()> {
    for to in [server(mesh), mesh.pod("outside", "server"), mesh.pod("mesh", "near")] {
        for address in to.addresses()? {
            let result = client(mesh).client(&["refused", &text(address), "8099"])?;
            ensure!(is_failed_connection(&result), "{} at {address}: {result}", to.key());
        }
    }
    Ok(())
}

fn an_address_that_nobody_has_is_a_failed_connection(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-1").access_log()?;
    let result = client(mesh).client(&["refused", "10.244.2.250", "8001", "15"])?;
    ensure!(is_failed_connection(&result), "{result}");
    log.line_with(&["dst.addr=10.244.2.250:8001", "error="])?;
    Ok(())
}

fn a_killed_server_ends_its_connections(mesh: &Mesh) -> Result<()> {
    let mortal = mesh.pod("mesh", "mortal");
    let mut watcher = client(mesh).start("client.py", &["watch", &text(mortal.v4()?), "8013"])?;
    ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    mortal.exec(&["pkill", "-9", "-f", "server.py"])?.good()?;
    let seen = watcher.next()?;
    ensure!(seen["end"] == "eof" || seen["end"] == "ECONNRESET", "{seen}");
    wait::until_true("the client ends", || watcher.ended())?;
    answers_again(mesh, mortal)
}

fn a_killed_pod_ends_its_connections_and_comes_back(mesh: &Mesh) -> Result<()> {
    let mortal = mesh.pod("mesh", "mortal");
    let watcher = client(mesh).start("client.py", &["watch", &text(mortal.v4()?), "8013"])?;
    ensure!(watcher.next()?["first"] == "tick\n", "no connection");
    kill(Pid::from_raw(mesh.node("node-2").pause_pid(&mortal)?), Signal::SIGKILL)?;
    let seen = watcher.next()?;
    ensure!(seen["end"] == "eof" || seen["end"] == "ECONNRESET", "{seen}");
    answers_again(mesh, mortal)
}

fn answers_again(mesh: &Mesh, pod: Pod<'_>) -> Result<()> {
    let address = text(pod.v4()?);
    wait::until_true(&format!("{} answers again", pod.key()), || {
        Ok(client(mesh).client(&["echo", &address, "8001", "again"])?["same"] == true)
    })
}

fn a_killed_client_ends_its_connections(mesh: &Mesh) -> Result<()> {
    let address = text(server(mesh).v4()?);
    let token = "killed-client";
    let holder = client(mesh).start("client.py", &["hold", &address, "8010", token])?;
    no_error(holder.next()?)?;
    client(mesh)
        .exec(&["pkill", "-9", "-f", &format!("hold {address} 8010 {token}")])?
        .good()?;
    let outcome = outcome(mesh, &address, token)?;
    ensure!(outcome["end"] == "eof" || outcome["end"] == "reset", "{outcome}");
    Ok(())
}

/// A descriptor for each tunnel that stays open may be kept, and no more.
const TUNNELS: usize = 16;

fn agents_keep_nothing_of_connections_that_ended(mesh: &Mesh) -> Result<()> {
    let nodes = ["node-1", "node-2"].map(|name| mesh.node(name));
    let before = [nodes[0].agent_files()?, nodes[1].agent_files()?];
    for address in [
        server(mesh).v4()?,
        server(mesh).v6()?,
        mesh.pod("outside", "server").v4()?,
    ] {
        let result = client(mesh).client(&["short", &text(address), "8001", "1000", "50"])?;
        ensure!(result == json!({"done": 1000, "failures": {}}), "{result}");
    }
    for (node, before) in nodes.into_iter().zip(before) {
        wait::until_true(&format!("the agent of {} has closed its files", node.name), || {
            Ok(node.agent_files()? <= before + TUNNELS)
        })?;
    }
    Ok(())
}
