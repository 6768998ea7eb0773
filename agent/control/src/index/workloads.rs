//! Workloads: pods, WorkloadEntries and endpoints of ServiceEntries. Those of EndpointSlices are in `slices`.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use k8s::{Effect, Problem, live::WorkloadKind};
use model::{HealthStatus, Locality, NamespacedName, NetworkMode, TunnelProtocol, Workload, WorkloadUid};

use super::{
    Settings,
    entries::Note,
    labels,
    names::Labels,
    parts::{Address, Part, PartKind, within},
    records::{Endpoint, Place, Pod, ServiceEntry, Tunnel},
    service_records::ServicePort,
    slices::slice_ports,
    tables::Tables,
    waypoints::Traffic,
};

/// Service → service port → target port.
pub(super) type Services = BTreeMap<NamespacedName, BTreeMap<u16, u16>>;

impl Tables {
    /// A pod as a workload.
    pub(super) fn pod_workload(&self, part: &Part, settings: &Settings, notes: &mut Vec<Note>) -> Option<Workload> {
        let name = &part.of;
        let pod = self.pods.get(name)?;
        let network = pod.network.as_ref().unwrap_or(&self.network);
        let addresses = match pod.host_network {
            true => pod.addresses.to_vec(),
            false => self.owned(part, network, &pod.addresses, "status.podIPs", notes),
        };
        if addresses.is_empty() {
            return None;
        }
        let uid = WorkloadUid::of_pod(&settings.cluster, &name.namespace, &name.name);
        let mut workload = self.workload(uid, name, network, &pod.labels, settings);
        workload.workload_ips = addresses;
        workload.node = pod.node.clone();
        workload.service_account = pod.service_account.clone();
        workload.workload_name = pod.workload_name.clone();
        workload.workload_type = pod.kind.name().into();
        if workload.canonical_name.is_empty() {
            workload.canonical_name = pod.workload_name.clone();
        }
        set_tunnel(&mut workload, pod.tunnel);
        if pod.host_network {
            workload.network_mode = NetworkMode::HostNetwork;
        }
        workload.status = health(pod.ready);
        let mut services = self.services_of_pod(name, pod);
        if !pod.host_network {
            self.add_shared(part, network, &workload.workload_ips, false, &mut services);
        }
        workload.services = collect(services);
        workload.authorization_policies = self.listed_policies(&name.namespace, &pod.labels);
        workload.waypoint = self.waypoint(&pod.labels, &name.namespace, Traffic::Workloads, notes);
        workload.locality = self
            .nodes
            .get(&pod.node)
            .map(|node| node.locality.clone())
            .unwrap_or_default();
        workload.application_tunnel = pod.labels.get(labels::GATEWAY_NAME).and_then(|gateway| {
            let gateway = NamespacedName {
                namespace: name.namespace.clone(),
                name: gateway.clone(),
            };
            self.gateways.get(&gateway)?.binding
        });
        Some(workload)
    }

    /// A WorkloadEntry as a workload.
    pub(super) fn entry_workload(&self, part: &Part, settings: &Settings, notes: &mut Vec<Note>) -> Option<Workload> {
        let name = &part.of;
        let endpoint = &self.entries.get(name)?.endpoint;
        let (namespace, of) = (&name.namespace, &name.name);
        let uid = format!(
            "{}/networking.istio.io/WorkloadEntry/{namespace}/{of}",
            settings.cluster
        );
        let mut workload = self.endpoint_workload(part, uid, endpoint, settings, "spec.address", notes)?;
        let mut services = self.services_of_entry(name, endpoint);
        self.add_shared(part, &workload.network, &workload.workload_ips, false, &mut services);
        workload.services = collect(services);
        workload.waypoint = self.waypoint(&endpoint.labels, namespace, Traffic::Workloads, notes);
        Some(workload)
    }

    /// An endpoint of a ServiceEntry as a workload.
    pub(super) fn inline_workload(&self, part: &Part, settings: &Settings, notes: &mut Vec<Note>) -> Option<Workload> {
        let name = &part.of;
        let entry = self.service_entries.get(name)?;
        let endpoint = self.inline_endpoint(part)?;
        let place = match &endpoint.place {
            Place::Ip(ip) => ip.to_string(),
            Place::Host(host) => host.to_string(),
        };
        let (namespace, of) = (&name.namespace, &name.name);
        let uid = format!(
            "{}/networking.istio.io/ServiceEntry/{namespace}/{of}/{place}",
            settings.cluster
        );
        let mut workload = self.endpoint_workload(part, uid, endpoint, settings, "spec.endpoints", notes)?;
        let mut services = Services::new();
        self.add_hosts(name, entry, Some(endpoint), &mut services);
        self.add_shared(part, &workload.network, &workload.workload_ips, false, &mut services);
        workload.services = collect(services);
        // The entry's label is its services' and its endpoints'; what is wrong with it is said once, of the services.
        workload.waypoint = self.waypoint(&entry.labels, namespace, Traffic::Workloads, &mut Vec::new());
        Some(workload)
    }

