//! Bad input from the network on 15008: refused, with a line that says what it was, at a bounded cost, and to nobody
//! else's harm.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use system_tests::{
    Mesh, Pod,
    forge::{self, Offer, Outcome},
    mesh::Log,
    scenarios, wait,
};

scenarios![
    a_forged_client_with_the_right_certificate_is_served,
    no_certificate_is_refused_and_said,
    a_certificate_of_another_authority_is_refused_and_said,
    an_expired_certificate_is_refused_and_said,
    another_trust_domain_is_refused_and_said,
    plain_http_is_refused_and_said,
    random_bytes_are_refused_and_said,
    tls_for_another_protocol_is_refused_and_said,
    garbage_inside_of_a_tunnel_is_refused,
    a_huge_header_is_refused,
    a_connect_to_another_address_is_refused,
    a_connect_to_the_proxys_own_ports_is_refused,
    a_connect_to_nonsense_is_refused,
    a_thousand_half_open_handshakes_harm_nobody,
    nothing_of_all_this_is_kept,
];

const FRIEND: &str = "spiffe://cluster.local/ns/mesh/sa/client";

/// Where the forger is: a pod outside the mesh, on the other node.
const FROM: &str = "uc-outside-client";

fn server(mesh: &Mesh) -> Pod<'_> {
    mesh.pod("mesh", "server")
}

fn hbone(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, 15008)
}

fn target(address: IpAddr, port: u16) -> String {
    SocketAddr::new(address, port).to_string()
}

fn log(mesh: &Mesh) -> Result<Log> {
    mesh.node("node-2").access_log()
}

/// The line of the access log about a forger: with its address and these words.
fn is_said(log: &Log, mesh: &Mesh, words: &[&str]) -> Result<()> {
    let from = mesh.pod("outside", "client").v4()?.to_string();
    log.line_with(&[&[from.as_str()], words].concat()).map(drop)
}

fn still_serves(mesh: &Mesh) -> Result<()> {
    for address in server(mesh).addresses()? {
        let result = mesh
            .pod("mesh", "client")
            .client(&["echo", &address.to_string(), "8001", "fine", "1000"])?;
        ensure!(result["same"] == true, "the others suffer: {result}");
    }
    Ok(())
}

/// The control: a forger with everything right is served; what is refused below is refused for its one fault.
fn a_forged_client_with_the_right_certificate_is_served(mesh: &Mesh) -> Result<()> {
    for address in server(mesh).addresses()? {
        let outcome = forge::connect(
            FROM,
            hbone(address),
            Offer::of(mesh, FRIEND)?,
            &target(address, 8001),
            &[],
        )?;
        ensure!(outcome == Outcome::Status(200), "{outcome:?}");
    }
    Ok(())
}

fn is_refused(mesh: &Mesh, offer: Offer, words: &[&str]) -> Result<()> {
    let address = server(mesh).v4()?;
    let log = log(mesh)?;
    let outcome = forge::connect(FROM, hbone(address), offer, &target(address, 8001), &[])?;
    ensure!(outcome.is_refused(), "{outcome:?}");
    is_said(&log, mesh, words)?;
    still_serves(mesh)
}

fn no_certificate_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    is_refused(mesh, Offer::no_certificate(), &["sent no certificate"])
}

fn a_certificate_of_another_authority_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    is_refused(mesh, Offer::by_a_stranger(FRIEND)?, &["authority", "trust"])
}

fn an_expired_certificate_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    is_refused(mesh, Offer::expired(mesh, FRIEND)?, &["expired"])
}

fn another_trust_domain_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    let other = "spiffe://other.example/ns/mesh/sa/client";
    is_refused(mesh, Offer::of(mesh, other)?, &["other.example", "trust domain"])
}

fn bytes_are_refused(mesh: &Mesh, bytes: &[u8], words: &[&str]) -> Result<()> {
    let address = server(mesh).v4()?;
    let log = log(mesh)?;
    let answer = forge::send_raw(FROM, hbone(address), bytes)?;
    // At the most an alert of TLS: fifteen is its content type.
    ensure!(answer.is_empty() || answer[0] == 0x15, "{answer:02x?}");
    is_said(&log, mesh, words)?;
    still_serves(mesh)
}

fn plain_http_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    bytes_are_refused(mesh, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", &["plain HTTP"])?;
    bytes_are_refused(mesh, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &["plain HTTP"])
}

fn random_bytes_are_refused_and_said(mesh: &Mesh) -> Result<()> {
    // The first byte is no TLS record's and no letter.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let noise = (0..4096).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    });
    let bytes: Vec<u8> = std::iter::once(0xf1).chain(noise).collect();
    bytes_are_refused(mesh, &bytes, &["does not speak TLS"])?;
    // A record that claims to be of a handshake, and holds none.
    let mut record = vec![0x16, 3, 1, 0x0f, 0xff];
    record.extend(&bytes);
    bytes_are_refused(mesh, &record, &["TLS"])
}

