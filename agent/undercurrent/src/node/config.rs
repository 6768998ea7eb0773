//! What the node role is told on its command line or by its environment; read here and nowhere else.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use clap::{ArgAction, Args, ValueEnum, builder::FalseyValueParser};
use identity::ControlAddress;
use model::TrustDomain;

use super::dns::DnsArgs;

/// Options of `undercurrent node`.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// This node's name, as workloads name it.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    #[command(flatten)]
    pub fixed: StaticArgs,
    #[command(flatten)]
    pub control: ControlArgs,
    #[command(flatten)]
    pub dns: DnsArgs,
    /// Where the agent keeps its socket and what must outlive a restart: its pods, what it knows of the mesh, and its pods'
    /// certificates with their keys. For root alone, and better in memory (tmpfs) than on a disk.
    #[arg(
        long,
        env = "UNDERCURRENT_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/run/undercurrent"
    )]
    pub state_dir: PathBuf,
    /// The cgroup (v2) that holds all pods of this node, and no process of the node itself.
    #[arg(
        long,
        env = "UNDERCURRENT_PODS_CGROUP",
        value_name = "DIR",
        default_value = "/sys/fs/cgroup/kubepods.slice"
    )]
    pub pods_cgroup: PathBuf,
    /// Where the container runtime keeps the network namespaces of pods under names (containerd, CRI-O: cni-UUID). There the
    /// agent looks for pods that it was not told of: with eBPF they could not connect.
    #[arg(
        long,
        env = "UNDERCURRENT_NETNS_DIR",
        value_name = "DIR",
        default_value = "/var/run/netns"
    )]
    pub netns_dir: PathBuf,
    /// Namespaces whose pods are never captured.
    #[arg(
        long,
        env = "UNDERCURRENT_EXCLUDE_NAMESPACES",
        value_name = "NAME",
        value_delimiter = ',',
        default_values = k8s::EXCLUDED_NAMESPACES
    )]
    pub exclude_namespaces: Vec<String>,
    /// What pods may ask to be left out of the mesh by annotation, where their namespace's annotation
    /// undercurrent.io/traffic-exclusions does not say: inbound, outbound, all, or none.
    #[arg(
        long,
        env = "UNDERCURRENT_ALLOW_EXCLUSIONS",
        value_name = "WHICH",
        default_value = "none"
    )]
    pub allow_exclusions: k8s::ExclusionsPermission,
    /// How traffic is captured.
    #[arg(long, env = "UNDERCURRENT_CAPTURE", value_enum, default_value_t = CaptureMode::Auto)]
    pub capture: CaptureMode,
    /// Where eBPF links and maps are pinned, so that capture outlives the agent (in a bpffs).
    #[arg(
        long,
        env = "UNDERCURRENT_PIN_DIR",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/undercurrent"
    )]
    pub pin_dir: PathBuf,
    /// Threads that carry traffic. Pods that share none do not hold each other up [default: 16].
    #[arg(long, env = "UNDERCURRENT_SHARDS", value_name = "N")]
    pub shards: Option<usize>,
    /// How many of those threads carry one pod's traffic [default: one per core, at most 2].
    #[arg(long, env = "UNDERCURRENT_SHARDS_PER_POD", value_name = "N")]
    pub shards_per_pod: Option<usize>,
    /// Threads whose pods ask for little go before other processes (SCHED_RR), so that a quiet pod does not wait for a noisy
    /// one: each for a fifth of a processor at most, all for a quarter of the machine. Without CAP_SYS_NICE they do not.
    #[arg(
        long,
        env = "UNDERCURRENT_REALTIME",
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set
    )]
    pub realtime: bool,
    /// One line for each connection, on standard output.
    #[arg(long, env = "UNDERCURRENT_ACCESS_LOG", value_enum, default_value_t = AccessLogMode::Text)]
    pub access_log: AccessLogMode,
    /// A line when a connection opens, too.
    #[arg(long, env = "UNDERCURRENT_ACCESS_LOG_OPENING")]
    pub access_log_opening: bool,
    /// Where Prometheus scrapes (`/stats/prometheus`, `/metrics`).
    #[arg(
        long,
        env = "UNDERCURRENT_METRICS",
        value_name = "ADDRESS",
        default_value = "[::]:15020"
    )]
    pub metrics: SocketAddr,
    /// Sets of labels that connections are counted under at most; what is too many is counted as `overflow`.
    #[arg(long, env = "UNDERCURRENT_METRICS_SERIES", value_name = "N", default_value_t = 4000)]
    pub metrics_series: usize,
    /// How long a set of labels stays after its last connection.
    #[arg(long, env = "UNDERCURRENT_METRICS_EXPIRY_SECONDS", value_name = "SECONDS", default_value = "600", value_parser = seconds)]
    pub metrics_expiry: Duration,
    /// Where people of this machine ask the agent (loopback only; the same as the socket in the state directory).
    #[arg(
        long,
        env = "UNDERCURRENT_ADMIN",
        value_name = "ADDRESS",
        default_value = "127.0.0.1:15000"
    )]
    pub admin: SocketAddr,
    /// Where a kubelet asks for readiness (`/healthz/ready`).
    #[arg(
        long,
        env = "UNDERCURRENT_HEALTH",
        value_name = "ADDRESS",
        default_value = "[::]:15021"
    )]
    pub health: SocketAddr,
    /// How long connections may go on after the agent was told to end, or another took over from it.
    #[arg(long, env = "UNDERCURRENT_DRAIN_SECONDS", value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub drain: Duration,
    /// Whose servers are asked for the names of ServiceEntries that are resolved by DNS.
    #[arg(
        long,
        env = "UNDERCURRENT_RESOLV_CONF",
        value_name = "FILE",
        default_value = "/etc/resolv.conf"
    )]
    pub resolv_conf: PathBuf,
    /// Be the worker of the holder at standard input (see `node::handover`).
    #[arg(long, hide = true)]
    pub worker: bool,
    /// Log the eBPF programs' decisions too (costs time on every packet).
    #[arg(long, env = "UNDERCURRENT_EBPF_LOG")]
    pub ebpf_log: bool,
}

