//! Which endpoint a connection gets to: the least loaded, one that answers, and always the one that is meant.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::{Config, FailureKind};
use lab::{
    Lab, LabPod, echo, eventually, expect_echo, expect_refused, new_address, policy,
    two::{Two, two},
    value,
};
use model::{Action, HealthStatus, Match, StringMatch, TunnelProtocol, WorkloadUid};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

/// A proxy whose time limits are never reached, so that only another endpoint helps.
fn patient_for_ever(patience: Duration) -> Config {
    const NEVER: Duration = Duration::from_secs(3600);
    let mut config = Config {
        patience,
        connect_timeout: NEVER,
        ..Config::default()
    };
    config.hbone.connect_timeout = NEVER;
    config.hbone.handshake_timeout = NEVER;
    config.hbone.response_timeout = NEVER;
    config
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_a_dead_endpoint_fails_over() {
    let mut two = two();
    let third = two.lab.pod(&two.far, "deaf");
    two.lab.workload("gone", TunnelProtocol::Hbone);
    let service = two.lab.service("web", 80, 8080, &["server", "gone", "deaf"]);
    two.lab.publish();
    echo(two.server.listen(8080).await);
    for _ in 0..50 {
        expect_echo(&mut two.client.dial(service).await.unwrap(), b"hello").await;
    }
    assert!(two.near.counters().failed_over > 0);
    assert_eq!(two.near.counters().failed(FailureKind::Tunnel), 0);
    drop(third);
}

/// Its agent has released it, and ours has not heard of it yet.
#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_the_mesh_is_reached_by_who_hears_of_it_late() {
    let mut lab = Lab::new();
    let near = lab.proxy_with(Config {
        second_look: Duration::from_secs(3600),
        ..Config::default()
    });
    let client = lab.pod(&near, "client");
    let address = lab.workload("leaver", TunnelProtocol::Hbone);
    let service = lab.service("web", 80, 8080, &["leaver"]);
    lab.publish();
    echo(TcpListener::bind((address, 8080)).await.unwrap());
    // What is left of its agent: who gets here is refused.
    let released = TcpListener::bind((address, 15008)).await.unwrap();
    let mut waiting = Vec::new();
    for target in [SocketAddr::new(address, 8080), service] {
        waiting.push(client.dial(target).await.unwrap());
        drop(released.accept().await.unwrap());
    }
    lab.contents.workloads[1].protocol = TunnelProtocol::None;
    lab.publish();
    for stream in &mut waiting {
        expect_echo(stream, b"hello").await;
    }
}

/// Nothing is known of it that would be another way: its agent has gone, and the client hears of it soon.
#[tokio::test(flavor = "multi_thread")]
async fn who_stays_in_the_mesh_is_not_reached_around_it() {
    let mut lab = Lab::new();
    let near = lab.proxy_with(Config {
        second_look: Duration::from_millis(50),
        ..Config::default()
    });
    let client = lab.pod(&near, "client");
    let address = lab.workload("server", TunnelProtocol::Hbone);
    lab.publish();
    echo(TcpListener::bind((address, 8080)).await.unwrap());
    expect_refused(client.dial(SocketAddr::new(address, 8080)).await).await;
    assert_eq!(near.counters().failed(FailureKind::Tunnel), 1);
}

/// As at an address that somebody else has got since, and as with a certificate that has expired.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_handshake_fails_is_passed_over() {
    let mut two = two();
    let address = two.lab.workload("no-agent", TunnelProtocol::Hbone);
    let service = two.lab.service("web", 80, 8080, &["server", "no-agent"]);
    two.lab.publish();
    echo(two.server.listen(8080).await);
    let plain = TcpListener::bind((address, 15008)).await.unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = plain.accept().await {
            let _ = socket.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await;
        }
    });
    let mut held = two.client.dial(service).await.unwrap();
    expect_echo(&mut held, b"hello").await;
    for _ in 0..20 {
        expect_echo(&mut two.client.dial(service).await.unwrap(), b"hello").await;
    }
    let failed_over = two.near.counters().failed_over;
    assert!((1..10).contains(&failed_over), "{failed_over} of 21");
}