    /// The endpoint of a ServiceEntry that a part is.
    pub(super) fn inline_endpoint(&self, part: &Part) -> Option<&Endpoint> {
        let entry = self.service_entries.get(&part.of)?;
        entry.endpoints.get(usize::try_from(part.index).ok()?)
    }

    fn endpoint_workload(
        &self,
        part: &Part,
        uid: String,
        endpoint: &Endpoint,
        settings: &Settings,
        field: &str,
        notes: &mut Vec<Note>,
    ) -> Option<Workload> {
        let name = &part.of;
        let network = endpoint.network.as_ref().unwrap_or(&self.network);
        let mut workload = self.workload(WorkloadUid(uid.into()), name, network, &endpoint.labels, settings);
        match &endpoint.place {
            Place::Ip(ip) => workload.workload_ips = self.owned(part, network, &[*ip], field, notes),
            Place::Host(host) => workload.hostname = host.clone(),
        }
        if workload.workload_ips.is_empty() && workload.hostname.is_empty() {
            return None;
        }
        workload.service_account = endpoint.service_account.clone();
        workload.capacity = endpoint.capacity;
        workload.locality = endpoint.locality.clone();
        let labelled = endpoint.labels.get(labels::WORKLOAD_NAME);
        workload.workload_name = labelled.unwrap_or(&name.name).clone();
        if workload.canonical_name.is_empty() {
            workload.canonical_name = name.name.clone();
        }
        set_tunnel(&mut workload, endpoint.tunnel);
        workload.authorization_policies = self.listed_policies(&name.namespace, &endpoint.labels);
        Some(workload)
    }

    /// What every workload has.
    pub(super) fn workload(
        &self,
        uid: WorkloadUid,
        name: &NamespacedName,
        network: &Arc<str>,
        own: &Labels,
        settings: &Settings,
    ) -> Workload {
        let first = |keys: [&str; 3]| keys.into_iter().find_map(|key| own.get(key)).cloned();
        Workload {
            uid,
            name: name.name.clone(),
            namespace: name.namespace.clone(),
            trust_domain: settings.trust_domain.clone(),
            cluster_id: settings.cluster.clone(),
            network: network.clone(),
            canonical_name: first(labels::CANONICAL_NAME).unwrap_or_default(),
            canonical_revision: first(labels::CANONICAL_REVISION).unwrap_or_else(|| "latest".into()),
            workload_type: WorkloadKind::Pod.name().into(),
            locality: Locality::default(),
            ..Workload::default()
        }
    }

    /// The addresses that nobody else has.
    pub(super) fn owned(
        &self,
        part: &Part,
        network: &Arc<str>,
        addresses: &[IpAddr],
        field: &str,
        notes: &mut Vec<Note>,
    ) -> Vec<IpAddr> {
        let mut owned = Vec::with_capacity(addresses.len());
        for ip in addresses {
            match self.owner(&Address::single(network, *ip), part) {
                Some(owner) if owner != part => {
                    let (field, problem, effect) = taken(field, &ip.to_string(), owner);
                    let stands_in = part.kind != PartKind::Pod && owner.kind.is_workload();
                    notes.push((field, problem, if stands_in { Effect::Note } else { effect }));
                }
                _ => owned.push(*ip),
            }
        }
        owned
    }

    /// The services of the other endpoints that are at these addresses: who has the address is the endpoint for them
    /// all, with its own identity. So two ServiceEntries may name one address, and one may name a pod's. Slices say whether
    /// it is ready, and where it is not it serves them only with `unready_too`.
    pub(super) fn add_shared(
        &self,
        part: &Part,
        network: &Arc<str>,
        addresses: &[IpAddr],
        unready_too: bool,
        to: &mut Services,
    ) {
        for ip in addresses {
            let others = self.addresses.of(&Address::single(network, *ip));
            for other in others.filter(|other| *other != part) {
                let services = match other.kind {
                    PartKind::SliceEndpoint if !unready_too && !self.is_endpoint_as_healthy(other) => None,
                    PartKind::SliceEndpoint => self.services_of_slice(&other.of),
                    _ => self.services_of_written(other),
                };
                for (name, ports) in services.into_iter().flatten() {
                    to.entry(name).or_insert(ports);
                }
            }
        }
    }

    /// The services of who names an address in an entry.
    pub(super) fn services_of_written(&self, part: &Part) -> Option<Services> {
        match part.kind {
            PartKind::Entry => {
                let entry = self.entries.get(&part.of);
                entry.map(|entry| self.services_of_entry(&part.of, &entry.endpoint))
            }
            PartKind::Endpoint => self.services_of_endpoint(part),
            _ => None,
        }
    }

    fn services_of_endpoint(&self, part: &Part) -> Option<Services> {
        let entry = self.service_entries.get(&part.of)?;
        let endpoint = self.inline_endpoint(part)?;
        let mut services = Services::new();
        self.add_hosts(&part.of, entry, Some(endpoint), &mut services);
        Some(services)
    }

