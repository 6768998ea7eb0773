//! EndpointSlices: which pods serve which services, and their endpoints that are no pods, as workloads.

use std::{collections::BTreeMap, sync::Arc};

use model::{Locality, NamespacedName, Workload, WorkloadUid};

use super::{
    Settings,
    entries::Note,
    names::Labels,
    parts::{Address, Part, PartKind},
    service_records::{Other, ServicePort, Slice},
    tables::{Tables, exchange},
    workloads::{Services, collect, health},
};

impl Tables {
    pub fn put_slice(&mut self, name: &NamespacedName, new: Option<Slice>) {
        let Some(old) = exchange(&mut self.slices, name, new) else {
            return;
        };
        let new = self.slices.get(name).cloned();
        let same_ports = match (&old, &new) {
            (Some(old), Some(new)) => old.ports == new.ports && old.service == new.service,
            _ => false,
        };
        let has = |record: &Option<Slice>, pod: &NamespacedName| {
            record
                .as_ref()
                .is_some_and(|slice| slice.pods.binary_search(pod).is_ok())
        };
        for (record, other, put) in [(&old, &new, false), (&new, &old, true)] {
            let Some(slice) = record else { continue };
            let of = (slice.service.clone(), name.clone());
            if put {
                self.slices_of_service.insert(of);
            } else {
                self.slices_of_service.remove(&of);
            }
            for pod in &slice.pods {
                if same_ports && has(other, pod) {
                    continue;
                }
                self.link_slice(pod, name, put);
                self.dirty.insert(Part::new(PartKind::Pod, pod));
            }
            let network = self.network.clone();
            for (index, endpoint) in slice.others.iter().enumerate() {
                let part = Part::at(PartKind::SliceEndpoint, name, index);
                self.claim_address(Address::single(&network, endpoint.ip), &part, put);
                self.dirty.insert(part);
                if endpoint.node.is_empty() && endpoint.zone.is_empty() {
                    continue;
                }
                let on = (endpoint.node.clone(), name.clone());
                if put {
                    self.slices_on.insert(on);
                } else {
                    self.slices_on.remove(&on);
                }
            }
        }
    }

    /// In their order, for where two slices of a service contradict each other the last one is believed.
    fn link_slice(&mut self, pod: &NamespacedName, slice: &NamespacedName, put: bool) {
        let slices = self.slices_of_pod.entry(pod.clone()).or_default();
        match (slices.binary_search(slice), put) {
            (Err(at), true) => slices.insert(at, slice.clone()),
            (Ok(at), false) => _ = slices.remove(at),
            _ => {}
        }
        if slices.is_empty() {
            self.slices_of_pod.remove(pod);
        }
    }

    /// The endpoints that are where a node says; also those of which a zone alone is known, and any node may be in it.
    pub(super) fn mark_slices_on(&mut self, node: &Arc<str>) {
        for place in [node.clone(), "".into()] {
            let from = (place.clone(), NamespacedName::new("", ""));
            let slices = self.slices_on.range(from..).take_while(|(on, _)| *on == place);
            for (_, name) in slices {
                let Some(slice) = self.slices.get(name) else { continue };
                let there = slice.others.iter().enumerate().filter(|(_, other)| other.node == place);
                self.dirty
                    .extend(there.map(|(index, _)| Part::at(PartKind::SliceEndpoint, name, index)));
            }
        }
    }

