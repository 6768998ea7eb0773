//! The mesh configuration: YAML under the key `mesh` of the ConfigMap `istio` in the root namespace.
//!
//! <https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/>. Most of it is for sidecars; what has no meaning
//! here is named in a finding.

use serde::Deserialize;

use super::Reader;
use crate::{Effect, Metadata, Problem, deserialize, meta::null_is_empty};

/// The name of the ConfigMap.
const NAME: &str = "istio";

/// The mesh configuration, as far as it is acted upon.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshConfig {
    /// Of the ConfigMap.
    #[serde(skip)]
    pub metadata: Metadata,
    /// The domain of every identity; none: as the control plane was told.
    pub trust_domain: Option<String>,
    /// Domains whose identities count as the trust domain's.
    #[serde(deserialize_with = "null_is_empty")]
    pub trust_domain_aliases: Vec<String>,
    /// Where the policies for the mesh stand; none: as the control plane was told.
    pub root_namespace: Option<String>,
    outbound_traffic_policy: Option<OutboundTrafficPolicy>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
struct OutboundTrafficPolicy {
    mode: Option<String>,
}

impl MeshConfig {
    /// Whether a ConfigMap of this name is the mesh configuration (its namespace must be the root one, too).
    pub fn is_named(name: &str) -> bool {
        name == NAME
    }
}

impl Reader<'_> {
    pub(super) fn mesh_config(&mut self) -> Option<MeshConfig> {
        let text = self.value.get("data").and_then(|data| data.get("mesh"));
        let text = text.and_then(serde_json::Value::as_str).unwrap_or_default();
        let written = match serde_yaml_ng::from_str::<serde_yaml_ng::Value>(text) {
            Ok(serde_yaml_ng::Value::Null) => serde_yaml_ng::Value::Mapping(serde_yaml_ng::Mapping::new()),
            Ok(written) => written,
            Err(error) => {
                self.find("data.mesh", Problem::Syntax(error.to_string()), Effect::Refused);
                return None;
            }
        };
        let (mut config, unknown): (MeshConfig, _) = match deserialize(&written) {
            Ok(read) => read,
            Err((field, why)) => {
                self.find(&format!("data.mesh.{field}"), Problem::Invalid(why), Effect::Refused);
                return None;
            }
        };
        for field in unknown {
            self.find(&format!("data.mesh.{field}"), Problem::NotActedUpon, Effect::Note);
        }
        let outbound = config.outbound_traffic_policy.as_ref();
        if let Some(mode) = outbound.and_then(|policy| policy.mode.as_deref())
            && mode != "ALLOW_ANY"
        {
            let problem = Problem::Unsupported(format!("{mode} at L4; ALLOW_ANY holds"));
            self.find("data.mesh.outboundTrafficPolicy.mode", problem, Effect::Note);
        }
        config.metadata = self.metadata();
        Some(config)
    }
}
