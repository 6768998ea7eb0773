//! The xDS server over real connections, with clients that speak the protocol as it is generated from its definition.

#![allow(clippy::unwrap_used)]

mod mesh;

use std::{collections::BTreeSet, time::Duration};

use control::{
    resources::{Change, Type},
    xds::{AdmissionLimits, Config, View},
};
use mesh::{Agent, Replica, policy, remove, service, workload};
use tonic::Code;

fn small() -> Vec<Change> {
    vec![
        Change::Put(service("ns/s", "10.1.0.1", 0)),
        Change::Put(workload("a", "10.0.0.1", &["ns/s"], 0)),
        Change::Put(workload("b", "10.0.0.2", &["ns/s"], 0)),
        Change::Put(workload("c", "10.0.0.3", &[], 0)),
        Change::Put(policy("ns/p", 0)),
    ]
}

fn large(pods: u32) -> Vec<Change> {
    let pod = |n: u32| {
        workload(
            &format!("cluster//Pod/ns/{n}"),
            &format!("10.{}.{}.{}", n >> 16, n >> 8 & 255, n & 255),
            &[],
            0,
        )
    };
    (0..pods).map(|n| Change::Put(pod(n))).collect()
}

#[tokio::test]
async fn an_agent_is_synchronised_and_kept_so() {
    let replica = Replica::start(small(), Config::default()).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    assert_eq!(agent.names(View::Address), BTreeSet::from(["a", "b", "c", "ns/s"]));
    let generation = replica.cache.apply(vec![
        Change::Put(workload("a", "10.0.0.1", &[], 1)),
        remove(Type::Address, "b"),
        Change::Put(policy("ns/q", 0)),
    ]);
    let before = agent.bytes;
    agent.until_synchronised(&replica).await;
    replica.discovery.acknowledged().wait_in_force(generation).await;
    assert_eq!(agent.names(View::Address), BTreeSet::from(["a", "c", "ns/s"]));
    assert_eq!(agent.names(View::Authorization), BTreeSet::from(["ns/p", "ns/q"]));
    assert!(agent.bytes - before < 1000, "only what changed");
    let client = &replica.discovery.acknowledged().clients()[0];
    assert_eq!((client.caller.as_str(), client.node.as_str()), ("test", "node-0"));
}

#[tokio::test]
async fn a_mesh_of_many_responses_arrives_whole() {
    let config = Config {
        response_bytes: 64 << 10,
        ..Config::default()
    };
    let replica = Replica::start(large(5000), config).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    assert_eq!(agent.names(View::Address).len(), 5000);
    assert!(
        agent.largest < 128 << 10 && agent.taken > 5,
        "{} {}",
        agent.largest,
        agent.taken
    );
}

#[tokio::test]
async fn a_replica_that_takes_over_sends_only_the_difference() {
    let (one, other) = (
        Replica::start(large(2000), Config::default()).await,
        Replica::start(large(2000), Config::default()).await,
    );
    let mut agent = Agent::connect(&one).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&one).await;
    // The first dies in the middle of a push, with something the agent has not acknowledged.
    one.cache
        .apply(vec![Change::Put(workload("mid-push", "10.9.0.1", &[], 0))]);
    let whole = agent.bytes;
    one.stop().await;
    other.cache.apply(vec![
        Change::Put(workload("mid-push", "10.9.0.1", &[], 0)),
        remove(Type::Address, "cluster//Pod/ns/7"),
    ]);
    agent.reconnect(&other).await.unwrap();
    let before = agent.bytes;
    agent.until_synchronised(&other).await;
    assert_eq!(agent.names(View::Address).len(), 2000);
    assert!(
        agent.bytes - before < 2000 && whole > 100_000,
        "{} of {whole}",
        agent.bytes - before
    );
}

#[tokio::test]
async fn names_are_asked_for_on_demand() {
    let replica = Replica::start(small(), Config::default()).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.say(View::Address, &["*"], &["*"]).await;
    agent.receive().await.unwrap();
    agent.say(View::Address, &["/10.1.0.1", "/192.0.2.1"], &[]).await;
    let response = agent.receive().await.unwrap();
    assert_eq!(response.removed_resources, ["/192.0.2.1"]);
    assert_eq!(agent.names(View::Address), BTreeSet::from(["a", "b", "ns/s"]));
    replica
        .cache
        .apply(vec![Change::Put(workload("d", "192.0.2.1", &[], 0))]);
    agent.receive().await.unwrap();
    assert!(agent.names(View::Address).contains("d"));
}

#[tokio::test]
async fn a_refusal_is_reported_with_the_resource_and_the_client() {
    let replica = Replica::start(small(), Config::default()).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    agent.refuses = Some("ns/bad: no such action".to_owned());
    let generation = replica.cache.apply(vec![
        Change::Put(policy("ns/bad", 0)),
        Change::Put(policy("ns/fine", 0)),
    ]);
    agent.receive().await.unwrap();
    replica.discovery.acknowledged().wait_in_force(generation).await;
    let refusals = replica.discovery.acknowledged().refusals();
    let [refusal] = &refusals[..] else {
        panic!("{refusals:?}")
    };
    assert_eq!((&*refusal.resources[0], refusal.node.as_str()), ("ns/bad", "node-0"));
    assert_eq!(
        (refusal.view, refusal.message.as_str()),
        (View::Authorization, "ns/bad: no such action")
    );
}

