//! What the node role is told on its command line or by its environment; read here and nowhere else.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

/// Options of `undercurrent node`.
#[derive(Args, Clone, Debug)]
pub struct NodeArgs {
    /// This node's name, as workloads name it.
    #[arg(long, env = "NODE_NAME", value_name = "NAME")]
    pub node: String,
    /// What is known of the mesh: a file of workloads, services and policies, reread when it changes.
    #[arg(long = "static", env = "UNDERCURRENT_STATIC", value_name = "FILE")]
    pub static_file: PathBuf,
    /// The certificate (PEM) of the authority that signs the identities of this node's pods.
    #[arg(long, env = "UNDERCURRENT_CA_CERT", value_name = "FILE")]
    pub ca_cert: PathBuf,
    /// Its private key (PEM, PKCS#8).
    #[arg(long, env = "UNDERCURRENT_CA_KEY", value_name = "FILE")]
    pub ca_key: PathBuf,
    /// Where the agent keeps its socket and what must outlive a restart.
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
    /// How traffic is captured.
    #[arg(long, env = "UNDERCURRENT_CAPTURE", value_enum, default_value_t = CaptureMode::Ebpf)]
    pub capture: CaptureMode,
    /// Where eBPF links and maps are pinned, so that capture outlives the agent (in a bpffs).
    #[arg(
        long,
        env = "UNDERCURRENT_PIN_DIR",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/undercurrent"
    )]
    pub pin_dir: PathBuf,
    /// Threads that carry traffic [default: one per core, at most 2].
    #[arg(long, env = "UNDERCURRENT_SHARDS", value_name = "N")]
    pub shards: Option<usize>,
    /// One line for each connection, on standard output.
    #[arg(long, env = "UNDERCURRENT_ACCESS_LOG", value_enum, default_value_t = AccessLogMode::Text)]
    pub access_log: AccessLogMode,
    /// Where a kubelet asks for readiness (`/healthz/ready`).
    #[arg(
        long,
        env = "UNDERCURRENT_HEALTH",
        value_name = "ADDRESS",
        default_value = "0.0.0.0:15021"
    )]
    pub health: SocketAddr,
    /// How long connections may go on after the agent was told to end.
    #[arg(long, env = "UNDERCURRENT_DRAIN_SECONDS", value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub drain: Duration,
    /// Log the eBPF programs' decisions too (costs time on every packet).
    #[arg(long, env = "UNDERCURRENT_EBPF_LOG")]
    pub ebpf_log: bool,
}

/// How traffic is captured.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum CaptureMode {
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
