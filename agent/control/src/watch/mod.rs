//! Objects in: a watch for each kind, one index, and what follows from it into the xDS cache.
//!
//! ```text
//! API ═ watch (a task a kind) ═► steps ─► index (a thread): all that is there ─► Index::apply ─► Cache::apply ─► clients
//!              │                                                                  └─► findings ─► status
//!              └─► views: pods (auth), namespaces (trust), policies (status)
//! ```
//! No timers: what came in while the index was busy is one step, and when it is idle a change is applied at once. Before
//! every kind was listed nothing is served; after that, with the API away, what is known is. The queue between is bounded,
//! so that a slow index slows the watches down. The thread ends when the watches do.

mod index;
mod kind;
mod known;
mod object;
mod served;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use k8s::live::{self, Kind};
use kube::Client;
use serde_json::Value;
use tasks::{DrainMode, DrainSignal};
use tokio::sync::mpsc;

use self::known::Step;
use crate::{index::ObjectChange, status::Seen};

pub use index::{Indexing, Sink, Step as IndexStep};
pub use kind::resource;
pub use known::Tally;
pub use object::Raw;

/// Steps that wait for the index.
const QUEUE: usize = 4096;

/// Sees objects as they come, beside the index.
pub trait View: Send + Sync + 'static {
    /// It is new, or other than before.
    fn put(&self, kind: Kind, namespace: &str, name: &str, object: &Value);
    /// It is gone.
    fn gone(&self, kind: Kind, namespace: &str, name: &str);
    /// All of a kind were told.
    fn synced(&self, _kind: Kind) {}
}

/// How the watches are: by kind, whether its objects were listed, and what is wrong with it.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<BTreeMap<Kind, State>>>);

#[derive(Clone, Debug, Default)]
struct State {
    synced: bool,
    trouble: Option<String>,
    applied: Tally,
}

impl Health {
    /// The kinds that have not been listed yet.
    pub fn missing(&self) -> Vec<Kind> {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let synced = |kind: &Kind| states.get(kind).is_some_and(|state| state.synced);
        Kind::ALL.into_iter().filter(|kind| !synced(kind)).collect()
    }

    /// How much of each kind has gone through the index and is in the cache.
    pub fn applied(&self) -> BTreeMap<&'static str, Tally> {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        states
            .iter()
            .map(|(kind, state)| (kind.name(), state.applied))
            .collect()
    }

    /// What is wrong with which watch.
    pub fn troubles(&self) -> BTreeMap<&'static str, String> {
        let states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let troubles = states
            .iter()
            .filter_map(|(kind, state)| Some((kind.name(), state.trouble.clone()?)));
        troubles.collect()
    }

    fn with<T>(&self, kind: Kind, change: impl FnOnce(&mut State) -> T) -> T {
        let mut states = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        change(states.entry(kind).or_default())
    }
}

/// What the index is told.
#[derive(Debug)]
enum Message {
    Change(Box<ObjectChange>, Option<Seen>),
    Synced(Kind),
}

/// Starts a watch for each kind, and the index. The tasks end with the drain.
pub fn start(
    client: &Client,
    indexing: Indexing,
    views: Arc<[Arc<dyn View>]>,
    drain: &DrainSignal,
) -> std::io::Result<Health> {
    let health = Health::default();
    let (to, from) = mpsc::channel(QUEUE);
    let root_namespace = indexing.root_namespace();
    indexing.start(from, health.clone())?;
    for kind in Kind::ALL {
        let following = Following {
            kind,
            to: to.clone(),
            views: views.clone(),
            health: health.clone(),
        };
        let (client, root_namespace, mut drain) = (client.clone(), root_namespace.clone(), drain.clone());
        tokio::spawn(async move {
            tokio::select! {
                _ = drain.reached(DrainMode::Immediate) => {}
                () = kind::follow(client, kind, &root_namespace, following) => {}
            }
        });
    }
    Ok(health)
}

/// Takes one kind's steps to the index and the views.
struct Following {
    kind: Kind,
    to: mpsc::Sender<(Kind, Tally, Message)>,
    views: Arc<[Arc<dyn View>]>,
    health: Health,
}

impl kind::Follow for Following {
    async fn step(&mut self, step: Step, tally: Tally) -> bool {
        let kind = self.kind;
        let message = match step {
            Step::Put(raw) => {
                for view in self.views.iter() {
                    view.put(kind, raw.namespace(), raw.name(), &raw.value);
                }
                let seen = Seen::of(kind, raw.namespace(), raw.name(), Some(&raw.value));
                Message::Change(Box::new(ObjectChange::Put(live::read(kind, &raw.value))), seen)
            }
            Step::Gone(namespace, name) => {
                for view in self.views.iter() {
                    view.gone(kind, &namespace, &name);
                }
                let seen = Seen::of(kind, &namespace, &name, None);
                let (namespace, name) = (namespace.into(), name.into());
                Message::Change(Box::new(ObjectChange::Delete { kind, namespace, name }), seen)
            }
            Step::Synced => {
                self.views.iter().for_each(|view| view.synced(kind));
                self.health.with(kind, |state| state.synced = true);
                Message::Synced(kind)
            }
        };
        self.to.send((kind, tally, message)).await.is_ok()
    }

    fn state(&mut self, trouble: Option<String>) {
        let changed = self.health.with(self.kind, |state| {
            let changed = state.trouble != trouble;
            state.trouble.clone_from(&trouble);
            changed
        });
        let kind = self.kind.name();
        match trouble {
            Some(trouble) if changed => {
                tracing::warn!(kind, trouble, "the watch is interrupted; what is known is served")
            }
            None if changed => tracing::info!(kind, "the watch works again"),
            _ => {}
        }
    }
}
