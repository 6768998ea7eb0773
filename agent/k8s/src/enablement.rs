//! Who is in the mesh: Istio's enablement selector (`cni/pkg/util/enablement_selector.go`).

use model::NonTcp;

use crate::{Metadata, Pod};

const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
const NON_TCP: &str = "undercurrent.io/non-tcp-traffic";
/// Namespaces whose pods are never in the mesh where nobody says otherwise: it must not sit below what it runs on.
pub const EXCLUDED_NAMESPACES: [&str; 1] = ["kube-system"];

/// Whether a pod is in the mesh, and why not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Enablement {
    /// It is: its traffic is captured.
    Captured,
    /// Neither the pod nor its namespace asks for it, or the pod opts out.
    NotAsked,
    /// It has the node's network namespace, which is not its own to capture.
    HostNetwork,
    /// It has a sidecar.
    Sidecar,
    /// Its namespace is one that is never captured.
    ExcludedNamespace,
}

/// Whether a pod is in the mesh: its label over its namespace's, never with the host's network.
pub fn enablement(pod: &Pod, namespace: Option<&Metadata>) -> Enablement {
    enablement_of(&pod.metadata, pod.spec.host_network, namespace, &EXCLUDED_NAMESPACES)
}

/// Likewise, of what decides it: a pod's metadata and whose network it has; and which namespaces are excluded.
pub fn enablement_of(
    pod: &Metadata,
    host_network: bool,
    namespace: Option<&Metadata>,
    excluded: &[impl AsRef<str>],
) -> Enablement {
    let mode = |metadata: &Metadata| metadata.labels.get(DATAPLANE_MODE).cloned();
    let of_namespace = namespace.and_then(mode);
    let asked = match mode(pod).as_deref() {
        Some("ambient") => true,
        Some("none") => false,
        _ => of_namespace.as_deref() == Some("ambient"),
    };
    if !asked {
        Enablement::NotAsked
    } else if excluded.iter().any(|name| name.as_ref() == pod.namespace) {
        Enablement::ExcludedNamespace
    } else if host_network {
        Enablement::HostNetwork
    } else if pod.annotations.contains_key("sidecar.istio.io/status") {
        Enablement::Sidecar
    } else {
        Enablement::Captured
    }
}

/// What becomes of a pod's traffic that is not TCP: the pod's annotation over its namespace's; or the value that is
/// neither `pass` nor `forbid`, which forbids.
pub(crate) fn non_tcp(pod: &Pod, namespace: Option<&Metadata>) -> (NonTcp, Option<String>) {
    non_tcp_of(&pod.metadata, namespace)
}

/// Likewise, of a pod's metadata.
pub fn non_tcp_of(pod: &Metadata, namespace: Option<&Metadata>) -> (NonTcp, Option<String>) {
    let of_namespace = namespace.and_then(|metadata| metadata.annotations.get(NON_TCP));
    match pod.annotations.get(NON_TCP).or(of_namespace).map(String::as_str) {
        None => (NonTcp::Inherit, None),
        Some("pass") => (NonTcp::Pass, None),
        Some("forbid") => (NonTcp::Forbid, None),
        Some(other) => (NonTcp::Forbid, Some(other.to_owned())),
    }
}
