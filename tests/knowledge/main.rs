//! From objects to what an agent knows, on the real code of both ends over a real connection: whatever changes in
//! whatever order, the agent comes to know what a fresh one is told, and on the way only what the control plane had.
//!
//! ```text
//! objects ─► control::index ─► xds::Cache ─► Discovery ═ TCP ═ discovery::Client ─► mesh::Snapshot ─► control::wire
//!                                   └ every generation ──────────── is one of these ◄───────────────────┘
//! ```
#![allow(clippy::unwrap_used)]

mod objects;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use control::{
    index::{self, Index},
    resources::{Change, Resource, Type},
    wire,
    xds::{self, Authenticate, Cache, Caller, Discovery},
};
use discovery::{Client, Config, Handle, Limits, Mode, NodeId};
use futures_util::future::BoxFuture;
use identity::Upstream;
use mesh::{Knowledge, Snapshot};
use model::MeshSettings;
use objects::{Step, sequence};
use proptest::prelude::*;
use proto::{
    Message,
    security::{Authorization, Scope},
    workload::{Address, address},
};
use tasks::DrainTrigger;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;

/// Longer than this nothing takes that works.
const PATIENCE: Duration = Duration::from_secs(60);

/// Everything of one type: names and encoded messages.
type State = BTreeMap<Arc<str>, Bytes>;

struct Anybody;

impl Authenticate for Anybody {
    fn authenticate<'a>(
        &'a self,
        _: &'a http::HeaderMap,
        _: Option<SocketAddr>,
    ) -> BoxFuture<'a, Result<Caller, tonic::Status>> {
        let name = "anybody".to_owned();
        Box::pin(async move { Ok(Caller { name }) })
    }
}

/// A control plane whose objects are put by hand.
struct Control {
    index: Index,
    cache: Arc<Cache>,
    discovery: Discovery,
    address: SocketAddr,
    /// Every state that it had.
    addresses: Vec<State>,
    policies: Vec<State>,
    server: JoinHandle<()>,
    _drain: DrainTrigger,
}

impl Drop for Control {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl Control {
    async fn start() -> Self {
        let cache = Arc::new(Cache::new());
        cache.apply(Vec::new());
        let (drain, signal) = tasks::drain_channel();
        let config = xds::Config {
            // So little that most states come in parts.
            response_bytes: 600,
            pace: Duration::from_millis(1),
            settle: Duration::from_millis(1),
            ..xds::Config::default()
        };
        let discovery = Discovery::start(cache.clone(), Arc::new(Anybody), config, signal);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = xds::transport().add_service(discovery.clone());
        let serving = router.serve_with_incoming(TcpListenerStream::new(listener));
        Self {
            index: Index::new(index::Config::default()),
            cache,
            discovery,
            address,
            addresses: vec![State::new()],
            policies: vec![State::new()],
            server: tokio::spawn(async move { serving.await.unwrap() }),
            _drain: drain,
        }
    }

