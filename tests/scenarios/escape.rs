//! Ways out of a pod, tried as root in it with CAP_NET_RAW and CAP_NET_ADMIN: none leads TCP past the mesh.
//!
//! The judge is outside: a capture on the fabric and one in a pod beside the attacker. Every way has a text and a range
//! of source ports of its own, above 61000: from there agents dial the applications, but not what is outside of a pod. A
//! text addressed to a pod of the mesh must not
//! be seen at all; to a pod outside the mesh the agent passes it on in plaintext, and then from a port of its own.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use system_tests::{
    Capture, Mesh, Pod,
    capture::Packets,
    netns,
    pod::no_error,
    scenarios,
    suite::{note, part_not_run},
    wait,
};

scenarios![
    the_judge_sees_what_escapes,
    sockets_do_not_escape,
    hand_made_packets_do_not_escape,
    a_nested_namespace_is_no_way_out,
    every_try_is_counted,
    a_captured_socket_reaches_its_peer_through_the_mesh,
    the_proxys_ports_cannot_be_dialled,
    the_proxys_ports_cannot_be_stolen,
    a_pod_that_breaks_its_own_routes_is_repaired_and_leaks_nothing,
    ports_taken_and_sockets_made_before_enrolment_do_not_escape,
];

fn attacker(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("escape", "attacker")
}

/// Ways that use the kernel's TCP.
const SOCKETS: &[&str] = &[
    "tcp",
    "fast_open_by_sendto",
    "fast_open_by_connect",
    "marks",
    "devices",
    "v4_mapped",
    "mptcp",
    "user_1337",
    "again_after_disconnect",
    "repair",
    "foreign_source",
    "added_address",
    "nat_in_the_pod",
    "io_uring",
];

/// Ways that make their own packets.
const PACKETS: &[&str] = &[
    "raw_ip",
    "raw_tcp",
    "fragments",
    "encapsulated",
    "packet_socket",
    "packet_socket_with_vlan",
    "packet_socket_with_odd_type",
    "other_pods_address",
];

/// What this way sends; to pods outside the mesh something else, which the agent may pass on.
fn text(way: &str, to_the_mesh: bool) -> String {
    format!("{}-{way}-", if to_the_mesh { "secret" } else { "allowed" })
}

fn strings(addresses: impl IntoIterator<Item = IpAddr>) -> Vec<String> {
    addresses.into_iter().map(|address| address.to_string()).collect()
}

fn targets(mesh: &Mesh) -> Result<(Vec<String>, Vec<String>)> {
    let inside = strings(mesh.pod("mesh", "server").addresses()?);
    let outside = [
        mesh.pod("outside", "server").addresses()?,
        mesh.pod("outside", "near").addresses()?,
    ];
    Ok((inside, strings(outside.concat())))
}

/// Tries a way; what gets no answer is given up soon.
fn try_way(from: Pod<'_>, way: &str, text: &str, targets: &[String]) -> Result<Value> {
    try_for("1", from, way, text, targets)
}

/// As [`try_way`], with so many seconds for each answer.
fn try_for(seconds: &str, from: Pod<'_>, way: &str, text: &str, targets: &[String]) -> Result<Value> {
    let targets: Vec<&str> = targets.iter().map(String::as_str).collect();
    from.script("escape.py", &[&[seconds, way, text], &targets[..]].concat())
}

/// What was seen outside of the pod while something was tried.
struct Seen {
    fabric: Packets,
    near: Packets,
    control: [IpAddr; 2],
}

fn watched(mesh: &Mesh, work: impl FnOnce() -> Result<()>) -> Result<Seen> {
    let near = mesh.pod("outside", "near");
    let fabric = Capture::on_fabric()?;
    let beside = Capture::of_pod(&near.netns(), "uc-node-1", near.v4()?)?;
    work()?;
    Ok(Seen {
        fabric: fabric.stop()?,
        near: beside.stop()?,
        control: mesh.pod("outside", "client").addresses()?,
    })
}

/// Source ports that only an attacker uses, of what is seen outside of the pods.
const FROM_ATTACKERS: &str = "tcp and src portrange 61000-61999";

impl Seen {
    fn shows(&self, text: &str) -> bool {
        self.fabric.contain(text) || self.near.contain(text)
    }

    fn escaped(&self) -> Result<Vec<String>> {
        // The pod of the control may still be answered, and then says that it knows of nothing.
        let [v4, v6] = self.control;
        let filter = format!("{FROM_ATTACKERS} and not src host {v4} and not src host {v6}");
        Ok([self.fabric.matching(&filter)?, self.near.matching(&filter)?].concat())
    }
}

