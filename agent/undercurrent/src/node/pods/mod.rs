//! The pods of this node: what should be captured, and making it so.
//!
//! ```text
//!                told (cmdadd)                in the mesh, and a certificate             first listeners given to the proxy
//!   unknown ───────────────────► known, uncaptured ──────────────────► captured ───────────────────────► served
//!                                     ▲                                   │
//!                                     └── out; peers were told before ────┘      gone (cmddel, GC): forgotten
//! ```
//! What should be is answered by an [`expectation::Oracle`]: the static file, or the Kubernetes API. One task
//! ([`reconciler`]) owns the state; it is woken by an event, by what the oracle learns, by a certificate that came, and by a
//! timer, compares what should be with what is, and repairs the difference. It waits for nobody: a certificate is fetched
//! beside it, and cmdadd is answered when there is something to answer.
//!
//! A pod that the API has and nobody told of is found by its addresses, as if it had been told ([`untold`]).
//!
//! Fail closed: a pod that nobody names is not let start (its namespace stays unknown to the kernel's hooks, which refuse
//! its connections), and a captured pod that nobody names any more stays captured.

mod expectation;
mod parts;
mod pod;
mod prepare;
mod reconciler;
mod untold;

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use admin::{PodAdded, PodChecked, PodRemoved, ValidAttachments};
use model::{Identity, NamespacedName, PodSettings, WorkloadUid};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::Instant,
};

pub use expectation::{Oracle, PodsOfCluster};
pub use parts::Parts;
pub use prepare::prepare;
pub use reconciler::start;

use super::{kube_source::Cluster, records::PodRecord};

/// How long cmdadd waits for what may come by itself: less than a runtime's patience with its plugin.
const PATIENCE: Duration = Duration::from_secs(25);

type Outcome = Result<(), String>;

enum Event {
    /// With who waits for its capture, and until when.
    Added(Box<PodRecord>, oneshot::Sender<Outcome>, Instant),
    /// With its sandbox, where that was said.
    Removed(NamespacedName, String, oneshot::Sender<Outcome>),
    /// The sandboxes that there are.
    Garbage(Vec<String>, oneshot::Sender<Outcome>),
    /// Another agent is to be in charge: nothing is to be done any more. Told when that is so.
    Pause(oneshot::Sender<()>),
    /// The other agent is gone.
    Resume,
}

/// The way to tell the reconciler of pods.
#[derive(Clone)]
pub struct Pods {
    events: mpsc::Sender<Event>,
    /// Who vouches for a pod that is about to start; nobody where a static file names all pods.
    cluster: Option<Cluster>,
}

impl Pods {
    /// Resolves once the pod is captured, or known not to be in the mesh.
    pub async fn added(&self, event: PodAdded) -> Outcome {
        let addresses = event.ips.iter().map(admin::PodIp::ip).collect::<Result<Vec<_>, _>>()?;
        if addresses.is_empty() {
            return Err("the pod has no address".to_owned());
        }
        let until = Instant::now() + PATIENCE;
        let pod = NamespacedName::new(event.pod_namespace, event.pod_name);
        let api = match &self.cluster {
            Some(cluster) => Some(cluster.resolve(&pod, &event.pod_uid, &addresses, PATIENCE).await?),
            None => None,
        };
        let record = PodRecord {
            pod,
            netns: event.netns,
            addresses,
            container_id: event.container_id,
            found: false,
            starting: true,
            captured: None,
            api,
        };
        self.ask(|answer| Event::Added(Box::new(record), answer, until)).await
    }

    /// Resolves once nothing of the pod is left.
    pub async fn removed(&self, event: PodRemoved) -> Outcome {
        let pod = NamespacedName::new(event.pod_namespace, event.pod_name);
        self.ask(|answer| Event::Removed(pod, event.container_id, answer)).await
    }

    /// Resolves once nothing is left of pods of other sandboxes than these.
    pub async fn garbage(&self, valid: ValidAttachments) -> Outcome {
        self.ask(|answer| Event::Garbage(valid.container_ids, answer)).await
    }

    /// Does nothing more from when this resolves until [`Self::resume`]; events are answered with
    /// [`admin::ASK_AGAIN`].
    pub async fn pause(&self) {
        let (answer, answered) = oneshot::channel();
        if self.events.send(Event::Pause(answer)).await.is_ok() {
            // Without a reconciler nothing is done either.
            let _ = answered.await;
        }
    }

    /// Goes on, from what the records say now.
    pub async fn resume(&self) {
        let _ = self.events.send(Event::Resume).await;
    }

    async fn ask(&self, event: impl FnOnce(oneshot::Sender<Outcome>) -> Event) -> Outcome {
        let (answer, answered) = oneshot::channel();
        let ended = || "the agent is ending".to_owned();
        self.events.send(event(answer)).await.map_err(|_| ended())?;
        answered.await.map_err(|_| ended())?
    }
}

/// What the reconciler shows of itself.
#[derive(Clone, Default)]
pub struct View(Arc<Mutex<ViewState>>);

#[derive(Default)]
struct ViewState {
    attempted: watch::Sender<bool>,
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
    /// Whether the agent is its name server.
    pub answers_dns: bool,
    pub problem: Option<String>,
    /// How it is captured.
    pub settings: PodSettings,
    /// What it asks for and does not get: to be in the mesh; or, where it is captured, what its annotations say.
    pub notes: Vec<String>,
}

impl View {
    /// Whether every pod that was known at the start is as it should be.
    pub fn settled(&self) -> bool {
        self.lock().settled
    }

    /// Resolves once everything was tried for every pod that was known at the start.
    pub async fn attempted(&self) {
        let mut attempted = self.lock().attempted.subscribe();
        // The sender is this view's own.
        let _ = attempted.wait_for(|attempted| *attempted).await;
    }

    /// Every pod.
    pub fn pods(&self) -> Vec<PodView> {
        self.lock().pods.clone()
    }

    /// Whether a pod is captured, or known not to be in the mesh.
    pub fn check(&self, pod: &PodChecked) -> Outcome {
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
