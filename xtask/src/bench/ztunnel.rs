//! `--peer NAME=PATH`: ztunnel, or what behaves like it, by the path of its binary. Nothing is built here.
//!
//! One runs in each pod, `PROXY_MODE=dedicated`, with a static file of the two workloads and `FAKE_CA`, which exists
//! only in a ztunnel built with `--features testing`. Traffic reaches it as in Istio's sidecar rules: REDIRECT of what
//! the client's pod sends to 15001, exempting what carries ztunnel's mark. HBONE goes from pod to pod. The source
//! address is not kept (`ENABLE_ORIG_SRC=false`), which spares it the routes that this would need. Everything else is
//! as its defaults have it. The variables are those of ztunnel's `config.rs`.

use std::net::IpAddr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::contender::{Contender, START, Sides};
use super::lab::{Lab, Pod, Scratch, check, in_netns};
use super::process::{Running, wait_ready};

/// ztunnel's own packets, which the redirect leaves alone.
const MARK: &str = "1337";

/// A node proxy with ztunnel's environment variables.
pub struct Ztunnel {
    name: String,
    binary: String,
    running: Option<(Running, Running)>,
}

impl Ztunnel {
    /// From `NAME=PATH`.
    pub fn new(name: String, binary: String) -> Self {
        Ztunnel {
            name,
            binary,
            running: None,
        }
    }

    fn spawn(&self, lab: &Lab, netns: &str, name: &'static str, address: IpAddr) -> Result<Running> {
        let mut proxy = in_netns(netns, &self.binary);
        proxy.env("PROXY_MODE", "dedicated");
        proxy.env("PROXY_WORKLOAD_INFO", format!("bench-{}/{name}/{name}", self.name));
        proxy.env("LOCAL_XDS_PATH", lab.path(&format!("{}.yaml", self.name)));
        proxy
            .env("XDS_ADDRESS", "")
            .env("FAKE_CA", "true")
            .env("ENABLE_ORIG_SRC", "false");
        proxy
            .env("PACKET_MARK", MARK)
            .env("INSTANCE_IP", address.to_string())
            .env("NODE_NAME", "bench");
        Running::start(&mut proxy, &lab.path(&format!("{}-{name}.log", self.name)))
    }

    fn write_knowledge(&self, lab: &Lab) -> Result<()> {
        let pair = self.pair();
        let workload = |pod: &Pod, name: &str| -> Result<serde_json::Value> {
            Ok(json!({
                "uid": format!("bench//Pod/bench-{}/{name}", self.name), "name": name,
                "namespace": format!("bench-{}", self.name), "serviceAccount": name, "trustDomain": "cluster.local",
                "workloadIps": [lab.address(pod)?], "protocol": "HBONE", "node": "bench", "network": "",
            }))
        };
        let all = [workload(&pair.client(), "client")?, workload(&pair.server(), "server")?];
        // YAML takes JSON.
        let file = json!({"workloads": all, "policies": [], "services": []}).to_string();
        Ok(std::fs::write(lab.path(&format!("{}.yaml", self.name)), file)?)
    }
}

/// Whether the readiness server of the proxy in a namespace says 200; asked by curl, whose start costs some milliseconds.
fn ready(netns: &str) -> bool {
    let mut curl = in_netns(netns, "curl");
    curl.args([
        "--silent",
        "--fail",
        "--max-time",
        "1",
        "--output",
        "/dev/null",
        "http://127.0.0.1:15021/healthz/ready",
    ]);
    curl.stdin(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn wait(running: &mut Running, netns: &str, start: Instant) -> Result<Duration> {
    wait_ready(start, START, || {
        running.alive()?;
        Ok(ready(netns))
    })
    .with_context(|| format!("the proxy in {netns}; its log is under target/bench/lab"))
}

impl Contender for Ztunnel {
    fn name(&self) -> &str {
        &self.name
    }

    fn about(&self) -> String {
        format!(
            "{}, dedicated mode, one in each pod, iptables REDIRECT at the client, no policy",
            self.binary
        )
    }

    fn start(&mut self, lab: &Lab) -> Result<()> {
        self.write_knowledge(lab)?;
        let pair = self.pair();
        let (client, server) = (pair.client(), pair.server());
        let start = Instant::now();
        let mut inbound = self.spawn(lab, &server.netns(), "server", lab.address(&server)?)?;
        let mut outbound = self.spawn(lab, &client.netns(), "client", lab.address(&client)?)?;
        wait(&mut inbound, &server.netns(), start)?;
        wait(&mut outbound, &client.netns(), start)?;
        let rule = |words: &[&str]| {
            check(
                Command::new("ip")
                    .args(["netns", "exec", &client.netns(), "iptables", "-w", "-t", "nat"])
                    .args(words),
            )
        };
        rule(&[
            "-A", "OUTPUT", "-p", "tcp", "-m", "mark", "--mark", MARK, "-j", "RETURN",
        ])?;
        rule(&[
            "-A",
            "OUTPUT",
            "-p",
            "tcp",
            "!",
            "-d",
            "127.0.0.0/8",
            "-j",
            "REDIRECT",
            "--to-ports",
            "15001",
        ])?;
        self.running = Some((outbound, inbound));
        Ok(())
    }

    fn sides(&self) -> Result<Sides> {
        let (client, server) = self.running.as_ref().context("not started")?;
        Ok(Sides {
            client: vec![client.id()],
            server: vec![server.id()],
        })
    }

    fn time_to_ready(&self, lab: &Lab) -> Result<Option<Duration>> {
        let _scratch = Scratch::new()?;
        let start = Instant::now();
        let mut one = self.spawn(lab, Scratch::NAME, "client", IpAddr::from([127, 0, 0, 1]))?;
        wait(&mut one, Scratch::NAME, start).map(Some)
    }
}
