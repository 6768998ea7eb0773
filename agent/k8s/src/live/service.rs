//! What services are made of beside Services: EndpointSlices, ServiceEntries and Gateways.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_yaml_ng::Value;

use super::workload::{Condition, Endpoint, is_true};
use crate::{Metadata, meta::null_is_empty};

/// Endpoints of a Service.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// The label `kubernetes.io/service-name` says of which Service.
    pub metadata: Metadata,
    /// `IPv4`, `IPv6` or `FQDN`.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub address_type: String,
    /// The endpoints.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub endpoints: Vec<SliceEndpoint>,
    /// What they listen on, by the name of the service's port.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub ports: Vec<SlicePort>,
}

/// An endpoint of a slice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Its address; the others, if any, are the same endpoint's.
    #[serde(deserialize_with = "null_is_empty")]
    pub addresses: Vec<String>,
    /// How it is.
    #[serde(deserialize_with = "null_is_empty")]
    pub conditions: SliceConditions,
    /// The pod, where it is one.
    pub target_ref: Option<TargetRef>,
    /// The node, where it is known.
    pub node_name: Option<String>,
    /// The zone, where it is known.
    pub zone: Option<String>,
}

/// How an endpoint of a slice is. What is not said is taken to be so.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SliceConditions {
    /// New connections may go there.
    pub ready: Option<bool>,
    /// It answers, though it may be on its way out.
    pub serving: Option<bool>,
    /// It is on its way out.
    pub terminating: Option<bool>,
}

/// An object that an endpoint stands for.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct TargetRef {
    /// Such as `Pod`.
    pub kind: String,
    /// Its namespace; empty for the slice's.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// A port of a slice.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct SlicePort {
    /// The name of the service's port; empty for the only one.
    #[serde(deserialize_with = "null_is_empty")]
    pub name: String,
    /// The number; none: every port.
    pub port: Option<u16>,
    /// `TCP` where nothing is said.
    pub protocol: Option<String>,
}

/// Services that Kubernetes knows nothing of.
/// <https://istio.io/latest/docs/reference/config/networking/service-entry/>
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct ServiceEntry {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What it says.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub spec: ServiceEntrySpec,
    /// The addresses that were allotted.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub status: ServiceEntryStatus,
}

/// What a ServiceEntry says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ServiceEntrySpec {
    /// The names, each a service.
    #[serde(deserialize_with = "null_is_empty")]
    pub hosts: Vec<String>,
    /// Virtual addresses or ranges of them.
    #[serde(deserialize_with = "null_is_empty")]
    pub addresses: Vec<String>,
    /// The ports.
    #[serde(deserialize_with = "null_is_empty")]
    pub ports: Vec<EntryPort>,
    /// `MESH_EXTERNAL` (the default) or `MESH_INTERNAL`.
    pub location: Option<String>,
    /// `NONE` (the default), `STATIC`, `DNS`, `DNS_ROUND_ROBIN` or `DYNAMIC_DNS`.
    pub resolution: Option<String>,
    /// Who is behind it.
    #[serde(deserialize_with = "null_is_empty")]
    pub endpoints: Vec<Endpoint>,
    /// Or: the pods and WorkloadEntries behind it.
    pub workload_selector: Option<EntrySelector>,
    /// Who sees it.
    #[serde(deserialize_with = "null_is_empty")]
    pub export_to: Vec<String>,
    /// What certificates of its endpoints may say.
    #[serde(deserialize_with = "null_is_empty")]
    pub subject_alt_names: Vec<String>,
}

/// Labels that must all be there; none select nothing.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct EntrySelector {
    /// Of which each must be there with this value.
    #[serde(deserialize_with = "null_is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A port of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EntryPort {
    /// The port of the service.
    pub number: u16,
    /// Such as `HTTP`.
    pub protocol: String,
    /// Its name, by which endpoints say their own.
    pub name: String,
    /// The endpoints' port; the same where nothing is said.
    pub target_port: Option<u16>,
}

/// What became of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ServiceEntryStatus {
    /// The addresses that were allotted, host by host.
    #[serde(deserialize_with = "null_is_empty")]
    pub addresses: Vec<AllottedAddress>,
}

/// An address that was allotted to a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AllottedAddress {
    /// The address.
    pub value: String,
    /// The host it is for; every one where nothing is said.
    pub host: Option<String>,
}

/// A Gateway (Gateway API): here, a waypoint.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Gateway {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What it says.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub spec: GatewaySpec,
    /// What became of it.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub status: GatewayStatus,
}

/// A GatewayClass: what holds for its Gateways, unless they say otherwise.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct GatewayClass {
    /// Name, labels, annotations.
    pub metadata: Metadata,
}

/// What a Gateway says.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GatewaySpec {
    /// Such as `istio-waypoint`.
    pub gateway_class_name: String,
    /// The ports it listens on.
    #[serde(deserialize_with = "null_is_empty")]
    pub listeners: Vec<Listener>,
}

/// A listener of a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Listener {
    /// Its name.
    pub name: String,
    /// Its port.
    pub port: u16,
    /// Such as `HBONE`.
    pub protocol: String,
    /// Who may attach.
    pub allowed_routes: Option<AllowedRoutes>,
}

/// Who may attach to a listener.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AllowedRoutes {
    /// By namespace.
    pub namespaces: Option<AllowedNamespaces>,
}

/// The namespaces that may attach.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct AllowedNamespaces {
    /// `All`, `Same` (the default), `Selector` or `None`.
    pub from: Option<String>,
    /// With `Selector`: by the namespace's labels.
    pub selector: Option<LabelSelector>,
}

/// Kubernetes' `LabelSelector`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Of which each must be there with this value.
    #[serde(deserialize_with = "null_is_empty")]
    pub match_labels: BTreeMap<String, String>,
    /// Further conditions, as they are written.
    #[serde(deserialize_with = "null_is_empty")]
    pub match_expressions: Vec<Value>,
}

/// What became of a Gateway.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GatewayStatus {
    /// Where it is reached.
    #[serde(deserialize_with = "null_is_empty")]
    pub addresses: Vec<GatewayStatusAddress>,
    /// Such as `Programmed`.
    #[serde(deserialize_with = "null_is_empty")]
    pub conditions: Vec<Condition>,
}

/// Where a Gateway is reached.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct GatewayStatusAddress {
    /// `IPAddress` (the default) or `Hostname`.
    #[serde(rename = "type")]
    pub type_: Option<String>,
    /// The address.
    pub value: String,
}

impl Gateway {
    /// Whether what it asks for is there.
    pub fn is_programmed(&self) -> bool {
        is_true(&self.status.conditions, "Programmed")
    }

    /// The listener that tunnels come in by, if it is a waypoint.
    pub fn hbone_listener(&self) -> Option<&Listener> {
        self.spec.listeners.iter().find(|listener| listener.protocol == "HBONE")
    }
}
