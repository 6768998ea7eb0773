//! What is told, as JSON.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// A pod's network namespace is there; its containers are about to start. Istio's form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodAdded {
    /// The path of its network namespace.
    pub netns: PathBuf,
    /// Its name.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
    /// Its addresses.
    #[serde(rename = "IPs")]
    pub ips: Vec<PodIp>,
    /// The sandbox's id as the container runtime has it; ours, Istio's plugin does not send it.
    #[serde(default, rename = "ContainerID", skip_serializing_if = "String::is_empty")]
    pub container_id: String,
    /// The pod's uid in the API, where the runtime says it; ours, too.
    #[serde(default, rename = "PodUID", skip_serializing_if = "String::is_empty")]
    pub pod_uid: String,
}

/// An address of a pod, as the CNI result has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodIp {
    /// With or without a prefix length: `10.0.0.7/24`.
    pub address: String,
    /// Which of the result's interfaces; not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<u32>,
    /// Not used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

impl PodIp {
    /// An address and nothing else.
    pub fn new(address: impl Into<String>) -> Self {
        Self {
            address: address.into(),
            interface: None,
            gateway: None,
        }
    }

    /// The address without the prefix length.
    pub fn ip(&self) -> Result<IpAddr, String> {
        let text = self.address.split('/').next().unwrap_or_default();
        text.parse()
            .map_err(|_| format!("{:?} is not an address", self.address))
    }
}

/// A pod is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodRemoved {
    /// Its name.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
    /// The sandbox that is gone. A pod of this name with another one is its successor, and stays. Empty: any.
    #[serde(default, rename = "ContainerID", skip_serializing_if = "String::is_empty")]
    pub container_id: String,
}

/// Whether a pod is as it should be (CNI's CHECK).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodChecked {
    /// Its name.
    pub pod_name: String,
    /// Its namespace.
    pub pod_namespace: String,
}

/// The sandboxes that there are (CNI's GC): pods of other ones are gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ValidAttachments {
    /// Their ids.
    #[serde(rename = "ContainerIDs")]
    pub container_ids: Vec<String>,
}

/// What a node agent is and does.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// The agent's version.
    pub version: String,
    /// The node's name.
    pub node: String,
    /// The agent's process id.
    pub pid: u32,
    /// Seconds since the agent started.
    pub uptime_seconds: u64,
    /// Empty when ready; else what is pending.
    pub pending: Vec<String>,
    /// How traffic is captured.
    pub capture: CaptureStatus,
    /// What is known of the mesh.
    pub knowledge: KnowledgeStatus,
    /// Every identity that a certificate is kept or wanted for.
    pub certificates: Vec<IdentityStatus>,
    /// Every pod that the agent was told of.
    pub pods: Vec<PodStatus>,
    /// What the hooks in the kernel did on this node since they were pinned, by reason.
    pub counters: BTreeMap<String, u64>,
    /// Connections by what became of them, since the start.
    pub connections: BTreeMap<String, u64>,
    /// Access-log lines that were dropped because the output was too slow.
    pub access_log_dropped: u64,
}

/// How traffic is captured on this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CaptureStatus {
    /// `ebpf` or `iptables`.
    pub mode: String,
    /// Why that one.
    pub why: String,
    /// What the kernel offers.
    pub capabilities: Vec<CapabilityStatus>,
}

/// One feature of the kernel that capture uses.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CapabilityStatus {
    /// Its name.
    pub name: String,
    /// Whether it is there.
    pub available: bool,
    /// What is missing and what follows, where it is not.
    pub detail: String,
}

/// What is known of the mesh.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct KnowledgeStatus {
    /// Counts the changes; 0 before anything is known.
    pub generation: u64,
    /// How many workloads are known.
    pub workloads: usize,
    /// What could not be taken over, and why.
    pub rejected: Vec<String>,
    /// Where it comes from.
    pub source: SourceStatus,
}

/// Where knowledge of the mesh comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SourceStatus {
    /// `static` or `xds`.
    pub kind: String,
    /// The file, or the addresses of the control plane.
    pub address: String,
    /// Whether it is there now: a control plane's connection stands.
    pub connected: bool,
    /// Since when that is so, in seconds since 1970; 0 where unknown.
    pub since: u64,
    /// Whether everything that was subscribed has come at least once since the agent started.
    pub synced: bool,
    /// Resources held from it.
    pub resources: usize,
    /// Why it was not there when it last was not.
    pub last_error: Option<String>,
    /// The Kubernetes API that the node's own pods are learnt from, where there is one.
    pub pods_from: Option<PodSourceStatus>,
}

/// The Kubernetes API, as the source of the node's own pods.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSourceStatus {
    /// Whether pods and namespaces are known in full.
    pub synced: bool,
    /// Pods of this node.
    pub pods: usize,
    /// Why it could not be watched when it last could not.
    pub last_error: Option<String>,
}

/// The certificate of an identity.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IdentityStatus {
    /// Whose.
    pub identity: String,
    /// What is held.
    pub certificate: Option<CertificateStatus>,
    /// When the next is fetched, in seconds since 1970.
    pub next_fetch: u64,
    /// Why the last fetch failed, until one succeeds.
    pub last_error: Option<String>,
}

/// A pod of the node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether its traffic is captured now.
    pub captured: bool,
    /// Why it is not captured, where it should be or asks to be; where it is, what of its annotations is not done.
    pub problem: Option<String>,
    /// What the pod's annotation `ambient.istio.io/redirection` says as far as this agent wrote it: `enabled`, `pending`, or
    /// nothing.
    pub redirection: Option<String>,
    /// Its identity, where it is in the mesh.
    pub identity: Option<String>,
    /// Its certificate, once there is one.
    pub certificate: Option<CertificateStatus>,
    /// What the hooks in the kernel did with its traffic, by reason; what was dropped among it.
    pub counters: BTreeMap<String, u64>,
}

/// A certificate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CertificateStatus {
    /// Its serial number.
    pub serial: String,
    /// When it ends, in seconds since 1970.
    pub not_after: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_cni_event_is_read() {
        let event: PodAdded = serde_json::from_str(
            r#"{"Netns":"/var/run/netns/x","PodName":"web","PodNamespace":"shop",
                "IPs":[{"Interface":2,"Address":"10.0.0.7/24","Gateway":"10.0.0.1"}]}"#,
        )
        .unwrap();
        assert_eq!(event.ips[0].ip(), Ok("10.0.0.7".parse().unwrap()));
    }
}
