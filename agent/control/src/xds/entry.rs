//! A resource as the cache keeps it: encoded once, with a version made of what it says.
//!
//! The version is a part of SHA-256 over name, aliases and message, so two replicas with the same content give the same
//! versions (`the_version_says_what_the_resource_is`), and a client that goes from one to the other is sent only what
//! differs. 96 bits: what a collision would give, one's own resource staying as it was at agents that reconnect, is not
//! worth the search.

use std::{collections::BTreeMap, fmt, sync::Arc};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use proto::{
    Message,
    discovery::{self, DeltaDiscoveryResponse},
    prost_types::Any,
    security::Scope,
    workload,
};

use super::View;
use crate::resources::{Resource, Type};

/// What a resource says, in sixteen characters.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version([u8; 16]);

impl Version {
    fn of(resource: &Resource) -> Self {
        let mut context = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
        let mut part = |bytes: &[u8]| {
            context.update(&(bytes.len() as u64).to_le_bytes());
            context.update(bytes);
        };
        part(resource.name.as_bytes());
        resource.aliases.iter().for_each(|alias| part(alias.as_bytes()));
        part(&resource.message);
        let digest = context.finish();
        let mut text = [0; 16];
        URL_SAFE_NO_PAD
            .encode_slice(&digest.as_ref()[..12], &mut text)
            .expect("twelve bytes are sixteen characters");
        Self(text)
    }

    /// As on the wire.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{}", *byte as char))
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A resource of the cache.
#[derive(Debug)]
pub struct Entry {
    /// Its name.
    pub name: Arc<str>,
    /// Its other names.
    pub aliases: Box<[Arc<str>]>,
    /// The names of the services that this workload is an endpoint of.
    pub services: Box<[Arc<str>]>,
    /// What it says.
    pub version: Version,
    /// It is an `Address` of a workload, not of a service.
    workload: bool,
    /// A policy that holds only for workloads that name it.
    pub(super) named: bool,
    /// The field of a response that carries it.
    wire: Bytes,
}

impl Entry {
    pub(super) fn new(resource: &Resource) -> Self {
        let version = Version::of(resource);
        let workload = match resource.type_ {
            // What can't be read has no endpoints, and is sent all the same: it is the client's to reject.
            Type::Address => {
                Membership::decode(resource.message.clone())
                    .unwrap_or_default()
                    .workload
            }
            Type::Authorization => None,
        };
        let named = resource.type_ == Type::Authorization
            && Scoped::decode(resource.message.clone()).unwrap_or_default().scope() == Scope::WorkloadSelector;
        let message = Any {
            type_url: resource.type_.url().to_owned(),
            value: resource.message.to_vec(),
        };
        Self {
            name: Arc::clone(&resource.name),
            aliases: resource.aliases.clone().into(),
            version,
            workload: workload.is_some(),
            named,
            services: workload
                .map(|workload| workload.services.into_keys().map(Arc::from).collect())
                .unwrap_or_default(),
            wire: field(discovery::Resource {
                name: resource.name.to_string(),
                aliases: resource.aliases.iter().map(|alias| alias.to_string()).collect(),
                version: version.to_string(),
                resource: Some(message),
            }),
        }
    }

    /// Whether subscribers of this view are shown it.
    pub(super) fn is_seen_in(&self, view: View) -> bool {
        view != View::Workload || self.workload
    }

    /// The field `resources` of a response.
    pub(super) fn wire(&self, view: View) -> Bytes {
        match view {
            View::Address | View::Authorization => self.wire.clone(),
            View::Workload => self.workload_wire().unwrap_or_default(),
        }
    }

    /// The workload out of its `Address`. Few ask for this view, so it is made on the way and not kept.
    fn workload_wire(&self) -> Option<Bytes> {
        let mut response = DeltaDiscoveryResponse::decode(self.wire.clone()).ok()?;
        let mut resource = response.resources.pop()?;
        let message = resource.resource.as_mut()?;
        let address = workload::Address::decode(message.value.as_slice()).ok()?;
        let Some(workload::address::Type::Workload(workload)) = address.r#type else {
            return None;
        };
        message.type_url = View::Workload.url().to_owned();
        message.value = workload.encode_to_vec();
        Some(field(resource))
    }
}