/// A mesh without a control plane: everything is in files.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Without a control plane")]
pub struct StaticArgs {
    /// What is known of the mesh: a file of workloads, services and policies, reread when it changes.
    #[arg(
        long = "static",
        env = "UNDERCURRENT_STATIC",
        value_name = "FILE",
        required_unless_present = "xds",
        conflicts_with = "xds",
        requires_all = ["ca_cert", "ca_key"]
    )]
    pub static_file: Option<PathBuf>,
    /// The certificate (PEM) of the authority that signs the identities of this node's pods.
    #[arg(long, env = "UNDERCURRENT_CA_CERT", value_name = "FILE", conflicts_with = "xds")]
    pub ca_cert: Option<PathBuf>,
    /// Its private key (PEM, PKCS#8).
    #[arg(long, env = "UNDERCURRENT_CA_KEY", value_name = "FILE", conflicts_with = "xds")]
    pub ca_key: Option<PathBuf>,
}

/// A mesh with a control plane, ours or istiod; the environment is that of ztunnel.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "With a control plane")]
pub struct ControlArgs {
    /// The control plane's addresses, such as istiod.istio-system.svc:15012; several are tried in turn.
    #[arg(long, env = "XDS_ADDRESS", value_name = "HOST:PORT", value_delimiter = ',')]
    pub xds: Vec<ControlAddress>,
    /// The certificate authority's addresses [default: those of --xds].
    #[arg(
        long,
        env = "CA_ADDRESS",
        value_name = "HOST:PORT",
        value_delimiter = ',',
        requires = "xds"
    )]
    pub ca: Vec<ControlAddress>,
    /// This node's service-account token (audience istio-ca), reread when it is replaced.
    #[arg(
        long,
        env = "UNDERCURRENT_TOKEN",
        value_name = "FILE",
        default_value = "/var/run/secrets/tokens/istio-token"
    )]
    pub token: PathBuf,
    /// The roots (PEM) of the mesh, for the control plane and for peers; reread when they change.
    #[arg(
        long,
        env = "UNDERCURRENT_ROOTS",
        value_name = "FILE",
        default_value = "/var/run/secrets/istio/root-cert.pem"
    )]
    pub roots: PathBuf,
    /// This cluster's name, as the control plane has it [default: $ISTIO_META_CLUSTER_ID, else Kubernetes].
    #[arg(long, env = "CLUSTER_ID", value_name = "NAME")]
    cluster: Option<String>,
    /// This node's network, as the control plane has it.
    #[arg(long, env = "NETWORK", value_name = "NAME", default_value = "")]
    pub network: String,
    /// The mesh's trust domain.
    #[arg(long, env = "TRUST_DOMAIN", value_name = "DOMAIN", default_value = "cluster.local", value_parser = trust_domain)]
    pub trust_domain: TrustDomain,
    /// Trust domains whose identities count as the mesh's own.
    #[arg(long, env = "TRUST_DOMAIN_ALIASES", value_name = "DOMAIN", value_delimiter = ',', value_parser = trust_domain)]
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Learn only of what this node's pods talk to, when they do.
    #[arg(long, env = "XDS_ON_DEMAND", value_parser = FalseyValueParser::new())]
    pub xds_on_demand: bool,
    /// The namespace of the mesh configuration (`outboundTrafficPolicy`) and of the Sidecar for every namespace.
    #[arg(
        long,
        env = "UNDERCURRENT_ROOT_NAMESPACE",
        value_name = "NAMESPACE",
        default_value = "istio-system"
    )]
    pub root_namespace: String,
    /// The ConfigMap of the mesh configuration; with a revision of istiod, istio-REVISION.
    #[arg(long, env = "UNDERCURRENT_MESH_CONFIG", value_name = "NAME", default_value = "istio")]
    pub mesh_config: String,
    /// How to reach the Kubernetes API, which names this node's pods [default: as a pod of the cluster does].
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    pub kubeconfig: Option<PathBuf>,
    /// This agent's own pod, as it introduces itself to the control plane.
    #[arg(
        long,
        env = "POD_NAME",
        value_name = "NAME",
        default_value = "undercurrent-node",
        hide = true
    )]
    pub pod_name: String,
    /// Its namespace.
    #[arg(
        long,
        env = "POD_NAMESPACE",
        value_name = "NAME",
        default_value = "istio-system",
        hide = true
    )]
    pub pod_namespace: String,
    /// Its address.
    #[arg(long, env = "INSTANCE_IP", value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), hide = true)]
    pub instance_ip: IpAddr,
    /// Its service account.
    #[arg(long, env = "SERVICE_ACCOUNT", value_name = "NAME", hide = true)]
    pub service_account: Option<String>,
}

