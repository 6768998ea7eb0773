//! Services by host name, for DNS and for what was learned by it.
//!
//! A host name may be that of several services (ServiceEntries of several namespaces): who asks gets that of its own
//! namespace, else the canonical one, else the first by namespace; never one that its namespace may not see
//! (`a_host_name_means_the_service_of_the_own_namespace_first`). A wildcard, `*.example.com`, stands under just that
//! name and is found by walking up the labels (`a_wildcard_is_found_by_its_labels_and_the_longest_goes_first`).
//!
//! Shared between snapshots as every index; the keys are the services' own host names, so that a service costs an entry
//! and no text.

use std::sync::Arc;

use model::{Service, Visibility};

use crate::trie::Trie;

/// The services of a host name: nearly always one.
#[derive(Clone, Debug)]
enum Named {
    One(Arc<Service>),
    /// Two or more, in the order of their namespaces.
    Several(Arc<Vec<Arc<Service>>>),
}

impl Named {
    fn as_slice(&self) -> &[Arc<Service>] {
        match self {
            Self::One(service) => std::slice::from_ref(service),
            Self::Several(services) => services,
        }
    }

    fn of(mut services: Vec<Arc<Service>>) -> Option<Self> {
        services.sort_by(|a, b| a.namespace.cmp(&b.namespace));
        match services.len() {
            0 => None,
            1 => services.pop().map(Self::One),
            _ => Some(Self::Several(Arc::new(services))),
        }
    }
}

/// The index. Names are kept in lower case and without a final dot.
#[derive(Clone, Default, Debug)]
pub(crate) struct Hosts {
    by_name: Trie<Arc<str>, Named>,
}

fn key(service: &Service) -> Arc<str> {
    let host = service.hostname.trim_end_matches('.');
    if host.len() == service.hostname.len() && !host.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return service.hostname.clone();
    }
    host.to_ascii_lowercase().into()
}

impl Hosts {
    pub(crate) fn add(&mut self, service: &Arc<Service>) {
        let key = key(service);
        let others = self.by_name.get(&key).map(Named::as_slice).unwrap_or_default();
        let others = others.iter().filter(|other| other.namespace != service.namespace);
        let services = others.chain([service]).cloned().collect();
        if let Some(named) = Named::of(services) {
            self.by_name.insert(key, named);
        }
    }

    pub(crate) fn remove(&mut self, service: &Arc<Service>) {
        let key = key(service);
        let others = self.by_name.get(&key).map(Named::as_slice).unwrap_or_default();
        let others = others.iter().filter(|other| other.namespace != service.namespace);
        match Named::of(others.cloned().collect()) {
            Some(named) => drop(self.by_name.insert(key, named)),
            None => drop(self.by_name.remove(&key)),
        }
    }

    /// The service of exactly this name (`*.example.com` is the wildcard's), in lower case, as a namespace sees it.
    pub(crate) fn get(&self, name: &str, namespace: &str) -> Option<&Arc<Service>> {
        let services = self.by_name.get_by(name)?.as_slice();
        let visible =
            |service: &&Arc<Service>| service.visibility == Visibility::Public || *service.namespace == *namespace;
        let rank = |service: &&Arc<Service>| (*service.namespace != *namespace, !service.canonical);
        services.iter().filter(visible).min_by_key(rank)
    }

    /// The service with the longest wildcard that a name is under.
    pub(crate) fn wildcard(&self, name: &str, namespace: &str) -> Option<&Arc<Service>> {
        let mut wildcard = String::with_capacity(name.len() + 1);
        let mut rest = name;
        while let Some((label, parent)) = rest.split_once('.') {
            if label.is_empty() || parent.is_empty() {
                return None;
            }
            wildcard.clear();
            wildcard.push_str("*.");
            wildcard.push_str(parent);
            if let Some(service) = self.get(&wildcard, namespace) {
                return Some(service);
            }
            rest = parent;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(namespace: &str, host: &str, change: impl FnOnce(&mut Service)) -> Arc<Service> {
        let mut service = Service {
            name: host.into(),
            namespace: namespace.into(),
            hostname: host.into(),
            ..Service::default()
        };
        change(&mut service);
        Arc::new(service)
    }

    fn found<'a>(hosts: &'a Hosts, name: &str, namespace: &str) -> Option<&'a str> {
        hosts.get(name, namespace).map(|service| &*service.namespace)
    }

    #[test]
    fn a_host_name_means_the_service_of_the_own_namespace_first() {
        let mut hosts = Hosts::default();
        let own = |service: &mut Service| service.visibility = Visibility::Namespace;
        let entries = [
            service("c", "Api.example.com.", |service| service.canonical = true),
            service("b", "api.example.com", |_| {}),
            service("a", "api.example.com", own),
        ];
        assert_eq!(found(&hosts, "api.example.com", "a"), None);
        entries.iter().for_each(|entry| hosts.add(entry));
        entries.iter().for_each(|entry| hosts.add(entry));
        let expected = [("a", "a"), ("b", "b"), ("c", "c"), ("d", "c")];
        for (asking, answer) in expected {
            assert_eq!(found(&hosts, "api.example.com", asking), Some(answer));
        }
        hosts.remove(&entries[0]);
        assert_eq!(found(&hosts, "api.example.com", "d"), Some("b"));
        hosts.remove(&entries[1]);
        assert_eq!(
            found(&hosts, "api.example.com", "d"),
            None,
            "it is not to be seen from there"
        );
        hosts.remove(&entries[2]);
        assert_eq!(hosts.by_name.len(), 0);
    }

    #[test]
    fn a_wildcard_is_found_by_its_labels_and_the_longest_goes_first() {
        let mut hosts = Hosts::default();
        hosts.add(&service("a", "*.example.com", |_| {}));
        hosts.add(&service("b", "*.eu.example.com", |_| {}));
        let find = |name: &str| hosts.wildcard(name, "x").map(|service| &*service.hostname);
        assert_eq!(find("www.example.com"), Some("*.example.com"));
        assert_eq!(find("a.b.example.com"), Some("*.example.com"));
        assert_eq!(find("a.b.eu.example.com"), Some("*.eu.example.com"));
        for none in [
            "example.com",
            "com",
            "",
            ".example.com",
            "example.org",
            "wwwexample.com",
        ] {
            assert_eq!(find(none), None, "{none}");
        }
    }
}
