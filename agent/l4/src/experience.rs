//! What the shards have learnt of endpoints by dialling them: how many connections live at each, and who failed lately.
//!
//! ```text
//! shard 0 ─ writes ─> [loads] ┐                     ┌ who failed, if anybody did: one lock, seldom taken
//! shard 1 ─ writes ─> [loads] ┴─ all read: the sum  └ nobody failed: one look at a counter
//! ```
//! Loads are counted in [`SLOTS`] slots for each shard, by a hash of the endpoint's uid: bounded, without a lock and
//! without a shared write; endpoints that meet in a slot look as loaded as both together, which costs a little balance and
//! nothing else.

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

/// Slots of a shard: 64 KiB. Of a thousand endpoints six in a hundred share theirs.
const SLOTS: usize = 1 << 14;

/// What all shards know together.
pub(crate) struct Experience {
    loads: Box<[Box<[AtomicU32]>]>,
    hasher: RandomState,
    passed_over: RwLock<PassedOver>,
    /// How many those are, so that nobody locks to learn that there are none.
    failing: AtomicUsize,
}

impl Experience {
    /// For so many shards.
    pub(crate) fn new(shards: usize) -> Arc<Self> {
        let loads = || (0..SLOTS).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self {
            loads: (0..shards).map(|_| loads()).collect(),
            hasher: RandomState::new(),
            passed_over: RwLock::default(),
            failing: AtomicUsize::new(0),
        })
    }

    fn slot(&self, endpoint: &WorkloadUid) -> usize {
        self.hasher.hash_one(endpoint) as usize % SLOTS
    }

    /// Counts a connection of this shard to an endpoint, until the guard is dropped. Only the shard's own thread may.
    pub(crate) fn count(self: &Arc<Self>, shard: usize, endpoint: &WorkloadUid) -> Counted {
        let counted = Counted {
            experience: self.clone(),
            shard,
            slot: self.slot(endpoint),
        };
        counted.add(1);
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
        let slot = self.slot(endpoint);
        let of_shard = |loads: &[AtomicU32]| loads.get(slot).map_or(0, |load| load.load(Relaxed));
        self.loads.iter().map(|loads| of_shard(loads)).sum()
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
    shard: usize,
    slot: usize,
}

impl Counted {
    fn add(&self, change: i32) {
        let loads = self.experience.loads.get(self.shard);
        if let Some(load) = loads.and_then(|loads| loads.get(self.slot)) {
            // Written by this thread alone, so nothing is lost between the two.
            load.store(load.load(Relaxed).wrapping_add_signed(change), Relaxed);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.add(-1);
    }
}

#[cfg(test)]
mod tests {
    use mesh::Experience as _;

    use super::*;

    #[test]
    fn the_connections_of_all_shards_count_while_they_live() {
        let experience = Experience::new(2);
        let uid = WorkloadUid("a".into());
        let counted = [0, 1, 1].map(|shard| experience.count(shard, &uid));
        assert_eq!(experience.load(&uid), 3);
        drop(counted);
        assert_eq!(experience.load(&uid), 0);
    }

    #[test]
    fn who_failed_is_passed_over_until_it_is_known_to_work() {
        let experience = Experience::new(1);
        let (uid, at, now) = (WorkloadUid("a".into()), "10.0.0.1:80".parse().unwrap(), Instant::now());
        experience.failed(&uid, at, now);
        assert!(experience.is_passed_over(&uid, at));
        experience.succeeded(&uid, at);
        assert!(!experience.is_passed_over(&uid, at) && !experience.any_failing());
    }
}
