//! One real agent, as far as knowledge goes: the discovery client and the mesh that it writes to.

use std::{collections::BTreeMap, path::PathBuf, time::Instant};

use anyhow::Result;
use discovery::{Client, Config, Mode, NodeId};
use identity::{ControlAddress, Upstream};
use mesh::Scope;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::measure::Process;

/// Whom it follows.
#[derive(clap::Args)]
pub struct Options {
    /// The control plane.
    #[arg(long)]
    control: ControlAddress,
    /// The roots that its certificate chains to, unless it is spoken to in plaintext.
    #[arg(long)]
    roots: Option<PathBuf>,
    /// The file that its token is in.
    #[arg(long)]
    token: Option<PathBuf>,
    /// How many workloads, services and policies there are.
    #[arg(long)]
    resources: usize,
}

/// Until standard input ends; says what it takes once it knows everything.
pub async fn run(options: Options) -> Result<()> {
    let (this, resources) = (Process::this(), options.resources);
    let before = this.memory_mib()?;
    let config = Config {
        upstream: Upstream {
            addresses: vec![options.control],
            roots_file: options.roots.unwrap_or_default(),
        },
        token_file: options.token,
        node: NodeId {
            ip: [127, 0, 0, 1].into(),
            pod: "undercurrent-node-0".to_owned(),
            namespace: "istio-system".to_owned(),
            node: "node-0".to_owned(),
            metadata: BTreeMap::new(),
        },
        cluster: "Kubernetes".to_owned(),
        network: String::new(),
        mode: Mode::Wildcard,
        settings: model::MeshSettings::default(),
        state_dir: None,
        keeps: true,
        limits: discovery::Limits::default(),
    };
    let began = Instant::now();
    let (writer, knowledge, demands) = mesh::with("", Scope::Everything);
    let handle = Client::start(config, writer, demands);
    let mut status = handle.changed();
    let known = status
        .wait_for(|status| status.addresses + status.policies >= resources)
        .await?
        .clone();
    let seconds = began.elapsed().as_secs_f64();
    let workloads = knowledge.snapshot().workloads().count();
    let bytes = (this.memory_mib()? - before) * 1024.0 * 1024.0;
    println!(
        "{}",
        json!({"seconds": seconds, "workloads": workloads, "addresses": known.addresses,
            "memory_mib": this.memory_mib()?, "peak_mib": this.peak_mib()?, "bytes_per_workload": bytes / workloads as f64,
            "rejected": known.rejected.len()})
    );
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}
