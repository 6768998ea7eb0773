//! A replica of the xDS server, and agents that take what it sends.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::Arc,
    time::Duration,
};

use bytes::{Buf, BufMut};
use control::{
    resources::{Change, Resource, Type},
    xds::{self, Authenticate, Cache, Caller, Config, Discovery, View},
};
use futures_util::future::BoxFuture;
use proto::{
    Message,
    discovery::{
        DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status as RpcStatus,
        aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    security::Authorization,
    workload::{Address, PortList, Service, Workload, address},
};
use tasks::{DrainMode, DrainTrigger, drain_channel};
use tokio::{net::TcpListener, sync::mpsc, task::JoinHandle};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Status, Streaming,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::Channel,
};

pub fn workload(uid: &str, address: &str, services: &[&str], content: u32) -> Resource {
    let ports = |name: &&str| ((*name).to_owned(), PortList::default());
    let workload = Workload {
        uid: uid.to_owned(),
        name: content.to_string(),
        services: services.iter().map(ports).collect::<BTreeMap<_, _>>(),
        ..Default::default()
    };
    address_of(uid, address, address::Type::Workload(workload))
}

pub fn service(name: &str, address: &str, content: u32) -> Resource {
    let service = Service {
        name: content.to_string(),
        ..Default::default()
    };
    address_of(name, address, address::Type::Service(service))
}

fn address_of(name: &str, address: &str, content: address::Type) -> Resource {
    Resource {
        type_: Type::Address,
        name: name.into(),
        aliases: vec![format!("/{address}").into()],
        message: Address { r#type: Some(content) }.encode_to_vec().into(),
    }
}

pub fn policy(name: &str, content: u32) -> Resource {
    let policy = Authorization {
        name: content.to_string(),
        ..Default::default()
    };
    Resource {
        type_: Type::Authorization,
        name: name.into(),
        aliases: vec![],
        message: policy.encode_to_vec().into(),
    }
}

pub fn remove(type_: Type, name: &str) -> Change {
    Change::Remove {
        type_,
        name: name.into(),
    }
}

/// Takes everybody with the right word.
struct Word;

impl Authenticate for Word {
    fn authenticate<'a>(
        &'a self,
        headers: &'a http::HeaderMap,
        peer: Option<SocketAddr>,
    ) -> BoxFuture<'a, Result<Caller, Status>> {
        let known = headers.get("authorization").is_some_and(|word| word == "Bearer test");
        Box::pin(async move {
            assert!(peer.is_some());
            match known {
                true => Ok(Caller {
                    name: "test".to_owned(),
                }),
                false => Err(Status::unauthenticated("not the word")),
            }
        })
    }
}

/// A control plane, as far as xDS goes.
pub struct Replica {
    pub cache: Arc<Cache>,
    pub discovery: Discovery,
    pub address: SocketAddr,
    drain: DrainTrigger,
    server: JoinHandle<()>,
}

impl Replica {
    pub async fn start(mesh: Vec<Change>, config: Config) -> Self {
        let cache = Arc::new(Cache::new());
        cache.apply(mesh);
        Self::serve(cache, config).await
    }

    /// One that does not know the mesh yet.
    pub async fn unknown() -> Self {
        Self::serve(Arc::new(Cache::new()), Config::default()).await
    }

    async fn serve(cache: Arc<Cache>, config: Config) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (drain, signal) = drain_channel();
        let discovery = Discovery::start(Arc::clone(&cache), Arc::new(Word), config, signal.clone());
        let (connections, incoming) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((stream, peer)) = listener.accept().await {
                let accepted = Ok::<_, std::io::Error>(xds::Connection::new(stream, peer));
                if connections.send(accepted).await.is_err() {
                    return;
                }
            }
        });
        let router = xds::transport().add_service(discovery.clone());
        let server = tokio::spawn(async move {
            let mut signal = signal;
            let ended = async {
                signal.reached(DrainMode::Graceful).await;
            };
            let incoming = ReceiverStream::new(incoming);
            router.serve_with_incoming_shutdown(incoming, ended).await.unwrap();
        });
        Self {
            cache,
            discovery,
            address,
            drain,
            server,
        }
    }

    /// Ends as a control plane does that is told to.
    pub async fn stop(self) {
        self.drain.drain(DrainMode::Graceful);
        self.server.await.unwrap();
    }
}

/// An agent that keeps names and versions.
pub struct Agent {
    has: [BTreeMap<String, String>; 3],
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: Streaming<DeltaDiscoveryResponse>,
    pub bytes: usize,
    pub largest: usize,
    pub taken: usize,
    pub refuses: Option<String>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

type Stream = (mpsc::Sender<DeltaDiscoveryRequest>, Streaming<DeltaDiscoveryResponse>);

async fn open(address: SocketAddr, word: &str) -> Result<Stream, Status> {
    let channel = Channel::from_shared(format!("http://{address}")).unwrap();
    let channel = channel
        .connect()
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let (requests, receiver) = mpsc::channel(16);
    let mut request = Request::new(ReceiverStream::new(receiver));
    request
        .metadata_mut()
        .insert("authorization", format!("Bearer {word}").parse().unwrap());
    let mut client = AggregatedDiscoveryServiceClient::new(channel);
    let responses = client.delta_aggregated_resources(request).await?.into_inner();
    Ok((requests, responses))
}

impl Agent {
    pub async fn connect(replica: &Replica) -> Result<Self, Status> {
        Self::connect_as(replica, "test").await
    }

