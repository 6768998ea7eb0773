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
}

/// An address of a pod, as the CNI result has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct PodIp {
    /// With or without a prefix length: `10.0.0.7/24`.
    pub address: String,
}

impl PodIp {
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
    /// Why it is not captured, where it should be.
    pub problem: Option<String>,
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
