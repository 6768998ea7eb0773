//! Services: those of Kubernetes, and the hosts of ServiceEntries.

use std::sync::Arc;

use k8s::{Effect, Problem};
use model::{HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, NetworkAddress, RoutingScope};

use super::{
    entries::Note,
    labels,
    parts::{Address, Part, PartKind},
    records::Namespace,
    service_records::ServicePort,
    tables::Tables,
    workloads::taken,
};

impl Tables {
    /// A Service.
    pub(super) fn kubernetes_service(&self, part: &Part, notes: &mut Vec<Note>) -> Option<model::Service> {
        let name = &part.of;
        let service = self.services.get(name)?;
        let mut vips = Vec::new();
        for ip in &service.addresses {
            self.add_vip(
                part,
                &Address::single(&self.network, *ip),
                "spec.clusterIPs",
                &mut vips,
                notes,
            );
        }
        let namespace = self.namespaces.get(&name.namespace);
        let distribution = distribution(service.distribution.as_deref(), namespace, notes);
        Some(model::Service {
            name: name.name.clone(),
            namespace: name.namespace.clone(),
            hostname: service.hostname.clone(),
            vips,
            subject_alt_names: self.decoration(part, &service.hostname),
            waypoint: self.waypoint_of_service(part, &service.labels, notes),
            load_balancing: match (service.node_local, service.not_ready_too) {
                (true, not_ready) => balanced(vec![RoutingScope::Node], LoadBalancingMode::Strict, not_ready),
                (false, not_ready) => distributed(distribution, not_ready),
            },
            ip_families: service.families,
            canonical: true,
            visibility: service.visibility,
            ..ports(&service.ports)
        })
    }

    /// A host of a ServiceEntry; none, where another object of the namespace has its name.
    pub(super) fn host_service(&self, part: &Part, notes: &mut Vec<Note>) -> Option<model::Service> {
        let name = &part.of;
        let entry = self.service_entries.get(name)?;
        let host = entry.hosts.get(usize::try_from(part.index).ok()?)?;
        if let Some(owner) = self.host_owner(&host.hostname, part).filter(|owner| *owner != part) {
            notes.push(taken("spec.hosts", &host.hostname, owner));
            return None;
        }
        let mut vips = Vec::new();
        for block in &host.addresses {
            let address = Address {
                network: self.network.clone(),
                ip: block.addr(),
                length: block.prefix_len(),
            };
            self.add_vip(part, &address, "spec.addresses", &mut vips, notes);
        }
        let namespace = self.namespaces.get(&name.namespace);
        let distribution = distribution(entry.distribution.as_deref(), namespace, notes);
        let best = self.hostnames.of(&host.hostname).min_by_key(|part| self.rank(part));
        Some(model::Service {
            name: name.name.clone(),
            namespace: name.namespace.clone(),
            hostname: host.hostname.clone(),
            vips,
            subject_alt_names: entry.subject_alt_names.to_vec(),
            waypoint: self.waypoint_of_service(part, &entry.labels, notes),
            load_balancing: match entry.passthrough {
                true => balanced(Vec::new(), LoadBalancingMode::Passthrough, false),
                false => distributed(distribution, false),
            },
            ip_families: IpFamilies::Automatic,
            canonical: best == Some(part),
            visibility: entry.visibility,
            ..ports(&entry.ports)
        })
    }

    /// Whose host name it is, within the namespace of the part.
    pub(super) fn host_owner(&self, hostname: &Arc<str>, part: &Part) -> Option<&Part> {
        let claimants = self.hostnames.of(hostname);
        let here = claimants.filter(|other| other.of.namespace == part.of.namespace);
        // No name is looked up in vain: there is nearly always one claimant.
        here.min_by_key(|part| self.rank(part))
    }

    /// The names that ServiceEntries of a Service's own namespace add to those that its endpoints may show.
    fn decoration(&self, part: &Part, hostname: &Arc<str>) -> Vec<Arc<str>> {
        let hosts = self.hostnames.of(hostname);
        let hosts = hosts.filter(|other| other.kind == PartKind::Host && other.of.namespace == part.of.namespace);
        let names = hosts.filter_map(|host| self.service_entries.get(&host.of));
        let mut names: Vec<_> = names
            .flat_map(|entry| entry.subject_alt_names.iter().cloned())
            .collect();
        names.sort();
        names.dedup();
        names
    }

    fn add_vip(
        &self,
        part: &Part,
        address: &Address,
        field: &str,
        vips: &mut Vec<NetworkAddress>,
        notes: &mut Vec<Note>,
    ) {
        let single = Address::single(&address.network, address.ip).length == address.length;
        let vip = NetworkAddress {
            network: address.network.clone(),
            address: address.ip,
            length: (!single).then_some(address.length),
        };
        match self.owner(address, part) {
            Some(owner) if owner != part => {
                notes.push(taken(field, &format!("{}/{}", address.ip, address.length), owner))
            }
            _ => vips.push(vip),
        }
    }
}

/// The ports, in a service that has nothing else.
fn ports(ports: &[ServicePort]) -> model::Service {
    let protocols = ports.iter().map(|port| (port.port, port.protocol));
    model::Service {
        ports: ports.iter().map(|port| (port.port, port.target)).collect(),
        app_protocols: protocols
            .filter(|(_, protocol)| *protocol != model::AppProtocol::Unknown)
            .collect(),
        ..model::Service::default()
    }
}

/// Which endpoints go first: as the service says, else as its namespace does.
fn distribution(own: Option<&str>, namespace: Option<&Namespace>, notes: &mut Vec<Note>) -> &'static [RoutingScope] {
    use RoutingScope::{Network, Node, Region, Subzone, Zone};
    let of_namespace = || namespace.and_then(|namespace| namespace.distribution.as_deref());
    let written = own.or_else(of_namespace).unwrap_or("any");
    match written.to_ascii_lowercase().as_str() {
        "preferclose" | "prefersamezone" => &[Network, Region, Zone],
        "prefersamenode" => &[Network, Region, Zone, Subzone, Node],
        "any" => &[],
        _ => {
            // A namespace's is the namespace's author's to mend.
            if own.is_some() {
                let field = format!("trafficDistribution, {}", labels::TRAFFIC_DISTRIBUTION);
                let problem = Problem::Unsupported(format!("{written}; all endpoints are alike"));
                notes.push((field, problem, Effect::Note));
            }
            &[]
        }
    }
}

fn distributed(scopes: &[RoutingScope], not_ready: bool) -> Option<LoadBalancing> {
    let mode = match scopes.is_empty() {
        true => LoadBalancingMode::Standard,
        false => LoadBalancingMode::Failover,
    };
    balanced(scopes.to_vec(), mode, not_ready)
}

fn balanced(scopes: Vec<RoutingScope>, mode: LoadBalancingMode, not_ready: bool) -> Option<LoadBalancing> {
    let balancing = LoadBalancing {
        routing_preference: scopes,
        mode,
        health_policy: match not_ready {
            true => HealthPolicy::AllowAll,
            false => HealthPolicy::OnlyHealthy,
        },
    };
    Some(balancing).filter(|balancing| *balancing != LoadBalancing::default())
}
