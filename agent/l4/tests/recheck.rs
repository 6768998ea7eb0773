//! Connections that are judged while they live, and policies that only say what they would do.

#![allow(clippy::unwrap_used, missing_docs)]

mod lab;

use identity::generate_root;
use l4::FailureKind;
use lab::{Lab, echo, eventually, expect_echo, expect_refused, expect_reset, new_address, policy, two::two};
use model::{Action, Match, StringMatch, TrustDomain};

fn of_the_mesh() -> Match {
    Match {
        principals: vec![StringMatch::Presence],
        ..Match::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_in_dry_run_is_told_of_and_changes_nothing() {
    let mut two = two();
    echo(two.server.listen(8080).await);
    let mut rehearsed = policy("rehearsed", Action::Deny, of_the_mesh());
    rehearsed.dry_run = true;
    two.lab.contents.policies.push(rehearsed);
    two.lab.publish();
    let mut socket = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut socket, b"hello").await;
    drop(socket);
    two.lab.line(&[
        "inbound",
        "rule=\"allowed: no policy forbids it\"",
        "dry_run=\"denied by AuthorizationPolicy shop/rehearsed (rules[0]): the peer is",
    ]);
    let mut plain = two.server.receive_plaintext(new_address(), 8080).await.unwrap();
    expect_echo(&mut plain, b"hello").await;
    drop(plain);
    two.lab.line(&["inbound", "dry_run=\"allowed: no policy forbids it\""]);
    let counters = two.far.counters();
    assert_eq!((counters.dry_run_denied, counters.dry_run_allowed), (1, 0));

    // The other way round: denied, and with the dry run it would be allowed. A live connection learns of it, too.
    let mut live = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"hello").await;
    two.lab.contents.policies[0].action = Action::Allow;
    two.lab.contents.policies.push(model::Policy {
        rules: Vec::new(),
        ..policy("nobody", Action::Allow, Match::default())
    });
    two.lab.publish();
    expect_reset(live).await;
    let would = "dry_run=\"allowed by AuthorizationPolicy shop/rehearsed (rules[0])\"";
    two.lab
        .line(&["inbound", "none of AuthorizationPolicy shop/nobody allows it", would]);
    expect_refused(two.client.dial(two.server.at(8080)).await).await;
    two.lab.line(&["inbound", "policy rejection", would]);
    assert_eq!(two.far.counters().dry_run_allowed, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_is_somebody_else_now_keeps_no_connection() {
    let mut two = two();
    echo(two.server.listen(8080).await);
    let mut socket = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut socket, b"hello").await;
    let server = two
        .lab
        .contents
        .workloads
        .iter_mut()
        .find(|workload| workload.uid == two.server.uid);
    server.unwrap().service_account = "another".into();
    two.lab.publish();
    expect_reset(socket).await;
    two.lab.line(&[
        "inbound",
        "the pod was spiffe://cluster.local/ns/shop/sa/server when the connection began and is \
         spiffe://cluster.local/ns/shop/sa/another now",
    ]);
    let mut socket = two.client.dial(two.server.at(8080)).await.unwrap();
    expect_echo(&mut socket, b"as the new one").await;
    let client = two
        .lab
        .contents
        .workloads
        .iter_mut()
        .find(|workload| workload.uid == two.client.uid);
    client.unwrap().service_account = "another".into();
    two.lab.publish();
    expect_reset(socket).await;
    two.lab
        .line(&["outbound", "the pod was spiffe://cluster.local/ns/shop/sa/client"]);
    assert_eq!(two.near.counters().failed(FailureKind::Identity), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_denied_client_learns_by_what() {
    let mut two = two();
    two.lab
        .contents
        .policies
        .push(policy("nobody", Action::Deny, of_the_mesh()));
    two.lab.publish();
    expect_refused(two.client.dial(two.server.at(8080)).await).await;
    two.lab.line(&[
        "outbound",
        "error=\"the peer refused: 401 (denied by AuthorizationPolicy shop/nobody (rules[0]): the peer is \
         spiffe://cluster.local/ns/shop/sa/client)\"",
    ]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_leaves_takes_its_connections_along() {
    let mut lab = Lab::new();
    let (near, far) = (lab.proxy(), lab.proxy());
    let (client, server) = (lab.pod(&near, "client"), lab.pod(&far, "server"));
    lab.publish();
    let trust = lab.identities.trust().clone();
    let (other, _) = generate_root(&TrustDomain::default()).unwrap();
    trust.set_bundle((lab.root.clone() + &other).as_bytes()).unwrap();
    echo(server.listen(8080).await);
    let mut socket = client.dial(server.at(8080)).await.unwrap();
    expect_echo(&mut socket, b"hello").await;
    let mut plain = server.receive_plaintext(new_address(), 8080).await.unwrap();
    expect_echo(&mut plain, b"hello").await;
    // The root goes, and still is that of the pods' own certificates: nothing happens until these are replaced.
    trust.set_bundle(other.as_bytes()).unwrap();
    expect_echo(&mut socket, b"still here").await;
    for name in ["client", "server"] {
        lab.identities
            .forget(&format!("spiffe://cluster.local/ns/shop/sa/{name}").parse().unwrap());
    }
    let (third, _) = generate_root(&TrustDomain::default()).unwrap();
    trust.set_bundle(third.as_bytes()).unwrap();
    expect_reset(socket).await;
    // Both ends judge; who is first is chance.
    lab.line(&["proved itself under a root that is no longer trusted"]);
    expect_echo(&mut plain, b"who proved nothing lost nothing").await;
}

/// The tunnel was chosen while the root was trusted, and the answer comes when it is not any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_leaves_while_a_connection_is_made_takes_it_along() {
    let (mut here, mut there) = (Lab::new(), Lab::new());
    let (near, far) = (here.proxy(), there.proxy());
    let (client, server) = (here.pod(&near, "client"), there.pod(&far, "server"));
    here.contents.workloads.extend(there.contents.workloads.clone());
    there.contents.workloads.clone_from(&here.contents.workloads);
    here.publish();
    there.publish();
    let both = here.root.clone() + &there.root;
    for lab in [&here, &there] {
        lab.identities.trust().set_bundle(both.as_bytes()).unwrap();
    }
    let application = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    application.bind(&server.at(8081).into()).unwrap();
    application.listen(0).unwrap();
    // Its queue is full: the next one is not connected to before it takes this one.
    let first = std::net::TcpStream::connect(server.at(8081)).unwrap();
    let waiting = client.dial(server.at(8081)).await.unwrap();
    eventually("the other node dials the application", async || {
        let connections = far.connections().await;
        connections.iter().any(|one| one.hbone_target == Some(server.at(8081)))
    })
    .await;
    here.identities.trust().set_bundle(here.root.as_bytes()).unwrap();
    let _taken = application.accept().unwrap();
    expect_reset(waiting).await;
    here.line(&[
        "outbound",
        "8081",
        "proved itself under a root that is no longer trusted",
    ]);
    drop(first);
}
