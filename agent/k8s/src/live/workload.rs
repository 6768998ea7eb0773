//! What runs: pods with their node, and WorkloadEntries, which are workloads outside Kubernetes.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::{ContainerPort, Metadata, meta::null_is_empty};

/// A pod as the API shows it: where it runs and how it is, not what it runs ([`crate::Pod`] has that).
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Pod {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// As far as the mesh is concerned.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub spec: PodSpec,
    /// How it is.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub status: PodStatus,
}

/// The part of a pod's `spec` that the mesh needs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The node that it runs on.
    #[serde(deserialize_with = "null_is_empty")]
    pub node_name: String,
    /// Whether it shares the node's addresses.
    #[serde(deserialize_with = "null_is_empty")]
    pub host_network: bool,
    /// Half of its identity; empty means `default`.
    #[serde(deserialize_with = "null_is_empty")]
    pub service_account_name: String,
    /// For their named ports.
    #[serde(deserialize_with = "null_is_empty")]
    pub containers: Vec<ContainerPorts>,
}

/// The ports of a container.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ContainerPorts {
    /// The ports that it is said to listen on.
    #[serde(deserialize_with = "null_is_empty")]
    pub ports: Vec<ContainerPort>,
}

/// How a pod is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// `Pending`, `Running`, `Succeeded`, `Failed` or `Unknown`.
    #[serde(deserialize_with = "null_is_empty")]
    pub phase: String,
    /// Its first address.
    #[serde(rename = "podIP", deserialize_with = "null_is_empty")]
    pub pod_ip: String,
    /// All of its addresses.
    #[serde(rename = "podIPs", deserialize_with = "null_is_empty")]
    pub pod_ips: Vec<PodIp>,
    /// Such as `Ready`.
    #[serde(deserialize_with = "null_is_empty")]
    pub conditions: Vec<Condition>,
}

/// An address of a pod.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct PodIp {
    /// The address.
    pub ip: String,
}

/// A condition in a status.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Condition {
    /// Such as `Ready`.
    #[serde(rename = "type")]
    pub type_: String,
    /// `True`, `False` or `Unknown`.
    pub status: String,
}

/// Whether the condition of this type is `True`.
pub(super) fn is_true(conditions: &[Condition], type_: &str) -> bool {
    let mut found = conditions.iter().filter(|condition| condition.type_ == type_);
    found.next().is_some_and(|condition| condition.status == "True")
}

impl Pod {
    /// The service account's name.
    pub fn service_account(&self) -> &str {
        match self.spec.service_account_name.as_str() {
            "" => "default",
            name => name,
        }
    }

    /// Whether it passes its readiness checks and is not on its way out.
    pub fn is_ready(&self) -> bool {
        is_true(&self.status.conditions, "Ready") && self.metadata.deletion_timestamp.is_none()
    }

    /// Whether it has run to its end; its address may be another's by now.
    pub fn has_ended(&self) -> bool {
        matches!(self.status.phase.as_str(), "Succeeded" | "Failed")
    }

    /// Its addresses as they are written.
    pub fn addresses(&self) -> impl Iterator<Item = &str> {
        let all = self.status.pod_ips.iter().map(|address| address.ip.as_str());
        let first = Some(self.status.pod_ip.as_str()).filter(|_| self.status.pod_ips.is_empty());
        all.chain(first).filter(|address| !address.is_empty())
    }

    /// The named TCP ports of its containers.
    pub fn named_ports(&self) -> impl Iterator<Item = (&str, u16)> {
        let ports = self.spec.containers.iter().flat_map(|container| &container.ports);
        let tcp = ports.filter(|port| port.protocol == "TCP");
        tcp.filter_map(|port| Some((port.name.as_deref()?, port.container_port)))
    }

