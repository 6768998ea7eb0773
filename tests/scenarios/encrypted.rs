//! Nothing in clear: what pods of the mesh say to each other is on the wire as ciphertext, and on no port but HBONE's.
//!
//! Every payload is a marker, over and over, so that any packet with a part of it would show it.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use system_tests::{Capture, Mesh, Pod, capture::Packets, scenarios};

scenarios![
    a_capture_of_plaintext_shows_the_marker,
    nothing_between_pods_of_the_mesh_is_in_clear,
    http_between_pods_of_the_mesh_is_not_in_clear,
    a_service_address_is_no_way_around,
    only_hbone_crosses_between_nodes,
    pods_of_one_node_are_encrypted_too,
];

/// Nothing that occurs by itself.
const MARKER: &str = "wQ7-clear-as-day-";

/// Sends the marker there, and has it echoed back.
fn say(from: Pod<'_>, to: IpAddr, marker: &str) -> Result<()> {
    let result = from.client(&["echo", &to.to_string(), "8001", marker, "2000"])?;
    ensure!(result["same"] == true, "{} to {to}: {result}", from.key());
    Ok(())
}

fn captured(work: impl FnOnce() -> Result<()>) -> Result<Packets> {
    let capture = Capture::on_fabric()?;
    work()?;
    capture.stop()
}

/// The control: these captures and this search find what is there to be found.
fn a_capture_of_plaintext_shows_the_marker(mesh: &Mesh) -> Result<()> {
    let (outside, server) = (mesh.pod("outside", "client"), mesh.pod("outside", "server"));
    for address in server.addresses()? {
        let packets = captured(|| say(outside, address, MARKER))?;
        ensure!(
            packets.contain(MARKER),
            "plaintext to {address} was not seen: the other scenarios would prove nothing"
        );
    }
    // From the mesh to a pod outside of it there is no other way than plaintext.
    let packets = captured(|| say(mesh.pod("mesh", "client"), server.v4()?, MARKER))?;
    ensure!(packets.contain(MARKER), "plaintext out of the mesh was not seen");
    Ok(())
}

fn nothing_between_pods_of_the_mesh_is_in_clear(mesh: &Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    for (from, to) in [(client, server), (server, mesh.pod("mesh", "near"))] {
        for address in to.addresses()? {
            let packets = captured(|| say(from, address, MARKER))?;
            ensure!(!packets.contain(MARKER), "{} to {address} is in clear", from.key());
            let hbone = packets.matching(&format!("tcp port 15008 and host {address}"))?;
            ensure!(
                !hbone.is_empty(),
                "{} to {address} did not cross the fabric at all",
                from.key()
            );
        }
    }
    Ok(())
}

fn http_between_pods_of_the_mesh_is_not_in_clear(mesh: &Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    for address in server.addresses()? {
        let host = if address.is_ipv6() {
            format!("[{address}]")
        } else {
            address.to_string()
        };
        let packets = captured(|| {
            let (url, header) = (format!("http://{host}:8080/{MARKER}"), format!("x-secret: {MARKER}"));
            client
                .exec(&["curl", "-sS", "--max-time", "10", "-H", &header, "-d", MARKER, &url])?
                .good()?;
            Ok(())
        })?;
        for word in [MARKER, "HTTP/1.1", "x-secret", "nginx"] {
            ensure!(!packets.contain(word), "{word:?} of HTTP to {address} is in clear");
        }
    }
    Ok(())
}

fn a_service_address_is_no_way_around(mesh: &Mesh) -> Result<()> {
    let client = mesh.pod("mesh", "client");
    let packets = captured(|| {
        let header = format!("x-secret: {MARKER}");
        client
            .exec(&["curl", "-sS", "--max-time", "10", "-H", &header, "http://server/"])?
            .good()?;
        Ok(())
    })?;
    ensure!(
        !packets.contain(MARKER),
        "a request to the service's address is in clear"
    );
    Ok(())
}

fn only_hbone_crosses_between_nodes(mesh: &Mesh) -> Result<()> {
    let (client, server) = (mesh.pod("mesh", "client"), mesh.pod("mesh", "server"));
    let packets = captured(|| {
        for address in server.addresses()? {
            say(client, address, MARKER)?;
            ensure!(client.client(&["reset-us", &address.to_string(), "8007"])?["end"] == "ECONNRESET");
            client.client(&["refused", &address.to_string(), "8099"])?;
        }
        Ok(())
    })?;
    let [from, from6] = client.addresses()?;
    let [to, to6] = server.addresses()?;
    let between = format!("((host {from} and host {to}) or (host {from6} and host {to6}))");
    let others = packets.matching(&format!("tcp and not port 15008 and {between}"))?;
    ensure!(others.is_empty(), "TCP that is not HBONE:\n{}", others.join("\n"));
    Ok(())
}

/// What leaves a pod is ciphertext, even if it does not leave the node: seen on the node's ends of the pods' links.
fn pods_of_one_node_are_encrypted_too(mesh: &Mesh) -> Result<()> {
    let near = mesh.pod("mesh", "near");
    for (from, is_clear) in [
        (mesh.pod("outside", "client"), true),
        (mesh.pod("mesh", "client"), false),
    ] {
        for address in near.addresses()? {
            let capture = Capture::of_node("node-1")?;
            say(from, address, MARKER)?;
            let packets = capture.stop()?;
            ensure!(
                packets.contain(MARKER) == is_clear,
                "{} to {address}: in clear is {}",
                from.key(),
                !is_clear
            );
        }
    }
    Ok(())
}
