//! What the hooks decided, by reason and by pod.

use std::collections::{BTreeMap, HashMap};

use abi::Reason;
use model::WorkloadUid;

use crate::{maps::Maps, pod::PodState};

/// Counts since the maps were pinned: they outlive the agent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GuardCounters {
    /// All of the node.
    pub total: BTreeMap<Reason, u64>,
    /// Of each captured pod, where the hook knows it. `sk_lookup` does not.
    pub pods: BTreeMap<WorkloadUid, BTreeMap<Reason, u64>>,
}

impl GuardCounters {
    /// The node's count for a reason.
    pub fn get(&self, reason: Reason) -> u64 {
        self.total.get(&reason).copied().unwrap_or_default()
    }

    /// A pod's count for a reason.
    pub fn of_pod(&self, uid: &WorkloadUid, reason: Reason) -> u64 {
        let counts = self.pods.get(uid);
        counts
            .and_then(|counts| counts.get(&reason))
            .copied()
            .unwrap_or_default()
    }
}

pub(crate) fn gather(maps: &Maps, pods: &HashMap<WorkloadUid, PodState>) -> GuardCounters {
    let mut owners = HashMap::new();
    for (uid, state) in pods {
        for (index, _) in state.captured.iter().flat_map(|captured| &captured.plan.interfaces) {
            owners.insert(*index, uid);
        }
    }
    let mut counters = GuardCounters::default();
    for ((ifindex, reason), count) in maps.counters() {
        *counters.total.entry(reason).or_default() += count;
        if let Some(uid) = owners.get(&ifindex) {
            *counters
                .pods
                .entry((*uid).clone())
                .or_default()
                .entry(reason)
                .or_default() += count;
        }
    }
    counters
}
