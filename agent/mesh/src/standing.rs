//! What a pod's verdicts depend on: to know, when something changed, whose connections have to be judged again.
//!
//! In a large mesh something changes all the time, and hardly ever for the pods of one node. Objects that did not change
//! are the same allocation from snapshot to snapshot, so two standings are compared by their addresses, at the price of
//! the policies that concern one pod, and the replicas of its waypoint where it has one (`only_what_concerns_a_pod_changes_its_standing`).

use std::sync::Arc;

use model::{Identity, NamespacedName, Policy, Workload, WorkloadUid};

use crate::Snapshot;

/// What a pod's verdicts depend on, as one snapshot has it. Equal ones give the same verdicts on the same facts.
#[derive(Clone, Debug, Default)]
pub struct Standing {
    known: bool,
    workload: Option<Arc<Workload>>,
    policies: Vec<Result<Arc<Policy>, NamespacedName>>,
    /// Where it has a waypoint: from whom alone it takes connections.
    waypoints: Vec<Identity>,
}

impl Standing {
    /// The pod as it is known.
    pub fn workload(&self) -> Option<&Arc<Workload>> {
        self.workload.as_ref()
    }
}

impl PartialEq for Standing {
    fn eq(&self, other: &Self) -> bool {
        let same_workload = match (&self.workload, &other.workload) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        let same = |(one, other): (&Result<Arc<Policy>, _>, &Result<Arc<Policy>, _>)| match (one, other) {
            (Ok(one), Ok(other)) => Arc::ptr_eq(one, other),
            (Err(one), Err(other)) => one == other,
            _ => false,
        };
        self.known == other.known
            && self.waypoints == other.waypoints
            && same_workload
            && self.policies.len() == other.policies.len()
            && self.policies.iter().zip(&other.policies).all(same)
    }
}

impl Snapshot {
    /// What a pod's verdicts depend on.
    pub fn standing(&self, uid: &WorkloadUid) -> Standing {
        let workload = self.workload(uid);
        let policies = workload.map(|workload| {
            let policies = self.shared_policies_for(workload);
            policies.map(|policy| policy.cloned()).collect()
        });
        let mut waypoints = Vec::new();
        if let Some(workload) = workload.filter(|workload| workload.waypoint.is_some()) {
            self.any_waypoint_identity(workload, |identity| {
                waypoints.push(identity);
                false
            });
            waypoints.dedup();
        }
        Standing {
            waypoints,
            known: self.ready() && self.unannounced(uid).is_none(),
            workload: workload.cloned(),
            policies: policies.unwrap_or_default(),
        }
    }
}