    /// Takes steps, as one change of the mesh; its generation.
    fn apply(&mut self, steps: &[Step]) -> u64 {
        let outcome = self.index.apply(steps.iter().map(Step::change).collect());
        let (mut addresses, mut policies) = (
            self.addresses.last().unwrap().clone(),
            self.policies.last().unwrap().clone(),
        );
        for change in &outcome.changes {
            let mut of = |type_: Type, name: &Arc<str>, message: Option<Bytes>| {
                let state = if type_ == Type::Address {
                    &mut addresses
                } else {
                    &mut policies
                };
                match message {
                    Some(message) => state.insert(name.clone(), message),
                    None => state.remove(name),
                };
            };
            match change {
                Change::Put(resource) => of(resource.type_, &resource.name, Some(resource.message.clone())),
                Change::Remove { type_, name } => of(*type_, name, None),
            }
        }
        self.addresses.push(addresses);
        self.policies.push(policies);
        self.cache.apply(outcome.changes)
    }
}

/// An agent, as far as knowledge goes.
struct Agent {
    handle: Handle,
    knowledge: Knowledge,
    seen: Arc<Mutex<Vec<Arc<Snapshot>>>>,
    watching: JoinHandle<()>,
}

impl Agent {
    fn start(control: SocketAddr, state_dir: Option<&Path>) -> Self {
        let (writer, knowledge, demands) = mesh::with("", mesh::Scope::Everything);
        let config = Config {
            upstream: Upstream {
                addresses: vec![format!("http://{control}").parse().unwrap()],
                roots_file: "unused".into(),
            },
            token_file: None,
            node: NodeId {
                ip: [10, 0, 0, 7].into(),
                pod: "agent".to_owned(),
                namespace: "istio-system".to_owned(),
                node: "n1".to_owned(),
                metadata: BTreeMap::new(),
            },
            cluster: "Kubernetes".to_owned(),
            network: String::new(),
            mode: Mode::Wildcard,
            settings: MeshSettings::default(),
            state_dir: state_dir.map(Path::to_owned),
            keeps: true,
            limits: Limits {
                first_wait: Duration::from_millis(1),
                longest_wait: Duration::from_millis(20),
                ..Limits::default()
            },
        };
        let handle = Client::start(config, writer, demands);
        let seen = Arc::new(Mutex::new(vec![knowledge.snapshot()]));
        let (mut changed, all, source) = (knowledge.changed(), seen.clone(), knowledge.clone());
        let watching = tokio::spawn(async move {
            while changed.changed().await.is_ok() {
                all.lock().unwrap().push(source.snapshot());
            }
        });
        Self {
            handle,
            knowledge,
            seen,
            watching,
        }
    }

    /// Waits until it knows exactly this.
    async fn until(&self, addresses: &State, policies: &State) {
        let mut changed = self.knowledge.changed();
        let reached = async {
            while state_of(&self.knowledge.snapshot()) != (addresses.clone(), policies.clone()) {
                changed.changed().await.unwrap();
            }
        };
        if tokio::time::timeout(PATIENCE, reached).await.is_err() {
            let known = state_of(&self.knowledge.snapshot());
            panic!(
                "known: {known:#?}\nexpected: {:#?}\n{:?}",
                (addresses, policies),
                self.handle.status()
            );
        }
    }

    /// Ends it; every state it passed through was one of these, and it never went back. What held for a workload in that
    /// state and in all since, held on the way between them.
    async fn stop(self, control: &Control) {
        self.handle.stop().await;
        self.watching.abort();
        let mut at = 0;
        let always = always_holds(&control.addresses, &control.policies);
        for snapshot in self.seen.lock().unwrap().iter().filter(|snapshot| snapshot.ready()) {
            let (addresses, policies) = state_of(snapshot);
            let had = control.addresses[at..].iter().position(|state| *state == addresses);
            at += had.unwrap_or_else(|| panic!("the control plane never had {addresses:#?}"));
            // A policy that is gone stays until no address names it any more: each is one that there was.
            let there_was = |(name, message)| control.policies.iter().any(|state| state.get(name) == Some(message));
            assert!(policies.iter().all(there_was), "{policies:#?}");
            for (uid, policy) in &always[at] {
                let workload = snapshot.workloads().find(|workload| *workload.uid.0 == **uid).unwrap();
                let mut holds = snapshot.policies_for(workload).flatten();
                assert!(
                    holds.any(|one| one.key().to_string() == **policy),
                    "{policy} does not hold for {uid} any more, and did before and since"
                );
            }
            for workload in snapshot.workloads() {
                let all_known = snapshot.policies_for(workload).all(|policy| policy.is_ok());
                assert!(all_known, "{} names a policy that is not known", workload.uid);
            }
        }
    }
}

/// Of each state the workloads, and the policies that hold for them in it and in all that came after.
fn always_holds(addresses: &[State], policies: &[State]) -> Vec<BTreeSet<(Arc<str>, Arc<str>)>> {
    let mut since: Vec<BTreeSet<_>> = addresses.iter().zip(policies).map(|(a, p)| holding(a, p)).collect();
    for at in (1..since.len()).rev() {
        let (before, after) = since.split_at_mut(at);
        before[at - 1].retain(|one| after[0].contains(one));
    }
    since
}

/// The workloads of a state, and the policies that hold for them.
fn holding(addresses: &State, policies: &State) -> BTreeSet<(Arc<str>, Arc<str>)> {
    let mut found = BTreeSet::new();
    for (uid, message) in addresses {
        let Some(address::Type::Workload(workload)) = Address::decode(message.clone()).unwrap().r#type else {
            continue;
        };
        for (name, message) in policies {
            let policy = Authorization::decode(message.clone()).unwrap();
            let holds = match policy.scope() {
                Scope::Global => true,
                Scope::Namespace => policy.namespace == workload.namespace,
                Scope::WorkloadSelector => workload.authorization_policies.iter().any(|one| *one == **name),
            };
            if holds {
                found.insert((uid.clone(), name.clone()));
            }
        }
    }
    found
}