    /// An endpoint of an EndpointSlice that is no pod. It has one health and may serve several Services, each of which says
    /// by its own slice whether it is ready: if it is for any, it is healthy and no endpoint of the others.
    pub(super) fn slice_workload(&self, part: &Part, settings: &Settings, notes: &mut Vec<Note>) -> Option<Workload> {
        let name = &part.of;
        let service = &self.slices.get(name)?.service;
        let endpoint = self.slice_endpoint(part)?;
        let workload_ips = self.owned(part, &self.network, &[endpoint.ip], "endpoints", notes);
        if workload_ips.is_empty() {
            return None;
        }
        let mut claimants = self.addresses.of(&Address::single(&self.network, endpoint.ip));
        let is_ready = claimants.any(|claimant| self.is_ready(claimant));
        let mut services = Services::new();
        if !is_ready || self.is_endpoint_as_healthy(part) {
            services.extend(self.services_of_slice(name).into_iter().flatten());
        }
        self.add_shared(part, &self.network, &workload_ips, !is_ready, &mut services);
        if services.is_empty() {
            return None;
        }
        let (namespace, of) = (&name.namespace, &name.name);
        let uid = format!(
            "{}/discovery.k8s.io/EndpointSlice/{namespace}/{of}/{}",
            settings.cluster, endpoint.ip
        );
        let uid = WorkloadUid(uid.into());
        let mut workload = self.workload(uid, name, &self.network, &Labels::default(), settings);
        workload.workload_ips = workload_ips;
        workload.canonical_name = service.name.clone();
        workload.workload_name = service.name.clone();
        workload.node = endpoint.node.clone();
        workload.locality = self.locality_of(endpoint);
        workload.status = health(is_ready);
        workload.services = collect(services);
        Some(workload)
    }

    /// Whether who claims an address is a ready endpoint of some service there.
    fn is_ready(&self, claimant: &Part) -> bool {
        match claimant.kind {
            PartKind::SliceEndpoint => {
                self.slice_endpoint(claimant).is_some_and(|endpoint| endpoint.ready)
                    && self.services_of_slice(&claimant.of).is_some()
            }
            _ => self
                .services_of_written(claimant)
                .is_some_and(|services| !services.is_empty()),
        }
    }

    /// Whether a slice's Service takes its endpoint if others say that it is healthy.
    pub(super) fn is_endpoint_as_healthy(&self, part: &Part) -> bool {
        let service = || self.services.get(&self.slices.get(&part.of)?.service);
        let is_ready = self.slice_endpoint(part).is_some_and(|endpoint| endpoint.ready);
        is_ready || service().is_some_and(|service| service.not_ready_too)
    }

    /// The endpoint that a part is.
    pub(super) fn slice_endpoint(&self, part: &Part) -> Option<&Other> {
        let slice = self.slices.get(&part.of)?;
        slice.others.get(usize::try_from(part.index).ok()?)
    }

    /// Where its node is; where it names none, the zone that it names, in the region that all nodes of the zone are in.
    fn locality_of(&self, endpoint: &Other) -> Locality {
        let of_node = self.nodes.get(&endpoint.node).map(|node| &node.locality);
        if let Some(locality) = of_node.filter(|locality| !locality.zone.is_empty()) {
            return locality.clone();
        }
        let mut region = of_node.map(|locality| locality.region.clone());
        if endpoint.node.is_empty() && !endpoint.zone.is_empty() {
            let nodes = self.nodes.values().map(|node| &node.locality);
            let mut regions = nodes.filter(|it| it.zone == endpoint.zone).map(|it| &it.region);
            let first = regions.next();
            region = first.filter(|first| regions.all(|other| other == *first)).cloned();
        }
        Locality {
            region: region.unwrap_or_default(),
            zone: endpoint.zone.clone(),
            subzone: Arc::default(),
        }
    }

    /// The service of a slice, as its endpoints that are no pods serve it.
    pub(super) fn services_of_slice(&self, name: &NamespacedName) -> Option<Services> {
        let slice = self.slices.get(name)?;
        let service = self.services.get(&slice.service)?;
        let key = NamespacedName {
            namespace: name.namespace.clone(),
            name: service.hostname.clone(),
        };
        Some(Services::from([(key, slice_ports(&service.ports, &slice.ports))]))
    }
}

/// The service's ports by the numbers that a slice gives to their names.
pub(super) fn slice_ports(ports: &[ServicePort], slice: &[(Arc<str>, u16)]) -> BTreeMap<u16, u16> {
    let target = |port: &ServicePort| {
        let found = slice.iter().find(|(name, _)| *name == port.name)?;
        Some((port.port, found.1))
    };
    ports.iter().filter_map(target).collect()
}
