//! Many agents in one process: each its own connection, decoding and acknowledging what it is sent.
//!
//! Lines on standard input: `again`, and those that remember come back with what they had; its end ends them all.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

use anyhow::{Context, Result};
use bytes::{Buf, Bytes};
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
use tonic::{
    Request, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};

const URLS: [&str; 2] = [proto::ADDRESS_TYPE, proto::AUTHORIZATION_TYPE];

/// How many, of what.
#[derive(clap::Args)]
pub struct Options {
    /// The control plane.
    #[arg(long)]
    control: SocketAddr,
    /// How many agents.
    #[arg(long)]
    count: usize,
    /// How many of them remember names and versions, to come back with them.
    #[arg(long)]
    remember: usize,
    /// How many resources there are.
    #[arg(long)]
    resources: usize,
    /// Read no resource's message: a thousand agents share the machine.
    #[arg(long)]
    light: bool,
}

/// As much of a response as every agent reads.
#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(message, repeated, tag = "2")]
    resources: Vec<Resource>,
    #[prost(string, tag = "4")]
    type_url: String,
    #[prost(string, repeated, tag = "6")]
    removed: Vec<String>,
    #[prost(string, tag = "5")]
    nonce: String,
    #[prost(uint64, tag = "1000")]
    size: u64,
}

#[derive(Clone, PartialEq, Message)]
struct Resource {
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "1")]
    version: String,
    #[prost(message, optional, tag = "2")]
    any: Option<Any>,
}

#[derive(Clone, PartialEq, Message)]
struct Any {
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

struct Wire;

impl Codec for Wire {
    type Encode = DeltaDiscoveryRequest;
    type Decode = Response;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Wire {
    type Item = DeltaDiscoveryRequest;
    type Error = Status;

    fn encode(&mut self, request: DeltaDiscoveryRequest, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        request.encode(to).map_err(|error| Status::internal(error.to_string()))
    }
}

impl Decoder for Wire {
    type Item = Response;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Response>, Status> {
        let size = from.remaining() as u64;
        let response = Response::decode(from).map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(Response { size, ..response }))
    }
}

/// What they have in common.
struct Shared {
    options: Options,
    synchronised: watch::Sender<usize>,
    bytes: AtomicU64,
    /// Counts up when those that remember are to come back.
    again: watch::Sender<u64>,
}

struct Agent {
    shared: Arc<Shared>,
    id: usize,
    remembers: bool,
    known: [BTreeMap<String, String>; 2],
}

impl Agent {
    async fn run(mut self) -> Result<()> {
        let mut again = self.shared.again.subscribe();
        let remembers = self.remembers;
        loop {
            tokio::select! {
                ended = self.stream() => ended?,
                changed = async {
                    match remembers {
                        true => again.changed().await,
                        false => std::future::pending().await,
                    }
                } => changed?,
            }
        }
    }

    /// One connection, until it ends.
    async fn stream(&mut self) -> Result<()> {
        let options = &self.shared.options;
        let endpoint = Endpoint::from_shared(format!("http://{}", options.control))?
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20);
        let (requests, mut responses) = open(endpoint.connect().await?).await?;
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
            requests.send(request).await?;
        }
        let came_back = self.known.iter().any(|known| !known.is_empty());
        let (mut counted, mut answers, mut done) = (0, [false; 2], false);
        while let Some(response) = responses.message().await? {
            let of = usize::from(response.type_url == URLS[1]);
            counted += response.resources.len();
            answers[of] = true;
            self.shared.bytes.fetch_add(response.size, Relaxed);
            let request = DeltaDiscoveryRequest {
                type_url: response.type_url.clone(),
                response_nonce: response.nonce.clone(),
                ..Default::default()
            };
            self.take(response, of)?;
            requests.send(request).await?;
            if !done && (came_back || counted >= self.shared.options.resources) && answers == [true; 2] {
                done = true;
                self.shared.synchronised.send_modify(|count| *count += 1);
            }
        }
        Ok(())
    }

    fn take(&mut self, response: Response, of: usize) -> Result<()> {
        for resource in response.resources {
            if !self.shared.options.light && of == 0 {
                let message = resource.any.context("a resource without a message")?;
                Address::decode(message.value)?;
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
}

async fn open(channel: Channel) -> Result<(mpsc::Sender<DeltaDiscoveryRequest>, Streaming<Response>)> {
    let (requests, receiver) = mpsc::channel(8);
    let mut client = tonic::client::Grpc::new(channel).max_decoding_message_size(64 << 20);
    client.ready().await?;
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
    let path = http::uri::PathAndQuery::from_static(path);
    let request = Request::new(ReceiverStream::new(receiver));
    let responses = client.streaming(request, path, Wire).await?.into_inner();
    Ok((requests, responses))
}

/// Until standard input ends.
pub async fn run(options: Options) -> Result<()> {
    let (count, remember) = (options.count, options.remember.min(options.count));
    let shared = Arc::new(Shared {
        options,
        synchronised: watch::Sender::new(0),
        bytes: AtomicU64::new(0),
        again: watch::Sender::new(0),
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
    wait(&shared, count, began, count).await?;
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        anyhow::ensure!(line == "again", "no such command: {line}");
        shared.synchronised.send_replace(0);
        shared.bytes.store(0, Relaxed);
        let began = Instant::now();
        shared.again.send_modify(|again| *again += 1);
        wait(&shared, remember, began, remember).await?;
    }
    Ok(())
}

/// Says when so many are synchronised, and the bytes that each was sent.
async fn wait(shared: &Shared, count: usize, began: Instant, of: usize) -> Result<()> {
    let mut synchronised = shared.synchronised.subscribe();
    synchronised.wait_for(|synchronised| *synchronised >= count).await?;
    let bytes = shared.bytes.load(Relaxed) as f64 / of.max(1) as f64;
    println!(
        "{}",
        json!({"seconds": began.elapsed().as_secs_f64(), "agents": count, "bytes": bytes})
    );
    Ok(())
}