/// Tries ways, and fails with every one that got out.
fn none_escapes(mesh: &Mesh, ways: &[&str]) -> Result<()> {
    let (inside, outside) = targets(mesh)?;
    let mut tried = Vec::new();
    let seen = watched(mesh, || {
        for way in ways {
            let secret = try_way(attacker(mesh), way, &text(way, true), &inside)?;
            let allowed = try_way(attacker(mesh), way, &text(way, false), &outside)?;
            tried.push(format!("{way}: {secret} {allowed}"));
        }
        Ok(())
    })?;
    let mut escaped: Vec<String> = ways
        .iter()
        .filter(|way| seen.shows(&text(way, true)))
        .map(|way| format!("in clear: {way}"))
        .collect();
    escaped.extend(seen.escaped()?);
    let tried = tried.join("\n");
    note(&tried);
    ensure!(escaped.is_empty(), "escaped:\n{}\ntried:\n{tried}", escaped.join("\n"));
    Ok(())
}

/// The control: the same ways, from a pod that is not in the mesh, are seen.
fn the_judge_sees_what_escapes(mesh: &Mesh) -> Result<()> {
    let (inside, outside) = targets(mesh)?;
    for way in ["tcp", "raw_ip", "packet_socket", "fragments"] {
        let seen = watched(mesh, || {
            try_way(mesh.pod("outside", "client"), way, &text(way, true), &inside).map(drop)
        })?;
        ensure!(
            seen.shows(&text(way, true)),
            "{way} was not seen: the other scenarios would prove nothing"
        );
    }
    let seen = watched(mesh, || {
        try_way(mesh.pod("outside", "client"), "tcp", &text("tcp", true), &outside).map(drop)
    })?;
    ensure!(
        !seen.near.matching(FROM_ATTACKERS)?.is_empty(),
        "the pod beside does not see what it gets"
    );
    ensure!(
        !seen.fabric.matching(FROM_ATTACKERS)?.is_empty(),
        "the fabric does not show source ports"
    );
    Ok(())
}

fn sockets_do_not_escape(mesh: &Mesh) -> Result<()> {
    none_escapes(mesh, SOCKETS)
}

fn hand_made_packets_do_not_escape(mesh: &Mesh) -> Result<()> {
    none_escapes(mesh, PACKETS)
}

fn a_nested_namespace_is_no_way_out(mesh: &Mesh) -> Result<()> {
    let (inside, _) = targets(mesh)?;
    let way = "nested_namespace";
    let mut result = Value::Null;
    let seen = watched(mesh, || {
        result = try_way(attacker(mesh), way, &text(way, true), &inside)?;
        Ok(())
    })?;
    note(&result.to_string());
    ensure!(!seen.shows(&text(way, true)), "in clear: {result}");
    let escaped = seen.escaped()?;
    ensure!(escaped.is_empty(), "escaped: {}", escaped.join("\n"));
    if result.to_string().contains("unshare is not permitted") {
        return part_not_run(
            "escape::a_nested_namespace_is_no_way_out",
            "the kernel lets no pod make namespaces",
        );
    }
    // The pod has had its own link bridged away: that is over.
    wait::until_true("the pod's own network works again", || {
        let mut works = true;
        for address in &inside {
            works &= attacker(mesh).client(&["echo", address, "8001"])?["same"] == true;
        }
        Ok(works)
    })
}

fn every_try_is_counted(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-1");
    let (inside, _) = targets(mesh)?;
    for way in [
        "raw_ip",
        "raw_tcp",
        "packet_socket",
        "packet_socket_with_vlan",
        "fragments",
    ] {
        let before = node.dropped(&attacker(mesh))?;
        try_way(attacker(mesh), way, &text(way, true), &inside)?;
        wait::until_true(&format!("drops of {way} are counted"), || {
            Ok(node.dropped(&attacker(mesh))? > before)
        })?;
    }
    let outbound = || anyhow::Ok(node.status()?.connections.get("outbound").copied().unwrap_or(0));
    let before = outbound()?;
    try_way(attacker(mesh), "marks", &text("marks", true), &inside)?;
    wait::until_true("captured connections are counted", || Ok(outbound()? > before))
}

/// Capture is not only that nothing gets out: what may go, arrives.
fn a_captured_socket_reaches_its_peer_through_the_mesh(mesh: &Mesh) -> Result<()> {
    let (inside, outside) = targets(mesh)?;
    for way in [
        "tcp",
        "fast_open_by_connect",
        "v4_mapped",
        "mptcp",
        "user_1337",
        "io_uring",
    ] {
        for (text, targets) in [(text(way, true), &inside), (text(way, false), &outside)] {
            let result = try_for("8", attacker(mesh), way, &text, targets)?;
            for (target, outcome) in result.as_object().context("not an object")? {
                let fine = *outcome == "echo" || *outcome == "not for IPv6";
                ensure!(fine, "{way} to {target}: {outcome}");
            }
        }
    }
    Ok(())
}

