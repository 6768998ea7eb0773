//! The whole path: client → outbound → HBONE → inbound → server, with real certificates and policies.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    time::Duration,
};

use l4::{Config, ConnectionInfo, FailureKind};
use lab::{
    Lab, LabPod, echo, eventually, expect_echo, expect_refused, expect_reset, new_address, policy,
    two::{Two, two},
};
use model::{Action, Authority, Match, StringMatch, TunnelProtocol};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

fn strict() -> model::Policy {
    policy(
        "strict",
        Action::Deny,
        Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        },
    )
}

fn deny_client() -> model::Policy {
    let client = StringMatch::Exact("cluster.local/ns/shop/sa/client".into());
    policy(
        "no-client",
        Action::Deny,
        Match {
            principals: vec![client],
            ..Match::default()
        },
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_talks_to_a_pod_and_both_logs_tell() {
    let mut two = two();
    two.lab.contents.policies.push(strict());
    two.lab.publish();
    let listener = two.server.listen(8080).await;
    let client = two.client.dial(two.server.at(8080)).await.unwrap();
    let client_address = client.local_addr().unwrap();
    let (server, seen) = listener.accept().await.unwrap();
    assert_eq!(seen.ip(), two.client.ip, "the server sees the client's address");

    let sent: Vec<u8> = (0..8_000_000_u32)
        .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    let both = |socket: TcpStream, sent: Vec<u8>| async move {
        let (mut reader, mut writer) = socket.into_split();
        let writing = tokio::spawn(async move {
            writer.write_all(&sent).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        reader.read_to_end(&mut received).await.unwrap();
        writing.await.unwrap();
        received
    };
    let (at_client, at_server) = tokio::join!(both(client, sent.clone()), both(server, sent[..1000].to_vec()));
    assert!(at_client == sent[..1000] && at_server == sent);

    let source = format!("src.addr={client_address} src.workload=\"client\" src.namespace=\"shop\"");
    let target = format!("dst.hbone_addr={}", two.server.at(8080));
    let identity = "dst.identity=\"spiffe://cluster.local/ns/shop/sa/server\"";
    let mut lines = [
        two.lab.line(&[
            "info",
            "complete",
            &target,
            "src.identity=\"spiffe://cluster.local/ns/shop/sa/client\"",
            identity,
        ]),
        two.lab.line(&[
            "info",
            "complete",
            &target,
            "src.identity=\"spiffe://cluster.local/ns/shop/sa/client\"",
            identity,
        ]),
    ];
    lines.sort_by_key(|line| line.contains("outbound"));
    assert!(lines[1].contains(&source), "{lines:?}");
    assert!(lines[1].contains("bytes_sent=8000000 bytes_recv=1000"), "{lines:?}");
    assert!(lines[0].contains("bytes_sent=1000 bytes_recv=8000000"), "{lines:?}");
    assert!(lines[0].contains("rule=\"allowed: no policy forbids it\""), "{lines:?}");
    assert_eq!(two.near.counters().completed, 1);
    assert_eq!(two.far.counters().inbound_streams, 1);
    assert!(two.near.connections().await.is_empty() && two.far.connections().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn many_short_connections_all_work_and_leave_nothing() {
    let two = two();
    echo(two.server.listen(8080).await);
    for _ in 0..20 {
        let batch = (0..100).map(|index: u32| {
            let dialling = two.client.dial(two.server.at(8080));
            async move {
                let mut socket = dialling.await.unwrap();
                socket.write_all(&index.to_be_bytes()).await.unwrap();
                socket.shutdown().await.unwrap();
                let mut answer = Vec::new();
                socket.read_to_end(&mut answer).await.unwrap();
                assert_eq!(answer, index.to_be_bytes());
            }
        });
        futures_util::future::join_all(batch).await;
    }
    eventually("all are done", async || {
        two.near.counters().completed == 2000 && two.far.counters().completed == 2000
    })
    .await;
    assert!(two.near.connections().await.is_empty() && two.far.connections().await.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_is_reset_and_the_application_never_dialled() {
    let mut two = two();
    two.lab.contents.policies.push(deny_client());
    two.lab.publish();
    let listener = two.server.listen(8080).await;
    expect_refused(two.client.dial(two.server.at(8080)).await).await;
    two.lab.line(&[
        "inbound",
        "rule=\"denied by AuthorizationPolicy shop/no-client (rules[0]): the peer is spiffe://cluster.local/ns/shop/sa/client",
    ]);
    two.lab
        .line(&["outbound", "the peer refused: 401", "response_flags=\"DENY\""]);
    assert_eq!(two.near.counters().failed(FailureKind::Tunnel), 1);
    assert_eq!(two.far.counters().failed(FailureKind::Denied), 1);
    let nobody = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(nobody.is_err(), "the application was dialled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upstream_is_a_reset_at_the_client() {
    let two = two();
    // Nothing listens: refused by the application's host.
    expect_refused(two.client.dial(two.server.at(8080)).await).await;
    two.lab.line(&["inbound", "error", "Connection refused"]);
    two.lab.line(&["outbound", "error=\"the peer refused: 503"]);
    // A workload of the mesh without a proxy, and an address that nobody knows.
    let Two {
        mut lab,
        near: _near,
        far: _far,
        client,
        ..
    } = two;
    let dead = lab.workload("dead", TunnelProtocol::Hbone);
    lab.publish();
    expect_refused(client.dial(SocketAddr::new(dead, 80)).await).await;
    lab.line(&["outbound", &format!("cannot connect to {dead}:15008")]);
    let unknown = SocketAddr::new(new_address(), 81);
    expect_refused(client.dial(unknown).await).await;
    lab.line(&[
        "outbound",
        &format!("{unknown} could not be connected to: Connection refused"),
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn half_close_and_reset_pass_through() {
    let two = two();
    let listener = two.server.listen(8080).await;
    for client_first in [true, false] {
        let client = two.client.dial(two.server.at(8080)).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        let (mut one, mut other) = if client_first {
            (client, server)
        } else {
            (server, client)
        };
        one.write_all(b"all I have").await.unwrap();
        one.shutdown().await.unwrap();
        let mut received = Vec::new();
        other.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"all I have");
        other.write_all(b"an answer").await.unwrap();
        other.shutdown().await.unwrap();
        received.clear();
        one.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"an answer");
    }
    for client_resets in [true, false] {
        let client = two.client.dial(two.server.at(8080)).await.unwrap();
        let server = listener.accept().await.unwrap().0;
        let (one, other) = if client_resets {
            (client, server)
        } else {
            (server, client)
        };
        one.set_zero_linger().unwrap();
        drop(one);
        expect_reset(other).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_may_speak_first() {
    let two = two();
    let listener = two.server.listen(8080).await;
    let mut client = two.client.dial(two.server.at(8080)).await.unwrap();
    let mut server = listener.accept().await.unwrap().0;
    server.write_all(b"220 hello").await.unwrap();
    let mut greeting = [0; 9];
    client.read_exact(&mut greeting).await.unwrap();
    assert_eq!(&greeting, b"220 hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_knowledge_everything_is_refused() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    let listener = server.listen(8080).await;
    expect_refused(client.dial(server.at(8080)).await).await;
    lab.line(&["outbound", "nothing is known of workload"]);
    expect_refused(server.receive_plaintext(client.ip, 8080).await).await;
    lab.line(&["inbound", "nothing is known of workload"]);
    expect_refused(TcpStream::connect(server.at(15008)).await).await;
    let nobody = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(nobody.is_err(), "the application was dialled");
    // And once it is known, everything works.
    lab.publish();
    drop(listener);
    echo(server.listen(8080).await);
    expect_echo(&mut client.dial(server.at(8080)).await.unwrap(), b"now").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_is_served_as_policy_says() {
    let mut two = two();
    echo(two.server.listen(8080).await);
    let stranger = new_address();
    let mut socket = two.server.receive_plaintext(stranger, 8080).await.unwrap();
    expect_echo(&mut socket, b"hello").await;
    drop(socket);
    two.lab.line(&[
        "inbound",
        &format!("src.addr={stranger}:"),
        "bytes_sent=5 bytes_recv=5",
        "rule=\"allowed",
    ]);
    two.lab.contents.policies.push(strict());
    two.lab.publish();
    expect_refused(two.server.receive_plaintext(stranger, 8080).await).await;
    two.lab.line(&[
        "inbound",
        &format!("src.addr={stranger}:"),
        "rule=\"denied by AuthorizationPolicy shop/strict",
    ]);
    // Its own ports are never served.
    expect_refused(two.server.receive_plaintext(stranger, 15008).await).await;
    two.lab.line(&["inbound", "a port of the mesh's own proxy"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_in_the_mesh_is_passed_through() {
    let mut two = two();
    let outside = TcpListener::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
    let address = outside.local_addr().unwrap();
    echo(outside);
    expect_echo(&mut two.client.dial(address).await.unwrap(), b"to an unknown address").await;
    two.lab.line(&[
        "outbound",
        &format!("dst.addr={address}"),
        "bytes_sent=21 bytes_recv=21",
    ]);
    let plain = two.lab.workload("plain", TunnelProtocol::None);
    two.lab.publish();
    echo(TcpListener::bind(SocketAddr::new(plain, 8080)).await.unwrap());
    expect_echo(
        &mut two.client.dial(SocketAddr::new(plain, 8080)).await.unwrap(),
        b"to a plain pod",
    )
    .await;
    two.lab.line(&["outbound", "dst.workload=\"plain\""]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_captured_and_what_would_loop_is_refused() {
    let two = two();
    expect_refused(two.client.dial_uncaptured().await).await;
    two.lab.line(&["outbound", "dialled the capture port itself"]);
    for port in l4::OWN_PORTS {
        expect_refused(two.client.dial(two.client.at(port)).await).await;
        two.lab.line(&["outbound", "go round in circles"]);
    }
    // Another pod's are refused by that pod.
    expect_refused(two.client.dial(two.server.at(15006)).await).await;
    two.lab.line(&["inbound", "which this pod does not serve"]);
    assert_eq!(two.near.counters().failed(FailureKind::Misdirected), 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_live_connection_is_closed_when_policy_changes() {
    let mut two = two();
    echo(two.server.listen(8080).await);
    let mut tunnelled = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut tunnelled, b"hello").await;
    let mut plain = two.server.receive_plaintext(new_address(), 8080).await.unwrap();
    expect_echo(&mut plain, b"hello").await;
    two.lab.contents.policies.push(strict());
    two.lab.publish();
    expect_reset(plain).await;
    two.lab.line(&[
        "bytes_recv=5",
        "no longer allowed: denied by AuthorizationPolicy shop/strict",
    ]);
    expect_echo(&mut tunnelled, b"still here").await;
    two.lab.contents.policies.push(deny_client());
    two.lab.publish();
    expect_reset(tunnelled).await;
    two.lab.line(&[
        "bytes_recv=15",
        "no longer allowed: denied by AuthorizationPolicy shop/no-client",
    ]);
    assert_eq!(two.far.counters().failed(FailureKind::NoLongerAllowed), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_is_reached_and_its_name_logged() {
    let mut two = two();
    let service = two.lab.service("web", 80, 8080, &["server"]);
    two.lab.publish();
    echo(two.server.listen(8080).await);
    expect_echo(&mut two.client.dial(service).await.unwrap(), b"hello").await;
    for _ in 0..2 {
        two.lab
            .line(&["dst.service=\"web.shop.svc.cluster.local\"", "dst.workload=\"server\""]);
    }
    expect_refused(two.client.dial(SocketAddr::new(service.ip(), 81)).await).await;
    two.lab.line(&["outbound", "has no port 81"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_half_open_handshakes_do_not_harm_a_good_one() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut silent = Vec::new();
    for _ in 0..1000 {
        silent.push(TcpStream::connect(two.server.at(15008)).await.unwrap());
    }
    expect_echo(&mut two.client.dial(two.server.at(8080)).await.unwrap(), b"hello").await;
    let shards = Config::default().shards_per_pod as u64;
    let dropped = 1000 - Config::default().half_open as u64 * shards;
    eventually("the oldest are dropped", async || {
        two.far.counters().half_open_dropped >= dropped
    })
    .await;
    // And they end in the log, too, when they go.
    drop(silent);
    two.lab.line(&["inbound", "during the handshake"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_goes_the_same_way() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let client = lab.pod(&proxy, "client");
    let Ok(free) = std::net::TcpListener::bind("[::1]:15008") else {
        eprintln!("not run: [::1]:15008 is taken or this machine has no IPv6");
        return;
    };
    drop(free);
    let server = lab.pod_at(&proxy, "server", "::1".parse().unwrap());
    lab.publish();
    echo(server.listen(0).await);
    let listener = server.listen(0).await;
    let address = listener.local_addr().unwrap();
    echo(listener);
    expect_echo(&mut client.dial(address).await.unwrap(), b"hello").await;
    lab.line(&["inbound", "dst.hbone_addr=[::1]:"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_nothing_holds_the_sender_back() {
    let two = two();
    let listener = two.server.listen(8080).await;
    let client = two.client.dial(two.server.at(8080)).await.unwrap();
    let mut server = listener.accept().await.unwrap().0;
    let chunk = vec![7; 1 << 20];
    let (mut sent, mut quiet) = (0_u64, 0);
    while quiet < 200 {
        match client.try_write(&chunk) {
            Ok(count) => (sent, quiet) = (sent + count as u64, 0),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                quiet += 1;
                // The proxies answer this only when they have nothing else to do.
                two.near.connections().await;
                two.far.connections().await;
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(sent < 128 << 20, "{sent} bytes were taken though nobody reads");
    drop(client);
    let mut received = Vec::new();
    server.read_to_end(&mut received).await.unwrap();
    assert_eq!(received.len() as u64, sent);
}

/// As a peer that speaks HBONE itself: the status of a CONNECT, 200 included.
async fn status_of(lab: &Lab, pod: &LabPod, authority: &str) -> u16 {
    let client: model::Identity = "spiffe://cluster.local/ns/shop/sa/client".parse().unwrap();
    let server = "spiffe://cluster.local/ns/shop/sa/server".parse().unwrap();
    let credentials = lab.identities.credentials(&client).await.unwrap();
    let pool = hbone::Pool::new(std::rc::Rc::new(hbone::Config::default()));
    let key = hbone::TunnelKey {
        source: client,
        destination: vec![server],
        workload: pod.uid.clone(),
        address: pod.at(15008),
    };
    let request = hbone::ConnectRequest {
        authority: authority.parse::<Authority>().unwrap(),
        headers: Vec::new(),
    };
    let dial = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    match pool.open(&key, &credentials, dial, request).await {
        Ok(_) => 200,
        Err(hbone::OpenError::Refused { status, .. }) => status,
        Err(error) => panic!("{error}"),
    }
}

#[tokio::test(flavor = "local")]
async fn a_connect_is_answered_with_ztunnels_status() {
    let mut two = two();
    let service = two.lab.service("web", 80, 8080, &["server"]);
    two.lab.service("other", 80, 8080, &[]);
    two.lab.publish();
    let _listener = two.server.listen(8080).await;
    let ip = two.server.ip;
    for (authority, status) in [
        (format!("{ip}:8080"), 200),
        ("web.shop.svc.cluster.local:80".to_owned(), 200),
        // The application does not listen.
        (format!("{ip}:8081"), 503),
        // Not this pod; a service's address is not the pod's either.
        (format!("{}:8080", two.client.ip), 400),
        (service.to_string(), 400),
        ("web.shop.svc.cluster.local:81".to_owned(), 503),
        ("unknown.shop.svc.cluster.local:80".to_owned(), 503),
        // Deviation from ztunnel: a service that the pod is no endpoint of.
        ("other.shop.svc.cluster.local:80".to_owned(), 503),
        (format!("{ip}:15001"), 503),
        (format!("{ip}:15006"), 503),
        (format!("{ip}:15008"), 503),
    ] {
        assert_eq!(
            status_of(&two.lab, &two.server, &authority).await,
            status,
            "{authority}"
        );
    }
    two.lab.contents.policies.push(deny_client());
    two.lab.publish();
    assert_eq!(status_of(&two.lab, &two.server, &format!("{ip}:8080")).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_and_tunnels_are_shared_out_among_the_shards_of_their_pod() {
    let mut lab = Lab::new();
    let three = || Config {
        shards: 4,
        shards_per_pod: 3,
        ..Config::default()
    };
    let (near, far) = (lab.proxy_with(three()), lab.proxy_with(three()));
    let (client, server) = (lab.pod(&near, "client"), lab.pod(&far, "server"));
    lab.publish();
    echo(server.listen(8080).await);
    let mut live = Vec::new();
    for _ in 0..9 {
        let mut socket = client.dial(server.at(8080)).await.unwrap();
        expect_echo(&mut socket, b"hello").await;
        live.push(socket);
    }
    for proxy in [&near, &far] {
        let mut shards = [0; 4];
        for connection in proxy.connections().await {
            assert!(connection.established && connection.sent + connection.received == 10);
            shards[connection.shard] += 1;
        }
        assert_eq!(shards, [3, 3, 3, 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_share_no_shard_while_there_are_enough() {
    let mut lab = Lab::new();
    let proxy = lab.proxy_with(Config {
        shards: 4,
        shards_per_pod: 2,
        ..Config::default()
    });
    let pods = [lab.pod(&proxy, "one"), lab.pod(&proxy, "other")];
    let server = lab.pod(&proxy, "server");
    lab.publish();
    echo(server.listen(8080).await);
    let mut live = Vec::new();
    for pod in pods.iter().cycle().take(8) {
        let mut socket = pod.dial(server.at(8080)).await.unwrap();
        expect_echo(&mut socket, b"hello").await;
        live.push(socket);
    }
    let mut of_pods: HashMap<_, HashSet<usize>> = HashMap::new();
    let outbound = |connection: &ConnectionInfo| connection.direction == telemetry::Direction::Outbound;
    for connection in proxy.connections().await.into_iter().filter(outbound) {
        of_pods.entry(connection.pod).or_default().insert(connection.shard);
    }
    let shards: Vec<_> = of_pods.into_values().collect();
    let [one, other] = &shards[..] else {
        panic!("{shards:?}")
    };
    assert!(
        one.is_disjoint(other) && one.len() == 2 && other.len() == 2,
        "{shards:?}"
    );
}
