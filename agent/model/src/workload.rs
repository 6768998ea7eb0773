//! A workload: something with addresses that connections come from and go to. Field by field Istio's
//! `istio.workload.Workload`, as far as it is acted upon.

use std::{fmt, net::IpAddr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{GatewayAddress, Identity, NamespacedName, NonTcp, PortMap, SortedMap, TrustDomain, service::is_default};

/// A workload's unique name in the mesh, such as `cluster1//v1/Pod/default/web-0`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WorkloadUid(pub Arc<str>);

impl WorkloadUid {
    /// The uid of a Kubernetes pod.
    pub fn of_pod(cluster: &str, namespace: &str, name: &str) -> Self {
        Self(format!("{cluster}//v1/Pod/{namespace}/{name}").into())
    }
}

impl WorkloadUid {
    /// Whether it is a Kubernetes pod's.
    pub fn is_pod(&self) -> bool {
        let mut parts = self.0.split('/').skip(1);
        (parts.next(), parts.next(), parts.next()) == (Some(""), Some("v1"), Some("Pod"))
    }
}

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a workload is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum TunnelProtocol {
    /// As it is: plain TCP.
    #[default]
    #[serde(rename = "TCP")]
    None,
    /// Through HBONE on port 15008; the workload is in the mesh.
    #[serde(rename = "HBONE")]
    Hbone,
}

/// Whose network namespace a workload lives in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum NetworkMode {
    /// Its own.
    #[default]
    Standard,
    /// The node's; its address names the node, not the workload.
    HostNetwork,
}

/// Whether new connections may go there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum HealthStatus {
    /// Yes.
    #[default]
    Healthy,
    /// No.
    Unhealthy,
}

/// What the workload's own listener expects before the application's bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum ApplicationTunnelProtocol {
    /// Nothing: the workload takes any authority, at this port.
    #[default]
    None,
    /// A PROXY header, version 2.
    Proxy,
}

/// How what arrives by HBONE is handed to the workload, where not simply dialled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct ApplicationTunnel {
    /// What goes before the bytes.
    pub protocol: ApplicationTunnelProtocol,
    /// The workload's port for it; none: the port that was asked for.
    pub port: Option<u16>,
}

/// Where something runs, from wide to narrow; empty where unknown.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Locality {
    /// `topology.kubernetes.io/region`.
    pub region: Arc<str>,
    /// `topology.kubernetes.io/zone`.
    pub zone: Arc<str>,
    /// `topology.istio.io/subzone`.
    pub subzone: Arc<str>,
}

impl Default for Locality {
    fn default() -> Self {
        Self {
            region: empty(),
            zone: empty(),
            subzone: empty(),
        }
    }
}

/// Something that connections come from and go to: a pod, for now.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// Unique in the mesh.
    pub uid: WorkloadUid,
    /// The pod's name.
    pub name: Arc<str>,
    /// The pod's namespace.
    pub namespace: Arc<str>,
    /// Whose authority vouches for it.
    #[serde(default)]
    pub trust_domain: TrustDomain,
    /// The Kubernetes service account; `default` where nothing is said.
    #[serde(default = "default_service_account")]
    pub service_account: Arc<str>,
    /// Every address it is reached at, IPv4 and IPv6.
    #[serde(default)]
    pub workload_ips: Vec<IpAddr>,
    /// How it is reached.
    #[serde(default)]
    pub protocol: TunnelProtocol,
    /// Whose network namespace it lives in.
    #[serde(default)]
    pub network_mode: NetworkMode,
    /// The node that it runs on.
    #[serde(default = "empty")]
    pub node: Arc<str>,
    /// The name telemetry groups by (`service.istio.io/canonical-name`, else `app`).
    #[serde(default = "empty")]
    pub canonical_name: Arc<str>,
    /// The revision telemetry groups by (`service.istio.io/canonical-revision`, else `version`).
    #[serde(default = "empty")]
    pub canonical_revision: Arc<str>,
    /// The Deployment, Job or pod that it belongs to.
    #[serde(default = "empty")]
    pub workload_name: Arc<str>,
    /// What `workload_name` names: `deployment`, `job`, `cronjob` or `pod`.
    #[serde(default = "default_workload_type")]
    pub workload_type: Arc<str>,
    /// The cluster it runs in.
    #[serde(default = "default_cluster")]
    pub cluster_id: Arc<str>,
    /// The services it is an endpoint of (`namespace/hostname`), each with service port → target port.
    #[serde(default)]
    pub services: SortedMap<NamespacedName, PortMap>,
    /// The policies that select it by label; those of its namespace and of the mesh apply without being listed.
    #[serde(default)]
    pub authorization_policies: Vec<NamespacedName>,
    /// Whether new connections may go there.
    #[serde(default)]
    pub status: HealthStatus,
    /// What becomes of traffic that the mesh does not carry (UDP, ICMP and the rest).
    #[serde(default)]
    pub non_tcp: NonTcp,
    /// The network that its addresses are of; empty for the default one.
    #[serde(default = "empty", skip_serializing_if = "is_default")]
    pub network: Arc<str>,
    /// The name to ask DNS for its address, where it has none (a ServiceEntry's endpoint).
    #[serde(default = "empty", skip_serializing_if = "is_default")]
    pub hostname: Arc<str>,
    /// The waypoint that traffic for it goes through, when it is dialled by its own address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// The gateway that it is reached by from other networks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    /// Whether it speaks HBONE itself, and no node agent does so for it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub native_tunnel: bool,
    /// How what arrives by HBONE is handed to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Where it runs.
    #[serde(default, skip_serializing_if = "is_default")]
    pub locality: Locality,
    /// Its share of a service's connections, relative to that of the other endpoints.
    #[serde(default = "default_capacity", skip_serializing_if = "is_default_capacity")]
    pub capacity: u32,
}

impl Default for Workload {
    /// A healthy workload outside the mesh, of which nothing is known.
    fn default() -> Self {
        Self {
            uid: WorkloadUid::default(),
            name: empty(),
            namespace: empty(),
            trust_domain: TrustDomain::default(),
            service_account: default_service_account(),
            workload_ips: Vec::new(),
            protocol: TunnelProtocol::default(),
            network_mode: NetworkMode::default(),
            node: empty(),
            canonical_name: empty(),
            canonical_revision: empty(),
            workload_name: empty(),
            workload_type: default_workload_type(),
            cluster_id: default_cluster(),
            services: SortedMap::default(),
            authorization_policies: Vec::new(),
            status: HealthStatus::default(),
            non_tcp: NonTcp::default(),
            network: empty(),
            hostname: empty(),
            waypoint: None,
            network_gateway: None,
            native_tunnel: false,
            application_tunnel: None,
            locality: Locality::default(),
            capacity: default_capacity(),
        }
    }
}

impl Workload {
    /// The identity that its certificate carries.
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }

    /// Whether a node agent captures its traffic: in the mesh, with a network namespace of its own.
    pub fn is_captured(&self) -> bool {
        self.protocol == TunnelProtocol::Hbone && self.network_mode == NetworkMode::Standard
    }
}

fn empty() -> Arc<str> {
    Arc::from("")
}

fn default_service_account() -> Arc<str> {
    Arc::from("default")
}

fn default_workload_type() -> Arc<str> {
    Arc::from("pod")
}

fn default_cluster() -> Arc<str> {
    Arc::from("Kubernetes")
}

fn default_capacity() -> u32 {
    1
}

fn is_default_capacity(capacity: &u32) -> bool {
    *capacity == default_capacity()
}
