//! Many agents in one process: each its own connection, decoding and acknowledging what it is sent.
//!
//! Lines on standard input: `leave`, and those that remember close their connections; `again`, and they come back with
//! what they had. Its end ends them all. Lines on standard output: an answer to each `again` (and one at first), and with
//! `--tell` each resource that the last agent has taken in since, with the time.

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, Result};
use identity::{ControlAddress, Upstream};
use prost::Message;
use proto::{
    discovery::{DeltaDiscoveryRequest, Node},
    workload::Address,
};
use serde_json::json;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Streaming, metadata::MetadataValue};

use crate::wire::{Response, Wire};

/// How often a connection is tried again.
const TRIES: usize = 30;
const URLS: [&str; 2] = [proto::ADDRESS_TYPE, proto::AUTHORIZATION_TYPE];

/// How many, of what.
#[derive(clap::Args)]
pub struct Options {
    /// The control plane.
    #[arg(long)]
    control: ControlAddress,
    /// The roots that its certificate chains to, unless it is spoken to in plaintext.
    #[arg(long)]
    roots: Option<PathBuf>,
    /// Tokens, one on a line; agents take them in turn.
    #[arg(long)]
    tokens: Option<PathBuf>,
    /// How many agents.
    #[arg(long)]
    count: usize,
    /// How many of them remember names and versions, to come back with them.
    #[arg(long)]
    remember: usize,
    /// How many resources there are.
    #[arg(long)]
    resources: usize,
    /// At first, read no resource's message: a thousand agents share the machine.
    #[arg(long)]
    light: bool,
    /// Tell of each resource that all have taken in.
    #[arg(long)]
    tell: bool,
}

/// What they have in common.
struct Shared {
    options: Options,
    upstream: Upstream,
    tokens: Vec<MetadataValue<tonic::metadata::Ascii>>,
    synchronised: watch::Sender<usize>,
    /// Received and sent: messages, without HTTP and TLS.
    bytes: [AtomicU64; 2],
    /// While it is odd, those that remember are away.
    phase: watch::Sender<u64>,
    /// By how many agents a resource has been taken in since all were synchronised; nothing before that.
    taken: Mutex<Option<HashMap<String, usize>>>,
}

impl Shared {
    /// One more agent has this.
    fn take(&self, name: &str) {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(taken) = taken.as_mut() else { return };
        let by = match taken.get_mut(name) {
            Some(by) => {
                *by += 1;
                *by
            }
            None => {
                taken.insert(name.to_owned(), 1);
                1
            }
        };
        if by == self.options.count {
            taken.remove(name);
            let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
            println!(
                "{}",
                json!({"applied": name, "at": now.unwrap_or_default().as_secs_f64()})
            );
        }
    }
}

struct Agent {
    shared: Arc<Shared>,
    id: usize,
    remembers: bool,
    known: [BTreeMap<String, String>; 2],
}

impl Agent {
    async fn run(mut self) -> Result<()> {
        let mut phase = self.shared.phase.subscribe();
        let remembers = self.remembers;
        loop {
            if remembers {
                phase.wait_for(|phase| phase % 2 == 0).await?;
            }
            tokio::select! {
                ended = self.stream() => ended?,
                changed = async {
                    match remembers {
                        true => phase.changed().await,
                        false => std::future::pending().await,
                    }
                } => changed?,
            }
        }
    }

