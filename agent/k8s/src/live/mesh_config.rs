//! The mesh configuration: YAML under the key `mesh` of the ConfigMap `istio` in the root namespace.
//!
//! <https://istio.io/latest/docs/reference/config/istio.mesh.v1alpha1/>. Most of it is for sidecars; what has no meaning
//! here is named in a finding. Its `outboundTrafficPolicy`, and that of a `Sidecar`, are for the node agents, which watch
//! both by themselves.

use model::OutboundMode;
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

impl OutboundTrafficPolicy {
    fn read(&self) -> Result<Option<OutboundMode>, String> {
        match self.mode.as_deref() {
            None => Ok(None),
            Some("ALLOW_ANY") => Ok(Some(OutboundMode::AllowAny)),
            Some("REGISTRY_ONLY") => Ok(Some(OutboundMode::RegistryOnly)),
            Some(other) => Err(format!("{other:?} is neither ALLOW_ANY nor REGISTRY_ONLY")),
        }
    }
}

/// A Sidecar, as far as it has a meaning without sidecars: where the pods of its namespace may go.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Sidecar {
    workload_selector: Option<serde_json::Value>,
    outbound_traffic_policy: Option<OutboundTrafficPolicy>,
    egress: Option<serde_json::Value>,
    ingress: Option<serde_json::Value>,
}

impl Sidecar {
    /// From its `spec`.
    pub fn read(spec: &serde_json::Value) -> Result<Self, String> {
        Self::deserialize(spec).map_err(|error| error.to_string())
    }

    /// Whether it is for its whole namespace.
    pub fn is_for_namespace(&self) -> bool {
        let selector = self
            .workload_selector
            .as_ref()
            .and_then(|selector| selector.get("labels"));
        selector
            .and_then(serde_json::Value::as_object)
            .is_none_or(serde_json::Map::is_empty)
    }

    /// Where pods may go, if it says so.
    pub fn outbound(&self) -> Result<Option<OutboundMode>, String> {
        self.outbound_traffic_policy
            .as_ref()
            .map_or(Ok(None), OutboundTrafficPolicy::read)
    }

    /// What of it has no effect.
    pub fn not_acted_upon(&self) -> Option<&'static str> {
        if !self.is_for_namespace() {
            return Some(
                "spec.workloadSelector: only a Sidecar for a whole namespace has an effect; this one has none",
            );
        }
        (self.egress.is_some() || self.ingress.is_some())
            .then_some("spec.egress and spec.ingress are for sidecars; only outboundTrafficPolicy has an effect")
    }
}

impl MeshConfig {
    /// Where pods may go that the mesh does not know; what is not said is ALLOW_ANY, as in Istio.
    pub fn outbound(&self) -> Result<OutboundMode, String> {
        let mode = self
            .outbound_traffic_policy
            .as_ref()
            .map_or(Ok(None), OutboundTrafficPolicy::read)?;
        Ok(mode.unwrap_or_default())
    }

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
        if let Err(why) = config.outbound() {
            let problem = Problem::Invalid(format!("{why}; what held before stays in force"));
            self.find("data.mesh.outboundTrafficPolicy.mode", problem, Effect::Narrowed);
        }
        config.metadata = self.metadata();
        Some(config)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::live::{Kind, Object, read};

    fn outbound(mesh: &str) -> Option<Result<OutboundMode, String>> {
        let value = json!({"metadata": {"name": "istio"}, "data": {"mesh": mesh}});
        match read(Kind::ConfigMap, &value).object {
            Object::MeshConfig(config) => Some(config.outbound()),
            _ => None,
        }
    }

    #[test]
    fn where_pods_may_go_is_read_and_never_guessed() {
        use OutboundMode::{AllowAny, RegistryOnly};
        assert_eq!(outbound("trustDomain: td"), Some(Ok(AllowAny)));
        assert_eq!(outbound("outboundTrafficPolicy: {}"), Some(Ok(AllowAny)));
        let only = "outboundTrafficPolicy:\n  mode: REGISTRY_ONLY\n";
        assert_eq!(outbound(only), Some(Ok(RegistryOnly)));
        assert!(matches!(
            outbound("outboundTrafficPolicy: {mode: registry_only}"),
            Some(Err(_))
        ));
        assert_eq!(outbound("outboundTrafficPolicy: 7"), None);
        assert_eq!(outbound(": ["), None);
    }

    #[test]
    fn of_a_sidecar_the_namespaces_outbound_policy_counts() {
        let of = |spec| Sidecar::read(&spec).unwrap();
        let only = of(json!({"outboundTrafficPolicy": {"mode": "REGISTRY_ONLY"}}));
        assert_eq!(only.outbound(), Ok(Some(OutboundMode::RegistryOnly)));
        assert!(only.is_for_namespace() && only.not_acted_upon().is_none());
        assert_eq!(of(json!({})).outbound(), Ok(None));
        let some = of(json!({"workloadSelector": {"labels": {"app": "web"}}}));
        assert!(!some.is_for_namespace() && some.not_acted_upon().is_some());
        assert!(of(json!({"egress": [{"hosts": ["./*"]}]})).not_acted_upon().is_some());
        assert!(of(json!({"outboundTrafficPolicy": {"mode": "X"}})).outbound().is_err());
    }
}
