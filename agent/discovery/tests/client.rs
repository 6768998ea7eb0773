//! The client against a control plane that does what the test says, over real connections.
#![allow(clippy::unwrap_used)]

mod fake;

use std::{net::SocketAddr, path::Path, time::Duration};

use discovery::{Client, Config, Handle, Limits, Mode, NodeId, Source};
use fake::{Fake, policy, state, workload};
use identity::Upstream;
use mesh::{Knowledge, Route, Wanted};
use model::{MeshSettings, OriginalDst, Workload};
use proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

fn config(addresses: &[SocketAddr]) -> Config {
    Config {
        upstream: Upstream {
            addresses: addresses
                .iter()
                .map(|address| format!("http://{address}").parse().unwrap())
                .collect(),
            roots_file: "unused".into(),
        },
        token_file: None,
        node: NodeId {
            ip: [10, 0, 0, 7].into(),
            pod: "ztunnel-x".to_owned(),
            namespace: "istio-system".to_owned(),
            node: "n1".to_owned(),
            metadata: Default::default(),
        },
        cluster: "Kubernetes".to_owned(),
        network: String::new(),
        mode: Mode::Wildcard,
        settings: MeshSettings::default(),
        state_dir: None,
        keeps: true,
        limits: Limits {
            first_wait: Duration::from_millis(1),
            longest_wait: Duration::from_millis(20),
            ..Limits::default()
        },
    }
}

fn start(config: Config) -> (Handle, Knowledge) {
    let scope = match config.mode {
        Mode::Wildcard => mesh::Scope::Everything,
        Mode::OnDemand => mesh::Scope::OnDemand,
    };
    let (writer, knowledge, demands) = mesh::with(&config.network, scope);
    (Client::start(config, writer, demands), knowledge)
}

async fn known(knowledge: &Knowledge, holds: impl Fn(&mesh::Snapshot) -> bool) {
    let mut changed = knowledge.changed();
    while !holds(&knowledge.snapshot()) {
        changed.changed().await.unwrap();
    }
}

async fn told(handle: &Handle, holds: impl Fn(&discovery::Status) -> bool) -> discovery::Status {
    let mut changed = handle.changed();
    let status = changed.wait_for(holds).await.unwrap();
    status.clone()
}

fn has(snapshot: &mesh::Snapshot, name: &str) -> bool {
    snapshot.workloads().any(|workload| &*workload.name == name)
}

#[tokio::test]
async fn what_the_control_plane_says_is_in_force_before_it_is_acknowledged() {
    let mut control = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let token = directory.path().join("token");
    std::fs::write(&token, "secret\n").unwrap();
    let (handle, knowledge) = start(Config {
        token_file: Some(token.clone()),
        ..config(&[control.address])
    });
    let mut stream = control.stream().await;
    assert_eq!(stream.header("authorization"), "Bearer secret");
    assert_eq!(stream.header("clusterid"), "Kubernetes");
    let first = stream.request().await;
    assert_eq!(first.type_url, AUTHORIZATION_TYPE);
    let node = first.node.unwrap();
    assert_eq!(
        node.id,
        "ztunnel~10.0.0.7~ztunnel-x.istio-system~istio-system.svc.cluster.local"
    );
    assert!(node.metadata.unwrap().fields.contains_key("NODE_NAME"));
    assert_eq!(stream.request().await.type_url, ADDRESS_TYPE);

    stream.send(state(AUTHORIZATION_TYPE, vec![policy("p", 1)], &[]));
    assert_eq!(stream.request().await.response_nonce, "nonce");
    assert!(!knowledge.snapshot().ready());
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0)], &[]));
    assert_eq!(stream.request().await.error_detail, None);
    let snapshot = knowledge.snapshot();
    assert!(snapshot.ready() && has(&snapshot, "a") && snapshot.counts().policies == 1);

    stream.send(state(
        ADDRESS_TYPE,
        vec![workload("b", 2, 0), workload("bad", 3, 9)],
        &["c//v1/Pod/shop/a"],
    ));
    let refusal = stream.request().await.error_detail.unwrap();
    assert_eq!(
        refusal.message,
        "c//v1/Pod/shop/bad: status: value 9 is not known to this version"
    );
    let snapshot = knowledge.snapshot();
    assert!(has(&snapshot, "b") && !has(&snapshot, "a") && !has(&snapshot, "bad"));
    let status = told(&handle, |status| !status.rejected.is_empty()).await;
    assert_eq!(
        (status.addresses, status.policies, status.source),
        (1, 1, Source::ControlPlane)
    );
    assert_eq!(status.connected.unwrap().address, control.address);

    // A new connection brings the token that is there then, and says what is held.
    std::fs::write(&token, "newer").unwrap();
    drop(stream);
    let mut stream = control.stream().await;
    assert_eq!(stream.header("authorization"), "Bearer newer");
    assert_eq!(stream.request().await.initial_resource_versions["shop/p"], "v");
    let held = stream.request().await.initial_resource_versions;
    assert_eq!(held.into_keys().collect::<Vec<_>>(), ["c//v1/Pod/shop/b"]);
    assert!(has(&knowledge.snapshot(), "b"), "what is known stays in force");
}

