//! Policies: the L4 part of AuthorizationPolicies, and what PeerAuthentications become.
//!
//! What can't be enforced as it is written is sent as a policy that denies everything that it may have selected: an agent
//! of Istio's takes a name that it does not know for nothing (`a_policy_that_cannot_be_read_closes`).

use std::{collections::BTreeSet, sync::Arc};

use k8s::{Effect, Finding, PeerAuthentication, PeerAuthentications, Place, closing};
use model::{NamespacedName, Policy};

use super::{
    finding,
    names::Labels,
    parts::{Part, within},
    tables::{Authentication, Tables},
};

/// Where every object of the API stands: nowhere in a file.
static NOWHERE: Place = Place {
    file: String::new(),
    document: 0,
    item: None,
};

impl Tables {
    /// The policies that a workload lists: those that select it by label.
    pub(super) fn listed_policies(&self, namespace: &Arc<str>, labels: &Labels) -> Vec<NamespacedName> {
        let mut listed = BTreeSet::new();
        for scope in self.scopes(namespace) {
            for (name, policy) in within(&self.policies, scope) {
                if policy.sent
                    && policy
                        .selector
                        .as_ref()
                        .is_some_and(|selector| labels.matches(selector))
                {
                    listed.insert(name.clone());
                }
            }
            for (name, record) in within(&self.authentications, scope) {
                if record.written.is_none()
                    && record
                        .selector
                        .as_ref()
                        .is_some_and(|selector| labels.matches(selector))
                {
                    listed.insert(self.unreadable(name, record).key());
                }
            }
        }
        if !self.authentications.is_empty() {
            let scoped = PeerAuthentications::new(self.readable(namespace), &self.root_namespace, &mut Vec::new());
            let policy = scoped.policy_for(namespace, &labels.to_map());
            listed.extend(policy.map(|policy| policy.key()));
        }
        listed.into_iter().collect()
    }

    /// An AuthorizationPolicy.
    pub(super) fn authorization(&self, part: &Part, findings: &mut Vec<Finding>) -> Option<Policy> {
        let record = self.policies.get(&part.of)?;
        if record.written.is_none() && !record.sent {
            return None;
        }
        match &record.written {
            Some(written) => {
                let (policy, mut found) = written.l4(&self.root_namespace);
                if found.iter().any(|finding| finding.effect == Effect::Elsewhere) {
                    found = self.targeted(part, written);
                }
                findings.extend(found);
                policy
            }
            None => Some(closing(
                &part.source().object(),
                record.selector.is_some(),
                &self.root_namespace,
            )),
        }
    }

    /// What a PeerAuthentication becomes.
    pub(super) fn authentication(&self, part: &Part, findings: &mut Vec<Finding>) -> Option<Policy> {
        let record = self.authentications.get(&part.of)?;
        let Some(written) = &record.written else {
            return Some(self.unreadable(&part.of, record));
        };
        let mut found = Vec::new();
        let scoped = PeerAuthentications::new(self.readable(&part.of.namespace), &self.root_namespace, &mut found);
        let source = part.source();
        let object = source.object();
        findings.extend(found.into_iter().filter(|finding| finding.object == object));
        let overlaps = scoped.overlaps(written, self.labelled(&part.of.namespace), |labels, asked| {
            labels.have_all(asked)
        });
        let overlaps = overlaps.into_iter();
        findings.extend(overlaps.map(|(field, problem, effect)| finding(&source, (field.to_owned(), problem, effect))));
        scoped.converted(written)
    }

    /// The workloads of a namespace that a selector can mean, and the names of what runs there: a rollout changes none.
    fn labelled<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = (&'a str, &'a Labels)> {
        let pods = within(&self.pods, namespace).map(|(_, pod)| (&*pod.workload_name, &*pod.labels));
        let entries = within(&self.entries, namespace);
        let entries = entries.map(|(name, entry)| (&*name.name, &*entry.endpoint.labels));
        let service_entries = within(&self.service_entries, namespace);
        let endpoints = service_entries.flat_map(|(name, entry)| {
            let endpoints = entry.endpoints.iter();
            endpoints.map(|endpoint| (&*name.name, &*endpoint.labels))
        });
        pods.chain(entries).chain(endpoints)
    }

    fn unreadable(&self, name: &NamespacedName, record: &Authentication) -> Policy {
        let object = k8s::live::Kind::PeerAuthentication.object(&name.namespace, &name.name);
        closing(&object, record.selector.is_some(), &self.root_namespace)
    }

    /// The namespace and, if it is another one, the root namespace.
    fn scopes<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = &'a Arc<str>> {
        let root = Some(&self.root_namespace).filter(|root| **root != *namespace);
        std::iter::once(namespace).chain(root)
    }

    fn readable<'a>(&'a self, namespace: &'a Arc<str>) -> impl Iterator<Item = (&'a Place, &'a PeerAuthentication)> {
        let records = self
            .scopes(namespace)
            .flat_map(|scope| within(&self.authentications, scope));
        records.filter_map(|(_, record)| Some((&NOWHERE, &**record.written.as_ref()?)))
    }
}