/// Its agent lags behind the control plane: it runs the pod, and has not been told of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_whose_agent_does_not_know_its_policies_yet_is_passed_over() {
    let (mut lab, mut far_side) = (Lab::new(), Lab::new());
    far_side.identities = lab.identities.clone();
    let (near, far) = (lab.proxy(), far_side.proxy());
    let client = lab.pod(&near, "client");
    let (server, other) = (far_side.pod(&far, "server"), far_side.pod(&far, "other"));
    lab.contents.workloads.extend(far_side.contents.workloads.clone());
    let service = lab.service("web", 80, 8080, &["server", "other"]);
    let alone = lab.service("alone", 80, 8080, &["server"]);
    lab.publish();
    far_side
        .writer
        .locals()
        .set(vec![far_side.contents.workloads.remove(0)]);
    far_side.publish();
    let listener = server.listen(8080).await;
    echo(other.listen(8080).await);
    for _ in 0..20 {
        expect_echo(&mut client.dial(service).await.unwrap(), b"hello").await;
    }
    assert!(near.counters().failed_over > 0);
    // Where there is no other, the client is refused, and told why.
    expect_refused(client.dial(alone).await).await;
    let why = "denied: the control plane has not announced this pod yet";
    far_side.line(&["inbound", why]);
    lab.line(&[
        "outbound",
        &format!("the peer refused: 503 ({why}"),
        "response_flags=\"CONNECT\"",
    ]);
    let nobody = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(nobody.is_err(), "the application was dialled");
}