    /// Those whose services change with a part's: who has its address in its stead.
    pub(super) fn stand_ins(&self, part: &Part) -> Option<&Part> {
        let (network, ip) = match part.kind {
            PartKind::Entry => place_of(&self.entries.get(&part.of)?.endpoint)?,
            PartKind::Endpoint => place_of(self.inline_endpoint(part)?)?,
            PartKind::SliceEndpoint => (None, self.slice_endpoint(part)?.ip),
            _ => return None,
        };
        self.workload_at(&Address::single(network.unwrap_or(&self.network), ip))
    }

    /// The services that a pod is an endpoint of: those whose slices name it, and the hosts of entries that select it.
    fn services_of_pod(&self, name: &NamespacedName, pod: &Pod) -> Services {
        let mut services = Services::new();
        for slice in self.slices_of_pod.get(name).into_iter().flatten() {
            let Some(slice) = self.slices.get(slice) else { continue };
            let Some(service) = self.services.get(&slice.service) else {
                continue;
            };
            let key = NamespacedName {
                namespace: name.namespace.clone(),
                name: service.hostname.clone(),
            };
            let ports = services.entry(key).or_default();
            ports.extend(slice_ports(&service.ports, &slice.ports));
        }
        self.add_selecting(name, &pod.labels, None, &mut services);
        services
    }

    /// The services that a WorkloadEntry is an endpoint of: those of its namespace that select it.
    fn services_of_entry(&self, name: &NamespacedName, endpoint: &Endpoint) -> Services {
        let mut services = Services::new();
        for (_, service) in within(&self.services, &name.namespace) {
            if service.selector.is_empty() || !endpoint.labels.matches(&service.selector) {
                continue;
            }
            let key = NamespacedName {
                namespace: name.namespace.clone(),
                name: service.hostname.clone(),
            };
            services.insert(key, named_ports(&service.ports, endpoint));
        }
        self.add_selecting(name, &endpoint.labels, Some(endpoint), &mut services);
        services
    }

    fn add_selecting(&self, name: &NamespacedName, labels: &Labels, endpoint: Option<&Endpoint>, to: &mut Services) {
        for (entry_name, ()) in within(&self.selecting, &name.namespace) {
            if let Some(entry) = self.service_entries.get(entry_name)
                && labels.matches(&entry.selector)
            {
                self.add_hosts(entry_name, entry, endpoint, to);
            }
        }
    }

    /// The hosts of an entry that are its own.
    fn add_hosts(&self, name: &NamespacedName, entry: &ServiceEntry, endpoint: Option<&Endpoint>, to: &mut Services) {
        let only = endpoint.and_then(|endpoint| endpoint.only);
        for (index, host) in entry.hosts.iter().enumerate() {
            let part = Part::at(PartKind::Host, name, index);
            if only.is_some_and(|only| only != part.index) || self.host_owner(&host.hostname, &part) != Some(&part) {
                continue;
            }
            let key = NamespacedName {
                namespace: name.namespace.clone(),
                name: host.hostname.clone(),
            };
            to.insert(key, endpoint_ports(&entry.ports, endpoint));
        }
    }
}

/// What somebody else has.
pub(super) fn taken(field: &str, what: &str, owner: &Part) -> Note {
    let owner = owner.source().object();
    let problem = Problem::Invalid(format!("{what} is {owner}'s"));
    (field.to_owned(), problem, Effect::Narrowed)
}

fn place_of(endpoint: &Endpoint) -> Option<(Option<&Arc<str>>, IpAddr)> {
    match endpoint.place {
        Place::Ip(ip) => Some((endpoint.network.as_ref(), ip)),
        Place::Host(_) => None,
    }
}

fn set_tunnel(workload: &mut Workload, tunnel: Tunnel) {
    workload.native_tunnel = tunnel == Tunnel::Native;
    workload.protocol = match tunnel {
        Tunnel::None => TunnelProtocol::None,
        Tunnel::Captured | Tunnel::Native => TunnelProtocol::Hbone,
    };
}

pub(super) fn health(ready: bool) -> HealthStatus {
    match ready {
        true => HealthStatus::Healthy,
        false => HealthStatus::Unhealthy,
    }
}

/// A Service's ports as an endpoint outside Kubernetes has them: as with pods, by the target port's name, if it has one.
fn named_ports(ports: &[ServicePort], endpoint: &Endpoint) -> BTreeMap<u16, u16> {
    let target = |port: &ServicePort| match &port.target_name {
        Some(name) => Some((port.port, endpoint.port(name)?)),
        None => Some((port.port, Some(port.target).filter(|number| *number != 0)?)),
    };
    ports.iter().filter_map(target).collect()
}

/// A ServiceEntry's ports as an endpoint has them: by the port's own name, else the target port, which is a number.
fn endpoint_ports(ports: &[ServicePort], endpoint: Option<&Endpoint>) -> BTreeMap<u16, u16> {
    let target = |port: &ServicePort| {
        let named = endpoint.and_then(|endpoint| endpoint.port(&port.name));
        let number = named.or(Some(port.target).filter(|number| *number != 0))?;
        Some((port.port, number))
    };
    ports.iter().filter_map(target).collect()
}

pub(super) fn collect(services: Services) -> model::SortedMap<NamespacedName, model::PortMap> {
    let services = services.into_iter();
    services
        .map(|(name, ports)| (name, ports.into_iter().collect()))
        .collect()
}