#[tokio::test]
async fn a_dead_replica_is_left_for_the_other() {
    let (mut first, mut second) = (Fake::start().await, Fake::start().await);
    let (handle, knowledge) = start(config(&[first.address, second.address]));
    let mut stream = tokio::select! {
        stream = first.stream() => stream,
        stream = second.stream() => stream,
    };
    stream.send(state(AUTHORIZATION_TYPE, vec![], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0)], &[]));
    known(&knowledge, |snapshot| has(snapshot, "a")).await;
    // It dies mid-push: a part of a state was sent.
    let mut part = state(ADDRESS_TYPE, vec![workload("b", 2, 0)], &["c//v1/Pod/shop/a"]);
    part.system_version_info = "2+".to_owned();
    stream.send(part);
    let dead = told(&handle, |status| status.connected.is_some())
        .await
        .connected
        .unwrap()
        .address;
    let mut other = if dead == first.address { second } else { first };
    drop(stream);
    let mut stream = other.stream().await;
    stream.request().await;
    let held = stream.request().await.initial_resource_versions;
    assert_eq!(held.into_keys().collect::<Vec<_>>(), ["c//v1/Pod/shop/a"]);
    stream.send(state(AUTHORIZATION_TYPE, vec![], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("b", 2, 0)], &["c//v1/Pod/shop/a"]));
    known(&knowledge, |snapshot| has(snapshot, "b") && !has(snapshot, "a")).await;
    let status = told(&handle, |status| status.connected.is_some()).await;
    assert!(status.last_error.is_some());
}

#[tokio::test]
async fn who_never_answers_is_left() {
    let (mut first, mut second) = (Fake::start().await, Fake::start().await);
    let (handle, knowledge) = start(Config {
        limits: Limits {
            answer: Duration::from_millis(200),
            ..config(&[]).limits
        },
        ..config(&[first.address, second.address])
    });
    // Whoever is asked first says nothing, and holds the stream.
    let (_silent, mut other) = tokio::select! {
        stream = first.stream() => (stream, second),
        stream = second.stream() => (stream, first),
    };
    let mut stream = other.stream().await;
    stream.send(state(AUTHORIZATION_TYPE, vec![], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0)], &[]));
    known(&knowledge, |snapshot| has(snapshot, "a")).await;
    let (_, error) = told(&handle, |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(error.contains("did not answer within"), "{error}");
}

#[tokio::test]
async fn garbage_is_an_error_and_what_is_known_stays() {
    let mut control = Fake::start().await;
    let (handle, knowledge) = start(config(&[control.address]));
    let mut stream = control.stream().await;
    stream.send(state(AUTHORIZATION_TYPE, vec![], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0)], &[]));
    known(&knowledge, |snapshot| has(snapshot, "a")).await;
    stream.send(state(
        "type.googleapis.com/envoy.config.cluster.v3.Cluster",
        vec![],
        &[],
    ));
    let mut stream = control.stream().await;
    let (_, error) = told(&handle, |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(error.contains("which was not asked for"), "{error}");
    assert!(has(&knowledge.snapshot(), "a"));

    // And bytes that are no HTTP/2 at all.
    let raw = fake::garbage().await;
    let (handle, _knowledge) = start(config(&[raw]));
    told(&handle, |status| status.attempts > 3 && status.last_error.is_some()).await;
    stream.request().await;
}

#[tokio::test]
async fn a_token_that_can_not_be_read_is_named() {
    let control = Fake::start().await;
    let (handle, _knowledge) = start(Config {
        token_file: Some("/nowhere/token".into()),
        ..config(&[control.address])
    });
    let (_, error) = told(&handle, |status| status.last_error.is_some())
        .await
        .last_error
        .unwrap();
    assert!(error.contains("the token file /nowhere/token: "), "{error}");
}

