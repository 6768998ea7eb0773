//! What the client is told.

use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, time::Duration};

use identity::Upstream;
use model::MeshSettings;
use proto::{
    discovery::Node,
    prost_types::{Struct, Value, value::Kind},
};

/// How much is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Everything in the mesh.
    #[default]
    Wildcard,
    /// Policies, and of workloads and services those that are asked for. The mesh must be made with
    /// [`mesh::Scope::OnDemand`].
    OnDemand,
}

impl Mode {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Wildcard => "wildcard",
            Self::OnDemand => "on-demand",
        }
    }
}

/// Who this agent is: what ztunnel says of itself.
#[derive(Clone, Debug)]
pub struct NodeId {
    /// The agent's pod's address.
    pub ip: IpAddr,
    /// Its name.
    pub pod: String,
    /// Its namespace.
    pub namespace: String,
    /// The Kubernetes node.
    pub node: String,
    /// Anything more to say (`ISTIO_METAJSON_*`, `PROXY_CONFIG`).
    pub metadata: BTreeMap<String, String>,
}

impl NodeId {
    /// `ztunnel~<ip>~<pod>.<namespace>~<namespace>.svc.cluster.local`, with the metadata that istiod looks for.
    pub(crate) fn message(&self, cluster: &str) -> Node {
        let Self {
            ip,
            pod,
            namespace,
            node,
            metadata,
        } = self;
        let own = [
            ("NAME", pod.clone()),
            ("NAMESPACE", namespace.clone()),
            ("INSTANCE_IPS", ip.to_string()),
            ("NODE_NAME", node.clone()),
            ("CLUSTER_ID", cluster.to_owned()),
        ];
        let own = own.into_iter().map(|(key, value)| (key.to_owned(), value));
        let text = |(key, value)| {
            let kind = Some(Kind::StringValue(value));
            (key, Value { kind })
        };
        Node {
            id: format!("ztunnel~{ip}~{pod}.{namespace}~{namespace}.svc.cluster.local"),
            metadata: Some(Struct {
                fields: metadata.clone().into_iter().chain(own).map(text).collect(),
            }),
            user_agent_name: "undercurrent".to_owned(),
            user_agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }
    }
}

/// What the client is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the control plane is, and whom to believe that they are it.
    pub upstream: Upstream,
    /// The service-account token, read for each connection; none: no token is shown.
    pub token_file: Option<PathBuf>,
    /// Who this agent is.
    pub node: NodeId,
    /// The cluster's name (`clusterid`).
    pub cluster: String,
    /// The network of the node; that of the mesh it was made with.
    pub network: String,
    /// How much is asked for.
    pub mode: Mode,
    /// What holds for the whole mesh, which discovery does not tell.
    pub settings: MeshSettings,
    /// Where the last good state is kept; none: nowhere.
    pub state_dir: Option<PathBuf>,
    /// Whether it is kept from the beginning, or only when that is said ([`crate::Handle::keep`]).
    pub keeps: bool,
    /// Bounds.
    pub limits: Limits,
}

/// What the control plane may cost and how long it may take.
#[derive(Clone, Debug)]
pub struct Limits {
    /// The largest response. istiod sends a whole mesh in one.
    pub response_bytes: usize,
    /// How long the first answers may take, and after them each part of a state that was begun.
    pub answer: Duration,
    /// The first wait before connecting anew.
    pub first_wait: Duration,
    /// The longest wait before connecting anew.
    pub longest_wait: Duration,
    /// A connection that lasted for this long was a good one: the wait begins from the first again.
    pub settled: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            response_bytes: 200 << 20,
            answer: Duration::from_secs(60),
            first_wait: Duration::from_millis(100),
            longest_wait: Duration::from_secs(15),
            settled: Duration::from_secs(10),
        }
    }
}
