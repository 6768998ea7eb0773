//! What this process knows of the mesh: changes in, snapshots out.
//!
//! ```text
//! a source (static file) ─► Contents ─► Writer::replace ─► Snapshot ─► Knowledge::snapshot   (any thread, no lock)
//!                                        │ one writer        └───────► Knowledge::changed    (watchers wake)
//! ```
//! A decision takes one snapshot and keeps to it. A snapshot is whole: its indexes agree with each other.
//!
//! Deliberately unknown here: sockets, time, files. Randomness is an argument.
//!
//! Before the first [`Writer::replace`] the snapshot is empty and not [`Snapshot::ready`]: whoever asks for a verdict is
//! denied with [`policy::Reason::NoKnowledge`] (`nothing_known_is_nothing_allowed`).

mod contents;
mod route;
mod snapshot;
pub mod static_file;

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

pub use contents::{Contents, Rejected};
pub use route::{RefuseReason, Route};
pub use snapshot::Snapshot;

/// The reading end: cheap to clone, shared by everything that decides.
#[derive(Clone)]
pub struct Knowledge {
    current: Arc<ArcSwap<Snapshot>>,
    changed: watch::Receiver<u64>,
}

impl Knowledge {
    /// What is known now. Keep it for one decision, not longer.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Wakes when there is a new snapshot; the value is its [`Snapshot::generation`].
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.changed.clone()
    }
}

/// The writing end; there is one.
pub struct Writer {
    current: Arc<ArcSwap<Snapshot>>,
    changed: watch::Sender<u64>,
}

/// An empty, not yet ready knowledge and its writer.
pub fn new() -> (Writer, Knowledge) {
    let current = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
    let (changed, receiver) = watch::channel(0);
    (
        Writer {
            current: current.clone(),
            changed,
        },
        Knowledge {
            current,
            changed: receiver,
        },
    )
}

impl Writer {
    /// Publishes new contents as one snapshot. An object that was rejected stays as it was when it was last good.
    /// Returns what could not be taken over, with what the caller already rejected left out.
    pub fn replace(&mut self, mut contents: Contents, rejected: &[Rejected]) -> Vec<Rejected> {
        let before = self.current.load_full();
        contents.keep_last_good(&before, rejected);
        let generation = before.generation() + 1;
        let (snapshot, conflicts) = Snapshot::build(contents, generation);
        self.current.store(Arc::new(snapshot));
        self.changed.send_replace(generation);
        conflicts
    }
}

#[cfg(test)]
mod tests {
    use policy::{Facts, Reason};

    use super::*;

    #[test]
    fn nothing_known_is_nothing_allowed() {
        let (_writer, knowledge) = new();
        let snapshot = knowledge.snapshot();
        assert!(!snapshot.ready());
        let workload = test_support::workload("a", "10.0.0.1");
        let facts = Facts {
            identity: None,
            source: "10.0.0.9".parse().unwrap(),
            destination: "10.0.0.1:80".parse().unwrap(),
        };
        assert_eq!(snapshot.verdict(&facts, &workload).reason, Reason::NoKnowledge);
    }

    #[test]
    fn watchers_wake_and_see_the_new_snapshot() {
        let (mut writer, knowledge) = new();
        let mut changed = knowledge.changed();
        changed.mark_unchanged();
        let contents = Contents {
            workloads: vec![test_support::workload("a", "10.0.0.1")],
            ..Contents::default()
        };
        assert!(writer.replace(contents, &[]).is_empty());
        assert!(changed.has_changed().unwrap());
        assert!(
            knowledge
                .snapshot()
                .workload_by_ip("10.0.0.1".parse().unwrap())
                .is_some()
        );
    }
}

#[cfg(test)]
mod test_support {
    use model::{TunnelProtocol, Workload, WorkloadUid};

    pub fn workload(name: &str, ip: &str) -> Workload {
        let text = format!(
            "{{uid: {}, name: {name}, namespace: shop, workloadIps: [\"{ip}\"], node: n1, protocol: HBONE}}",
            WorkloadUid::of_pod("c", "shop", name)
        );
        let workload: Workload = serde_yaml_ng::from_str(&text).unwrap();
        assert_eq!(workload.protocol, TunnelProtocol::Hbone);
        workload
    }
}