/// The pod is ready, and the control plane slower than its probe.
#[tokio::test(flavor = "multi_thread")]
async fn who_comes_before_the_pod_is_announced_waits() {
    const NEVER: Duration = Duration::from_secs(3600);
    let (mut lab, mut far_side) = (Lab::new(), Lab::new());
    far_side.identities = lab.identities.clone();
    let near = lab.proxy();
    let far = far_side.proxy_with(Config {
        discovery_timeout: NEVER,
        second_look: NEVER,
        ..Config::default()
    });
    let client = lab.pod(&near, "client");
    let server = far_side.pod(&far, "server");
    lab.contents.workloads.extend(far_side.contents.workloads.clone());
    lab.publish();
    let pod = far_side.contents.workloads.remove(0);
    far_side.writer.locals().set(vec![pod.clone()]);
    far_side.publish();
    let listener = server.listen(8080).await;
    let plain = server.receive_plaintext(new_address(), 8080).await.unwrap();
    let tunnelled = client.dial(server.at(8080)).await.unwrap();
    eventually("both have come", async || {
        let counters = far.counters();
        counters.inbound_plaintext == 1 && counters.inbound_streams == 1
    })
    .await;
    let nobody = tokio::time::timeout(Duration::ZERO, listener.accept()).await;
    assert!(nobody.is_err(), "the application was dialled");
    echo(listener);
    far_side.contents.workloads.push(pod);
    far_side.publish();
    for mut stream in [plain, tunnelled] {
        expect_echo(&mut stream, b"hello").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn black_holes_cost_the_client_little_and_are_passed_over() {
    let mut lab = Lab::new();
    let near = lab.proxy_with(patient_for_ever(Duration::from_millis(20)));
    let far = lab.proxy();
    let (client, server) = (lab.pod(&near, "client"), lab.pod(&far, "server"));
    let holes = ["one", "two"].map(|name| lab.late_pod(name, new_address()));
    let service = lab.service("web", 80, 8080, &["server", "one", "two"]);
    lab.publish();
    echo(server.listen(8080).await);
    for _ in 0..60 {
        expect_echo(&mut client.dial(service).await.unwrap(), b"hello").await;
    }
    // Two in three connections would meet one of them first if nothing were remembered.
    let failed_over = near.counters().failed_over;
    assert!((1..30).contains(&failed_over), "{failed_over} of 60");
    drop(holes);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_late_is_waited_for_where_there_is_no_better() {
    let mut lab = Lab::new();
    let near = lab.proxy_with(patient_for_ever(Duration::from_millis(1)));
    let far = lab.proxy();
    let client = lab.pod(&near, "client");
    let (server, late) = lab.late_pod("server", new_address());
    lab.workload("gone", TunnelProtocol::Hbone);
    let service = lab.service("web", 80, 8080, &["server", "gone"]);
    let alone = lab.service("alone", 80, 8080, &["server"]);
    lab.publish();
    echo(server.listen(8080).await);
    let mut clients = Vec::new();
    for to in [service, service, service, alone] {
        clients.push(client.dial(to).await.unwrap());
    }
    eventually("the other endpoint was tried", async || near.counters().failed_over > 0).await;
    far.add_pod(late).unwrap();
    let dialled = clients.len();
    for mut client in clients {
        expect_echo(&mut client, b"after all").await;
    }
    // The record has the endpoint that it was in the end, and the trace that this one was told.
    let lines: Vec<String> = (0..2 * dialled).map(|_| lab.line(&["complete"])).collect();
    let (near_lines, far_lines): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line.contains("outbound"));
    assert_eq!(near_lines.len(), dialled, "{lines:#?}");
    for line in near_lines {
        assert!(
            line.contains("dst.workload=\"server\"") && line.contains("sa/server"),
            "{line}"
        );
        let trace = value(line, "trace_id");
        let same = far_lines.iter().filter(|other| value(other, "trace_id") == trace);
        assert_eq!(same.count(), 1, "{lines:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_endpoint_can_be_connected_to_the_first_failure_is_told() {
    let mut two = two();
    let dead = two.lab.workload("dead", TunnelProtocol::Hbone);
    let service = two.lab.service("web", 80, 8080, &["dead"]);
    two.lab.publish();
    // Again and again, for the last endpoint is never passed over.
    for _ in 0..5 {
        expect_refused(two.client.dial(service).await).await;
        two.lab.line(&["outbound", &format!("cannot connect to {dead}:15008")]);
    }
    assert_eq!(two.near.counters().failed_over, 0);
}

/// The line is of one attempt: the failure, and where it led.
#[tokio::test(flavor = "multi_thread")]
async fn what_is_told_of_the_first_failure_is_that_endpoints() {
    let mut two = two();
    let both = ["one", "two"].map(|name| (name, two.lab.workload(name, TunnelProtocol::Hbone)));
    let service = two.lab.service("web", 80, 8080, &["one", "two"]);
    two.lab.publish();
    expect_refused(two.client.dial(service).await).await;
    let line = two.lab.line(&["outbound", "cannot connect to"]);
    let (name, at) = both
        .iter()
        .find(|(_, at)| line.contains(&format!("cannot connect to {at}:15008")))
        .unwrap();
    for field in [
        format!("dst.addr={at}:15008"),
        format!("dst.hbone_addr={at}:8080"),
        format!("dst.workload=\"{name}\""),
        format!("dst.identity=\"spiffe://cluster.local/ns/shop/sa/{name}\""),
    ] {
        assert!(line.contains(&field), "{field}: {line}");
    }
    assert_eq!(two.near.counters().failed_over, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_a_policy_denies_that_is_told_whoever_could_not_be_connected_to_before() {
    let mut two = two();
    two.lab.workload("dead", TunnelProtocol::Hbone);
    let service = two.lab.service("web", 80, 8080, &["server", "dead"]);
    let everybody = Match {
        principals: vec![StringMatch::Presence],
        ..Match::default()
    };
    two.lab
        .contents
        .policies
        .push(policy("nobody", Action::Deny, everybody));
    two.lab.publish();
    for _ in 0..20 {
        expect_refused(two.client.dial(service).await).await;
    }
    for _ in 0..20 {
        let line = two.lab.line(&["outbound"]);
        for field in [
            "the peer refused: 401 (denied by AuthorizationPolicy shop/nobody",
            "response_flags=\"DENY\"",
            "dst.workload=\"server\"",
        ] {
            assert!(line.contains(field), "{field}: {line}");
        }
    }
    assert!(two.near.counters().failed_over > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_client_is_sent_to_an_endpoint_that_was_only_tried() {
    let mut two = two();
    two.lab.workload("gone", TunnelProtocol::Hbone);
    let service = two.lab.service("web", 80, 8080, &["server", "gone"]);
    two.lab.publish();
    let listener = two.server.listen(8080).await;
    for _ in 0..20 {
        let mut client = two.client.dial(service).await.unwrap();
        client.write_all(b"at once").await.unwrap();
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        let mut server = listener.accept().await.unwrap().0;
        server.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"at once");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_live_are_shared_out_evenly() {
    let mut two = two();
    let other = two.lab.pod(&two.far, "other");
    let service = two.lab.service("web", 80, 8080, &["server", "other"]);
    two.lab.publish();
    for pod in [&two.server, &other] {
        echo(pod.listen(8080).await);
    }
    let mut clients = Vec::new();
    for _ in 0..20 {
        let mut client = two.client.dial(service).await.unwrap();
        expect_echo(&mut client, b"I stay").await;
        clients.push(client);
    }
    let live = two.far.connections().await;
    let at = |pod: &LabPod| live.iter().filter(|connection| connection.pod == pod.uid).count();
    assert_eq!((at(&two.server), at(&other)), (10, 10));
    drop(clients);
    eventually("all have ended", async || two.far.connections().await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tunnels_are_not_reused_for_another_pod_at_the_address() {
    let Two {
        mut lab,
        near,
        far,
        client,
        server,
    } = two();
    echo(server.listen(8080).await);
    expect_echo(&mut client.dial(server.at(8080)).await.unwrap(), b"hello").await;
    assert_eq!(far.counters().inbound_tunnels, 1);
    // A successor of the same identity is given the address, and nobody heard of the end of the one before.
    let successor = WorkloadUid::of_pod("Kubernetes", "shop", "successor");
    let last = lab.contents.workloads.last_mut().unwrap();
    assert_eq!(last.uid, server.uid);
    (last.uid, last.name) = (successor, "successor".into());
    lab.publish();
    expect_refused(client.dial(server.at(8080)).await).await;
    assert_eq!(far.counters().inbound_tunnels, 2, "the old one was not used");
    lab.line(&["inbound", "nothing is known of workload Kubernetes//v1/Pod/shop/server"]);
    drop(near);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_takes_no_new_connections_gets_none_and_keeps_those_it_has() {
    let mut two = two();
    let other = two.lab.pod(&two.far, "other");
    let service = two.lab.service("web", 80, 8080, &["server", "other"]);
    two.lab.publish();
    for pod in [&two.server, &other] {
        echo(pod.listen(8080).await);
    }
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"before").await;
    for workload in &mut two.lab.contents.workloads {
        if workload.uid == two.server.uid {
            workload.status = HealthStatus::Unhealthy;
        }
    }
    two.lab.publish();
    for _ in 0..20 {
        expect_echo(&mut two.client.dial(service).await.unwrap(), b"hello").await;
    }
    let of_server = two.far.connections().await;
    let of_server = of_server.iter().filter(|connection| connection.pod == two.server.uid);
    assert_eq!(of_server.count(), 1);
    expect_echo(&mut live, b"after").await;
    // By its own address it is reached as long as it is there, in a tunnel of its own time.
    let tunnels = two.far.counters().inbound_tunnels;
    expect_echo(&mut two.client.dial(two.server.at(8080)).await.unwrap(), b"you").await;
    assert_eq!(two.far.counters().inbound_tunnels, tunnels + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn peers_are_told_when_a_pod_is_on_its_way_out_and_what_lives_goes_on() {
    let two = two();
    echo(two.server.listen(8080).await);
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"before").await;
    two.far.send_tunnels_away(&two.server.uid);
    eventually("new connections come in a new tunnel", async || {
        expect_echo(&mut two.client.dial(two.server.at(8080)).await.unwrap(), b"new").await;
        two.far.counters().inbound_tunnels == 2
    })
    .await;
    expect_echo(&mut live, b"after").await;
    assert_eq!(two.near.counters().failed(FailureKind::Tunnel), 0);
    // Its end ends all of them, the old one's too.
    two.far.remove_pod(&two.server.uid);
    lab::expect_reset(live).await;
}