#[tokio::test]
async fn an_agent_that_does_not_read_is_dropped_and_others_are_served() {
    let config = Config {
        acknowledge: Duration::from_millis(300),
        ..Config::default()
    };
    let replica = Replica::start(large(20_000), config).await;
    let mut stuck = Agent::connect(&replica).await.unwrap();
    stuck.subscribe_all().await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    for content in 1..50 {
        replica
            .cache
            .apply(vec![Change::Put(workload("a", "10.9.0.1", &[], content))]);
        agent.until_synchronised(&replica).await;
    }
    let acknowledged = replica.discovery.acknowledged();
    let generation = replica.cache.snapshot().generation();
    acknowledged.wait_in_force(generation).await;
    assert_eq!(acknowledged.connected(), 1);
    assert_eq!(
        acknowledged.counters.dropped.load(std::sync::atomic::Ordering::Relaxed),
        1
    );
    // What it was sent stays within HTTP/2's windows, and then the connection is gone.
    while stuck.receive().await.is_ok() {}
}

#[tokio::test]
async fn garbage_ends_its_own_stream_only() {
    let replica = Replica::start(small(), Config::default()).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    let status = mesh::send_bytes(&replica, &[0xff; 64]).await;
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    let mut confused = Agent::connect(&replica).await.unwrap();
    confused
        .ask_for_type("type.googleapis.com/envoy.config.cluster.v3.Cluster")
        .await;
    confused.subscribe_all().await;
    confused.until_synchronised(&replica).await;
    replica
        .cache
        .apply(vec![Change::Put(workload("new", "10.0.0.9", &[], 0))]);
    agent.until_synchronised(&replica).await;
    assert!(agent.names(View::Address).contains("new"));
}

#[tokio::test]
async fn nobody_is_served_before_the_mesh_is_known_and_nobody_unknown() {
    let replica = Replica::start(vec![], Config::default()).await;
    let empty = Replica::unknown().await;
    let refused = Agent::connect(&empty).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    assert!(refused.metadata().contains_key("grpc-retry-pushback-ms"));
    let refused = Agent::connect_as(&replica, "somebody").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    Agent::connect(&replica).await.unwrap();
}

#[tokio::test]
async fn a_drain_sends_agents_elsewhere() {
    let replica = Replica::start(small(), Config::default()).await;
    let mut agent = Agent::connect(&replica).await.unwrap();
    agent.subscribe_all().await;
    agent.until_synchronised(&replica).await;
    let stop = tokio::spawn(replica.stop());
    let ended = agent.receive().await.unwrap_err();
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    stop.await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_agents_come_back_at_once() {
    let config = Config {
        admission: AdmissionLimits {
            first_syncs: 8,
            ..AdmissionLimits::default()
        },
        ..Config::default()
    };
    let replica = Replica::start(large(500), config).await;
    let mut agents = tokio::task::JoinSet::new();
    for _ in 0..200 {
        let mut agent = Agent::connect(&replica).await.unwrap();
        let cache = replica.cache.clone();
        agents.spawn(async move {
            agent.subscribe_all().await;
            agent.until(&cache).await;
            agent
        });
    }
    let agents = agents.join_all().await;
    assert!(agents.iter().all(|agent| agent.names(View::Address).len() == 500));
    let (replica, before) = (replica, agents[0].bytes);
    let mut back = tokio::task::JoinSet::new();
    for mut agent in agents {
        let (address, cache) = (replica.address, replica.cache.clone());
        back.spawn(async move {
            agent.reconnect_to(address).await.unwrap();
            agent.until(&cache).await;
            agent.bytes
        });
    }
    for bytes in back.join_all().await {
        assert!(bytes - before < 1000, "nothing changed, so nothing is sent");
    }
    assert_eq!(
        replica
            .discovery
            .acknowledged()
            .counters
            .streams
            .load(std::sync::atomic::Ordering::Relaxed),
        400
    );
}

#[tokio::test]
async fn a_queue_that_is_full_turns_agents_away() {
    let config = Config {
        admission: AdmissionLimits {
            first_syncs: 1,
            waiting: 1,
            ..AdmissionLimits::default()
        },
        ..Config::default()
    };
    let replica = Replica::start(small(), config).await;
    let one = Agent::connect(&replica).await.unwrap();
    let mut two = Agent::connect(&replica).await.unwrap();
    let mut queued = Vec::new();
    let refused = loop {
        match Agent::connect(&replica).await {
            Err(refused) => break refused,
            Ok(agent) => queued.push(agent),
        }
    };
    assert!(queued.len() <= 1, "{}", queued.len());
    assert_eq!(refused.code(), Code::Unavailable);
    drop(one);
    two.subscribe_all().await;
    two.until_synchronised(&replica).await;
}
