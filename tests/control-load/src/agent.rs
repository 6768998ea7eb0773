//! One real agent, as far as knowledge goes: the discovery client and the mesh that it writes to.

use std::{collections::BTreeMap, net::SocketAddr, time::Instant};

use anyhow::Result;
use discovery::{Client, Config, Mode, NodeId};
use identity::Upstream;
use mesh::Scope;
use serde_json::json;
use tokio::io::AsyncReadExt;

use crate::measure::{memory_mib, peak_mib};

/// Until standard input ends; says what it takes once it knows everything.
pub async fn run(control: SocketAddr, resources: usize) -> Result<()> {
    let before = memory_mib()?;
    let config = Config {
        upstream: Upstream {
            addresses: vec![format!("http://{control}").parse()?],
            roots_file: "/nonexistent".into(),
        },
        token_file: None,
        node: NodeId {
            ip: [127, 0, 0, 1].into(),
            pod: "undercurrent-node".to_owned(),
            namespace: "istio-system".to_owned(),
            node: "node-0".to_owned(),
            metadata: BTreeMap::new(),
        },
        cluster: "Kubernetes".to_owned(),
        network: String::new(),
        mode: Mode::Wildcard,
        settings: model::MeshSettings::default(),
        state_dir: None,
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
    let bytes = (memory_mib()? - before) * 1024.0 * 1024.0;
    println!(
        "{}",
        json!({"seconds": seconds, "workloads": workloads, "addresses": known.addresses,
            "memory_mib": memory_mib()?, "peak_mib": peak_mib()?, "bytes_per_workload": bytes / workloads as f64,
            "rejected": known.rejected.len()})
    );
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}
