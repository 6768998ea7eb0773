//! Who reaches whom: pods of the mesh and others, by pod and by service address, with real programs; and both ends see the
//! truth about each other.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use system_tests::{Mesh, Pod, netns, scenarios, wait};

scenarios![
    both_ends_see_the_true_addresses,
    a_service_address_leads_to_its_pod,
    a_pod_outside_the_mesh_is_reached_in_plaintext,
    a_pod_outside_the_mesh_reaches_in_where_policy_lets_it,
    a_pod_of_the_same_node_is_reached,
    a_pod_reaches_itself,
    curl_and_nginx_work,
    iperf3_works,
    udp_and_icmp_work_as_before,
    udp_and_icmp_are_dropped_where_that_is_set,
    large_datagrams_pass_in_fragments,
    a_captured_pod_has_no_firewall_rules,
];

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

fn text(address: IpAddr) -> String {
    address.to_string()
}

/// The client's `getpeername` is what it dialled; the server sees the client's own address.
fn addresses_are_true(from: Pod<'_>, to: IpAddr, port: &str) -> Result<()> {
    let own = from.addresses()?;
    let own = if to.is_ipv4() { own[0] } else { own[1] };
    let result = from.client(&["speaks-first", &text(to), port])?;
    let about = || format!("{} to {to}: {result}", from.key());
    ensure!(
        result["peer"] == json!([text(to), port.parse::<u16>()?]),
        "getpeername: {}",
        about()
    );
    ensure!(result["local"][0] == text(own), "getsockname: {}", about());
    let seen = result["server"]["peer"][0]
        .as_str()
        .map(|seen| seen.trim_start_matches("::ffff:").to_owned());
    ensure!(seen == Some(text(own)), "what the server sees: {}", about());
    let served = result["server"]["local"][1].as_u64();
    ensure!(served == Some(port.parse()?), "the server's getsockname: {}", about());
    Ok(())
}

fn both_ends_see_the_true_addresses(mesh: &Mesh) -> Result<()> {
    for to in [server(mesh), mesh.pod("mesh", "near"), mesh.pod("outside", "server")] {
        for address in to.addresses()? {
            addresses_are_true(client(mesh), address, "8002")?;
        }
    }
    Ok(())
}

/// The addresses of the service `server`, as the pods' resolvers find them.
fn service_addresses(mesh: &Mesh) -> Result<Vec<IpAddr>> {
    let said = client(mesh).exec(&["getent", "ahosts", "server"])?.good()?;
    let mut found: Vec<IpAddr> = said
        .lines()
        .filter_map(|line| line.split_whitespace().next()?.parse().ok())
        .collect();
    found.dedup();
    Ok(found)
}

fn a_service_address_leads_to_its_pod(mesh: &Mesh) -> Result<()> {
    let addresses = service_addresses(mesh)?;
    let expected: IpAddr = "10.96.77.7".parse()?;
    ensure!(addresses.contains(&expected), "{addresses:?} lacks {expected}");
    ensure!(addresses.iter().any(IpAddr::is_ipv6), "{addresses:?} has no IPv6");
    for address in addresses {
        addresses_are_true(client(mesh), address, "8002")?;
    }
    let said = client(mesh)
        .exec(&["curl", "-sS", "--max-time", "10", "http://server/"])?
        .good()?;
    ensure!(said.contains("GET server"), "{said}");
    Ok(())
}

fn a_pod_outside_the_mesh_is_reached_in_plaintext(mesh: &Mesh) -> Result<()> {
    for address in mesh.pod("outside", "server").addresses()? {
        let result = client(mesh).client(&["echo", &text(address), "8001", "plain", "100"])?;
        ensure!(result["same"] == true, "{result}");
    }
    Ok(())
}

fn a_pod_outside_the_mesh_reaches_in_where_policy_lets_it(mesh: &Mesh) -> Result<()> {
    let outside = mesh.pod("outside", "client");
    for address in server(mesh).addresses()? {
        let result = outside.client(&["echo", &text(address), "8001", "plain", "100"])?;
        ensure!(result["same"] == true, "{result}");
        addresses_are_true(outside, address, "8002")?;
    }
    Ok(())
}

fn a_pod_of_the_same_node_is_reached(mesh: &Mesh) -> Result<()> {
    for address in mesh.pod("mesh", "near").addresses()? {
        let result = client(mesh).client(&["echo", &text(address), "8001", "near", "100000"])?;
        ensure!(result["same"] == true, "{result}");
    }
    Ok(())
}

fn a_pod_reaches_itself(mesh: &Mesh) -> Result<()> {
    let [v4, v6] = server(mesh).addresses()?.map(text);
    for address in [v4.as_str(), v6.as_str(), "127.0.0.1", "::1"] {
        let result = server(mesh).client(&["echo", address, "8001", "self", "1000"])?;
        ensure!(result["same"] == true, "{address}: {result}");
        ensure!(result["peer"] == json!([address, 8001]), "{address}: {result}");
    }
    Ok(())
}