fn the_proxys_ports_cannot_be_dialled(mesh: &Mesh) -> Result<()> {
    let own = attacker(mesh).addresses()?;
    let far = mesh.pod("mesh", "server").addresses()?;
    let near = mesh.pod("mesh", "near").addresses()?;
    for address in strings([own, far, near].concat().into_iter().chain(["127.0.0.1".parse()?])) {
        for port in ["15001", "15006", "15008"] {
            let result = attacker(mesh).client(&["refused", &address, port, "5"])?;
            // At the most an alert of TLS from 15008, which is open to whoever has a certificate.
            let served = result["bytes"].as_u64().unwrap_or(0);
            let may = if port == "15008" { 7 } else { 0 };
            ensure!(served <= may, "{address}:{port} answered: {result}");
        }
    }
    // Nobody goes round in circles.
    a_captured_socket_reaches_its_peer_through_the_mesh(mesh)
}

const PORTS: [&str; 3] = ["15001", "15006", "15008"];

fn the_proxys_ports_cannot_be_stolen(mesh: &Mesh) -> Result<()> {
    let vandal = mesh.pod("escape", "vandal");
    let thief = vandal.start("steal.py", &PORTS)?;
    note(&thief.next()?.to_string());
    for address in mesh.pod("mesh", "server").addresses()? {
        let result = vandal.client(&["echo", &address.to_string(), "8001", "mine", "100"])?;
        ensure!(result["same"] == true, "outbound: {result}");
    }
    for address in vandal.addresses()? {
        // Nobody serves this port: what matters is who is asked, and that is the agent.
        mesh.pod("mesh", "client")
            .client(&["refused", &address.to_string(), "8099"])?;
        mesh.pod("outside", "client")
            .client(&["refused", &address.to_string(), "8099"])?;
    }
    let came = thief.finish()?;
    let own = vandal.addresses()?;
    let stolen = came["came"].as_array().context("no list")?;
    ensure!(stolen.is_empty(), "connections of {own:?} were taken over: {came}");
    Ok(())
}

fn a_pod_that_breaks_its_own_routes_is_repaired_and_leaks_nothing(mesh: &Mesh) -> Result<()> {
    let vandal = mesh.pod("escape", "vandal");
    let way = "tcp";
    let (inside, _) = targets(mesh)?;
    let broken = "for v in -4 -6; do while ip $v rule del fwmark 0x539/0xfff 2>/dev/null || ip $v rule del fwmark 0x539 2>/dev/null; do :; done; \
                  ip $v route flush table 100 2>/dev/null; done; ip rule; ip -6 rule";
    let seen = watched(mesh, || {
        note(&vandal.exec(&["sh", "-c", broken])?.stdout);
        try_way(vandal, way, &text(way, true), &inside)?;
        try_way(vandal, "raw_ip", &text("raw_ip", true), &inside)?;
        Ok(())
    })?;
    ensure!(
        !seen.shows(&text(way, true)) && !seen.shows(&text("raw_ip", true)),
        "in clear"
    );
    let escaped = seen.escaped()?;
    ensure!(escaped.is_empty(), "escaped: {}", escaped.join("\n"));
    // The agent looks after its pods by itself.
    wait::until_within(std::time::Duration::from_secs(40), "the rules are there again", || {
        let [v4, v6] = ["-4", "-6"].map(|version| netns::says(&vandal.netns(), "ip", &[version, "rule"]));
        Ok((v4?.contains("0x539") && v6?.contains("0x539")).then_some(()))
    })
}

fn ports_taken_and_sockets_made_before_enrolment_do_not_escape(mesh: &Mesh) -> Result<()> {
    let early = mesh.pod("late", "early-bird");
    let mut thief = early.start("steal.py", &PORTS)?;
    let listens = thief.next()?;
    ensure!(
        PORTS.iter().all(|port| listens[port] == "listens"),
        "before enrolment any port is free: {listens}"
    );
    mesh.enrol("early-bird", true)?;
    let server = mesh.pod("outside", "server").v4()?;
    let seen = watched(mesh, || {
        thief.say(&format!("connect {server} 8002"))?;
        let result = no_error(thief.next()?)?;
        ensure!(
            result["peer"][1] != 61900,
            "the server sees the socket's own port: it was not captured: {result}"
        );
        Ok(())
    })?;
    let escaped = seen.escaped()?;
    ensure!(escaped.is_empty(), "escaped: {}", escaped.join("\n"));
    for address in mesh.pod("mesh", "server").addresses()? {
        let result = early.client(&["echo", &address.to_string(), "8001", "mine", "100"])?;
        ensure!(result["same"] == true, "outbound: {result}");
    }
    for address in early.addresses()? {
        mesh.pod("mesh", "client")
            .client(&["refused", &address.to_string(), "8099"])?;
        mesh.pod("outside", "client")
            .client(&["refused", &address.to_string(), "8099"])?;
    }
    let came = thief.finish()?;
    mesh.enrol("early-bird", false)?;
    ensure!(
        came["came"].as_array().is_some_and(Vec::is_empty),
        "connections were taken over: {came}"
    );
    Ok(())
}
