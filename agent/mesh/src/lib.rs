//! What this process knows of the mesh: changes in, snapshots out.
//!
//! ```text
//! static file ─► Contents ─► Writer::replace ┐
//! xDS ─────────► Delta ────► Writer::apply ──┼─► Snapshot ─► Knowledge::snapshot   (any thread, no lock)
//! the node's own pods ─────► Locals::set ────┘           └─► Knowledge::changed    (watchers wake)
//! on demand: Demands ◄───────── Knowledge::want ◄── Route::Unknown
//! ```
//! A decision takes one snapshot and keeps to it. A snapshot is whole: its indexes agree with each other. The next one
//! shares with it what did not change, so that a change costs the same in a mesh of a hundred workloads and of a hundred
//! thousand (`examples/lookups.rs`).
//!
//! Of objects that claim one address the first by name has it and the others wait for it; whatever the order in which
//! they came, the same is known (`any_sequence_of_deltas_is_as_if_built_from_scratch`).
//!
//! Deliberately unknown here: sockets, time, files. Randomness is an argument.
//!
//! Before the first [`Writer::replace`] or [`Writer::apply`] no snapshot is [`Snapshot::ready`]: whoever asks for a
//! verdict is denied with [`policy::Reason::NoKnowledge`] (`nothing_known_is_nothing_allowed`).

mod choice;
mod claims;
mod contents;
mod demand;
mod endpoints;
mod hosts;
mod outbound;
mod ranges;
mod route;
mod snapshot;
mod standing;
pub mod static_file;
mod trie;
mod unreadable;
mod waypoint;
mod writer;

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, watch};

pub use choice::{Attempt, Experience, NoExperience};
pub use contents::{Contents, Rejected, RejectedObject};
pub use demand::{Demands, Wanted};
pub use endpoints::EndpointList;
pub use outbound::Exit;
pub use route::{RefuseReason, Route};
pub use snapshot::{Counts, Snapshot};
pub use standing::Standing;
pub use unreadable::Unreadable;
pub use waypoint::WaypointFault;
pub use writer::{Delta, Locals, Outbound, Writer};

/// The reading end: cheap to clone, shared by everything that decides.
#[derive(Clone)]
pub struct Knowledge {
    current: Arc<ArcSwap<Snapshot>>,
    changed: watch::Receiver<u64>,
    wanted: mpsc::Sender<Wanted>,
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

    /// Asks for what nothing is known of ([`Route::Unknown`]); a later snapshot knows it or, of an address, knows that
    /// there is nothing. Waits while too many ask; it is for the caller to give up.
    pub async fn want(&self, wanted: Wanted) {
        // Nobody there to fetch: nothing comes, and the caller's patience ends.
        let _ = self.wanted.send(wanted).await;
    }
}

/// Whether everything is known, or only what was asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Scope {
    /// An address that is not known is none of the mesh's.
    #[default]
    Everything,
    /// An address that is not known has to be asked for.
    OnDemand,
}

/// An empty, not yet ready knowledge of the default network and its writer.
pub fn new() -> (Writer, Knowledge) {
    let (writer, knowledge, _) = with("", Scope::Everything);
    (writer, knowledge)
}

/// An empty, not yet ready knowledge for a node of this network, its writer, and what will be asked for.
pub fn with(network: &str, scope: Scope) -> (Writer, Knowledge, Demands) {
    let current = Arc::new(ArcSwap::from_pointee(Snapshot::nothing(network, scope)));
    let (changed, receiver) = watch::channel(0);
    let (wanted, demands) = demand::channel();
    let knowledge = Knowledge {
        current: current.clone(),
        changed: receiver,
        wanted: wanted.clone(),
    };
    let shared = writer::Shared::new(current, changed, wanted);
    (Writer::new(Arc::new(shared)), knowledge, demands)
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
            aliases: std::sync::Arc::new([]),
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
