//! The pods of this node: what should be captured, and making it so.
//!
//! ```text
//!                told (cmdadd)                      the mesh says: in                 first listeners given to the proxy
//!   unknown ───────────────────► known, uncaptured ──────────────────► captured ───────────────────────► served
//!                                     ▲     the mesh says: out            │
//!                                     └──────────────────────────────────┘      gone (cmddel): forgotten
//! ```
//! One task owns the state; it is woken by an event, by new knowledge, and every [`RECONCILE_EVERY`], compares what
//! should be with what is, and repairs the difference. What fails is tried again at the next of these, and is told in
//! the status until then.
//!
//! Fail closed: a pod that the mesh does not name is not let start (its namespace stays unknown to the kernel's hooks,
//! which refuse its connections), and a captured pod that vanishes from the mesh stays captured.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use admin::{PodAdded, PodChecked, PodRemoved, ValidAttachments};
use anyhow::Context;
use capture::{CapturedPod, PodSpec};
use identity::Identities;
use mesh::Knowledge;
use model::{Identity, NamespacedName, OriginalDst, PeerAddr, Workload, WorkloadUid};
use socket2::SockRef;
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

use super::records::{PodRecord, Records};

const RECONCILE_EVERY: Duration = Duration::from_secs(15);
/// Events that wait; the local socket serves fewer connections than that at once.
const EVENTS: usize = 256;

/// What the reconciler works with.
pub struct Parts {
    pub node_name: Arc<str>,
    pub capture: capture::Capture,
    pub knowledge: Knowledge,
    pub identities: Identities,
    pub proxy: Arc<l4::Proxy>,
}

/// The way to tell the reconciler of pods.
#[derive(Clone)]
pub struct Pods(mpsc::Sender<Event>);

/// What the reconciler shows of itself.
#[derive(Clone, Default)]
pub struct View(Arc<Mutex<ViewState>>);

#[derive(Default)]
struct ViewState {
    settled: bool,
    pods: Vec<PodView>,
}

/// One pod, as it is.
#[derive(Clone, Debug)]
pub struct PodView {
    pub pod: NamespacedName,
    pub uid: WorkloadUid,
    pub addresses: Vec<IpAddr>,
    pub captured: bool,
    pub identity: Option<Identity>,
    pub problem: Option<String>,
}

enum Event {
    Added(PodRecord, oneshot::Sender<Result<(), String>>),
    Removed(NamespacedName, String, oneshot::Sender<Result<(), String>>),
    Garbage(Vec<String>, oneshot::Sender<Result<(), String>>),
}

impl Pods {
    /// Resolves once the pod is captured, or known not to be in the mesh.
    pub async fn added(&self, event: PodAdded) -> Result<(), String> {
        let addresses = event.ips.iter().map(admin::PodIp::ip).collect::<Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err("the pod has no address".to_owned());
        }
        let pod = NamespacedName::new(event.pod_namespace, event.pod_name);
        self.ask(|answer| {
            Event::Added(
                PodRecord {
                    pod,
                    netns: event.netns,
                    addresses,
                    container_id: event.container_id,
                },
                answer,
            )
        })
        .await
    }

    /// Resolves once nothing of the pod is left.
    pub async fn removed(&self, event: PodRemoved) -> Result<(), String> {
        let pod = NamespacedName::new(event.pod_namespace, event.pod_name);
        self.ask(|answer| Event::Removed(pod, event.container_id, answer)).await
    }

    /// Resolves once nothing is left of pods of other sandboxes than these.
    pub async fn garbage(&self, valid: ValidAttachments) -> Result<(), String> {
        self.ask(|answer| Event::Garbage(valid.container_ids, answer)).await
    }

    async fn ask(&self, event: impl FnOnce(oneshot::Sender<Result<(), String>>) -> Event) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        let ended = || "the agent is ending".to_owned();
        self.0.send(event(answer)).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }
}

impl View {
    /// Whether every pod that was known at the start is as it should be.
    pub fn settled(&self) -> bool {
        self.lock().settled
    }

    /// Every pod.
    pub fn pods(&self) -> Vec<PodView> {
        self.lock().pods.clone()
    }

