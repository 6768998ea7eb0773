//! What is asked for on demand: whoever meets an address, or the name of a waypoint, that nothing is known of says so
//! here, and waits for a snapshot that knows it or knows that there is nothing to know (of a name that is not said: then
//! the wait ends by time). Whoever fetches takes the questions from here.
//!
//! Bounded at [`QUEUE`]: more who ask wait until there is room. Asked twice is asked once, if the fetcher says so.

use std::fmt;

use model::{NamespacedName, NetworkAddress, WorkloadUid};
use tokio::sync::mpsc;

/// Questions that wait for the fetcher.
const QUEUE: usize = 1024;

/// What is asked for.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Wanted {
    /// The workload or service of this address.
    Address(NetworkAddress),
    /// This workload: a pod of this node.
    Workload(WorkloadUid),
    /// The service of this name, `namespace/hostname`, and its endpoints: a waypoint, or one whose waypoint matters.
    Service(NamespacedName),
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.address.fmt(f),
            Self::Workload(uid) => write!(f, "workload {uid}"),
            Self::Service(name) => write!(f, "service {name}"),
        }
    }
}

/// The questions, for whoever fetches.
#[derive(Debug)]
pub struct Demands(mpsc::Receiver<Wanted>);

impl Demands {
    /// The next question; `None` once nobody can ask any more.
    pub async fn next(&mut self) -> Option<Wanted> {
        self.0.recv().await
    }

    /// The next question, if there is one at once.
    pub fn try_next(&mut self) -> Option<Wanted> {
        self.0.try_recv().ok()
    }
}

pub(crate) fn channel() -> (mpsc::Sender<Wanted>, Demands) {
    let (sender, receiver) = mpsc::channel(QUEUE);
    (sender, Demands(receiver))
}
