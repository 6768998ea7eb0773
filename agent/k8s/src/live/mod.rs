//! Objects as the Kubernetes API has them, to typed structs with just what the mesh needs; one object at a time.
//!
//! ```text
//! JSON ─ read(kind) ─> Read { object, findings }      every input gives an object: one that can't be read is
//!                                                     `Object::Unreadable`, and takes the place of what it was
//! ```
//! Knows nothing of watches, and of one object nothing of the others. Where [`crate::parse`] reads manifests (what is to
//! be), this reads what is: a pod's addresses and readiness, not its containers' commands. Kinds that are the same to
//! both have one type for both.
//!
//! Invariants: no JSON panics (`arbitrary_json_never_panics`); a security policy that can't be read, or has a field that
//! nobody knows, is never dropped: it closes what it may have selected (`an_unknown_field_closes_a_policy`).

mod mesh_config;
mod service;
mod workload;

use serde::de::DeserializeOwned;
use serde_json::Value;

pub use mesh_config::{MeshConfig, Sidecar};
pub use service::{
    AllottedAddress, AllowedNamespaces, AllowedRoutes, EndpointSlice, EntryPort, EntrySelector, Gateway, GatewayClass,
    GatewaySpec, GatewayStatus, GatewayStatusAddress, LabelSelector, Listener, ServiceEntry, ServiceEntrySpec,
    ServiceEntryStatus, SliceConditions, SliceEndpoint, SlicePort, TargetRef,
};
pub use workload::{
    Condition, ContainerPorts, Endpoint, Node, NodeAddress, NodeStatus, Pod, PodIp, PodSpec, PodStatus, WorkloadEntry,
    WorkloadKind,
};

use crate::{
    AuthorizationPolicy, Effect, Finding, Metadata, Namespace, ObjectRef, PeerAuthentication, Place, Problem,
    ROOT_NAMESPACE, Selector, Service, ServiceAccount, deserialize,
};