fn curl_and_nginx_work(mesh: &Mesh) -> Result<()> {
    for address in server(mesh).addresses()? {
        let host = if address.is_ipv6() {
            format!("[{address}]")
        } else {
            text(address)
        };
        let url = format!("http://{host}:8080/");
        // Two requests on one connection, then a large body each way.
        let said = client(mesh)
            .exec(&["curl", "-sS", "--max-time", "20", &url, &url])?
            .good()?;
        let own = client(mesh).addresses()?[usize::from(address.is_ipv6())];
        let expected = format!("{own} {address} GET {}\n", host);
        ensure!(said == expected.repeat(2), "{said}");
    }
    let host = text(server(mesh).v4()?);
    let post = format!("head -c 8000000 /dev/zero | curl -sS --max-time 20 --data-binary @- http://{host}:8080/");
    let said = client(mesh).exec(&["sh", "-c", &post])?.good()?;
    ensure!(said.contains("POST"), "{said}");
    Ok(())
}

fn iperf3_works(mesh: &Mesh) -> Result<()> {
    for address in server(mesh).addresses()? {
        // By bytes and not by time: that it works is what counts here, not how fast.
        let said = client(mesh).exec(&["iperf3", "-c", &text(address), "-n", "100M", "-P", "4", "-J"])?;
        let report: Value = serde_json::from_str(&said.stdout).with_context(|| format!("{said:?}"))?;
        // What the server had when it was asked at the end; some was still under way.
        let [sent, received] =
            ["sum_sent", "sum_received"].map(|sum| report["end"][sum]["bytes"].as_f64().unwrap_or(0.0));
        ensure!(
            sent >= 100e6 && received > 50e6,
            "iperf3 to {address}: {sent} sent, {received} received, {}",
            report["error"]
        );
    }
    Ok(())
}

/// The mesh does not carry UDP, and does not harm it: fragments of it are not taken for fragments of TCP.
fn large_datagrams_pass_in_fragments(mesh: &Mesh) -> Result<()> {
    let datagram = "d".repeat(20_000);
    for address in server(mesh).addresses()? {
        wait::until_true(&format!("a large datagram to {address} is answered"), || {
            Ok(client(mesh).client(&["udp", &text(address), "8012", &datagram])?["answered"] == true)
        })?;
    }
    Ok(())
}

fn ping(from: Pod<'_>, to: IpAddr) -> Result<bool> {
    // No ping program is needed: the kernel's ICMP sockets do.
    let code = format!(
        "import socket,sys\n\
         v6={}\n\
         s=socket.socket(socket.AF_INET6 if v6 else socket.AF_INET,socket.SOCK_DGRAM,58 if v6 else 1)\n\
         s.settimeout(2)\n\
         s.sendto(bytes([128 if v6 else 8,0,0,0,0,1,0,1])+b'ping',('{to}',0))\n\
         s.recv(100)\n",
        if to.is_ipv6() { "True" } else { "False" }
    );
    Ok(from.exec(&["python3", "-c", &code])?.code == Some(0))
}

fn udp(from: Pod<'_>, to: IpAddr) -> Result<bool> {
    Ok(from.client(&["udp", &to.to_string(), "8012"])?["answered"] == true)
}

fn udp_and_icmp_work_as_before(mesh: &Mesh) -> Result<()> {
    for to in [
        mesh.pod("mesh", "server"),
        mesh.pod("outside", "server"),
        mesh.pod("outside", "near"),
    ] {
        for address in to.addresses()? {
            wait::until_true(&format!("UDP to {address} is answered"), || udp(client(mesh), address))?;
            wait::until_true(&format!("ICMP to {address} is answered"), || {
                ping(client(mesh), address)
            })?;
        }
    }
    Ok(())
}

fn udp_and_icmp_are_dropped_where_that_is_set(mesh: &Mesh) -> Result<()> {
    let quiet = mesh.pod("escape", "tcp-only");
    let node = mesh.node("node-1");
    for address in mesh.pod("outside", "server").addresses()? {
        let before = node.dropped(&quiet)?;
        ensure!(!udp(quiet, address)?, "UDP to {address} is answered");
        ensure!(!ping(quiet, address)?, "ICMP to {address} is answered");
        wait::until_true("the drops are counted", || Ok(node.dropped(&quiet)? > before + 1))?;
    }
    // TCP, and what it needs of ICMP and neighbour discovery, still works.
    for address in mesh.pod("mesh", "server").addresses()? {
        let result = quiet.client(&["echo", &address.to_string(), "8001", "tcp", "10000"])?;
        ensure!(result["same"] == true, "{result}");
    }
    Ok(())
}

/// Before the way of capture is ever changed: what rules carried may need some of them for a while afterwards.
fn a_captured_pod_has_no_firewall_rules(mesh: &Mesh) -> Result<()> {
    for pod in [client(mesh), server(mesh)] {
        for program in ["iptables-save", "ip6tables-save"] {
            let said = netns::says(&pod.netns(), program, &[])?;
            let rules: Vec<_> = said.lines().filter(|line| line.starts_with("-A")).collect();
            ensure!(rules.is_empty(), "{}: {rules:?}", pod.key());
        }
        let said = netns::says(&pod.netns(), "nft", &["list", "ruleset"])?;
        ensure!(said.trim().is_empty(), "{}: {said}", pod.key());
    }
    Ok(())
}
