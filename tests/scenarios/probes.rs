//! Probes: a kubelet reaches a strict pod by proof of who it is; whoever merely looks like it does not.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::{
    io::{Read, Write},
    time::Duration,
};

use anyhow::{Result, ensure};
use system_tests::{Mesh, Pod, netns, scenarios};

scenarios![
    strict_pods_become_ready_by_their_probes,
    a_process_of_the_node_sees_the_application_itself,
    another_pod_is_refused,
    a_pod_with_the_nodes_network_is_refused,
    forwarded_traffic_is_refused,
    the_mesh_itself_is_let_in,
    without_an_agent_probes_are_answered_and_nobody_else_is_let_in,
];

fn strict(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("strict", "http")
}

/// `up` waits for readiness: that it returned is the proof; this says so of each kind of probe.
fn strict_pods_become_ready_by_their_probes(mesh: &Mesh) -> Result<()> {
    for name in ["http", "tcp"] {
        let pod = mesh.pod("strict", name);
        let path = mesh.file(&format!("nodes/node-2/pods/strict-{name}/status.json"));
        let status: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
        ensure!(
            status["containers"][0]["ready"] == true,
            "{} is not ready: {status}",
            pod.key()
        );
        let node = mesh.node("node-2").status()?;
        let found = node
            .pods
            .iter()
            .find(|one| one.namespace == "strict" && one.name == name);
        ensure!(found.is_some_and(|one| one.captured), "{} is not captured", pod.key());
    }
    Ok(())
}

/// What a kubelet's probe is: a connection from the node's own network, by a process that is in no pod.
fn ask_from(netns: &str, address: IpAddr) -> Result<String> {
    netns::inside(netns, || {
        let limit = Duration::from_secs(5);
        let mut conn = TcpStream::connect_timeout(&SocketAddr::new(address, 8011), limit)?;
        conn.set_read_timeout(Some(limit))?;
        conn.write_all(b"GET /healthz HTTP/1.1\r\nhost: probe\r\n\r\n")?;
        let mut answer = String::new();
        conn.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

fn a_process_of_the_node_sees_the_application_itself(mesh: &Mesh) -> Result<()> {
    for address in strict(mesh).addresses()? {
        let answer = ask_from("uc-node-2", address)?;
        let node = if address.is_ipv4() {
            "172.30.0.2"
        } else {
            "fd00:172:30::2"
        };
        ensure!(answer.starts_with("HTTP/1.1 200"), "{address}: {answer}");
        ensure!(
            answer.contains(node),
            "the application does not see the node's own address: {answer}"
        );
    }
    Ok(())
}

fn is_refused(mesh: &Mesh, from: Pod<'_>) -> Result<()> {
    for address in strict(mesh).addresses()? {
        let log = mesh.node("node-2").access_log()?;
        let result = from.client(&["refused", &address.to_string(), "8011", "3"])?;
        ensure!(
            result["end"] != "eof" || result["bytes"] == 0,
            "{} got an answer from {address}: {result}",
            from.key()
        );
        ensure!(
            result.get("bytes").is_none_or(|bytes| *bytes == 0),
            "{}: {result}",
            from.key()
        );
        let source = format!("src.addr={}", bracketed(from_address(from, address)?));
        log.line_with(&[&source, "PeerAuthentication strict/default", "plaintext", "error="])?;
    }
    Ok(())
}

fn bracketed(address: IpAddr) -> String {
    if address.is_ipv6() {
        format!("[{address}]:")
    } else {
        format!("{address}:")
    }
}

fn from_address(from: Pod<'_>, to: IpAddr) -> Result<IpAddr> {
    if from.name == "host" {
        return Ok(if to.is_ipv4() {
            "172.30.0.2".parse()?
        } else {
            "fd00:172:30::2".parse()?
        });
    }
    Ok(from.addresses()?[usize::from(to.is_ipv6())])
}

fn another_pod_is_refused(mesh: &Mesh) -> Result<()> {
    // Of the same node and of the other.
    is_refused(mesh, mesh.pod("outside", "beside"))?;
    is_refused(mesh, mesh.pod("outside", "client"))
}

fn a_pod_with_the_nodes_network_is_refused(mesh: &Mesh) -> Result<()> {
    is_refused(mesh, mesh.pod("outside", "host"))
}

/// Another node's own processes come through this node's network, too, and are not its kubelet.
fn forwarded_traffic_is_refused(mesh: &Mesh) -> Result<()> {
    for address in strict(mesh).addresses()? {
        let log = mesh.node("node-2").access_log()?;
        let answer = ask_from("uc-node-1", address);
        ensure!(
            answer.as_ref().map_or(true, String::is_empty),
            "node-1 got an answer from {address}: {answer:?}"
        );
        log.line_with(&["PeerAuthentication strict/default", "plaintext", "error="])?;
    }
    Ok(())
}

fn the_mesh_itself_is_let_in(mesh: &Mesh) -> Result<()> {
    for address in strict(mesh).addresses()? {
        let result = mesh
            .pod("mesh", "client")
            .client(&["echo", &address.to_string(), "8001"])?;
        ensure!(result["same"] == true, "{result}");
    }
    Ok(())
}

/// Capture outlives the agent, and so does the proof of who a probe is.
fn without_an_agent_probes_are_answered_and_nobody_else_is_let_in(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-2");
    node.kill_agent()?;
    let outcome = without_an_agent(mesh);
    node.start_agent()?;
    outcome?;
    the_mesh_itself_is_let_in(mesh)
}

fn without_an_agent(mesh: &Mesh) -> Result<()> {
    for address in strict(mesh).addresses()? {
        let answer = ask_from("uc-node-2", address)?;
        ensure!(answer.starts_with("HTTP/1.1 200"), "{address}: {answer}");
        for from in [
            mesh.pod("outside", "beside"),
            mesh.pod("outside", "host"),
            mesh.pod("mesh", "client"),
        ] {
            let result = from.client(&["refused", &address.to_string(), "8011", "1"])?;
            ensure!(
                result.get("bytes").is_none_or(|bytes| *bytes == 0),
                "{} to {address}: {result}",
                from.key()
            );
        }
    }
    Ok(())
}
