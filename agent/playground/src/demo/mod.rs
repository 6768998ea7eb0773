//! `demo`: the samples on two nodes, and what a newcomer should see of them. Every claim it makes it checks, and it ends
//! with an error if one does not hold.
//!
//! ```text
//! up ─> calls, while the fabric is recorded ─> claims: identities, addresses, ciphertext, no rules, refusals ─> down
//! ```

mod packets;
mod record;
mod recorder;
mod rules;
mod stage;

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::Stdio,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use self::{
    packets::Capture,
    record::Record,
    recorder::Recorder,
    rules::{MISSING, RULES, count_rules},
    stage::Stage,
};
use crate::{
    cluster::{self, Places},
    down,
    exec::{ExecArgs, command_in_pod},
    launch::spawn_in_pod,
    layout::{Layout, pod_netns},
    preflight,
    state::State,
    up::{self, UpArgs},
};

/// Options of `demo`.
#[derive(clap::Args, Clone, Debug)]
pub struct DemoArgs {
    /// Leave the mesh up.
    #[arg(long)]
    pub keep: bool,
}

/// deploy/samples/two-nodes, so that the binary alone is enough.
const SAMPLES: [(&str, &str); 3] = [
    (
        "shop.yaml",
        include_str!("../../../../deploy/samples/two-nodes/shop.yaml"),
    ),
    (
        "bank.yaml",
        include_str!("../../../../deploy/samples/two-nodes/bank.yaml"),
    ),
    (
        "outside.yaml",
        include_str!("../../../../deploy/samples/two-nodes/outside.yaml"),
    ),
];

const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/client";

pub(crate) fn run(layout: &Layout, args: &DemoArgs) -> Result<()> {
    preflight::check()?;
    let manifests = layout.root.join("demo");
    if let Some(state) = State::load(layout)?
        && state.manifests != manifests
    {
        bail!(
            "a playground is up, with {}: take it down first",
            state.manifests.display()
        );
    }
    let result = show(layout, manifests);
    if args.keep {
        println!("\nThe mesh stays up. Take it down: undercurrent playground down");
    } else {
        down::run(layout)?;
    }
    let failed = result?;
    if failed > 0 {
        bail!("{failed} of the demo's claims do not hold");
    }
    Ok(())
}

/// Shows everything; returns how many claims do not hold.
fn show(layout: &Layout, manifests: PathBuf) -> Result<u32> {
    let mut stage = Stage::new();
    stage.title("Undercurrent: a service mesh without sidecars");
    stage.say("Two nodes on this machine, each with its own agent. The namespaces shop and bank are in the mesh, by a");
    stage.say("label; outside is not. The applications know nothing of it.");
    fs::create_dir_all(&manifests).with_context(|| format!("cannot create {}", manifests.display()))?;
    for (name, text) in SAMPLES {
        fs::write(manifests.join(name), text).with_context(|| format!("cannot write {name}"))?;
    }
    let up = UpArgs {
        manifests: manifests.clone(),
        nodes: Some(2),
        capture: None,
        access_log: Some("text".to_owned()),
        timeout: 60,
    };
    up::run(layout, &up)?;
    let state = State::expect(layout)?;
    let scene = Scene {
        layout,
        state: &state,
        since: state.node_names().map(|node| length(layout, &node)).collect(),
        secret: format!("the-secret-of-the-shop-{:08x}", nonce()),
        open: format!("a-postcard-{:08x}", nonce()),
    };
    let recorder = Recorder::start(layout, manifests.join("fabric.pcap"))?;
    let calls = scene.call()?;
    let capture = recorder.stop()?;
    let records = scene.records()?;
    scene.identities(&mut stage, &calls, &records);
    scene.addresses(&mut stage, &calls);
    scene.ciphertext(&mut stage, capture.as_ref());
    scene.no_rules(&mut stage)?;
    scene.refusals(&mut stage, &calls, &records);
    next_steps(&mut stage);
    Ok(stage.end())
}

fn length(layout: &Layout, node: &str) -> u64 {
    fs::metadata(layout.node(node).access_log()).map_or(0, |metadata| metadata.len())
}

fn nonce() -> u32 {
    let time = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap_or_default();
    time.subsec_nanos() ^ std::process::id().rotate_left(16)
}

