//! Who has an address or a host name that several claim.

use std::sync::Arc;

use model::{NamespacedName, Visibility};

use super::{
    names::Labels,
    parts::{Address, Part, PartKind},
    records::{Age, Place, Tunnel},
    tables::Tables,
};

impl Tables {
    pub(super) fn claim_place(&mut self, place: &Place, network: Option<&Arc<str>>, part: &Part, put: bool) {
        if let Place::Ip(ip) = place {
            let address = Address::single(&network.unwrap_or(&self.network).clone(), *ip);
            self.claim_address(address, part, put);
        }
    }

    pub(super) fn claim_address(&mut self, address: Address, part: &Part, put: bool) {
        self.dirty.extend(self.addresses.of(&address).cloned());
        if put {
            self.addresses.insert(address, part.clone());
        } else {
            self.addresses.remove(address, part.clone());
        }
    }

    /// Who else claims the name is made anew; within the namespace with all of its endpoints, for of those that share
    /// name and namespace one alone is there.
    pub(super) fn claim_hostname(&mut self, hostname: &Arc<str>, part: &Part, put: bool, mark: bool) {
        let others: Vec<Part> = self
            .hostnames
            .of(hostname)
            .filter(|other| *other != part)
            .cloned()
            .collect();
        for other in others {
            if mark && other.kind == PartKind::Host && other.of.namespace == part.of.namespace {
                self.mark_source(&other.source());
            }
            self.dirty.insert(other);
        }
        if put {
            self.hostnames.insert(hostname.clone(), part.clone());
        } else {
            self.hostnames.remove(hostname.clone(), part.clone());
        }
    }

    /// Of several that claim one thing the least has it. A pod's address is given by Kubernetes and can't be taken by
    /// what somebody writes into an entry, and neither can a Service's; otherwise the older one has it. A pod on its way
    /// out yields.
    pub(super) fn rank(&self, part: &Part) -> (u8, bool, Option<Age>, Part) {
        let of = &part.of;
        let (class, terminating, age) = match part.kind {
            PartKind::Pod => {
                let pod = self.pods.get(of);
                (0, pod.is_some_and(|pod| pod.terminating), pod.map(|pod| &pod.age))
            }
            PartKind::Service => (1, false, self.services.get(of).map(|record| &record.age)),
            PartKind::Entry => (2, false, self.entries.get(of).map(|record| &record.age)),
            PartKind::Host | PartKind::Endpoint => (2, false, self.service_entries.get(of).map(|record| &record.age)),
            PartKind::SliceEndpoint => (2, false, self.slices.get(of).map(|record| &record.age)),
            PartKind::Policy | PartKind::PeerAuthentication | PartKind::Namespace => (3, false, None),
        };
        (class, terminating, age.cloned(), part.clone())
    }

    /// Who has an address, of those that contend with this part for it; nobody else may have it and not know of it.
    ///
    /// A host whose traffic is passed on as it is (`resolution: NONE`) has no address that would else be a workload's which
    /// takes HBONE, however young: what has to be encrypted would go there in plaintext. The workload may be anybody's; if
    /// nobody serves HBONE there, connections fail, which is better than that
    /// (`nobody_passes_in_plaintext_around_who_takes_hbone`).
    pub(super) fn owner(&self, address: &Address, part: &Part) -> Option<&Part> {
        let mut claimants = self.addresses.of(address).peekable();
        let first = claimants.next()?;
        if claimants.peek().is_none() {
            return Some(first);
        }
        let contending = || self.addresses.of(address).filter(|other| self.contend(part, other));
        let first = contending().min_by_key(|part| self.rank(part))?;
        if !self.is_passed_on(first) {
            return Some(first);
        }
        let encrypted = match self.is_passed_on(part) {
            true => self.workload_at(address).filter(|other| self.contend(part, other)),
            false => contending()
                .filter(|other| !self.is_passed_on(other))
                .min_by_key(|part| self.rank(part)),
        };
        let encrypted = encrypted.filter(|other| self.takes_hbone(other));
        Some(encrypted.unwrap_or(first))
    }

    /// The workload that has an address.
    pub(super) fn workload_at(&self, address: &Address) -> Option<&Part> {
        let mut workloads = self.addresses.of(address).filter(|part| part.kind.is_workload());
        workloads.find(|part| self.owner(address, part) == Some(part))
    }

    fn is_passed_on(&self, part: &Part) -> bool {
        let entry = || self.service_entries.get(&part.of);
        part.kind == PartKind::Host && entry().is_some_and(|entry| entry.passthrough)
    }

    /// Of what somebody writes into an entry, whether it is tunnelled to.
    fn takes_hbone(&self, part: &Part) -> bool {
        let endpoint = match part.kind {
            PartKind::Entry => self.entries.get(&part.of).map(|entry| &entry.endpoint),
            PartKind::Endpoint => self.inline_endpoint(part),
            _ => None,
        };
        endpoint.is_some_and(|endpoint| endpoint.tunnel != Tunnel::None)
    }

    /// Hosts that namespaces keep to themselves have their addresses there alone, and so do not contend with each other
    /// nor with a host that is everybody's (`namespaces_may_keep_entries_of_one_address_to_themselves`). A host and its own
    /// endpoint are at one address together (`an_entrys_endpoints_may_have_its_address`).
    fn contend(&self, part: &Part, other: &Part) -> bool {
        let kept_to = |host: &Part| {
            let NamespacedName { namespace, name } = &host.of;
            let entry = self.service_entries.get(&host.of)?;
            let hostname = &entry.hosts.get(usize::try_from(host.index).ok()?)?.hostname;
            // One that is called as a Service is by Kubernetes is there for everybody, for agents.
            let is_kept =
                entry.visibility == Visibility::Namespace && !hostname.starts_with(&format!("{name}.{namespace}.svc."));
            is_kept.then(|| namespace.clone())
        };
        match (part.kind == PartKind::Host, other.kind == PartKind::Host) {
            (true, true) => kept_to(part) == kept_to(other),
            (true, false) => !self.is_endpoint_of(other, part),
            (false, true) => !self.is_endpoint_of(part, other),
            (false, false) => true,
        }
    }

    /// Whether a host's own entry lists or selects this.
    fn is_endpoint_of(&self, part: &Part, host: &Part) -> bool {
        let labels = match part.kind {
            PartKind::Endpoint => return part.of == host.of,
            PartKind::Pod => self.pods.get(&part.of).map(|pod| &pod.labels),
            PartKind::Entry => self.entries.get(&part.of).map(|entry| &entry.endpoint.labels),
            _ => None,
        };
        let entry = self.service_entries.get(&host.of);
        let selector = entry
            .map(|entry| &entry.selector)
            .filter(|selector| !selector.is_empty());
        let selects = |selector: &Arc<Labels>| labels.is_some_and(|labels| labels.matches(selector));
        part.of.namespace == host.of.namespace && selector.is_some_and(selects)
    }
}
