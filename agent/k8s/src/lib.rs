//! Kubernetes and Istio objects to model values; pure.
//!
//! ```text
//! text ─ parse ─> Objects (typed, checked) ─ translate(where everything runs) ─> Mesh (model values)
//!          └────────────────── Finding … ──────────────────┘  what was not taken, and why
//! ```
//! [`live`] reads single objects as the API has them, for the control plane's index and for admission.
//!
//! Knows nothing of files, of an API server, or of how pods are run: addresses and nodes are arguments.
//!
//! Invariants:
//! - Nothing is dropped in silence: what does not take effect in full is a [`Finding`] that names the object and the
//!   field (`every_refused_object_is_named`).
//! - A bad object never spoils another (`a_bad_document_spoils_no_other`), and no text panics (`arbitrary_text_never_panics`).
//! - What a security policy says and this crate cannot express closes, it never opens: the workloads concerned name
//!   a policy that is not there, which the verdict treats as a denial (`an_unreadable_policy_closes_its_workloads`).
//!
//! The conversion is that of istiod for ztunnel (`pilot/pkg/serviceregistry/ambient`), with these deviations: a DENY
//! whose HTTP fields are dropped still fires; a PeerAuthentication becomes a policy of its own, so that a denial names
//! the object that a person wrote.

mod authorization_policy;
mod authorization_rules;
mod capture;
mod enablement;
mod finding;
pub mod live;
mod meta;
mod parse;
mod peer_authentication;
mod pod;
mod probe;
mod service;
mod translate;

pub use authorization_policy::{AuthorizationPolicy, TargetRef, closing};
pub use capture::{
    BYPASS_INBOUND, EXCLUDE_INBOUND_PORTS, PERMISSION as EXCLUSIONS_PERMISSION, Permission as ExclusionsPermission,
    capture_of,
};
pub use enablement::{EXCLUDED_NAMESPACES, Enablement, enablement, enablement_of, non_tcp_of};
pub use finding::{Effect, Finding, ObjectRef, Place, Problem, Shared};
pub use live::validate;
pub use meta::{IntOrString, Metadata, OwnerReference, Selector};
pub(crate) use parse::deserialize;
pub use parse::{Objects, documents, parse};
pub use peer_authentication::{MutualTls, PeerAuthentication, PeerAuthentications, TlsMode};
pub use pod::{
    Container, ContainerPort, EnvVar, EnvVarSource, FieldRef, Pod, PodSpec, RestartPolicy, SecurityContext, expand,
};
pub use probe::{Exec, HttpGet, HttpHeader, Probe, TcpSocket};
pub use service::{IpFamily, Service, ServicePort, ServiceSpec};
pub use translate::{Context, Mesh, PodPlace, translate};

/// A namespace: its labels are what enrols its pods.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Namespace {
    /// Name, labels, annotations.
    pub metadata: Metadata,
}

/// A service account: half of an identity.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct ServiceAccount {
    /// Name and namespace.
    pub metadata: Metadata,
}

/// The namespace whose policies hold for the mesh, where nothing else is said.
pub const ROOT_NAMESPACE: &str = "istio-system";
