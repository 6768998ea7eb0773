//! What the shards have learnt of endpoints by dialling them: how many connections live at each, and who failed lately.
//!
//! ```text
//! all shards ─ count ─> [loads] ─ all read     who failed, if anybody did: one lock, seldom taken
//!                                              nobody failed: one look at a counter
//! ```
//! Loads are counted in [`SLOTS`] slots, by a hash of the endpoint's uid: bounded, and without a lock; endpoints that meet
//! in a slot look as loaded as both together, which costs a little balance and nothing else.

use std::{
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU32, AtomicUsize, Ordering::Relaxed},
    },
    time::Instant,
};

use model::WorkloadUid;

use crate::passing_over::PassedOver;

/// Slots: 64 KiB. Of a thousand endpoints six in a hundred share theirs.
const SLOTS: usize = 1 << 14;

/// What all shards know together.
pub(crate) struct Experience {
    loads: Box<[AtomicU32]>,
    hasher: RandomState,
    passed_over: RwLock<PassedOver>,
    /// How many those are, so that nobody locks to learn that there are none.
    failing: AtomicUsize,
}

impl Default for Experience {
    fn default() -> Self {
        Self {
            loads: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            hasher: RandomState::new(),
            passed_over: RwLock::default(),
            failing: AtomicUsize::new(0),
        }
    }
}

impl Experience {
    fn slot(&self, endpoint: &WorkloadUid) -> usize {
        self.hasher.hash_one(endpoint) as usize % SLOTS
    }

    /// Counts a connection to an endpoint, until the guard is dropped.
    pub(crate) fn count(self: &Arc<Self>, endpoint: &WorkloadUid) -> Counted {
        let counted = Counted {
            experience: self.clone(),
            slot: self.slot(endpoint),
        };
        if let Some(load) = counted.load() {
            load.fetch_add(1, Relaxed);
        }
        counted
    }

    /// A connection goes to this endpoint.
    pub(crate) fn begin(&self, endpoint: &WorkloadUid, at: SocketAddr, now: Instant) {
        if self.any_failing() {
            self.change(|passed_over| passed_over.begin(endpoint, at, now));
        }
    }

    /// The endpoint could be connected to.
    pub(crate) fn succeeded(&self, endpoint: &WorkloadUid, at: SocketAddr) {
        if self.any_failing() {
            self.change(|passed_over| passed_over.succeeded(endpoint, at));
        }
    }

    /// The endpoint could not be connected to.
    pub(crate) fn failed(&self, endpoint: &WorkloadUid, at: SocketAddr, now: Instant) {
        self.change(|passed_over| passed_over.failed(endpoint, at, now));
    }

    /// Forgets failures that are long past.
    pub(crate) fn forget(&self, now: Instant) {
        if self.any_failing() {
            self.change(|passed_over| passed_over.forget(now));
        }
    }

    fn any_failing(&self) -> bool {
        self.failing.load(Relaxed) > 0
    }

    fn change(&self, change: impl FnOnce(&mut PassedOver)) {
        let mut passed_over = self.passed_over.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut passed_over);
        self.failing.store(passed_over.len(), Relaxed);
    }
}

impl mesh::Experience for Experience {
    fn load(&self, endpoint: &WorkloadUid) -> u32 {
        let load = self.loads.get(self.slot(endpoint));
        load.map_or(0, |load| load.load(Relaxed))
    }

    fn is_passed_over(&self, endpoint: &WorkloadUid, target: SocketAddr) -> bool {
        if !self.any_failing() {
            return false;
        }
        let passed_over = self.passed_over.read().unwrap_or_else(PoisonError::into_inner);
        passed_over.contains(endpoint, target, Instant::now())
    }
}

/// A connection that is counted at its endpoint.
pub(crate) struct Counted {
    experience: Arc<Experience>,
    slot: usize,
}

impl Counted {
    fn load(&self) -> Option<&AtomicU32> {
        self.experience.loads.get(self.slot)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(load) = self.load() {
            load.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use mesh::Experience as _;

    use super::*;

    #[test]
    fn connections_count_while_they_live() {
        let experience = Arc::<Experience>::default();
        let uid = WorkloadUid("a".into());
        let counted = [(); 3].map(|()| experience.count(&uid));
        assert_eq!(experience.load(&uid), 3);
        drop(counted);
        assert_eq!(experience.load(&uid), 0);
    }

    #[test]
    fn who_failed_is_passed_over_until_it_is_known_to_work() {
        let experience = Experience::default();
        let (uid, at, now) = (WorkloadUid("a".into()), "10.0.0.1:80".parse().unwrap(), Instant::now());
        experience.failed(&uid, at, now);
        assert!(experience.is_passed_over(&uid, at));
        experience.succeeded(&uid, at);
        assert!(!experience.is_passed_over(&uid, at) && !experience.any_failing());
    }
}
