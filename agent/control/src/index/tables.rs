//! The objects as they are kept, and who depends on whom: every change marks the parts that have to be made anew.
//!
//! ```text
//! put/remove ─ unlink the old record, link the new one ─> look-ups, claims
//!           └─ mark what either of them concerns       ─> dirty parts
//! ```
//! What a part is made of is in `workloads`, `services`, `policies`; whatever they read must be marked from here when it
//! changes, which the property test of the index holds. What concerns several is marked in `marks`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use k8s::{AuthorizationPolicy, PeerAuthentication, live::Kind};
use model::NamespacedName;

use super::{
    labels,
    names::{Labels, Names},
    parts::{Address, Claims, Part, PartKind, Source},
    records::{Allowed, Entry, Gateway, Namespace, Node, Pod, ServiceEntry, UsedFor},
    service_records::{Service, Slice},
    waypoints,
};

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Policy {
    /// None: one that can't be read.
    pub written: Option<Box<AuthorizationPolicy>>,
    /// Whom it selects by label.
    pub selector: Option<Arc<Labels>>,
    /// Whether anything is sent for it.
    pub sent: bool,
}

/// A PeerAuthentication.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Authentication {
    /// None: one that can't be read.
    pub written: Option<Box<PeerAuthentication>>,
    /// Whom it selects by label.
    pub selector: Option<Arc<Labels>>,
}

/// The objects, and the look-ups over them.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub names: Names,
    /// The network of what names none.
    pub network: Arc<str>,
    pub root_namespace: Arc<str>,
    pub namespaces: BTreeMap<Arc<str>, Namespace>,
    pub nodes: BTreeMap<Arc<str>, Node>,
    pub pods: BTreeMap<NamespacedName, Pod>,
    pub services: BTreeMap<NamespacedName, Service>,
    pub slices: BTreeMap<NamespacedName, Slice>,
    pub entries: BTreeMap<NamespacedName, Entry>,
    pub service_entries: BTreeMap<NamespacedName, ServiceEntry>,
    pub gateways: BTreeMap<NamespacedName, Gateway>,
    /// GatewayClasses: what the waypoints of each are for.
    pub gateway_classes: BTreeMap<Arc<str>, Option<UsedFor>>,
    pub policies: BTreeMap<NamespacedName, Policy>,
    pub authentications: BTreeMap<NamespacedName, Authentication>,
    /// Node, pod.
    pods_on: BTreeSet<(Arc<str>, NamespacedName)>,
    /// Node, slice that has an endpoint there which is no pod; without a node where its zone alone is known.
    pub slices_on: BTreeSet<(Arc<str>, NamespacedName)>,
    pub slices_of_pod: HashMap<NamespacedName, Vec<NamespacedName>>,
    /// Service, slice.
    pub slices_of_service: BTreeSet<(NamespacedName, NamespacedName)>,
    /// The ServiceEntries that select workloads.
    pub selecting: BTreeMap<NamespacedName, ()>,
    /// Gateway, and who names it.
    gateway_users: BTreeSet<(NamespacedName, Source)>,
    /// The policies that have targets.
    pub(super) targeting: BTreeSet<NamespacedName>,
    pub addresses: Claims<Address>,
    pub hostnames: Claims<Arc<str>>,
    /// What has to be made anew.
    pub dirty: BTreeSet<Part>,
}

/// Puts or removes a record; whether that changed anything, with what was there.
pub(super) fn exchange<K: Ord + Clone, V: PartialEq>(
    map: &mut BTreeMap<K, V>,
    key: &K,
    new: Option<V>,
) -> Option<Option<V>> {
    if map.get(key) == new.as_ref() {
        return None;
    }
    Some(match new {
        Some(new) => map.insert(key.clone(), new),
        None => map.remove(key),
    })
}

impl Tables {
    pub fn new(network: Arc<str>, root_namespace: Arc<str>) -> Self {
        Self {
            network,
            root_namespace,
            ..Self::default()
        }
    }

    pub fn put_namespace(&mut self, name: &Arc<str>, new: Option<Namespace>) {
        let key = NamespacedName {
            namespace: "".into(),
            name: name.clone(),
        };
        let Some(old) = exchange(&mut self.namespaces, name, new) else {
            return;
        };
        self.mark_targeting(Some(name));
        let new = self.namespaces.get(name).cloned();
        let source = Source {
            kind: Kind::Namespace,
            name: key,
        };
        for (record, put) in [(&old, false), (&new, true)] {
            if let Some(record) = record
                && let Some(gateway) = waypoints::named(&record.labels, name)
            {
                self.use_gateway(gateway, source.clone(), put);
            }
        }
        let inherited = |record: &Option<Namespace>| {
            let record = record.as_ref();
            let label = |key| record.and_then(|record| record.labels.get(key).cloned());
            let distribution = record.and_then(|record| record.distribution.clone());
            (
                label(labels::USE_WAYPOINT),
                label(labels::USE_WAYPOINT_NAMESPACE),
                distribution,
            )
        };
        let by_label = |gateway: &Gateway| matches!(gateway.allowed, Allowed::Selector(_));
        if inherited(&old) != inherited(&new) || self.gateways.values().any(by_label) {
            self.mark_source(&source);
        }
    }

