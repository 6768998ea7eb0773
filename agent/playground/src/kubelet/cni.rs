//! The CNI plugin, called as a container runtime calls it: by environment, configuration on standard input, and an answer
//! or an error as JSON (CNI specification 1.1, section 2). The pod's network is made by the kubelet itself, which stands
//! for the plugin before it in the chain.

use std::{
    io::Write,
    net::IpAddr,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::{desired::Desired, layout::netns_path};

const VERSION: &str = "1.1.0";

/// Runs the plugin for a pod's network.
pub(super) fn run(binary: &Path, socket: &Path, command: &str, pod: &Desired, netns: &str) -> Result<()> {
    let metadata = &pod.pod.metadata;
    let sandbox = netns_path(netns);
    let mut plugin = Command::new(binary);
    plugin
        .arg("cni")
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &pod.uid)
        .env("CNI_NETNS", &sandbox)
        .env("CNI_IFNAME", "eth0")
        .env(
            "CNI_ARGS",
            format!(
                "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_UID={}",
                metadata.namespace, metadata.name, pod.uid
            ),
        )
        .env("CNI_PATH", binary.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = plugin.spawn().context("cannot run the CNI plugin")?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it ended early its answer says why.
        let _ = stdin.write_all(configuration(socket, &sandbox, &pod.addresses).to_string().as_bytes());
    }
    let output = child.wait_with_output().context("cannot wait for the CNI plugin")?;
    if output.status.success() {
        return Ok(());
    }
    let said: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let text = |key: &str| said[key].as_str().filter(|text| !text.is_empty()).map(str::to_owned);
    let words: Vec<_> = [text("msg"), text("details")].into_iter().flatten().collect();
    match words.is_empty() {
        true => bail!("CNI {command}: {}", String::from_utf8_lossy(&output.stderr).trim()),
        false => bail!("CNI {command}: {}", words.join(": ")),
    }
}

fn configuration(socket: &Path, sandbox: &Path, addresses: &[IpAddr]) -> Value {
    let address =
        |ip: &IpAddr| json!({"interface": 0, "address": format!("{ip}/{}", if ip.is_ipv4() { 32 } else { 128 })});
    json!({
        "cniVersion": VERSION,
        "name": "playground",
        "type": "undercurrent-cni",
        "agentSocket": socket,
        "prevResult": {
            "cniVersion": VERSION,
            "interfaces": [{"name": "eth0", "sandbox": sandbox}],
            "ips": addresses.iter().map(address).collect::<Vec<_>>(),
        },
    })
}