    /// Whether a pod is captured, or known not to be in the mesh.
    pub fn check(&self, pod: &PodChecked) -> Result<(), String> {
        let view = self.lock();
        let known = view
            .pods
            .iter()
            .find(|known| *known.pod.namespace == *pod.pod_namespace && *known.pod.name == *pod.pod_name);
        match known {
            None => Err("the agent was not told of the pod".to_owned()),
            Some(known) => known.problem.clone().map_or(Ok(()), Err),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ViewState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the reconciler with the pods that an earlier agent was told of.
pub fn start(parts: Parts, directory: &Path) -> anyhow::Result<(Pods, View, JoinHandle<()>)> {
    let (records, found) =
        Records::open(directory).with_context(|| format!("cannot keep pods in {}", directory.display()))?;
    if !found.is_empty() {
        tracing::info!(pods = found.len(), "pods found again from before the restart");
    }
    let (sender, events) = mpsc::channel(EVENTS);
    let view = View::default();
    let pods = found
        .into_values()
        .map(|record| (record.pod.clone(), Pod::new(record)))
        .collect();
    let reconciler = Reconciler {
        parts,
        records,
        pods,
        view: view.clone(),
    };
    Ok((Pods(sender), view, tokio::spawn(reconciler.run(events))))
}

struct Reconciler {
    parts: Parts,
    records: Records,
    pods: BTreeMap<NamespacedName, Pod>,
    view: View,
}

struct Pod {
    record: PodRecord,
    state: State,
    problem: Option<String>,
}

/// What the kernel and the proxy were last told of a pod.
#[derive(Clone, PartialEq)]
enum State {
    Unknown,
    Uncaptured(WorkloadUid),
    Captured {
        uid: WorkloadUid,
        identity: Identity,
        non_tcp_forbidden: bool,
    },
}

impl Pod {
    fn new(record: PodRecord) -> Self {
        Self {
            record,
            state: State::Unknown,
            problem: None,
        }
    }
}

impl Reconciler {
    async fn run(mut self, mut events: mpsc::Receiver<Event>) {
        let mut changed = self.parts.knowledge.changed();
        let mut timer = tokio::time::interval(RECONCILE_EVERY);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = events.recv() => match event {
                    Some(event) => self.handle(event).await,
                    None => return,
                },
                // The writer lives as long as the process; without it there is nothing new to learn.
                Ok(()) = changed.changed() => self.reconcile_all().await,
                _ = timer.tick() => self.reconcile_all().await,
            }
            self.show();
        }
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Added(record, answer) => {
                let outcome = self.add(record).await;
                self.show();
                // A plugin that does not wait any more asks again.
                let _ = answer.send(outcome);
            }
            Event::Removed(pod, container_id, answer) => {
                let successor = self.pods.get(&pod).is_some_and(|known| {
                    let other = &known.record.container_id;
                    !container_id.is_empty() && !other.is_empty() && *other != container_id
                });
                let outcome = if successor { Ok(()) } else { self.remove(&pod).await };
                self.show();
                let _ = answer.send(outcome);
            }
            Event::Garbage(valid, answer) => {
                let outcome = self.collect(&valid).await;
                self.show();
                let _ = answer.send(outcome);
            }
        }
    }

    async fn add(&mut self, record: PodRecord) -> Result<(), String> {
        let key = record.pod.clone();
        if let Some(before) = self.pods.get(&key)
            && before.record != record
        {
            self.remove(&key).await?;
        }
        self.records
            .keep(&record)
            .map_err(|error| format!("cannot keep the record of {key}: {error}"))?;
        self.pods.entry(key.clone()).or_insert_with(|| Pod::new(record));
        self.reconcile(&key).await
    }

    async fn remove(&mut self, key: &NamespacedName) -> Result<(), String> {
        if let Some(pod) = self.pods.remove(key) {
            if let State::Captured { uid, .. } = &pod.state {
                self.parts.proxy.remove_pod(uid);
            }
            if let State::Captured { uid, .. } | State::Uncaptured(uid) = &pod.state {
                self.parts.capture.forget(uid).await;
            }
        }
        self.records
            .drop_record(key)
            .map_err(|error| format!("cannot drop the record of {key}: {error}"))
    }

    /// Forgets the pods of sandboxes that are no more. One whose sandbox nobody named stays.
    async fn collect(&mut self, valid: &[String]) -> Result<(), String> {
        let gone = |pod: &&Pod| !pod.record.container_id.is_empty() && !valid.contains(&pod.record.container_id);
        let gone: Vec<_> = self
            .pods
            .values()
            .filter(gone)
            .map(|pod| pod.record.pod.clone())
            .collect();
        for key in gone {
            tracing::info!(pod = %key, "its sandbox is gone, as the container runtime says");
            self.remove(&key).await?;
        }
        Ok(())
    }

    async fn reconcile_all(&mut self) {
        let keys: Vec<_> = self.pods.keys().cloned().collect();
        for key in keys {
            if self.pods.get(&key).is_some_and(|pod| !pod.record.netns.exists()) {
                tracing::info!(pod = %key, "its network namespace is gone");
                if let Err(error) = self.remove(&key).await {
                    tracing::warn!(pod = %key, error, "cannot forget the pod");
                }
                continue;
            }
            // The problem is kept for the status and was logged; the next round tries again.
            let _ = self.reconcile(&key).await;
        }
        match self.parts.capture.reconcile().await {
            Ok(repaired) => repaired.iter().for_each(|what| tracing::warn!("repaired: {what}")),
            Err(error) => tracing::error!(%error, "cannot see whether capture stands as it should"),
        }
        let settled = self.parts.knowledge.snapshot().ready() && self.pods.values().all(|pod| pod.problem.is_none());
        if settled && !self.view.settled() {
            // Whoever sees the agent ready sees its pods.
            self.show();
            self.view.lock().settled = true;
            if let Err(error) = self.parts.capture.forget_untold().await {
                tracing::error!(%error, "cannot forget pods that went while no agent ran");
            }
        }
    }