    pub fn put_node(&mut self, name: &Arc<str>, new: Option<Node>) {
        if exchange(&mut self.nodes, name, new).is_none() {
            return;
        }
        let from = (name.clone(), NamespacedName::new("", ""));
        let pods = self.pods_on.range(from..).take_while(|(node, _)| node == name);
        self.dirty.extend(pods.map(|(_, pod)| Part::new(PartKind::Pod, pod)));
        self.mark_slices_on(name);
    }

    pub fn put_pod(&mut self, name: &NamespacedName, new: Option<Pod>) {
        let Some(old) = exchange(&mut self.pods, name, new) else {
            return;
        };
        let new = self.pods.get(name).cloned();
        let part = Part::new(PartKind::Pod, name);
        let selected_as = |pod: &Option<Pod>| pod.as_ref().map(|pod| (pod.labels.clone(), pod.workload_name.clone()));
        let is_selected_anew = selected_as(&old) != selected_as(&new);
        for (record, put) in [(old, false), (new, true)] {
            let Some(pod) = record else { continue };
            if is_selected_anew {
                self.mark_overlapping(&name.namespace, &pod.labels);
            }
            let on = (pod.node.clone(), name.clone());
            if put {
                self.pods_on.insert(on);
            } else {
                self.pods_on.remove(&on);
            }
            self.link_labels(&pod.labels, part.source(), put);
            if !pod.host_network {
                let network = pod.network.as_ref().unwrap_or(&self.network).clone();
                for ip in &pod.addresses {
                    self.claim_address(Address::single(&network, *ip), &part, put);
                }
            }
        }
        self.dirty.insert(part);
    }

    pub fn put_service(&mut self, name: &NamespacedName, new: Option<Service>) {
        let Some(old) = exchange(&mut self.services, name, new) else {
            return;
        };
        self.mark_targeting(Some(&name.namespace));
        let new = self.services.get(name).cloned();
        let part = Part::new(PartKind::Service, name);
        let ends = |record: &Option<Service>| {
            record
                .as_ref()
                .map(|record| (record.ports.clone(), record.selector.clone(), record.not_ready_too))
        };
        let of_endpoints = ends(&old) != ends(&new);
        let age = |record: &Option<Service>| record.as_ref().map(|record| record.age.clone());
        let contends = age(&old) != age(&new);
        for (record, put) in [(old, false), (new, true)] {
            let Some(service) = record else { continue };
            self.link_labels(&service.labels, part.source(), put);
            for ip in &service.addresses {
                self.claim_address(Address::single(&self.network.clone(), *ip), &part, put);
            }
            self.claim_hostname(&service.hostname, &part, put, contends);
            if of_endpoints {
                self.mark_selected_entries(&name.namespace, &service.selector);
            }
        }
        if of_endpoints {
            self.mark_slices_of(name);
        }
        self.dirty.insert(part);
    }

    pub fn put_entry(&mut self, name: &NamespacedName, new: Option<Entry>) {
        let Some(old) = exchange(&mut self.entries, name, new) else {
            return;
        };
        let new = self.entries.get(name).cloned();
        let part = Part::new(PartKind::Entry, name);
        for (record, put) in [(old, false), (new, true)] {
            let Some(entry) = record else { continue };
            self.mark_overlapping(&name.namespace, &entry.endpoint.labels);
            self.link_labels(&entry.endpoint.labels, part.source(), put);
            self.claim_place(&entry.endpoint.place, entry.endpoint.network.as_ref(), &part, put);
        }
        self.dirty.insert(part);
    }

