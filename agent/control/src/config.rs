//! What the control plane is told at start.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use identity::Clock;
use model::{NamespacedName, TrustDomain};

use crate::{ca, serve, xds};

/// Settings of a replica. The defaults are istiod's, where it has them.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster's name.
    pub cluster: Arc<str>,
    /// The network of workloads that name none.
    pub network: Arc<str>,
    /// The domain of services' host names.
    pub domain: Arc<str>,
    /// The domain of all identities, unless the mesh configuration (ConfigMap `istio`) names another.
    pub trust_domain: TrustDomain,
    /// Where the mesh configuration, the authority's Secrets and the lease are.
    pub root_namespace: Arc<str>,
    /// xDS and CA over TLS.
    pub xds: SocketAddr,
    /// The same in plaintext; loopback only.
    pub plaintext: Option<SocketAddr>,
    /// Metrics and readiness.
    pub monitoring: SocketAddr,
    /// Service accounts whose pods are node agents.
    pub node_accounts: Vec<NamespacedName>,
    /// Audiences that tokens may be for.
    pub audiences: Vec<String>,
    /// Names in the server's certificate, beside those of the Services `istiod` and `undercurrent-control`.
    pub server_names: Vec<String>,
    /// How long certificates are valid.
    pub lifetimes: ca::Lifetimes,
    /// How long a root is trusted before anything is signed below it, and after the last was.
    pub root_overlap: Duration,
    /// This replica's name, unique among them: the pod's.
    pub replica: String,
    /// How long clients may take to leave.
    pub patience: Duration,
    /// Bounds of the authority's queue.
    pub signing: ca::Bounds,
    /// Bounds of the ports.
    pub limits: serve::Limits,
    /// Bounds and times of xDS.
    pub discovery: xds::Config,
    /// Tells the time that certificates and tokens are measured with.
    pub clock: Clock,
}

impl Default for Config {
    fn default() -> Self {
        let lifetimes = ca::Lifetimes::default();
        Self {
            cluster: "Kubernetes".into(),
            network: "".into(),
            domain: "cluster.local".into(),
            trust_domain: TrustDomain::default(),
            root_namespace: k8s::ROOT_NAMESPACE.into(),
            xds: SocketAddr::from(([0, 0, 0, 0], 15012)),
            plaintext: None,
            monitoring: SocketAddr::from(([0, 0, 0, 0], 15014)),
            node_accounts: ["ztunnel", "undercurrent-node"]
                .map(|name| NamespacedName::new(k8s::ROOT_NAMESPACE, name))
                .into(),
            audiences: vec!["istio-ca".into()],
            server_names: Vec::new(),
            root_overlap: lifetimes.longest,
            lifetimes,
            replica: "undercurrent-control".into(),
            patience: Duration::from_secs(10),
            signing: ca::Bounds::default(),
            limits: serve::Limits::default(),
            discovery: xds::Config::default(),
            clock: Clock::system(),
        }
    }
}

impl Config {
    /// All names in the server's certificate.
    pub fn names(&self) -> Vec<String> {
        let namespace = &self.root_namespace;
        let services = ["istiod", "undercurrent-control"].iter().flat_map(|service| {
            [
                format!("{service}.{namespace}.svc"),
                format!("{service}.{namespace}"),
                format!("{service}.{namespace}.svc.{}", self.domain),
            ]
        });
        let mut names: Vec<String> = services.chain(self.server_names.iter().cloned()).collect();
        names.dedup();
        names
    }
}
