//! The pods' name server: what the mesh knows is answered at once, the rest comes from the server that was asked, untouched.
//! With each resolver's way of asking.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{Background, Mesh, Pod, machine, scenarios, wait};

scenarios![
    every_name_of_a_service_is_found,
    pods_of_a_headless_service_and_hosts_of_service_entries_are_found,
    what_the_mesh_does_not_know_passes_untouched,
    every_resolver_sees_the_server_that_it_asked,
    what_is_cut_short_is_asked_again_over_tcp,
    a_name_server_that_is_away_holds_up_nothing_that_the_mesh_knows,
    nobody_else_is_answered,
    a_pod_may_ask_its_own_name_server,
    without_an_agent_name_servers_are_asked_directly,
    name_servers_are_asked_directly_while_the_agent_is_told_to_leave_them_alone,
];

const SERVICE: &str = "server.mesh.svc.cluster.local";
const VIP: &str = "10.96.77.7";

fn client(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "client")
}

/// A name server outside the mesh; ended with the value.
fn upstream(mesh: &Mesh) -> Result<(Background, IpAddr, IpAddr)> {
    let pod = mesh.pod("outside", "near");
    let [v4, v6] = pod.addresses()?;
    let serving = pod.start("dns.py", &["serve"])?;
    serving.next()?;
    Ok((serving, v4, v6))
}

fn ask(from: Pod<'_>, pattern: &str, server: &str, name: &str, kind: &str) -> Result<Value> {
    from.script("dns.py", &["ask", pattern, server, name, kind])
}

#[track_caller]
fn found(answer: &Value, addresses: &[&str]) -> Result<()> {
    ensure!(
        answer["rcode"] == 0 && answer["addresses"] == serde_json::json!(addresses),
        "{answer}"
    );
    Ok(())
}

fn every_name_of_a_service_is_found(mesh: &Mesh) -> Result<()> {
    for name in [
        "server",
        "server.mesh",
        "server.mesh.svc",
        SERVICE,
        "server.mesh.svc.cluster.local.",
    ] {
        let said = client(mesh).exec(&["getent", "ahostsv4", name])?.good()?;
        ensure!(said.starts_with(VIP), "{name}: {said}");
        let said = client(mesh).exec(&["getent", "ahostsv6", name])?.good()?;
        ensure!(said.contains(':') && !said.contains(VIP), "{name}: {said}");
    }
    let said = client(mesh).exec(&["curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", "http://server/"])?;
    ensure!(said.stdout == "200", "{said:?}");
    let said = client(mesh).exec(&["getent", "ahosts", "nobody.mesh"])?;
    ensure!(said.code == Some(2), "a name that is not there is found: {said:?}");
    Ok(())
}

fn pods_of_a_headless_service_and_hosts_of_service_entries_are_found(mesh: &Mesh) -> Result<()> {
    let (_serving, server, _) = upstream(mesh)?;
    let server = server.to_string();
    let [v4, v6] = mesh.pod("mesh", "server").addresses()?.map(|ip| ip.to_string());
    for (name, kind, address) in [
        ("peers.mesh.svc.cluster.local", "A", &*v4),
        ("peers.mesh.svc.cluster.local", "AAAA", &*v6),
        ("server.peers.mesh.svc.cluster.local", "A", &*v4),
        ("peers4.mesh.svc.cluster.local", "A", &*v4),
        ("any.wild.example", "A", "240.11.0.1"),
        ("any.wild.example.mesh.svc.cluster.local", "A", "240.11.0.1"),
    ] {
        found(&ask(client(mesh), "glibc", &server, name, kind)?, &[address]).context(name)?;
    }
    // Known, but not by this family.
    for name in ["any.wild.example", "peers4.mesh.svc.cluster.local"] {
        found(&ask(client(mesh), "glibc", &server, name, "AAAA")?, &[]).context(name)?;
    }
    Ok(())
}

fn what_the_mesh_does_not_know_passes_untouched(mesh: &Mesh) -> Result<()> {
    let (_serving, server, server6) = upstream(mesh)?;
    let own = client(mesh).addresses()?;
    for (server, own) in [(server, own[0]), (server6, own[1])] {
        for (pattern, name, kind) in [
            ("glibc", "_http._tcp.server.mesh.svc.cluster.local", "SRV"),
            ("go", SERVICE, "TXT"),
            ("musl", SERVICE, "HTTPS"),
            ("tcp", "7.77.96.10.in-addr.arpa", "PTR"),
            ("glibc", "example.com", "A"),
            ("tcp", "example.com", "AAAA"),
        ] {
            let answer = ask(client(mesh), pattern, &server.to_string(), name, kind)?;
            ensure!(answer["untouched"] == true, "{name} {kind} by {pattern}: {answer}");
            let asked_by = answer["asked_by"].as_str().unwrap_or_default();
            ensure!(
                asked_by == own.to_string(),
                "{pattern} {server}: asked by {asked_by}, not by {own}"
            );
        }
    }
    Ok(())
}