/// The text without what every one of its kind begins and ends with.
fn short<'a>(text: &'a str, prefix: &str, suffix: &str) -> &'a str {
    let text = text.strip_prefix(prefix).unwrap_or(text);
    text.strip_suffix(suffix).unwrap_or(text)
}

struct Scene<'a> {
    layout: &'a Layout,
    state: &'a State,
    /// Where each node's access log ended before the calls.
    since: Vec<u64>,
    secret: String,
    open: String,
}

/// What the clients said.
struct Calls {
    /// Each with the address dialled.
    web: Vec<(SocketAddr, Value)>,
    orders: Value,
    vault: Value,
    /// Refused: without an identity, and with the wrong one.
    stranger: Value,
    shop_web: Value,
    /// From outside to outside, in clear.
    outside: Value,
}

impl Scene<'_> {
    fn call(&self) -> Result<Calls> {
        let web = self.vips("shop/web")?;
        let secret = ["--body", &self.secret];
        let web = web.into_iter().map(|address| {
            let address = SocketAddr::new(address, 80);
            Ok((
                address,
                self.app("shop/client", &format!("http://{address}/"), &secret)?,
            ))
        });
        Ok(Calls {
            web: web.collect::<Result<_>>()?,
            orders: self.app("shop/client", "tcp://orders.shop:9000", &["--bytes", "1M"])?,
            vault: self.app("shop/client", "grpc://vault.bank:80", &secret)?,
            outside: self.app("outside/client", "http://server/", &["--body", &self.open])?,
            stranger: self.app("outside/client", "http://vault.bank/", &[])?,
            shop_web: self.app("shop/web", "http://vault.bank/", &[])?,
        })
    }

    /// `undercurrent app call` in a pod; what it printed, whether the call went well or not.
    fn app(&self, pod: &str, url: &str, rest: &[&str]) -> Result<Value> {
        let words = ["undercurrent", "app", "call", url, "--json", "--timeout", "10"];
        let args = ExecArgs {
            pod: pod.to_owned(),
            user: None,
            command: words.iter().chain(rest).map(|word| (*word).to_owned()).collect(),
        };
        let (pause, mut command) = command_in_pod(self.layout, &args)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        let output = spawn_in_pod(pause, command)?
            .wait_with_output()
            .context("cannot wait for the client")?;
        let text = String::from_utf8_lossy(&output.stdout);
        serde_json::from_str(&text).with_context(|| format!("the client in {pod} said: {text}"))
    }

    fn vips(&self, service: &str) -> Result<Vec<IpAddr>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let found = runtime
            .context("cannot start a runtime")?
            .block_on(cluster::service_addresses(self.layout, service));
        found.with_context(|| format!("the addresses of {service}"))
    }

    fn pod_addresses(&self, pod: &str) -> Vec<IpAddr> {
        let places = Places::load(self.layout).unwrap_or_default();
        places.pods.get(pod).map(|slot| slot.addresses()).unwrap_or_default()
    }

    /// What the agents logged since, once the last call is among it.
    fn records(&self) -> Result<Vec<Record>> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let mut records = Vec::new();
            for (node, since) in self.state.node_names().zip(&self.since) {
                let text = fs::read(self.layout.node(&node).access_log()).unwrap_or_default();
                let text =
                    String::from_utf8_lossy(text.get(usize::try_from(*since)?..).unwrap_or_default()).into_owned();
                records.extend(text.lines().filter_map(|line| Record::parse(&node, line)));
            }
            // Who was refused may have tried both of the service's addresses.
            let refused = |namespace: &str, name: &str| refusal(&records, namespace, name).is_some();
            let served = records
                .iter()
                .filter(|record| record.is_inbound() && record.is_allowed());
            let complete = refused("outside", "client") && refused("shop", "web") && served.count() >= 4;
            if complete || Instant::now() > deadline {
                return Ok(records);
            }
            sleep(Duration::from_millis(20));
        }
    }

    fn identities(&self, stage: &mut Stage, calls: &Calls, records: &[Record]) {
        stage.heading("Who talked to whom");
        stage.say("From the access logs of the agents, where each connection ends as one line. The identities were proved with");
        stage.say("certificates (mutual TLS 1.3), which the agents hold for their pods: spiffe://cluster.local/ …");
        let served: Vec<_> = records
            .iter()
            .filter(|record| record.is_inbound() && record.is_allowed())
            .collect();
        stage.table(
            &["FROM", "TO", "SERVICE", "BYTES IN / OUT", "DECIDED BY"],
            served.iter().map(|record| {
                let bytes = format!("{} / {}", record.get("bytes_recv"), record.get("bytes_sent"));
                let identity = |name| short(record.get(name), "spiffe://cluster.local/", "");
                let service = short(record.get("dst.service"), "", ".svc.cluster.local");
                [
                    identity("src.identity"),
                    identity("dst.identity"),
                    service,
                    &bytes,
                    record.get("rule"),
                ]
                .map(str::to_owned)
            }),
        );
        let well = |call: &Value| call["ok"] == true;
        let all = calls.web.iter().all(|(_, call)| well(call)) && well(&calls.orders) && well(&calls.vault);
        stage.claim(
            all,
            "HTTP over IPv4 and IPv6, TCP (1 MiB there and back, compared by hash) and gRPC went through",
        );
        let by_client = |to: &str| {
            served
                .iter()
                .any(|record| record.get("dst.identity") == to && record.get("src.identity") == CLIENT)
        };
        let proved = ["shop/sa/web", "shop/sa/orders", "bank/sa/vault"].iter();
        let proved = proved
            .map(|account| format!("spiffe://cluster.local/ns/{account}"))
            .all(|to| by_client(&to));
        stage.claim(proved, &format!("each server's agent knows the client as {CLIENT}"));
        stage.claim(
            well(&calls.outside),
            "pods outside the mesh talk to each other as before",
        );
    }

    fn addresses(&self, stage: &mut Stage, calls: &Calls) {
        stage.heading("What the applications see");
        stage.say(
            "A proxy at each end, and neither application can tell: the client is connected to the address that it",
        );
        stage.say("dialled, and the server to the client's own address.");
        let client = self.pod_addresses("shop/client");
        let rows = calls.web.iter().map(|(dialled, call)| {
            let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            [
                dialled.to_string(),
                text(&call["peer"]),
                text(&call["server"]["peer"]),
                text(&call["server"]["local"]),
            ]
        });
        stage.table(
            &[
                "CLIENT DIALLED",
                "CLIENT'S getpeername",
                "SERVER'S getpeername",
                "SERVER'S getsockname",
            ],
            rows,
        );
        let address = |value: &Value| value.as_str().and_then(|text| text.parse::<SocketAddr>().ok());
        let dialled = calls
            .web
            .iter()
            .all(|(dialled, call)| address(&call["peer"]) == Some(*dialled));
        stage.claim(dialled, "the client sees the address that it dialled");
        let source = |call: &Value| address(&call["server"]["peer"]).is_some_and(|peer| client.contains(&peer.ip()));
        let seen = calls.web.iter().all(|(_, call)| source(call));
        let client: Vec<_> = client.iter().map(ToString::to_string).collect();
        stage.claim(
            seen,
            &format!("the server sees the client's own address ({})", client.join(", ")),
        );
    }

    fn ciphertext(&self, stage: &mut Stage, capture: Option<&Capture>) {
        stage.heading("What is on the wire");
        let Some(capture) = capture else {
            return stage.claim(
                false,
                "the fabric could not be recorded: tcpdump is missing (Debian: apt install tcpdump)",
            );
        };
        stage.say(&format!(
            "{} packets passed between the nodes meanwhile. One of those that carried the shop's requests:",
            capture.packets.len()
        ));
        if let Some(packet) = capture.tunnelled() {
            stage.code(&format!(
                "{} -> {}  (HBONE: HTTP/2 CONNECT in TLS)",
                packet.source, packet.destination
            ));
            for line in packets::hexdump(&packet.payload, 4) {
                stage.code(&line);
            }
        }
        stage.claim(
            capture.tunnelled().is_some(),
            "the mesh's traffic went through port 15008, in TLS",
        );
        stage.claim(
            !capture.contains(&self.secret),
            &format!(
                "{:?}, which the requests carried, is in none of the packets",
                self.secret
            ),
        );
        stage.claim(
            capture.contains(&self.open),
            &format!(
                "{:?}, sent between pods outside the mesh, is: the recording is no blank sheet",
                self.open
            ),
        );
    }

    fn no_rules(&self, stage: &mut Stage) -> Result<()> {
        stage.heading("What the pods' network was changed by");
        stage.say("eBPF programs on the host side and on the pods' cgroup, and nothing in the pods' firewall.");
        let mut rows = Vec::new();
        for pod in ["shop/client", "shop/web", "shop/orders", "bank/vault"] {
            let Some((namespace, name)) = pod.split_once('/') else {
                continue;
            };
            let netns = pod_netns(namespace, name);
            let mut row = vec![pod.to_owned()];
            for (program, arguments) in RULES {
                row.push(count_rules(&netns, program, arguments)?);
            }
            rows.push(row);
        }
        let names = RULES.map(|(program, arguments)| [&[program], arguments].concat().join(" "));
        let header: Vec<_> = ["POD"].into_iter().chain(names.iter().map(String::as_str)).collect();
        let none = rows
            .iter()
            .all(|row| row[1..].iter().all(|cell| cell == "0 rules" || cell == MISSING));
        let looked = rows.iter().all(|row| row[1..].iter().any(|cell| cell != MISSING));
        stage.table(&header, rows);
        stage.claim(
            none && looked,
            "there is not one iptables or nftables rule in any of them",
        );
        Ok(())
    }

    fn refusals(&self, stage: &mut Stage, calls: &Calls, records: &[Record]) {
        stage.heading("Who was refused, and why");
        stage.say("The bank's PeerAuthentication is STRICT, and its AuthorizationPolicy lets only the shop's client in. Whoever is");
        stage.say("refused can read why in the access log, by the name of the object that somebody wrote:");
        let tries = [
            (
                "outside",
                "client",
                &calls.stranger,
                "PeerAuthentication bank/default",
                "in plaintext, is refused by the PeerAuthentication",
            ),
            (
                "shop",
                "web",
                &calls.shop_web,
                "AuthorizationPolicy bank/vault-callers",
                "with an identity, is refused by the AuthorizationPolicy",
            ),
        ];
        for (namespace, name, call, object, what) in tries {
            let record = refusal(records, namespace, name);
            let rule = record.map_or("", |record| record.get("rule"));
            stage.code(&format!("{namespace}/{name} -> vault.bank  {rule}"));
            stage.code(&format!(
                "  and the client saw: {}",
                call["error"].as_str().unwrap_or("no error")
            ));
            stage.claim(
                call["ok"] == false && rule.contains(object),
                &format!("{namespace}/{name}, {what}"),
            );
        }
    }
}