fn tls_for_another_protocol_is_refused_and_said(mesh: &Mesh) -> Result<()> {
    is_refused(mesh, Offer::of(mesh, FRIEND)?.with_alpn(&["http/1.1"]), &["HTTP/2"])?;
    // Without any it is served, as ztunnel does: the certificate decides.
    let address = server(mesh).v4()?;
    let outcome = forge::connect(
        FROM,
        hbone(address),
        Offer::of(mesh, FRIEND)?.with_alpn(&[]),
        &target(address, 8001),
        &[],
    )?;
    ensure!(outcome == Outcome::Status(200) || outcome.is_refused(), "{outcome:?}");
    Ok(())
}

fn garbage_inside_of_a_tunnel_is_refused(mesh: &Mesh) -> Result<()> {
    let address = server(mesh).v4()?;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    // A frame of 16 MiB; one of an odd length; HEADERS that are no HPACK; a CONNECT that is HTTP/1.
    let frames: [&[u8]; 4] = [
        &[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1],
        &[0, 0, 3, 4, 0, 0, 0, 0, 0, 1, 2, 3],
        &[0, 0, 4, 1, 5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff],
        b"CONNECT 10.0.0.1:80 HTTP/1.1\r\n\r\n",
    ];
    for frame in frames {
        let log = log(mesh)?;
        let empty_settings = [0, 0, 0, 4, 0, 0, 0, 0, 0];
        let bytes = if frame[0] == b'C' {
            frame.to_vec()
        } else {
            [&preface[..], &empty_settings, frame].concat()
        };
        forge::send_inside(FROM, hbone(address), Offer::of(mesh, FRIEND)?, &bytes)?;
        is_said(&log, mesh, &["HTTP/2"])?;
    }
    still_serves(mesh)
}

fn a_huge_header_is_refused(mesh: &Mesh) -> Result<()> {
    let address = server(mesh).v4()?;
    let huge = "x".repeat(200 << 10);
    let before = mesh.node("node-2").agent_rss()?;
    for _ in 0..5 {
        let outcome = forge::connect(
            FROM,
            hbone(address),
            Offer::of(mesh, FRIEND)?,
            &target(address, 8001),
            &[("baggage", &huge)],
        )?;
        ensure!(outcome != Outcome::Status(200), "200 KiB of header were accepted");
    }
    let after = mesh.node("node-2").agent_rss()?;
    ensure!(
        after < before + (16 << 10),
        "the agent grew from {before} to {after} KiB"
    );
    still_serves(mesh)
}

fn answers_with(mesh: &Mesh, authority: &str, status: u16) -> Result<()> {
    let address = server(mesh).v4()?;
    let outcome = forge::connect(FROM, hbone(address), Offer::of(mesh, FRIEND)?, authority, &[])?;
    ensure!(
        outcome == Outcome::Status(status),
        "CONNECT {authority}: {outcome:?} and not {status}"
    );
    Ok(())
}

fn a_connect_to_another_address_is_refused(mesh: &Mesh) -> Result<()> {
    let log = mesh.node("node-2").access_log()?;
    let others = [
        target(mesh.pod("outside", "server").v4()?, 8001),
        target(mesh.pod("mesh", "mortal").v4()?, 8001),
        target(server(mesh).v6()?, 8001),
        "127.0.0.1:8001".to_owned(),
        "169.254.1.1:8001".to_owned(),
        "10.96.77.7:80".to_owned(),
    ];
    for other in others {
        answers_with(mesh, &other, 400)?;
    }
    log.line_with(&["not this pod", "error="]).map(drop)
}

fn a_connect_to_the_proxys_own_ports_is_refused(mesh: &Mesh) -> Result<()> {
    let address = server(mesh).v4()?;
    for port in [15001, 15006, 15008] {
        answers_with(mesh, &target(address, port), 503)?;
    }
    answers_with(mesh, &target(address, 8099), 503)
}

fn a_connect_to_nonsense_is_refused(mesh: &Mesh) -> Result<()> {
    answers_with(mesh, "nobody.nowhere.svc.cluster.local:80", 503)
}

fn a_thousand_half_open_handshakes_harm_nobody(mesh: &Mesh) -> Result<()> {
    let node = mesh.node("node-2");
    let (memory, files) = (node.agent_rss()?, node.agent_files()?);
    let address = server(mesh).v4()?;
    let open = forge::half_open(FROM, hbone(address), 1000)?;
    still_serves(mesh)?;
    // And a newcomer gets its handshake.
    a_forged_client_with_the_right_certificate_is_served(mesh)?;
    let now = node.agent_rss()?;
    ensure!(now < memory + (96 << 10), "the agent grew from {memory} to {now} KiB");
    drop(open);
    wait::until_true("the agent lets go of them", || Ok(node.agent_files()? < files + 50))
}

fn nothing_of_all_this_is_kept(mesh: &Mesh) -> Result<()> {
    let status = mesh.node("node-2").status()?;
    ensure!(status.pending.is_empty(), "not ready: {:?}", status.pending);
    let panicked = status
        .connections
        .iter()
        .find(|(name, _)| name.contains("panicked"))
        .map_or(0, |(_, count)| *count);
    ensure!(panicked == 0, "{panicked} connections ended by a bug");
    let path = mesh.file("nodes/node-2/agent.log");
    let log = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(
        !log.contains("panicked at"),
        "the agent panicked: see {}",
        path.display()
    );
    Ok(())
}
