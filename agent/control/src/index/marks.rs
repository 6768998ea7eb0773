//! Who has to be made anew when something changes that several are made of.

use std::{collections::BTreeSet, sync::Arc};

use k8s::live::Kind;
use model::NamespacedName;

use super::{
    names::Labels,
    parts::{Part, PartKind, Source, within},
    records::ServiceEntry,
    tables::Tables,
};

impl Tables {
    pub(super) fn mark_slices_of(&mut self, service: &NamespacedName) {
        let from = (service.clone(), NamespacedName::new("", ""));
        let slices = self.slices_of_service.range(from..).take_while(|(of, _)| of == service);
        for (_, name) in slices {
            let Some(slice) = self.slices.get(name) else { continue };
            self.dirty
                .extend(slice.pods.iter().map(|pod| Part::new(PartKind::Pod, pod)));
            let others = 0..slice.others.len();
            self.dirty
                .extend(others.map(|index| Part::at(PartKind::SliceEndpoint, name, index)));
        }
    }

    /// All that an entry gives: its hosts, its endpoints, and the services of those that it selects.
    pub(super) fn mark_service_entry(&mut self, name: &NamespacedName, entry: &ServiceEntry) {
        let hosts = 0..entry.hosts.len();
        self.dirty
            .extend(hosts.map(|index| Part::at(PartKind::Host, name, index)));
        let endpoints = 0..entry.endpoints.len();
        self.dirty
            .extend(endpoints.map(|index| Part::at(PartKind::Endpoint, name, index)));
        if !entry.selector.is_empty() {
            self.mark_selected_entries(&name.namespace, &entry.selector);
            let pods = within(&self.pods, &name.namespace).filter(|(_, pod)| pod.labels.matches(&entry.selector));
            self.dirty.extend(pods.map(|(name, _)| Part::new(PartKind::Pod, name)));
        }
    }

    pub(super) fn mark_selected_entries(&mut self, namespace: &Arc<str>, selector: &Labels) {
        if selector.is_empty() {
            return;
        }
        let selected = within(&self.entries, namespace).filter(|(_, entry)| entry.endpoint.labels.matches(selector));
        self.dirty
            .extend(selected.map(|(name, _)| Part::new(PartKind::Entry, name)));
    }

    /// The workloads that a policy of this namespace selects; all, if it has no selector.
    pub(super) fn mark_workloads(&mut self, namespace: &Arc<str>, selector: Option<&Labels>) {
        let selects = |labels: &Labels| selector.is_none_or(|selector| labels.matches(selector));
        let mut marked = Vec::new();
        let mut mark = |namespace: &Arc<str>| {
            let pods = within(&self.pods, namespace).filter(|(_, pod)| selects(&pod.labels));
            marked.extend(pods.map(|(name, _)| Part::new(PartKind::Pod, name)));
            let entries = within(&self.entries, namespace).filter(|(_, entry)| selects(&entry.endpoint.labels));
            marked.extend(entries.map(|(name, _)| Part::new(PartKind::Entry, name)));
            for (name, entry) in within(&self.service_entries, namespace) {
                let endpoints = entry.endpoints.iter().enumerate();
                let endpoints = endpoints.filter(|(_, endpoint)| selects(&endpoint.labels));
                marked.extend(endpoints.map(|(index, _)| Part::at(PartKind::Endpoint, name, index)));
            }
        };
        if *namespace == self.root_namespace {
            self.all_namespaces().iter().for_each(&mut mark);
        } else {
            mark(namespace);
        }
        self.dirty.extend(marked);
    }

    /// The PeerAuthentications that select a workload which came, went or changed its labels: who of them has it is told.
    /// One alone has whatever it selects.
    pub(super) fn mark_overlapping(&mut self, namespace: &Arc<str>, labels: &Labels) {
        let selecting = || {
            let all = within(&self.authentications, namespace);
            all.filter_map(|(name, record)| Some((name, record.selector.as_ref()?)))
        };
        if selecting().nth(1).is_none() {
            return;
        }
        let selecting = selecting().filter(|(_, selector)| labels.matches(selector));
        let parts: Vec<_> = selecting
            .map(|(name, _)| Part::new(PartKind::PeerAuthentication, name))
            .collect();
        self.dirty.extend(parts);
    }

    /// Every namespace that anything is in.
    fn all_namespaces(&self) -> BTreeSet<Arc<str>> {
        let pods = self.pods.keys().map(|name| &name.namespace);
        let entries = self.entries.keys().map(|name| &name.namespace);
        let service_entries = self.service_entries.keys().map(|name| &name.namespace);
        pods.chain(entries).chain(service_entries).cloned().collect()
    }

    /// Everything of an object; of a namespace, everything in it.
    pub(super) fn mark_source(&mut self, source: &Source) {
        let name = &source.name;
        match source.kind {
            Kind::Pod => _ = self.dirty.insert(Part::new(PartKind::Pod, name)),
            Kind::WorkloadEntry => _ = self.dirty.insert(Part::new(PartKind::Entry, name)),
            Kind::Service => _ = self.dirty.insert(Part::new(PartKind::Service, name)),
            Kind::ServiceEntry => {
                if let Some(entry) = self.service_entries.get(name).cloned() {
                    self.mark_service_entry(name, &entry);
                }
            }
            Kind::Namespace => {
                self.dirty.insert(Part::new(PartKind::Namespace, name));
                let namespace = &name.name;
                let part = |kind: PartKind| move |name: &NamespacedName| Part::new(kind, name);
                let pods = within(&self.pods, namespace).map(|(name, _)| name);
                self.dirty.extend(pods.map(part(PartKind::Pod)));
                let entries = within(&self.entries, namespace).map(|(name, _)| name);
                self.dirty.extend(entries.map(part(PartKind::Entry)));
                let services = within(&self.services, namespace).map(|(name, _)| name);
                self.dirty.extend(services.map(part(PartKind::Service)));
                let of_namespace = within(&self.service_entries, namespace);
                let all: Vec<_> = of_namespace
                    .map(|(name, entry)| (name.clone(), entry.clone()))
                    .collect();
                all.iter()
                    .for_each(|(name, entry)| self.mark_service_entry(name, entry));
            }
            _ => {}
        }
    }

    /// Everything, after a setting of the whole mesh changed.
    pub(super) fn mark_all(&mut self) {
        let mut namespaces = self.all_namespaces();
        namespaces.extend(self.services.keys().map(|name| name.namespace.clone()));
        for namespace in namespaces {
            let name = NamespacedName {
                namespace: "".into(),
                name: namespace,
            };
            self.mark_source(&Source {
                kind: Kind::Namespace,
                name,
            });
        }
        for (name, slice) in &self.slices {
            let others = 0..slice.others.len();
            self.dirty
                .extend(others.map(|index| Part::at(PartKind::SliceEndpoint, name, index)));
        }
        let policies = self.policies.keys();
        self.dirty
            .extend(policies.map(|name| Part::new(PartKind::Policy, name)));
        let authentications = self.authentications.keys();
        self.dirty
            .extend(authentications.map(|name| Part::new(PartKind::PeerAuthentication, name)));
    }
}