/// The line that tells of somebody's refusal.
fn refusal<'a>(records: &'a [Record], namespace: &str, name: &str) -> Option<&'a Record> {
    let mut refused = records
        .iter()
        .filter(|record| record.is_inbound() && record.is_denied());
    refused.find(|record| record.get("src.namespace") == namespace && record.get("src.workload") == name)
}

fn next_steps(stage: &mut Stage) {
    stage.heading("What to try next");
    stage.say("Bring the mesh up to stay (cargo xtask demo --keep, or undercurrent playground demo --keep), then:");
    for (command, what) in [
        (
            "undercurrent playground status",
            "nodes, agents, pods and their identities",
        ),
        (
            "undercurrent playground exec shop/client -- curl -s http://web/",
            "be an application",
        ),
        (
            "undercurrent playground kubeconfig > kubeconfig",
            "for kubectl: apply, get, edit, delete",
        ),
        (
            "undercurrent playground logs node-2 --access -f",
            "one line for each connection",
        ),
        (
            "undercurrent playground capture-packets -- -X tcp port 15008",
            "look at the wire yourself",
        ),
        (
            "undercurrent playground kill-control",
            "the mesh goes on with what it knows (then: start-control)",
        ),
        (
            "undercurrent playground upgrade node-2",
            "another agent takes over: no connection fails",
        ),
        (
            "undercurrent playground kill-agent node-2",
            "fails closed: nothing leaves in plaintext",
        ),
        ("undercurrent playground start-agent node-2", "and all is well again"),
        ("undercurrent playground down", "leaves nothing behind"),
    ] {
        stage.command(command, what);
    }
    stage.say("The manifests are in deploy/samples/two-nodes: change one, and bring it up again with --manifests.");
}
