//! Whether a pod may go where its connection leads: `outboundTrafficPolicy`, decided at the source.
//!
//! With `REGISTRY_ONLY` a pod reaches what the mesh's registry names and nothing else:
//!
//! | where it leads | may be |
//! | --- | --- |
//! | a pod | yes |
//! | another workload (a WorkloadEntry, an endpoint of a ServiceEntry or of a Service without pods) | on the ports of its services that are exported |
//! | a service (its own ports only, as ever), through a waypoint too | if it is exported to the pod's namespace |
//! | an address or block of a ServiceEntry with resolution NONE | if that is exported, on the entry's ports |
//! | any other address that the pod learned by a name | if a service or ServiceEntry of that name, or of a wildcard that covers it, is exported, on its ports |
//! | all else, the node's own and link-local addresses too | no |
//!
//! As for Istio's sidecars the Kubernetes API is reached by its Service; the cloud's metadata address needs a
//! ServiceEntry, as do name servers over TCP where the agent is not the pod's (`l4::dns`). Differences: a pod may dial a workload of the mesh by its own address, as everywhere in
//! ambient mode, and `exportTo` counts although the workload API tells only "everybody" from "its own namespace".
//!
//! v4-mapped addresses are the IPv4 addresses that they are; another port or family of a host is another destination
//! (`only_what_the_registry_names_is_reached`). Before it is known what the mesh says, the answer is
//! [`Exit::NotKnown`] for what the mesh does not know, and yes for the rest (`nothing_leaves_before_it_is_known`). UDP is
//! not the mesh's and not judged.

use std::{net::SocketAddr, sync::Arc};

use model::{LoadBalancingMode, OutboundMode, OutboundTrafficPolicy, Service, Visibility, Workload, canonical_socket};

use crate::{RefuseReason, Route, Snapshot};

/// Whether a connection may leave its pod.
#[derive(Clone, Debug, PartialEq)]
pub enum Exit {
    /// Yes; with the service that the registry has for it, where it was looked for and found.
    Open(Option<Arc<Service>>),
    /// It is not known yet what the mesh says of destinations that it does not know.
    NotKnown,
    /// No.
    Closed(RefuseReason),
}

impl Snapshot {
    /// What the mesh says of destinations that it does not know; none before that was heard.
    pub fn outbound(&self) -> Option<&OutboundTrafficPolicy> {
        self.outbound.as_deref()
    }

    /// Whether any pods are `REGISTRY_ONLY`.
    pub fn is_registry_only_somewhere(&self) -> bool {
        let only = |mode: &OutboundMode| *mode == OutboundMode::RegistryOnly;
        let outbound = self.outbound.as_deref();
        outbound.is_some_and(|policy| only(&policy.mode) || policy.namespaces.values().any(only))
    }

    /// Whether a pod may go where a connection leads: `route` is what [`Snapshot::resolve`] made of `dialled`, `names`
    /// are host names by which the pod may have learned the address.
    pub fn exit(&self, source: &Workload, dialled: SocketAddr, route: &Route, names: &[Arc<str>]) -> Exit {
        let (workload, service) = match route {
            Route::Tunnel { workload, service, .. }
            | Route::Plaintext { workload, service, .. }
            | Route::Named { workload, service, .. } => (Some(workload), service),
            // A waypoint is but the way: what is behind it counts.
            Route::Waypoint { service, target, .. } => (self.workload_by_ip(target.ip()), service),
            Route::Passthrough { .. } => return self.exit_to(source, dialled, names),
            _ => return Exit::Open(None),
        };
        if self.mode_of(source) != Some(OutboundMode::RegistryOnly) {
            return Exit::Open(None);
        }
        let may = match service {
            Some(service) => is_exported(service, source),
            None => workload.is_some_and(|workload| self.is_there_for(source, workload, dialled.port())),
        };
        match may {
            true => Exit::Open(None),
            false => self.exit_to(source, dialled, names),
        }
    }

    /// Whether a pod may dial a workload by its own address.
    fn is_there_for(&self, source: &Workload, workload: &Workload, port: u16) -> bool {
        let mut services = workload.services.iter();
        workload.uid.is_pod()
            || services.any(|(key, ports)| {
                let service = self.service(key).filter(|service| is_exported(service, source));
                let of_service = |service: &Arc<Service>| service.ports.iter().any(|(_, target)| *target == port);
                service.is_some_and(|service| ports.iter().any(|(_, target)| *target == port) || of_service(service))
            })
    }

    /// Whether a pod may go to this address, whatever way leads there: for a connection that lives.
    pub fn exit_to(&self, source: &Workload, dialled: SocketAddr, names: &[Arc<str>]) -> Exit {
        let dialled = canonical_socket(dialled);
        match self.mode_of(source) {
            None => Exit::NotKnown,
            Some(OutboundMode::AllowAny) => Exit::Open(None),
            Some(OutboundMode::RegistryOnly) => match self.registered(source, dialled, names) {
                Some(service) => Exit::Open(service),
                None => self.closed_to(source, dialled),
            },
        }
    }

    /// Whether a pod may use a service, as its `exportTo` says; any, where pods may go anywhere.
    pub fn may_use(&self, source: &Workload, service: &Service) -> bool {
        self.mode_of(source) != Some(OutboundMode::RegistryOnly) || is_exported(service, source)
    }

    fn mode_of(&self, source: &Workload) -> Option<OutboundMode> {
        Some(self.outbound.as_ref()?.of(&source.namespace))
    }

    /// What the registry has there for this pod.
    fn registered(&self, source: &Workload, dialled: SocketAddr, names: &[Arc<str>]) -> Option<Option<Arc<Service>>> {
        let workload = self.workload_by_ip(dialled.ip());
        if workload.is_some_and(|workload| self.is_there_for(source, workload, dialled.port())) {
            return Some(None);
        }
        let opens = |service: &&Arc<Service>| is_exported(service, source) && serves(service, dialled.port());
        if let Some(service) = self.services_around(dialled.ip()).find(opens) {
            return Some(Some(service.clone()));
        }
        let by_name = names.iter().flat_map(|name| {
            let exact = self.service_by_host(name, &source.namespace);
            let wildcard = || self.service_by_wildcard(name, &source.namespace);
            exact.into_iter().chain(wildcard())
        });
        let mut by_name = by_name.filter(opens);
        by_name.next().map(|service| Some(service.clone()))
    }

    fn closed_to(&self, source: &Workload, dialled: SocketAddr) -> Exit {
        let near = self.services_around(dialled.ip()).next();
        Exit::Closed(RefuseReason::NotRegistered {
            target: dialled,
            namespace: source.namespace.clone(),
            near: near.map(|service| service.key()),
        })
    }
}

/// Whether a pod's namespace may use it.
fn is_exported(service: &Service, source: &Workload) -> bool {
    service.visibility == Visibility::Public || service.namespace == source.namespace
}

/// Whether a port of it, or of its endpoints where it has no address of its own, is this one.
fn serves(service: &Service, port: u16) -> bool {
    let is_passed = |service: &Service| {
        let balancing = service.load_balancing.as_ref();
        balancing.is_some_and(|balancing| balancing.mode == LoadBalancingMode::Passthrough)
    };
    let by_target =
        || service.vips.is_empty() && !is_passed(service) && service.ports.iter().any(|(_, to)| *to == port);
    service.ports.contains_key(&port) || by_target()
}