fn every_resolver_sees_the_server_that_it_asked(mesh: &Mesh) -> Result<()> {
    let (_serving, server, server6) = upstream(mesh)?;
    let (v4, v6) = (server.to_string(), server6.to_string());
    let own = client(mesh).addresses()?.map(|ip| ip.to_string());
    for name in [SERVICE, "example.com"] {
        for (pattern, servers, from) in [
            ("glibc", v4.clone(), v4.clone()),
            ("glibc", v6.clone(), v6.clone()),
            ("go", v4.clone(), v4.clone()),
            ("go", v6.clone(), v6.clone()),
            ("musl", v4.clone(), v4.clone()),
            ("musl", v6.clone(), v6.clone()),
            ("mapped", v4.clone(), format!("::ffff:{v4}")),
            ("tcp", v4.clone(), v4.clone()),
        ] {
            let answer = ask(client(mesh), pattern, &servers, name, "A")?;
            ensure!(
                answer["from"][0] == from && answer["from"][1] == 53,
                "{pattern} {name}: {answer}"
            );
            ensure!(
                answer["id"] == true && answer["rcode"] == 0,
                "{pattern} {name}: {answer}"
            );
            if pattern == "go" {
                ensure!(
                    own.iter().any(|own| answer["local"] == **own),
                    "not the pod's own address: {answer}"
                );
            }
        }
        // Two servers from one socket, and one of them is not there.
        let answer = ask(client(mesh), "musl", &format!("{v4},192.0.2.53"), name, "A")?;
        ensure!(answer["rcode"] == 0, "{answer}");
    }
    Ok(())
}

fn what_is_cut_short_is_asked_again_over_tcp(mesh: &Mesh) -> Result<()> {
    let (_serving, server, _) = upstream(mesh)?;
    let server = server.to_string();
    let answer = ask(client(mesh), "glibc", &server, "big.example.com", "TXT")?;
    ensure!(answer["truncated"] == true, "{answer}");
    let answer = ask(client(mesh), "tcp", &server, "big.example.com", "TXT")?;
    ensure!(answer["truncated"] == false && answer["untouched"] == true, "{answer}");
    found(&ask(client(mesh), "tcp", &server, SERVICE, "A")?, &[VIP])
}

fn a_name_server_that_is_away_holds_up_nothing_that_the_mesh_knows(mesh: &Mesh) -> Result<()> {
    // Documentation addresses: nobody answers, or a router says so.
    let away = "192.0.2.54";
    for pattern in ["glibc", "go", "tcp"] {
        found(&ask(client(mesh), pattern, away, SERVICE, "A")?, &[VIP]).context(pattern)?;
    }
    // Who asks for what nobody knows is told so, before a resolver's patience of 5 s ends.
    let (_serving, server, _) = upstream(mesh)?;
    let answer = ask(client(mesh), "go", &server.to_string(), "slow.example.com", "A")?;
    ensure!(answer["rcode"] == 2, "not SERVFAIL: {answer}");
    Ok(())
}

fn nobody_else_is_answered(mesh: &Mesh) -> Result<()> {
    let victim = client(mesh).v4()?.to_string();
    let script = format!(
        "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(1)\n\
         s.sendto(b'\\x12\\x34\\x01\\0\\0\\x01\\0\\0\\0\\0\\0\\0\\x06server\\x04mesh\\0\\0\\x01\\0\\x01', ('{victim}', 15053))\n\
         try: print('answered', s.recv(512))\nexcept OSError as error: print('refused')"
    );
    for other in [mesh.pod("outside", "client"), mesh.pod("mesh", "near")] {
        let said = other.exec(&[machine::python(), "-c", &script])?.good()?;
        ensure!(said.trim() == "refused", "{}: {said}", other.key());
    }
    Ok(())
}

fn a_pod_may_ask_its_own_name_server(mesh: &Mesh) -> Result<()> {
    let (_serving, server, _) = upstream(mesh)?;
    let pod = mesh.pod("mesh", "asks-itself");
    for pattern in ["glibc", "musl"] {
        let answer = ask(pod, pattern, &server.to_string(), "any.wild.example", "A")?;
        ensure!(answer["untouched"] == true, "{pattern}: {answer}");
    }
    Ok(())
}

fn without_an_agent_name_servers_are_asked_directly(mesh: &Mesh) -> Result<()> {
    let (_serving, server, _) = upstream(mesh)?;
    let server = server.to_string();
    let node = mesh.node("node-1");
    node.kill_agent()?;
    let directly = ["glibc", "go", "musl", "mapped"].map(|pattern| {
        let answer = ask(client(mesh), pattern, &server, "any.wild.example", "A")?;
        ensure!(answer["untouched"] == true, "{pattern}: {answer}");
        Ok(())
    });
    node.start_agent()?;
    directly.into_iter().collect::<Result<Vec<()>>>()?;
    wait::until_true("the agent answers again", || {
        let answer = ask(client(mesh), "glibc", &server, "any.wild.example", "A")?;
        Ok(answer["addresses"] == serde_json::json!(["240.11.0.1"]))
    })
}

/// Pods run on while the agent is replaced by one with the other setting, and back.
fn name_servers_are_asked_directly_while_the_agent_is_told_to_leave_them_alone(mesh: &Mesh) -> Result<()> {
    let (_serving, server, _) = upstream(mesh)?;
    let server = server.to_string();
    // The mesh knows this name; the server, which answers anything, says something else.
    let is_ours = |pattern: &str| {
        let answer = ask(client(mesh), pattern, &server, "any.wild.example", "A")?;
        let by_the_mesh = answer["addresses"] == serde_json::json!(["240.11.0.1"]);
        ensure!(by_the_mesh != (answer["untouched"] == true), "{pattern}: {answer}");
        Ok(by_the_mesh)
    };
    let patterns = ["glibc", "go", "musl", "mapped", "tcp"];
    let node = mesh.node("node-1");
    for (option, expected) in [(Some(("UNDERCURRENT_DNS_CAPTURE", "false")), false), (None, true)] {
        node.restart_agent(option)?;
        let all = patterns.map(|pattern| {
            wait::until_true(&format!("{pattern}: the mesh answers: {expected}"), || {
                Ok(is_ours(pattern)? == expected)
            })
        });
        if !expected && all.iter().any(Result::is_err) {
            node.restart_agent(None)?;
        }
        all.into_iter().collect::<Result<()>>()?;
    }
    Ok(())
}