    pub fn put_service_entry(&mut self, name: &NamespacedName, new: Option<ServiceEntry>) {
        let Some(old) = exchange(&mut self.service_entries, name, new) else {
            return;
        };
        self.mark_targeting(Some(&name.namespace));
        let new = self.service_entries.get(name).cloned();
        for (record, put) in [(old, false), (new, true)] {
            let Some(entry) = record else { continue };
            let source = Source {
                kind: Kind::ServiceEntry,
                name: name.clone(),
            };
            self.link_labels(&entry.labels, source, put);
            if put && !entry.selector.is_empty() {
                self.selecting.insert(name.clone(), ());
            } else {
                self.selecting.remove(name);
            }
            for (index, host) in entry.hosts.iter().enumerate() {
                let part = Part::at(PartKind::Host, name, index);
                for block in &host.addresses {
                    let address = Address {
                        network: self.network.clone(),
                        ip: block.addr(),
                        length: block.prefix_len(),
                    };
                    self.claim_address(address, &part, put);
                }
                self.claim_hostname(&host.hostname, &part, put, true);
            }
            for (index, endpoint) in entry.endpoints.iter().enumerate() {
                let part = Part::at(PartKind::Endpoint, name, index);
                self.mark_overlapping(&name.namespace, &endpoint.labels);
                self.claim_place(&endpoint.place, endpoint.network.as_ref(), &part, put);
            }
            self.mark_service_entry(name, &entry);
        }
    }

    pub fn put_gateway(&mut self, name: &NamespacedName, new: Option<Gateway>) {
        if exchange(&mut self.gateways, name, new).is_some() {
            self.mark_users_of(name);
        }
    }

    pub fn put_gateway_class(&mut self, name: &Arc<str>, new: Option<Option<UsedFor>>) {
        if exchange(&mut self.gateway_classes, name, new).is_none() {
            return;
        }
        let of_class = self.gateways.iter().filter(|(_, gateway)| gateway.class == *name);
        let of_class: Vec<_> = of_class.map(|(gateway, _)| gateway.clone()).collect();
        of_class.iter().for_each(|gateway| self.mark_users_of(gateway));
    }

    fn mark_users_of(&mut self, name: &NamespacedName) {
        self.mark_targeting(None);
        let from = Source {
            kind: Kind::Namespace,
            name: NamespacedName::new("", ""),
        };
        let users = self.gateway_users.range((name.clone(), from)..);
        let users = users.take_while(|(gateway, _)| gateway == name);
        let users: Vec<Source> = users.map(|(_, user)| user.clone()).collect();
        users.iter().for_each(|user| self.mark_source(user));
    }

    pub fn put_policy(&mut self, name: &NamespacedName, new: Option<Policy>) {
        let Some(old) = exchange(&mut self.policies, name, new) else {
            return;
        };
        self.dirty.insert(Part::new(PartKind::Policy, name));
        let new = self.policies.get(name).cloned();
        let has_targets = |record: &Policy| {
            record
                .written
                .as_ref()
                .is_some_and(|written| written.targets().next().is_some())
        };
        match new.as_ref().is_some_and(has_targets) {
            true => self.targeting.insert(name.clone()),
            false => self.targeting.remove(name),
        };
        for record in old.iter().chain(&new) {
            self.mark_targets(name, record);
        }
        let listed = |record: &Option<Policy>| {
            let record = record.as_ref().filter(|record| record.sent);
            record.and_then(|record| record.selector.clone())
        };
        if listed(&old) != listed(&new) {
            for selector in [listed(&old), listed(&new)].into_iter().flatten() {
                self.mark_workloads(&name.namespace, Some(&selector));
            }
        }
    }

    pub fn put_authentication(&mut self, name: &NamespacedName, new: Option<Authentication>) {
        let Some(old) = exchange(&mut self.authentications, name, new) else {
            return;
        };
        let new = self.authentications.get(name).cloned();
        for record in [old, new].into_iter().flatten() {
            self.mark_workloads(&name.namespace, record.selector.as_deref());
        }
        // One that says nothing of its own is made of the wider ones, and of the others of its scope.
        let is_root = name.namespace == self.root_namespace;
        let all = self
            .authentications
            .keys()
            .filter(|other| is_root || other.namespace == name.namespace);
        self.dirty
            .extend(all.map(|name| Part::new(PartKind::PeerAuthentication, name)));
        self.dirty.insert(Part::new(PartKind::PeerAuthentication, name));
    }

    /// The Gateways that an object names by its labels.
    fn link_labels(&mut self, labels: &Labels, source: Source, put: bool) {
        let namespace = source.name.namespace.clone();
        if let Some(gateway) = waypoints::named(labels, &namespace) {
            self.use_gateway(gateway, source.clone(), put);
        }
        if let Some(name) = labels.get(labels::GATEWAY_NAME).cloned() {
            self.use_gateway(NamespacedName { namespace, name }, source, put);
        }
    }

    fn use_gateway(&mut self, gateway: NamespacedName, source: Source, put: bool) {
        if put {
            self.gateway_users.insert((gateway, source));
        } else {
            self.gateway_users.remove(&(gateway, source));
        }
    }
}