    /// One connection, until it ends.
    async fn stream(&mut self) -> Result<()> {
        let (requests, mut responses) = self.connect().await?;
        for (url, known) in URLS.iter().zip(&self.known) {
            let request = DeltaDiscoveryRequest {
                node: Some(Node {
                    id: format!(
                        "ztunnel~10.255.0.1~agent-{}.istio-system~istio-system.svc.cluster.local",
                        self.id
                    ),
                    ..Default::default()
                }),
                type_url: (*url).to_owned(),
                initial_resource_versions: known.clone(),
                ..Default::default()
            };
            self.send(&requests, request).await?;
        }
        let came_back = self.known.iter().any(|known| !known.is_empty());
        let (mut counted, mut answers, mut done) = (0, [false; 2], false);
        while let Some(response) = responses.message().await? {
            let of = usize::from(response.type_url == URLS[1]);
            counted += response.resources.len();
            answers[of] = true;
            self.shared.bytes[0].fetch_add(response.size, Relaxed);
            let request = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce.clone(),
                ..Default::default()
            };
            self.take(response, of, done)?;
            self.send(&requests, request).await?;
            if !done && (came_back || counted >= self.shared.options.resources) && answers == [true; 2] {
                done = true;
                self.shared.synchronised.send_modify(|count| *count += 1);
            }
        }
        Ok(())
    }

    async fn send(&self, to: &mpsc::Sender<DeltaDiscoveryRequest>, request: DeltaDiscoveryRequest) -> Result<()> {
        self.shared.bytes[1].fetch_add(request.encoded_len() as u64, Relaxed);
        Ok(to.send(request).await?)
    }

    fn take(&mut self, response: Response, of: usize, synchronised: bool) -> Result<()> {
        let reads = of == 0 && (synchronised || !self.shared.options.light);
        for resource in response.resources {
            if reads {
                let message = resource.any.context("a resource without a message")?;
                Address::decode(message.value)?;
            }
            if self.shared.options.tell {
                self.shared.take(&resource.name);
            }
            if self.remembers {
                self.known[of].insert(resource.name, resource.version);
            }
        }
        for name in response.removed {
            self.known[of].remove(&name);
        }
        Ok(())
    }

    /// As an agent does, it tries again when there are too many at once.
    async fn connect(&self) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<Response>)> {
        let mut failures = 0;
        loop {
            match self.open().await {
                Err(_) if failures < TRIES => failures += 1,
                opened => return opened,
            }
            // Not all at the same time.
            tokio::time::sleep(Duration::from_millis(500 + self.id as u64 % 500)).await;
        }
    }

    async fn open(&self) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<Response>)> {
        let (requests, receiver) = mpsc::channel(8);
        let mut client = tonic::client::Grpc::new(self.shared.upstream.channel()).max_decoding_message_size(64 << 20);
        client.ready().await?;
        let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
        let path = http::uri::PathAndQuery::from_static(path);
        let mut request = Request::new(ReceiverStream::new(receiver));
        if let Some(token) = self.shared.tokens.iter().cycle().nth(self.id) {
            request.metadata_mut().insert("authorization", token.clone());
        }
        let responses = client.streaming(request, path, Wire).await?.into_inner();
        Ok((requests, responses))
    }
}

/// Until standard input ends.
pub async fn run(options: Options) -> Result<()> {
    let (count, remember) = (options.count, options.remember.min(options.count));
    let tokens = match &options.tokens {
        None => Vec::new(),
        Some(file) => {
            let text = std::fs::read_to_string(file)?;
            let tokens = text.lines().map(|token| format!("Bearer {token}").parse());
            tokens.collect::<Result<_, _>>()?
        }
    };
    let shared = Arc::new(Shared {
        upstream: Upstream {
            addresses: vec![options.control.clone()],
            roots_file: options.roots.clone().unwrap_or_default(),
        },
        tokens,
        options,
        synchronised: watch::Sender::new(0),
        bytes: Default::default(),
        phase: watch::Sender::new(0),
        taken: Mutex::default(),
    });
    let began = Instant::now();
    let mut agents = tokio::task::JoinSet::new();
    for id in 0..count {
        let agent = Agent {
            shared: Arc::clone(&shared),
            id,
            remembers: id < remember,
            known: Default::default(),
        };
        agents.spawn(agent.run());
    }
    let control = control(Arc::clone(&shared), count, remember, began);
    tokio::select! {
        ended = control => ended,
        Some(ended) = agents.join_next() => {
            ended??;
            anyhow::bail!("an agent ended")
        }
    }
}

async fn control(shared: Arc<Shared>, count: usize, remember: usize, began: Instant) -> Result<()> {
    wait(&shared, count, began).await?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        match line.as_str() {
            "leave" => shared.phase.send_modify(|phase| *phase |= 1),
            "again" => {
                shared.synchronised.send_replace(0);
                for bytes in &shared.bytes {
                    bytes.store(0, Relaxed);
                }
                let began = Instant::now();
                shared.phase.send_modify(|phase| *phase = (*phase | 1) + 1);
                wait(&shared, remember, began).await?;
            }
            other => anyhow::bail!("no such command: {other}"),
        }
    }
    Ok(())
}

/// Says when so many are synchronised, and the bytes that each was sent and has sent.
async fn wait(shared: &Shared, count: usize, began: Instant) -> Result<()> {
    let mut synchronised = shared.synchronised.subscribe();
    synchronised.wait_for(|synchronised| *synchronised >= count).await?;
    let seconds = began.elapsed().as_secs_f64();
    let [bytes, uploaded] = [0, 1].map(|way| shared.bytes[way].load(Relaxed) as f64 / count.max(1) as f64);
    let mut taken = shared.taken.lock().unwrap_or_else(PoisonError::into_inner);
    taken.get_or_insert_default();
    println!(
        "{}",
        json!({"seconds": seconds, "agents": count, "bytes": bytes, "uploaded": uploaded})
    );
    Ok(())
}