/// The kinds that are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `v1`
    Namespace,
    /// `v1`
    Node,
    /// `v1`
    Pod,
    /// `v1`
    Service,
    /// `v1`
    ServiceAccount,
    /// `v1`; only the mesh configuration is of interest.
    ConfigMap,
    /// `discovery.k8s.io`
    EndpointSlice,
    /// `networking.istio.io`
    ServiceEntry,
    /// `networking.istio.io`
    WorkloadEntry,
    /// `security.istio.io`
    PeerAuthentication,
    /// `security.istio.io`
    AuthorizationPolicy,
    /// `gateway.networking.k8s.io`
    Gateway,
    /// `gateway.networking.k8s.io`
    GatewayClass,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 13] = [
        Self::Namespace,
        Self::Node,
        Self::Pod,
        Self::Service,
        Self::ServiceAccount,
        Self::ConfigMap,
        Self::EndpointSlice,
        Self::ServiceEntry,
        Self::WorkloadEntry,
        Self::PeerAuthentication,
        Self::AuthorizationPolicy,
        Self::Gateway,
        Self::GatewayClass,
    ];

    /// Its name, such as `Pod`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::ServiceAccount => "ServiceAccount",
            Self::ConfigMap => "ConfigMap",
            Self::EndpointSlice => "EndpointSlice",
            Self::ServiceEntry => "ServiceEntry",
            Self::WorkloadEntry => "WorkloadEntry",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::Gateway => "Gateway",
            Self::GatewayClass => "GatewayClass",
        }
    }

    /// Its API group; empty for the core.
    pub const fn group(self) -> &'static str {
        match self {
            Self::Namespace | Self::Node | Self::Pod | Self::Service | Self::ServiceAccount | Self::ConfigMap => "",
            Self::EndpointSlice => "discovery.k8s.io",
            Self::ServiceEntry | Self::WorkloadEntry => "networking.istio.io",
            Self::PeerAuthentication | Self::AuthorizationPolicy => "security.istio.io",
            Self::Gateway | Self::GatewayClass => "gateway.networking.k8s.io",
        }
    }

    /// The kind of this name in this group (`security.istio.io`, or with a version as in `apiVersion`).
    pub fn find(group: &str, name: &str) -> Option<Self> {
        let group = match group.split_once('/') {
            Some((group, _)) => group,
            None if group == "v1" => "",
            None => group,
        };
        let mut all = Self::ALL.into_iter();
        all.find(|kind| kind.name() == name && kind.group() == group)
    }

    /// Whether its objects have a namespace.
    pub const fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::Node | Self::GatewayClass)
    }

    /// Whether what becomes of it is told by a condition in its status.
    pub const fn has_condition(self) -> bool {
        self.is_policy() || matches!(self, Self::ServiceEntry)
    }

    /// Whether an object of it that can't be read must close something.
    pub const fn is_policy(self) -> bool {
        matches!(self, Self::PeerAuthentication | Self::AuthorizationPolicy)
    }

    /// How findings name an object of this kind.
    pub fn object(self, namespace: &str, name: &str) -> ObjectRef {
        ObjectRef {
            kind: self.name().to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

/// An object.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "each is the type that it holds")]
pub enum Object {
    Namespace(Namespace),
    Node(Node),
    Pod(Pod),
    Service(Service),
    ServiceAccount(ServiceAccount),
    MeshConfig(MeshConfig),
    EndpointSlice(EndpointSlice),
    ServiceEntry(ServiceEntry),
    WorkloadEntry(WorkloadEntry),
    PeerAuthentication(PeerAuthentication),
    AuthorizationPolicy(AuthorizationPolicy),
    Gateway(Gateway),
    GatewayClass(GatewayClass),
    /// An object that is there and can't be read; its findings say why.
    Unreadable(Unreadable),
}

/// An object that can't be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Unreadable {
    /// Its kind.
    pub kind: Kind,
    /// As much of its metadata as can be read.
    pub metadata: Metadata,
    /// For a policy: whom it selects, if that much can be read; else everybody.
    pub selector: Selector,
}

/// What was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Read {
    /// The object.
    pub object: Object,
    /// What of it has no meaning here, or why it can't be read.
    pub findings: Vec<Finding>,
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Node(_) => Kind::Node,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::ServiceAccount(_) => Kind::ServiceAccount,
            Self::MeshConfig(_) => Kind::ConfigMap,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::ServiceEntry(_) => Kind::ServiceEntry,
            Self::WorkloadEntry(_) => Kind::WorkloadEntry,
            Self::PeerAuthentication(_) => Kind::PeerAuthentication,
            Self::AuthorizationPolicy(_) => Kind::AuthorizationPolicy,
            Self::Gateway(_) => Kind::Gateway,
            Self::GatewayClass(_) => Kind::GatewayClass,
            Self::Unreadable(unreadable) => unreadable.kind,
        }
    }

    /// Its name, namespace, labels.
    pub fn metadata(&self) -> &Metadata {
        match self {
            Self::Namespace(object) => &object.metadata,
            Self::Node(object) => &object.metadata,
            Self::Pod(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::ServiceAccount(object) => &object.metadata,
            Self::MeshConfig(object) => &object.metadata,
            Self::EndpointSlice(object) => &object.metadata,
            Self::ServiceEntry(object) => &object.metadata,
            Self::WorkloadEntry(object) => &object.metadata,
            Self::PeerAuthentication(object) => &object.metadata,
            Self::AuthorizationPolicy(object) => &object.metadata,
            Self::Gateway(object) => &object.metadata,
            Self::GatewayClass(object) => &object.metadata,
            Self::Unreadable(object) => &object.metadata,
        }
    }

    /// How findings name it.
    pub fn reference(&self) -> ObjectRef {
        let metadata = self.metadata();
        self.kind().object(&metadata.namespace, &metadata.name)
    }
}

/// Reads an object of the API. What can't be read is [`Object::Unreadable`].
pub fn read(kind: Kind, value: &Value) -> Read {
    let mut reader = Reader {
        kind,
        value,
        findings: Vec::new(),
    };
    let object = match kind {
        Kind::Namespace => reader.lenient().map(Object::Namespace),
        Kind::Node => reader.lenient().map(Object::Node),
        Kind::Pod => reader.lenient().map(Object::Pod),
        Kind::Service => reader.lenient().map(Object::Service),
        Kind::ServiceAccount => reader.lenient().map(Object::ServiceAccount),
        Kind::ConfigMap => reader.mesh_config().map(Object::MeshConfig),
        Kind::EndpointSlice => reader.lenient().map(Object::EndpointSlice),
        Kind::ServiceEntry => reader.noting().map(Object::ServiceEntry),
        Kind::WorkloadEntry => reader.noting().map(Object::WorkloadEntry),
        Kind::PeerAuthentication => reader.strict().map(Object::PeerAuthentication),
        Kind::AuthorizationPolicy => reader.strict().map(Object::AuthorizationPolicy),
        Kind::Gateway => reader.lenient().map(Object::Gateway),
        Kind::GatewayClass => reader.lenient().map(Object::GatewayClass),
    };
    let object = object.unwrap_or_else(|| {
        Object::Unreadable(Unreadable {
            kind,
            metadata: reader.metadata(),
            selector: selector(value),
        })
    });
    Read {
        object,
        findings: reader.findings,
    }
}

