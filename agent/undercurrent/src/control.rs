//! The control-plane role: its options, its runtime and its signals. What it does is in the crate of that name.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use ::control::{Config, Lifetimes};
use anyhow::{Context, Result};
use clap::Args;
use model::{NamespacedName, TrustDomain};
use tokio::signal::unix::{SignalKind, signal};

/// Options of `undercurrent control`.
#[derive(Args, Clone, Debug)]
pub struct ControlArgs {
    /// How to reach the Kubernetes API [default: as a pod of the cluster].
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where xDS and certificates are served, over TLS.
    #[arg(long, env = "UNDERCURRENT_XDS", value_name = "ADDRESS", default_value = "[::]:15012")]
    xds: SocketAddr,
    /// Where metrics, readiness and the clients' state are served.
    #[arg(
        long,
        env = "UNDERCURRENT_MONITORING",
        value_name = "ADDRESS",
        default_value = "[::]:15014"
    )]
    monitoring: SocketAddr,
    /// Where xDS and certificates are served in plaintext, too: a loopback address, such as 127.0.0.1:15010.
    #[arg(long, env = "UNDERCURRENT_PLAINTEXT_XDS", value_name = "ADDRESS")]
    plaintext_xds: Option<SocketAddr>,
    /// The domain of all identities, unless the mesh configuration names another.
    #[arg(
        long,
        env = "UNDERCURRENT_TRUST_DOMAIN",
        value_name = "DOMAIN",
        default_value = "cluster.local"
    )]
    trust_domain: String,
    /// The cluster's name.
    #[arg(long, env = "CLUSTER_ID", value_name = "NAME", default_value = "Kubernetes")]
    cluster: String,
    /// The network of workloads that name none.
    #[arg(long, env = "NETWORK", value_name = "NAME", default_value = "")]
    network: String,
    /// The domain of services' host names.
    #[arg(
        long,
        env = "UNDERCURRENT_CLUSTER_DOMAIN",
        value_name = "DOMAIN",
        default_value = "cluster.local"
    )]
    cluster_domain: String,
    /// Where the mesh configuration, the authority's Secrets and the replicas' lease are.
    #[arg(
        long,
        env = "UNDERCURRENT_ROOT_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = "istio-system"
    )]
    root_namespace: String,
    /// Service accounts whose pods are node agents: they may ask for certificates of pods on their node.
    #[arg(
        long,
        env = "CA_TRUSTED_NODE_ACCOUNTS",
        value_name = "NAMESPACE/NAME",
        value_delimiter = ',',
        default_value = "istio-system/ztunnel,istio-system/undercurrent-node",
        value_parser = account
    )]
    node_service_account: Vec<NamespacedName>,
    /// Further names or addresses in the server's own certificate.
    #[arg(long, env = "UNDERCURRENT_CERT_NAMES", value_name = "NAME", value_delimiter = ',')]
    cert_names: Vec<String>,
    /// How long certificates are valid at the most, in seconds; also how long roots overlap when they change.
    #[arg(
        long,
        env = "UNDERCURRENT_MAX_CERTIFICATE_LIFETIME",
        value_name = "SECONDS",
        default_value_t = 24 * 3600,
        value_parser = clap::value_parser!(u64).range(60..=90 * 24 * 3600)
    )]
    max_certificate_lifetime: u64,
    /// This replica's name, unique among them.
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "undercurrent-control")]
    replica: String,
    /// How long clients may take to leave after the process was told to end, in seconds.
    #[arg(
        long,
        env = "UNDERCURRENT_DRAIN_SECONDS",
        value_name = "SECONDS",
        default_value_t = 10
    )]
    drain: u64,
}

/// Runs the role until it is told to end.
pub fn run(args: ControlArgs) -> Result<()> {
    crate::node::logging::start()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("control")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        let client = ::control::client(args.kubeconfig.as_deref()).await?;
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let told = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        Ok(::control::run(client, args.config(), told).await?)
    })
}

impl ControlArgs {
    fn config(self) -> Config {
        let longest = Duration::from_secs(self.max_certificate_lifetime);
        let defaults = Config::default();
        let default = defaults.lifetimes.default.min(longest);
        Config {
            cluster: self.cluster.into(),
            network: self.network.into(),
            domain: self.cluster_domain.into(),
            trust_domain: TrustDomain::new(self.trust_domain),
            root_namespace: self.root_namespace.into(),
            xds: self.xds,
            plaintext: self.plaintext_xds,
            monitoring: self.monitoring,
            node_accounts: self.node_service_account,
            server_names: self.cert_names,
            lifetimes: Lifetimes { default, longest },
            root_overlap: longest,
            replica: self.replica,
            patience: Duration::from_secs(self.drain),
            ..defaults
        }
    }
}

fn account(text: &str) -> Result<NamespacedName, String> {
    match text.split_once('/') {
        Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
            Ok(NamespacedName::new(namespace, name))
        }
        _ => Err("expected NAMESPACE/NAME, such as istio-system/ztunnel".into()),
    }
}
