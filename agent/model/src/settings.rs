//! What holds for the whole mesh where nothing narrower says otherwise.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::TrustDomain;

/// What becomes of a captured pod's traffic that is not TCP, which the mesh does not carry.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum NonTcp {
    /// As the mesh says; where the mesh says nothing, it passes.
    #[default]
    Inherit,
    /// It passes as it is, unencrypted.
    Pass,
    /// It is dropped and counted. ARP and neighbour discovery pass: without them there is no network.
    Forbid,
}

impl NonTcp {
    /// Whether it is dropped, given what the mesh says.
    pub fn is_forbidden(self, mesh: NonTcp) -> bool {
        match self {
            Self::Inherit => mesh == Self::Forbid,
            Self::Pass => false,
            Self::Forbid => true,
        }
    }
}

/// Where pods may go that the mesh's registry (its workloads, services and ServiceEntries) does not name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum OutboundMode {
    /// Anywhere, as it is.
    #[default]
    #[serde(rename = "ALLOW_ANY")]
    AllowAny,
    /// Nowhere.
    #[serde(rename = "REGISTRY_ONLY")]
    RegistryOnly,
}

/// The mesh's `outboundTrafficPolicy`, with what `Sidecar`s say of their namespaces.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct OutboundTrafficPolicy {
    /// For every namespace that is not named.
    pub mode: OutboundMode,
    /// Namespaces that have one of their own.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub namespaces: BTreeMap<Arc<str>, OutboundMode>,
}

impl OutboundTrafficPolicy {
    /// What holds for the pods of a namespace.
    pub fn of(&self, namespace: &str) -> OutboundMode {
        self.namespaces.get(namespace).copied().unwrap_or(self.mode)
    }
}

/// The settings of the mesh.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MeshSettings {
    /// Peers of any other trust domain are refused.
    #[serde(default)]
    pub trust_domain: TrustDomain,
    /// What becomes of traffic that is not TCP.
    #[serde(default)]
    pub non_tcp: NonTcp,
    /// Where pods may go that the mesh does not know. Under a control plane the node agent asks the Kubernetes API for
    /// it, since the workload API does not carry it.
    #[serde(default)]
    pub outbound_traffic_policy: OutboundTrafficPolicy,
}