    pub async fn connect_as(replica: &Replica, word: &str) -> Result<Self, Status> {
        let (requests, responses) = open(replica.address, word).await?;
        Ok(Self {
            has: Default::default(),
            requests,
            responses,
            bytes: 0,
            largest: 0,
            taken: 0,
            refuses: None,
        })
    }

    async fn send(&self, request: DeltaDiscoveryRequest) {
        let node = Node {
            id: "node-0".to_owned(),
            ..Default::default()
        };
        // A stream that ended is noticed when reading.
        let _ = self
            .requests
            .send(DeltaDiscoveryRequest {
                node: Some(node),
                ..request
            })
            .await;
    }

    /// Subscribes to everything, or again with what it has.
    pub async fn subscribe_all(&self) {
        for view in [View::Address, View::Authorization] {
            self.send(DeltaDiscoveryRequest {
                type_url: view.url().to_owned(),
                initial_resource_versions: self.has[view as usize].clone(),
                ..Default::default()
            })
            .await;
        }
    }

    pub async fn say(&self, view: View, subscribe: &[&str], unsubscribe: &[&str]) {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        self.send(DeltaDiscoveryRequest {
            type_url: view.url().to_owned(),
            resource_names_subscribe: strings(subscribe),
            resource_names_unsubscribe: strings(unsubscribe),
            ..Default::default()
        })
        .await;
    }

    pub async fn ask_for_type(&self, url: &str) {
        self.send(DeltaDiscoveryRequest {
            type_url: url.to_owned(),
            ..Default::default()
        })
        .await;
    }

    /// Takes one response and answers it.
    pub async fn receive(&mut self) -> Result<DeltaDiscoveryResponse, Status> {
        let response = self.responses.message().await?;
        let response = response.ok_or_else(|| Status::cancelled("the stream ended"))?;
        let size = response.encoded_len();
        (self.bytes, self.largest) = (self.bytes + size, self.largest.max(size));
        self.taken += 1;
        let view = View::from_url(&response.type_url).unwrap();
        let mut error = None;
        match self.refuses.take() {
            Some(message) => {
                error = Some(RpcStatus {
                    code: 13,
                    message,
                    ..Default::default()
                });
            }
            None => {
                let has = &mut self.has[view as usize];
                response
                    .removed_resources
                    .iter()
                    .for_each(|name| drop(has.remove(name)));
                let put = response.resources.iter().cloned();
                has.extend(put.map(|resource| (resource.name, resource.version)));
            }
        }
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error,
            ..Default::default()
        })
        .await;
        Ok(response)
    }

    /// Takes responses until it has what the replica has.
    pub async fn until_synchronised(&mut self, replica: &Replica) {
        self.until(&replica.cache).await;
    }

    pub async fn until(&mut self, cache: &Cache) {
        let bound = Duration::from_secs(60);
        let taken = tokio::time::timeout(bound, async {
            let same = |has: &BTreeMap<String, String>, type_| {
                let now = cache.snapshot();
                let same = |entry: &Arc<xds::Entry>| has.get(&*entry.name) == Some(&entry.version.to_string());
                now.len(type_) == has.len() && now.entries(type_).all(same)
            };
            loop {
                let same = same(&self.has[0], Type::Address) && same(&self.has[2], Type::Authorization);
                if same && self.taken >= 2 {
                    return;
                }
                self.receive().await.unwrap();
            }
        });
        taken.await.expect("it is not synchronised in a minute");
    }

    pub async fn reconnect(&mut self, replica: &Replica) -> Result<(), Status> {
        self.reconnect_to(replica.address).await
    }

    pub async fn reconnect_to(&mut self, address: SocketAddr) -> Result<(), Status> {
        (self.requests, self.responses) = open(address, "test").await?;
        self.taken = 0;
        self.subscribe_all().await;
        Ok(())
    }

    pub fn names(&self, view: View) -> BTreeSet<&str> {
        self.has[view as usize].keys().map(String::as_str).collect()
    }
}

/// Bytes in place of a request, and what the stream ends with.
pub async fn send_bytes(replica: &Replica, bytes: &'static [u8]) -> Status {
    let channel = Channel::from_shared(format!("http://{}", replica.address)).unwrap();
    let mut client = tonic::client::Grpc::new(channel.connect().await.unwrap());
    client.ready().await.unwrap();
    let mut request = Request::new(tokio_stream::once(bytes));
    request
        .metadata_mut()
        .insert("authorization", "Bearer test".parse().unwrap());
    let path = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";
    let path = http::uri::PathAndQuery::from_static(path);
    let mut responses = client.streaming(request, path, Raw).await.unwrap().into_inner();
    responses.message().await.unwrap_err()
}

/// Bytes as they are.
struct Raw;

impl Codec for Raw {
    type Encode = &'static [u8];
    type Decode = ();
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = &'static [u8];
    type Error = Status;

    fn encode(&mut self, bytes: &'static [u8], to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put_slice(bytes);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = ();
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<()>, Status> {
        from.advance(from.remaining());
        Ok(Some(()))
    }
}