    /// What made it: the Deployment, Job or CronJob, where there is one (`kubeutil.GetWorkloadMetaFromPod`).
    pub fn workload(&self) -> (WorkloadKind, &str) {
        let alone = (WorkloadKind::Pod, self.metadata.name.as_str());
        let owners = &self.metadata.owner_references;
        let Some(owner) = owners.iter().find(|owner| owner.controller) else {
            return alone;
        };
        match owner.kind.as_str() {
            "ReplicaSet" => {
                let hash = self.metadata.label("pod-template-hash");
                let of = hash.and_then(|hash| owner.name.strip_suffix(hash)?.strip_suffix('-'));
                of.filter(|name| !name.is_empty())
                    .map_or(alone, |name| (WorkloadKind::Deployment, name))
            }
            "Job" => match owner.name.rsplit_once('-') {
                Some((name, time))
                    if (8..=10).contains(&time.len())
                        && time.bytes().all(|c| c.is_ascii_digit())
                        && !name.is_empty() =>
                {
                    (WorkloadKind::CronJob, name)
                }
                _ => (WorkloadKind::Job, &owner.name),
            },
            "CronJob" => (WorkloadKind::CronJob, &owner.name),
            "Deployment" => (WorkloadKind::Deployment, &owner.name),
            _ => alone,
        }
    }
}

/// What a pod belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WorkloadKind {
    /// A Deployment.
    Deployment,
    /// A CronJob.
    CronJob,
    /// A Job.
    Job,
    /// Nothing that telemetry tells apart: the pod itself.
    Pod,
}

impl WorkloadKind {
    /// Its name in [`model::Workload::workload_type`].
    pub const fn name(self) -> &'static str {
        match self {
            Self::Deployment => "deployment",
            Self::CronJob => "cronjob",
            Self::Job => "job",
            Self::Pod => "pod",
        }
    }
}

/// A node: where its pods are.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct Node {
    /// Name and the labels of its place.
    pub metadata: Metadata,
    /// Its addresses.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub status: NodeStatus,
}

/// The part of a node's status that the mesh needs.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    /// Its addresses.
    #[serde(deserialize_with = "null_is_empty")]
    pub addresses: Vec<NodeAddress>,
}

/// An address of a node.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct NodeAddress {
    /// `InternalIP`, `ExternalIP` or `Hostname`.
    #[serde(rename = "type")]
    pub type_: String,
    /// The address.
    pub address: String,
}

/// A workload outside Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct WorkloadEntry {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// Where it is.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub spec: Endpoint,
}

/// Where something outside Kubernetes is: a WorkloadEntry's `spec`, or an endpoint of a ServiceEntry.
/// <https://istio.io/latest/docs/reference/config/networking/workload-entry/>
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Endpoint {
    /// An address, a host name or a path (`unix://`).
    pub address: String,
    /// Port name → number, over the service's target port.
    #[serde(deserialize_with = "null_is_empty")]
    pub ports: BTreeMap<String, u16>,
    /// What selectors match.
    #[serde(deserialize_with = "null_is_empty")]
    pub labels: BTreeMap<String, String>,
    /// The network that the address is of; empty for the default one.
    pub network: String,
    /// `region/zone/subzone`.
    pub locality: String,
    /// Its share, relative to the others; 0 means 1.
    pub weight: u32,
    /// Half of its identity; empty means `default`.
    pub service_account: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made_by(kind: &str, name: &str, hash: &str) -> (WorkloadKind, String) {
        let value = serde_json::json!({"metadata": {"name": "p", "labels": {"pod-template-hash": hash},
            "ownerReferences": [{"kind": kind, "name": name, "controller": true, "apiVersion": "v1", "uid": "1"}]}});
        let pod: Pod = serde_json::from_value(value).unwrap();
        let (kind, name) = pod.workload();
        (kind, name.to_owned())
    }

    #[test]
    fn a_pod_is_named_after_what_made_it() {
        use WorkloadKind::{CronJob, Deployment, Job, Pod};
        for (kind, name, hash, expected) in [
            ("ReplicaSet", "web-5d4f", "5d4f", (Deployment, "web")),
            ("ReplicaSet", "web-5d4f", "", (Pod, "p")),
            ("ReplicaSet", "-5d4f", "5d4f", (Pod, "p")),
            ("Job", "sweep-28000000", "", (CronJob, "sweep")),
            ("Job", "sweep-1", "", (Job, "sweep-1")),
            ("Job", "-28000000", "", (Job, "-28000000")),
            ("StatefulSet", "db", "", (Pod, "p")),
        ] {
            assert_eq!(
                made_by(kind, name, hash),
                (expected.0, expected.1.to_owned()),
                "{kind} {name}"
            );
        }
    }
}