    async fn reconcile(&mut self, key: &NamespacedName) -> Result<(), String> {
        let Some(pod) = self.pods.get(key) else { return Ok(()) };
        let outcome = match self.desired(&pod.record) {
            Ok(desired) if pod.state == desired => Ok(desired),
            Ok(desired) => self.change(&pod.record, &pod.state, &desired).await.map(|()| desired),
            Err(unknown) => Err(unknown),
        };
        let Some(pod) = self.pods.get_mut(key) else {
            return Ok(());
        };
        let outcome = outcome.map(|state| pod.state = state);
        if let Err(error) = &outcome
            && pod.problem.as_ref() != Some(error)
        {
            tracing::error!(pod = %key, "{error}");
        }
        pod.problem = outcome.clone().err();
        outcome
    }

    /// What the mesh says of a pod. By address, and only if name and node agree: a mix-up would give it another's identity.
    fn desired(&self, record: &PodRecord) -> Result<State, String> {
        let snapshot = self.parts.knowledge.snapshot();
        let named = |workload: &&Arc<Workload>| {
            workload.namespace == record.pod.namespace
                && workload.name == record.pod.name
                && workload.node == self.parts.node_name
        };
        let workload = record
            .addresses
            .iter()
            .find_map(|ip| snapshot.workload_by_ip(*ip))
            .filter(named);
        let Some(workload) = workload else {
            return Err(format!(
                "the mesh does not know a pod {} of this node with this address (yet)",
                record.pod
            ));
        };
        if !workload.is_captured() {
            return Ok(State::Uncaptured(workload.uid.clone()));
        }
        Ok(State::Captured {
            uid: workload.uid.clone(),
            identity: workload.identity(),
            non_tcp_forbidden: workload.non_tcp.is_forbidden(snapshot.settings().non_tcp),
        })
    }

    async fn change(&self, record: &PodRecord, before: &State, after: &State) -> Result<(), String> {
        let Parts {
            capture,
            proxy,
            identities,
            ..
        } = &self.parts;
        let spec = |uid: &WorkloadUid| PodSpec {
            uid: uid.clone(),
            netns: record.netns.clone(),
            addresses: record.addresses.clone(),
        };
        match after {
            State::Unknown => Ok(()),
            State::Uncaptured(uid) => {
                if let State::Captured { uid, .. } = before {
                    capture.release(uid).await.map_err(|error| error.to_string())?;
                    proxy.retire_pod(uid);
                    tracing::info!(pod = %record.pod, "not captured any more");
                }
                capture.know(spec(uid)).await.map_err(|error| error.to_string())
            }
            State::Captured {
                uid,
                identity,
                non_tcp_forbidden,
            } => {
                // The certificate first: a pod that starts must be able to talk at once.
                identities
                    .credentials(identity)
                    .await
                    .map_err(|error| error.to_string())?;
                let served = matches!(before, State::Captured { uid: served, .. } if served == uid);
                let handle = capture
                    .capture(spec(uid), *non_tcp_forbidden)
                    .await
                    .map_err(|error| error.to_string())?;
                if !served {
                    let listeners = handle.listeners().map_err(|error| error.to_string())?;
                    let pod = l4::Pod {
                        uid: uid.clone(),
                        sockets: Arc::new(Sockets(handle)),
                        listeners: l4::PodListeners {
                            outbound: listeners.outbound,
                            inbound: listeners.inbound,
                            hbone: listeners.hbone,
                        },
                    };
                    proxy
                        .add_pod(pod)
                        .map_err(|error| format!("the proxy does not take the pod: {error}"))?;
                    tracing::info!(pod = %record.pod, %identity, "captured");
                }
                Ok(())
            }
        }
    }

    fn show(&self) {
        let pods = self.pods.values().map(|pod| {
            let (uid, captured, identity) = match &pod.state {
                State::Unknown => (None, false, None),
                State::Uncaptured(uid) => (Some(uid), false, None),
                State::Captured { uid, identity, .. } => (Some(uid), true, Some(identity)),
            };
            PodView {
                pod: pod.record.pod.clone(),
                uid: uid.cloned().unwrap_or_else(|| WorkloadUid("".into())),
                addresses: pod.record.addresses.clone(),
                captured,
                identity: identity.cloned(),
                problem: pod.problem.clone(),
            }
        });
        self.view.lock().pods = pods.collect();
    }
}

/// Capture's handle, as the proxy wants it.
struct Sockets(CapturedPod);

impl l4::PodSockets for Sockets {
    fn original_destination(&self, accepted: SockRef<'_>, peer: PeerAddr, local: SocketAddr) -> Option<OriginalDst> {
        self.0.original_destination(accepted, peer, local)
    }

    fn inbound_destination(&self, accepted: SockRef<'_>, peer: PeerAddr, local: SocketAddr) -> OriginalDst {
        self.0.inbound_destination(accepted, peer, local)
    }

    fn outbound_socket(&self, target: SocketAddr) -> std::io::Result<socket2::Socket> {
        self.0.outbound_socket(target)
    }

    fn inbound_socket(&self, target: SocketAddr, source: IpAddr) -> std::io::Result<socket2::Socket> {
        self.0.inbound_socket(target, source)
    }
}
