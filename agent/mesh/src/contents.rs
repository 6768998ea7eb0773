//! Everything a source says, before it is indexed.

use std::{collections::HashSet, fmt};

use model::{MeshSettings, NamespacedName, Policy, Service, Workload, WorkloadUid};

/// Everything a source says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// What holds for the whole mesh.
    pub settings: MeshSettings,
    /// Every workload.
    pub workloads: Vec<Workload>,
    /// Every service.
    pub services: Vec<Service>,
    /// Every policy.
    pub policies: Vec<Policy>,
}

/// An object that could not be taken over, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    /// Which, where that could be read from it.
    pub object: RejectedObject,
    /// Why, in words.
    pub reason: String,
}

/// Which object was rejected.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RejectedObject {
    /// This workload.
    Workload(WorkloadUid),
    /// This service.
    Service(NamespacedName),
    /// The n-th entry of this list, which does not even say its name.
    Entry(&'static str, usize),
}

impl fmt::Display for Rejected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.object {
            RejectedObject::Workload(uid) => write!(f, "workload {uid}")?,
            RejectedObject::Service(key) => write!(f, "service {key}")?,
            RejectedObject::Entry(list, index) => write!(f, "{list}[{index}]")?,
        }
        write!(f, ": {}", self.reason)
    }
}

impl Contents {
    /// Puts the last good version of what was rejected in its place.
    pub(crate) fn keep_last_good<'a>(
        &mut self,
        workload: impl Fn(&WorkloadUid) -> Option<&'a Workload>,
        service: impl Fn(&NamespacedName) -> Option<&'a Service>,
        rejected: &[Rejected],
    ) {
        for object in rejected.iter().map(|rejected| &rejected.object) {
            match object {
                RejectedObject::Workload(uid) if self.workloads.iter().all(|workload| workload.uid != *uid) => {
                    self.workloads.extend(workload(uid).cloned());
                }
                RejectedObject::Service(key) if self.services.iter().all(|service| service.key() != *key) => {
                    self.services.extend(service(key).cloned());
                }
                _ => {}
            }
        }
    }

    /// Of several objects of one name the first stays.
    pub(crate) fn reject_duplicates(&mut self) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        let mut uids = HashSet::new();
        self.workloads.retain(|workload| {
            let is_new = uids.insert(workload.uid.clone());
            if !is_new {
                rejected.push(Rejected {
                    object: RejectedObject::Workload(workload.uid.clone()),
                    reason: "another workload has the same uid".to_owned(),
                });
            }
            is_new
        });
        let mut keys = HashSet::new();
        self.services.retain(|service| {
            let is_new = keys.insert(service.key());
            if !is_new {
                rejected.push(Rejected {
                    object: RejectedObject::Service(service.key()),
                    reason: "another service has the same hostname".to_owned(),
                });
            }
            is_new
        });
        rejected
    }
}