/// What is wrong with an object by itself: for admission, which refuses [`Effect::Refused`] and [`Effect::Closed`].
pub fn validate(kind: Kind, value: &Value) -> Vec<Finding> {
    let Read { object, mut findings } = read(kind, value);
    match &object {
        Object::AuthorizationPolicy(policy) => findings.extend(policy.l4(ROOT_NAMESPACE).1),
        Object::Service(service) => {
            let find = |(field, problem)| {
                let condition = (field, problem, Effect::Refused);
                Finding::of(object.reference(), &Place::default(), condition)
            };
            findings.extend(service.check().err().map(find));
        }
        _ => {}
    }
    findings
}

/// Whom an unreadable policy selects, if that much of it can be read; else everybody.
fn selector(value: &Value) -> Selector {
    let written = value.get("spec").and_then(|spec| spec.get("selector"));
    written
        .and_then(|selector| serde::Deserialize::deserialize(selector).ok())
        .unwrap_or_default()
}

struct Reader<'a> {
    kind: Kind,
    value: &'a Value,
    findings: Vec<Finding>,
}

impl Reader<'_> {
    /// Name and namespace, and the rest of the metadata if it can be read.
    fn metadata(&self) -> Metadata {
        let written = self.value.get("metadata");
        let read = written.and_then(|metadata| serde::Deserialize::deserialize(metadata).ok());
        read.unwrap_or_else(|| {
            let text = |field: &str| {
                let found = written.and_then(|metadata| metadata.get(field)).and_then(Value::as_str);
                found.unwrap_or_default().to_owned()
            };
            Metadata {
                name: text("name"),
                namespace: text("namespace"),
                ..Metadata::default()
            }
        })
    }

    /// Everything that the mesh does not need is the business of others.
    fn lenient<T: DeserializeOwned>(&mut self) -> Option<T> {
        self.typed().map(|(read, _)| read)
    }

    /// What is not acted upon is noted: the kind is the mesh's own.
    fn noting<T: DeserializeOwned>(&mut self) -> Option<T> {
        let (read, unknown) = self.typed()?;
        for field in unknown {
            self.find(&field, Problem::NotActedUpon, Effect::Note);
        }
        Some(read)
    }

    /// An unknown field may be what makes a policy strict, so it must be understood as a whole.
    fn strict<T: DeserializeOwned>(&mut self) -> Option<T> {
        let (read, unknown) = self.typed()?;
        match unknown.into_iter().next() {
            None => Some(read),
            Some(field) => {
                let problem = Problem::Invalid("no such field".to_owned());
                self.find(&field, problem, self.unreadable());
                None
            }
        }
    }

    fn typed<T: DeserializeOwned>(&mut self) -> Option<(T, Vec<String>)> {
        match deserialize(self.value) {
            Ok(read) => Some(read),
            Err((field, why)) => {
                self.find(&field, Problem::Invalid(why), self.unreadable());
                None
            }
        }
    }

    /// What follows when the object can't be read: a policy closes, unless it was only to say what it would do.
    fn unreadable(&self) -> Effect {
        let rehearsed = self.kind == Kind::AuthorizationPolicy && self.metadata().is_dry_run();
        match self.kind.is_policy() && !rehearsed {
            true => Effect::Closed,
            false => Effect::Refused,
        }
    }

    fn find(&mut self, field: &str, problem: Problem, effect: Effect) {
        let Metadata { name, namespace, .. } = self.metadata();
        self.findings.push(Finding {
            place: Place::default(),
            object: self.kind.object(&namespace, &name),
            field: if field == "." { String::new() } else { field.to_owned() },
            problem,
            effect,
        });
    }
}
