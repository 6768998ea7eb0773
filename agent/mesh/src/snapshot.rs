//! One moment's knowledge, indexed by what decisions look up.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
    sync::Arc,
};

use model::{
    HealthStatus, MeshSettings, NamespacedName, NetworkMode, Policy, Scope, Service, Workload, WorkloadUid,
    canonical_ip,
};
use policy::{Facts, Reason, Verdict};

use crate::{Contents, Rejected, contents::RejectedObject};

/// One moment's knowledge. Immutable; every index agrees with the others.
#[derive(Default, Debug)]
pub struct Snapshot {
    generation: u64,
    settings: MeshSettings,
    workloads: HashMap<WorkloadUid, Arc<Workload>>,
    workloads_by_ip: HashMap<IpAddr, Arc<Workload>>,
    services: HashMap<NamespacedName, Arc<Service>>,
    services_by_vip: HashMap<IpAddr, Arc<Service>>,
    endpoints: HashMap<NamespacedName, Vec<Arc<Workload>>>,
    policies: BTreeMap<NamespacedName, Arc<Policy>>,
    policies_by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
    policies_of_mesh: Vec<Arc<Policy>>,
}

impl Snapshot {
    /// Indexes contents. Of two objects that claim the same name or address the first keeps it; the other is rejected,
    /// since a mix-up would give one workload the other's identity.
    pub(crate) fn build(contents: Contents, generation: u64) -> (Self, Vec<Rejected>) {
        let mut rejected = Vec::new();
        let mut snapshot = Self {
            generation,
            settings: contents.settings,
            ..Self::default()
        };
        for workload in contents.workloads {
            if let Err(reason) = snapshot.add_workload(Arc::new(workload.clone())) {
                rejected.push(Rejected {
                    object: RejectedObject::Workload(workload.uid),
                    reason,
                });
            }
        }
        for service in contents.services {
            if let Err(reason) = snapshot.add_service(Arc::new(service.clone())) {
                rejected.push(Rejected {
                    object: RejectedObject::Service(service.key()),
                    reason,
                });
            }
        }
        for policy in contents.policies {
            snapshot.add_policy(Arc::new(policy));
        }
        (snapshot, rejected)
    }

    fn add_workload(&mut self, workload: Arc<Workload>) -> Result<(), String> {
        if self.workloads.contains_key(&workload.uid) {
            return Err("another workload has the same uid".to_owned());
        }
        // A host-network workload's address is its node's: it names no workload.
        let own_addresses = match workload.network_mode {
            NetworkMode::Standard => workload.workload_ips.as_slice(),
            NetworkMode::HostNetwork => &[],
        };
        if let Some((ip, other)) = own_addresses
            .iter()
            .find_map(|ip| Some((ip, self.workloads_by_ip.get(&canonical_ip(*ip))?)))
        {
            return Err(format!("its address {ip} is that of workload {}", other.uid));
        }
        for ip in own_addresses {
            self.workloads_by_ip.insert(canonical_ip(*ip), workload.clone());
        }
        if workload.status == HealthStatus::Healthy {
            for service in workload.services.keys() {
                self.endpoints
                    .entry(service.clone())
                    .or_default()
                    .push(workload.clone());
            }
        }
        self.workloads.insert(workload.uid.clone(), workload);
        Ok(())
    }

    fn add_service(&mut self, service: Arc<Service>) -> Result<(), String> {
        if self.services.contains_key(&service.key()) {
            return Err("another service has the same hostname".to_owned());
        }
        let vips = || service.vips.iter().map(|vip| canonical_ip(vip.address));
        if let Some((vip, other)) = vips().find_map(|vip| Some((vip, self.services_by_vip.get(&vip)?))) {
            return Err(format!("its address {vip} is that of service {}", other.key()));
        }
        for vip in vips() {
            self.services_by_vip.insert(vip, service.clone());
        }
        self.services.insert(service.key(), service);
        Ok(())
    }

    fn add_policy(&mut self, policy: Arc<Policy>) {
        match policy.scope {
            Scope::Global => self.policies_of_mesh.push(policy.clone()),
            Scope::Namespace => {
                self.policies_by_namespace
                    .entry(policy.namespace.clone())
                    .or_default()
                    .push(policy.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(policy.key(), policy);
    }

    /// Counts the snapshots; 0 is the empty one before anything was known.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether anything was ever known.
    pub fn ready(&self) -> bool {
        self.generation > 0
    }

    /// What holds for the whole mesh.
    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    /// Every workload, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// The workload of this uid.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    /// The workload of this address; none for a host-network one, whose address is its node's.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads_by_ip.get(&canonical_ip(ip))
    }

    /// The service of this key.
    pub fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    /// The service with this virtual address.
    pub fn service_by_vip(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.services_by_vip.get(&canonical_ip(ip))
    }

    /// The healthy endpoints of a service.
    pub fn endpoints(&self, service: &NamespacedName) -> &[Arc<Workload>] {
        self.endpoints.get(service).map_or(&[], Vec::as_slice)
    }

    /// The policies that concern a workload; `Err` names one that it is under and that is not known.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Result<&'a Policy, NamespacedName>> + 'a {
        let of_namespace = self
            .policies_by_namespace
            .get(&workload.namespace)
            .into_iter()
            .flatten();
        let selected = workload.authorization_policies.iter().map(|key| {
            self.policies
                .get(key)
                .map(|policy| &**policy)
                .ok_or_else(|| key.clone())
        });
        self.policies_of_mesh
            .iter()
            .chain(of_namespace)
            .map(|policy| Ok(&**policy))
            .chain(selected)
    }

    /// Whether a connection to this workload may be, and what decided.
    pub fn verdict(&self, facts: &Facts, workload: &Workload) -> Verdict {
        if !self.ready() {
            return Verdict::deny(Reason::NoKnowledge);
        }
        policy::decide(facts, self.policies_for(workload))
    }
}