/// The resource as a field of a response: responses are made by writing such fields one after the other.
fn field(resource: discovery::Resource) -> Bytes {
    DeltaDiscoveryResponse {
        resources: vec![resource],
        ..Default::default()
    }
    .encode_to_vec()
    .into()
}

/// As much of an `Authorization` as says for whom it holds.
#[derive(Clone, PartialEq, prost::Message)]
struct Scoped {
    #[prost(enumeration = "Scope", tag = "3")]
    scope: i32,
}

/// As much of an `Address` as says whose endpoint it is; the rest is skipped.
#[derive(Clone, PartialEq, prost::Message)]
struct Membership {
    #[prost(message, optional, tag = "1")]
    workload: Option<Endpoint>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Endpoint {
    #[prost(btree_map = "string, message", tag = "22")]
    services: BTreeMap<String, Ports>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Ports {}

#[cfg(test)]
mod tests {
    use super::super::testing::{policy, scoped, service, workload};
    use super::*;

    #[test]
    fn the_version_says_what_the_resource_is() {
        let version = |resource: &Resource| Entry::new(resource).version;
        let one = workload("a", "10.0.0.1", &["ns/s"], 0);
        assert_eq!(version(&one), version(&one.clone()));
        let mut other = one.clone();
        other.aliases.clear();
        let differing = [
            version(&one),
            version(&other),
            version(&workload("a", "10.0.0.1", &["ns/s"], 1)),
            version(&workload("b", "10.0.0.1", &["ns/s"], 0)),
        ];
        for (at, one) in differing.iter().enumerate() {
            assert!(!differing[at + 1..].contains(one), "{differing:?}");
        }
    }

    #[test]
    fn an_entry_is_a_field_of_a_response() {
        let resource = workload("a", "10.0.0.1", &["ns/s", "ns/t"], 0);
        let entry = Entry::new(&resource);
        assert_eq!(&*entry.services, &["ns/s".into(), "ns/t".into()]);
        let sent = DeltaDiscoveryResponse::decode(entry.wire(View::Address)).unwrap();
        let [sent] = &sent.resources[..] else {
            panic!("{sent:?}")
        };
        assert_eq!((&*sent.name, sent.version.as_bytes()), ("a", entry.version.as_bytes()));
        assert_eq!(sent.aliases, ["/10.0.0.1"]);
        let any = sent.resource.as_ref().unwrap();
        assert_eq!(
            (any.type_url.as_str(), &any.value),
            (proto::ADDRESS_TYPE, &resource.message.to_vec())
        );
    }

    #[test]
    fn the_workload_view_shows_workloads_only() {
        let entry = Entry::new(&workload("a", "10.0.0.1", &[], 3));
        assert!(entry.is_seen_in(View::Workload));
        let sent = DeltaDiscoveryResponse::decode(entry.wire(View::Workload)).unwrap();
        let any = sent.resources[0].resource.as_ref().unwrap();
        assert_eq!(any.type_url, "type.googleapis.com/istio.workload.Workload");
        let shown = proto::workload::Workload::decode(any.value.as_slice()).unwrap();
        assert_eq!((shown.uid.as_str(), shown.name.as_str()), ("a", "3"));
        assert!(!Entry::new(&service("ns/s", "10.1.0.1", 0)).is_seen_in(View::Workload));
        assert!(Entry::new(&policy("ns/p", 0)).is_seen_in(View::Authorization));
    }

    #[test]
    fn a_policy_says_whether_workloads_name_it() {
        for scope in [Scope::Global, Scope::Namespace, Scope::WorkloadSelector] {
            let entry = Entry::new(&scoped("ns/p", scope, 0));
            assert_eq!(entry.named, scope == Scope::WorkloadSelector);
        }
        assert!(!Entry::new(&workload("a", "10.0.0.1", &[], 0)).named);
    }

    #[test]
    fn a_message_that_cannot_be_read_is_sent_as_it_is() {
        let mut resource = workload("a", "10.0.0.1", &[], 0);
        resource.message = Bytes::from_static(&[0xff, 0xff]);
        let entry = Entry::new(&resource);
        assert!(entry.services.is_empty() && entry.wire(View::Workload).is_empty());
        assert!(DeltaDiscoveryResponse::decode(entry.wire(View::Address)).is_ok());
    }
}