impl ControlArgs {
    /// This cluster's name.
    pub fn cluster(&self) -> String {
        let of_istio = || std::env::var("ISTIO_META_CLUSTER_ID").ok();
        let name = self.cluster.clone().or_else(of_istio).filter(|name| !name.is_empty());
        name.unwrap_or_else(|| "Kubernetes".to_owned())
    }

    /// For the configuration that is shown: files by their names, never what is in them.
    fn shown(&self) -> serde_json::Value {
        let words = |addresses: &[ControlAddress]| addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        let aliases = self.trust_domain_aliases.iter().map(ToString::to_string);
        serde_json::json!({
            "xdsAddress": words(&self.xds),
            "caAddress": words(self.ca()),
            "clusterId": self.cluster(),
            "network": self.network,
            "trustDomain": self.trust_domain.to_string(),
            "trustDomainAliases": aliases.collect::<Vec<_>>(),
            "xdsOnDemand": self.xds_on_demand,
            "tokenFile": self.token,
            "rootsFile": self.roots,
            "kubeconfigFile": self.kubeconfig,
            "podName": self.pod_name,
            "podNamespace": self.pod_namespace,
            "instanceIp": self.instance_ip,
        })
    }

    /// Where certificates come from.
    pub fn ca(&self) -> &[ControlAddress] {
        if self.ca.is_empty() { &self.xds } else { &self.ca }
    }
}

fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    if text.is_empty() || text.contains(['/', ' ']) {
        return Err("expected a domain, such as cluster.local".to_owned());
    }
    Ok(TrustDomain::new(text))
}

impl NodeArgs {
    /// The configuration as it is shown; nothing secret is in it.
    pub fn shown(&self) -> serde_json::Value {
        let mut shown = serde_json::json!({
            "localNode": self.node,
            "staticFile": self.fixed.static_file,
            "stateDir": self.state_dir,
            "podsCgroup": self.pods_cgroup,
            "netnsDir": self.netns_dir,
            "capture": format!("{:?}", self.capture).to_lowercase(),
            "pinDir": self.pin_dir,
            "shards": self.shards.unwrap_or(l4::Config::default().shards),
            "realtime": self.realtime,
            "shardsPerPod": self.shards_per_pod.unwrap_or(l4::Config::default().shards_per_pod),
            "accessLog": format!("{:?}", self.access_log).to_lowercase(),
            "accessLogOpening": self.access_log_opening,
            "statsAddr": self.metrics,
            "metricsSeries": self.metrics_series,
            "metricsExpirySeconds": self.metrics_expiry.as_secs(),
            "adminAddr": self.admin,
            "readinessAddr": self.health,
            "selfTerminationDeadlineSeconds": self.drain.as_secs(),
            "resolvConfFile": self.resolv_conf,
        });
        if self.fixed.static_file.is_none()
            && let (Some(shown), serde_json::Value::Object(control)) = (shown.as_object_mut(), self.control.shown())
        {
            shown.extend(control);
        }
        shown
    }
}

/// How traffic is captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum CaptureMode {
    /// By eBPF where the kernel has what that needs, else by iptables.
    Auto,
    /// By eBPF programs on the pods' cgroup, in their network namespaces and on their veths.
    Ebpf,
    /// By iptables rules in each pod's network namespace, for kernels that lack what the eBPF programs need. No boundary
    /// for a pod that is hostile and has CAP_NET_ADMIN or CAP_NET_RAW.
    Iptables,
}

/// How connections are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum AccessLogMode {
    /// Not at all.
    Off,
    /// `key=value` text.
    Text,
    /// One JSON object a line.
    Json,
}

fn seconds(text: &str) -> Result<Duration, String> {
    text.parse()
        .map(Duration::from_secs)
        .map_err(|_| "expected a number of seconds".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        node: NodeArgs,
    }

    fn parse(line: &str) -> Result<NodeArgs, String> {
        let words = std::iter::once("node").chain(line.split_whitespace());
        Cli::try_parse_from(words)
            .map(|cli| cli.node)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn there_is_one_source_of_knowledge() {
        let fixed = "--static a --ca-cert b --ca-key c";
        let args = parse(&format!("--node n1 {fixed}")).unwrap();
        assert_eq!(args.fixed.static_file, Some("a".into()));
        let args = parse("--node n1 --xds istiod.istio-system.svc,10.0.0.1:15012").unwrap();
        assert_eq!(args.control.xds.len(), 2);
        assert_eq!(args.control.ca(), args.control.xds);
        assert!(!args.control.xds_on_demand);
        for bad in [
            "--node n1",
            "--node n1 --static a",
            &format!("--node n1 {fixed} --xds istiod:15012"),
            "--node n1 --xds istiod --ca-key c",
            "--node n1 --xds http://istiod:15010",
            "--node n1 --xds istiod --trust-domain a/b",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