/// What a snapshot would be sent as.
fn state_of(snapshot: &Snapshot) -> (State, State) {
    let entry = |resource: Resource| (resource.name, resource.message);
    let workloads = snapshot.workloads().map(|workload| entry(wire::workload(workload)));
    let services = snapshot.services().map(|service| entry(wire::service(service)));
    let policies = snapshot.policies().map(|policy| entry(wire::policy(policy)));
    (workloads.chain(services).collect(), policies.collect())
}

/// What decisions look up.
fn looked_up(snapshot: &Snapshot) -> Vec<String> {
    let ips = (0..8u8).flat_map(|last| [[10, 0, 0, last], [10, 9, 0, last], [10, 8, 0, last]]);
    let of_ip = ips.map(|ip| {
        let workload = snapshot
            .workload_by_ip(ip.into())
            .map(|workload| workload.uid.to_string());
        let service = snapshot.service_by_vip(ip.into()).map(|service| service.key());
        format!("{ip:?}: {workload:?} {service:?}")
    });
    let mut services: Vec<_> = snapshot.services().collect();
    services.sort_by_key(|service| service.key());
    let of_service = services.into_iter().map(|service| {
        let endpoints = snapshot
            .endpoints(&service.key())
            .iter()
            .map(|workload| workload.uid.to_string());
        format!("{}: {:?}", service.key(), endpoints.collect::<Vec<_>>())
    });
    of_ip.chain(of_service).collect()
}

async fn converges(sequence: Vec<(Vec<Step>, u8)>) {
    let mut control = Control::start().await;
    let directory = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(control.address, Some(directory.path()));
    for (steps, then) in sequence {
        let generation = control.apply(&steps);
        match then {
            // The change is in force at the agent before the next.
            0 | 1 => {
                let in_force = control.discovery.acknowledged().wait_in_force(generation);
                tokio::time::timeout(PATIENCE, in_force).await.unwrap();
            }
            // The agent starts anew, with what it left on the disk.
            2 => {
                agent.stop(&control).await;
                agent = Agent::start(control.address, Some(directory.path()));
            }
            // The next change comes at once, or nearly.
            3 => tokio::task::yield_now().await,
            _ => {}
        }
    }
    let (addresses, policies) = (control.addresses.last().unwrap(), control.policies.last().unwrap());
    agent.until(addresses, policies).await;
    let fresh = Agent::start(control.address, None);
    fresh.until(addresses, policies).await;
    assert_eq!(
        looked_up(&agent.knowledge.snapshot()),
        looked_up(&fresh.knowledge.snapshot())
    );
    agent.stop(&control).await;
    fresh.stop(&control).await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_agent_comes_to_know_what_a_fresh_one_is_told(sequence in sequence()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(converges(sequence));
    }
}
