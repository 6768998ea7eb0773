//! What holds for the whole mesh where nothing narrower says otherwise.

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
}
