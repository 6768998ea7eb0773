//! What is recomputed as one: a part of an object that gives at most one resource.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use k8s::{ObjectRef, live::Kind};
use model::NamespacedName;

/// An object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Source {
    pub kind: Kind,
    pub name: NamespacedName,
}

impl Source {
    pub fn object(&self) -> ObjectRef {
        self.kind.object(&self.name.namespace, &self.name.name)
    }
}

/// Which part of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum PartKind {
    /// A pod: a workload.
    Pod,
    /// A Service.
    Service,
    /// A WorkloadEntry: a workload.
    Entry,
    /// A host of a ServiceEntry: a service.
    Host,
    /// An endpoint of a ServiceEntry: a workload.
    Endpoint,
    /// An endpoint of an EndpointSlice that is no pod: a workload.
    SliceEndpoint,
    /// An AuthorizationPolicy: a policy.
    Policy,
    /// A PeerAuthentication: a policy.
    PeerAuthentication,
    /// A namespace: nothing but findings.
    Namespace,
}

impl PartKind {
    /// Whether it is somebody to talk to.
    pub const fn is_workload(self) -> bool {
        matches!(self, Self::Pod | Self::Entry | Self::Endpoint | Self::SliceEndpoint)
    }
}

/// A part of an object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Part {
    pub kind: PartKind,
    pub of: NamespacedName,
    /// Which, where there are several.
    pub index: u32,
}

impl Part {
    pub fn new(kind: PartKind, of: &NamespacedName) -> Self {
        Self::at(kind, of, 0)
    }

    pub fn at(kind: PartKind, of: &NamespacedName, index: usize) -> Self {
        Self {
            kind,
            of: of.clone(),
            index: u32::try_from(index).unwrap_or(u32::MAX),
        }
    }

    /// The object that it is of.
    pub fn source(&self) -> Source {
        let kind = match self.kind {
            PartKind::Pod => Kind::Pod,
            PartKind::Service => Kind::Service,
            PartKind::Entry => Kind::WorkloadEntry,
            PartKind::Host | PartKind::Endpoint => Kind::ServiceEntry,
            PartKind::SliceEndpoint => Kind::EndpointSlice,
            PartKind::Policy => Kind::AuthorizationPolicy,
            PartKind::PeerAuthentication => Kind::PeerAuthentication,
            PartKind::Namespace => Kind::Namespace,
        };
        Source {
            kind,
            name: self.of.clone(),
        }
    }

    /// Below every other part, for the beginning of a range.
    fn least() -> Self {
        Self {
            kind: PartKind::Pod,
            of: NamespacedName::new("", ""),
            index: 0,
        }
    }
}

/// An address or a block of them, in a network.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Address {
    pub network: Arc<str>,
    pub ip: IpAddr,
    pub length: u8,
}

impl Address {
    pub fn single(network: &Arc<str>, ip: IpAddr) -> Self {
        Self {
            network: network.clone(),
            ip,
            length: if ip.is_ipv4() { 32 } else { 128 },
        }
    }
}

/// Who claims what; of several claimants one wins.
#[derive(Debug)]
pub(super) struct Claims<K>(BTreeSet<(K, Part)>);

impl<K> Default for Claims<K> {
    fn default() -> Self {
        Self(BTreeSet::new())
    }
}

impl<K: Ord + Clone> Claims<K> {
    pub fn insert(&mut self, key: K, part: Part) {
        self.0.insert((key, part));
    }

    pub fn remove(&mut self, key: K, part: Part) {
        self.0.remove(&(key, part));
    }

    /// Those who claim it.
    pub fn of(&self, key: &K) -> impl Iterator<Item = &Part> + use<'_, K> {
        let key = key.clone();
        let range = self.0.range((key.clone(), Part::least())..);
        range.take_while(move |(other, _)| *other == key).map(|(_, part)| part)
    }
}

/// The entries of a namespace.
pub(super) fn within<'a, V>(
    map: &'a BTreeMap<NamespacedName, V>,
    namespace: &'a Arc<str>,
) -> impl Iterator<Item = (&'a NamespacedName, &'a V)> {
    let from = NamespacedName {
        namespace: namespace.clone(),
        name: "".into(),
    };
    map.range(from..)
        .take_while(move |(name, _)| name.namespace == *namespace)
}