fn with_disk(addresses: &[SocketAddr], directory: &Path) -> Config {
    Config {
        state_dir: Some(directory.to_owned()),
        keeps: true,
        ..config(addresses)
    }
}

/// An address at which nobody listens.
async fn nobody() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn an_agent_that_starts_without_the_control_plane_knows_what_it_knew() {
    let mut control = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (handle, knowledge) = start(with_disk(&[control.address], directory.path()));
    let mut stream = control.stream().await;
    stream.send(state(AUTHORIZATION_TYPE, vec![policy("p", 1)], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0), workload("b", 2, 0)], &[]));
    stream.send(state(ADDRESS_TYPE, vec![workload("c", 3, 0)], &["c//v1/Pod/shop/b"]));
    known(&knowledge, |snapshot| has(snapshot, "c")).await;
    handle.stop().await;

    let (handle, knowledge) = start(with_disk(&[nobody().await], directory.path()));
    let snapshot = knowledge.snapshot();
    assert!(snapshot.ready(), "known when the start returns");
    assert!(has(&snapshot, "a") && !has(&snapshot, "b") && has(&snapshot, "c"));
    assert_eq!((snapshot.counts().policies, handle.status().source), (1, Source::Disk));
    handle.stop().await;

    let (_handle, _knowledge) = start(with_disk(&[control.address], directory.path()));
    let mut stream = control.stream().await;
    stream.request().await;
    let held = stream.request().await.initial_resource_versions;
    assert_eq!(
        held.into_keys().collect::<Vec<_>>(),
        ["c//v1/Pod/shop/a", "c//v1/Pod/shop/c"]
    );
}

#[tokio::test]
async fn half_a_mesh_is_not_kept_for_the_next_start() {
    let mut control = Fake::start().await;
    let directory = tempfile::tempdir().unwrap();
    let (handle, _knowledge) = start(with_disk(&[control.address], directory.path()));
    let mut stream = control.stream().await;
    stream.send(state(AUTHORIZATION_TYPE, vec![policy("p", 1)], &[]));
    told(&handle, |status| status.policies == 1).await;
    handle.stop().await;
    let (_handle, knowledge) = start(with_disk(&[nobody().await], directory.path()));
    assert!(!knowledge.snapshot().ready());
}

#[tokio::test]
async fn a_damaged_file_is_put_aside_and_the_agent_begins_without() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("discovery.state"), "nonsense").unwrap();
    let (handle, knowledge) = start(with_disk(&[nobody().await], directory.path()));
    assert!(!knowledge.snapshot().ready());
    assert_eq!(handle.status().disk, None);
    let aside = std::fs::read(directory.path().join("discovery.state.unusable")).unwrap();
    assert_eq!(aside, b"nonsense");
}

#[tokio::test]
async fn on_demand_what_is_met_is_fetched() {
    let mut control = Fake::start().await;
    let (_handle, knowledge) = start(Config {
        mode: Mode::OnDemand,
        ..config(&[control.address])
    });
    let mut stream = control.stream().await;
    stream.request().await;
    assert_eq!(stream.request().await.resource_names_unsubscribe, ["*"]);
    stream.send(state(AUTHORIZATION_TYPE, vec![], &[]));
    known(&knowledge, mesh::Snapshot::ready).await;
    stream.request().await;

    let route = |last: u8| {
        let dialled = OriginalDst(SocketAddr::from(([10, 0, 0, last], 80)));
        knowledge.snapshot().resolve(&Workload::default(), dialled, 0, &[])
    };
    for last in [1, 9] {
        assert!(matches!(route(last), Route::Unknown { .. }));
        let address = model::NetworkAddress::new("", [10, 0, 0, last].into());
        knowledge.want(Wanted::Address(address)).await;
        assert_eq!(
            stream.request().await.resource_names_subscribe,
            [format!("/10.0.0.{last}")]
        );
    }
    stream.send(state(ADDRESS_TYPE, vec![workload("a", 1, 0)], &["/10.0.0.9"]));
    known(&knowledge, |snapshot| has(snapshot, "a")).await;
    assert!(matches!(route(1), Route::Tunnel { .. }));
    assert!(matches!(route(9), Route::Passthrough { .. }));
}
