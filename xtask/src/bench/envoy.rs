//! Envoy, as a peer to compare with: a pair of TCP proxies with mTLS between them.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;

use super::contender::{Contender, START, Sides};
use super::lab::{Lab, PORT, Pair, Scratch, check, in_netns};
use super::process::{Running, answers_ok, wait_ready};

/// Envoys, one in each pod's network namespace, as sidecars are.
pub struct Envoy {
    binary: String,
    concurrency: u32,
    running: Option<Sidecars>,
    /// The neighbour's.
    noisy: Option<Sidecars>,
}

/// Of a pair: the client's, and the server's.
type Sidecars = (Running, Running);

/// Where the client's Envoy listens: dialled directly, which spares it the NAT and conntrack that a redirect costs.
const OUTBOUND: &str = "127.0.0.1:15001";
const INBOUND: u16 = 15008;

impl Envoy {
    /// From the path of its binary.
    pub fn new(binary: String, concurrency: u32) -> Self {
        Envoy {
            binary,
            concurrency,
            running: None,
            noisy: None,
        }
    }

    /// A configuration with one TCP proxy: `tls` says on which of its two ends.
    fn configuration(lab: &Lab, name: &str, listen: SocketAddr, upstream: SocketAddr) -> serde_json::Value {
        let certificates = lab.path("certificates");
        let file = |name: &str| json!({"filename": certificates.join(name)});
        let common = json!({
            "tls_certificates": [{"certificate_chain": file("leaf.pem"), "private_key": file("leaf.key")}],
            "validation_context": {"trusted_ca": file("ca.pem")},
            "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
        });
        let socket = |kind: &str, extra: serde_json::Value| {
            let mut config = json!({
                "@type": format!("type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.{kind}"),
                "common_tls_context": common,
            });
            if let (Some(config), Some(extra)) = (config.as_object_mut(), extra.as_object()) {
                config.extend(extra.clone());
            }
            json!({"name": "tls", "typed_config": config})
        };
        let address = |address: SocketAddr| json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}});
        let mut chain = json!({"filters": [{"name": "tcp", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "tcp", "cluster": "up",
        }}]});
        // The default limit of 1024 connections would end the benchmark of 4,000 idle ones.
        let mut cluster = json!({
            "name": "up", "type": "STATIC", "connect_timeout": "5s",
            "circuit_breakers": {"thresholds": [{"max_connections": 1_000_000, "max_pending_requests": 1_000_000}]},
            "load_assignment": {"cluster_name": "up", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": address(upstream)}}]}]},
        });
        if !name.ends_with("server") {
            cluster["transport_socket"] = socket("UpstreamTlsContext", json!({}));
        } else {
            chain["transport_socket"] = socket("DownstreamTlsContext", json!({"require_client_certificate": true}));
        }
        json!({
            "admin": {"address": {"pipe": {"path": admin_socket(name)}}},
            "static_resources": {
                "listeners": [{"name": "in", "address": address(listen), "filter_chains": [chain]}],
                "clusters": [cluster],
            },
        })
    }

    /// Starts those of a pair, and waits until they are ready. Their files and sockets are named after it.
    fn sidecars(&self, lab: &Lab, pair: &Pair, name: &str) -> Result<Sidecars> {
        let tls = SocketAddr::new(lab.address(&pair.server())?, INBOUND);
        let names = ["server", "client"].map(|end| format!("{name}{end}"));
        let start = Instant::now();
        let application = SocketAddr::from(([127, 0, 0, 1], PORT));
        let mut inbound = self.spawn(lab, &pair.server().netns(), &names[0], tls, application)?;
        let mut outbound = self.spawn(lab, &pair.client().netns(), &names[1], OUTBOUND.parse()?, tls)?;
        envoy_ready(&mut inbound, &names[0], start)?;
        envoy_ready(&mut outbound, &names[1], start)?;
        Ok((outbound, inbound))
    }

    fn spawn(&self, lab: &Lab, netns: &str, name: &str, listen: SocketAddr, upstream: SocketAddr) -> Result<Running> {
        let config = lab.path(&format!("envoy-{name}.json"));
        std::fs::write(&config, Self::configuration(lab, name, listen, upstream).to_string())?;
        let mut envoy = in_netns(netns, &self.binary);
        envoy.args([
            "--use-dynamic-base-id",
            "--log-level",
            "warning",
            "--concurrency",
            &self.concurrency.to_string(),
        ]);
        envoy.arg("--config-path").arg(&config);
        Running::start(&mut envoy, &lab.path(&format!("envoy-{name}.log")))
    }
}

/// Unix socket paths are short, and a checkout's path may not be.
fn admin_socket(name: &str) -> String {
    format!("/tmp/uc-bench-{}-{name}.sock", std::process::id())
}

fn envoy_ready(running: &mut Running, name: &str, start: Instant) -> Result<Duration> {
    let socket = admin_socket(name);
    wait_ready(start, START, || {
        running.alive()?;
        Ok(answers_ok(socket.as_ref(), "/ready"))
    })
    .with_context(|| format!("Envoy at the {name}: see envoy-{name}.log under target/bench/lab"))
}

impl Contender for Envoy {
    fn name(&self) -> &str {
        "envoy"
    }

    fn about(&self) -> String {
        format!(
            "Envoy 1.40, one in each pod as sidecars are, TCP proxy over mTLS (TLS 1.3, session resumption as by \
             default), concurrency {}, dialled directly without iptables, no access log and no policy",
            self.concurrency
        )
    }

    fn start(&mut self, lab: &Lab) -> Result<()> {
        certificates(lab)?;
        self.running = Some(self.sidecars(lab, &self.pair(), "")?);
        if let Some(neighbour) = self.neighbour() {
            self.noisy = Some(self.sidecars(lab, &neighbour, "noisy-")?);
        }
        Ok(())
    }

    fn neighbour(&self) -> Option<Pair> {
        Some(Pair::new("envoy-noisy", false).nice())
    }

    fn target(&self, _: &Lab, _: &Pair) -> Result<SocketAddr> {
        Ok(OUTBOUND.parse()?)
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
        // Configured as the client's is; its upstream need not be there.
        let upstream = SocketAddr::from(([127, 0, 0, 1], INBOUND));
        let start = Instant::now();
        let mut one = self.spawn(lab, Scratch::NAME, "scratch", OUTBOUND.parse()?, upstream)?;
        envoy_ready(&mut one, "scratch", start).map(Some)
    }
}

/// One authority and one leaf for both Envoys: ECDSA P-256, as meshes use.
pub fn certificates(lab: &Lab) -> Result<()> {
    let directory = lab.path("certificates");
    std::fs::create_dir_all(&directory)?;
    let script = "set -e; cd \"$1\"
        new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -sha256 -days 2'
        openssl req -x509 $new -subj /O=cluster.local -keyout ca.key -out ca.pem \
            -addext 'basicConstraints=critical,CA:TRUE' -addext 'keyUsage=critical,keyCertSign,cRLSign' \
            -addext 'subjectAltName=URI:spiffe://cluster.local'
        openssl req $new -subj /CN=bench -keyout leaf.key -out leaf.csr
        printf 'subjectAltName=URI:spiffe://cluster.local/ns/bench/sa/bench\\nextendedKeyUsage=serverAuth,clientAuth\\n' > leaf.ext
        openssl x509 -req -in leaf.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile leaf.ext -out leaf.pem";
    check(Command::new("sh").args(["-c", script, "certificates"]).arg(directory)).context("certificates")
}
