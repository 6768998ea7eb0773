//! The gRPC service, and the task of each stream.
//!
//! ```text
//! request ─► admission ─► Authenticate ─► stream task ◄── published states (paced)
//!                                          │   ▲ requests
//!                             frames ▼     │   └─ HTTP/2
//!                             body (at most one response of each view) ─► HTTP/2
//! ```
//! A stream's task is its own: it ends when the client goes, does not acknowledge in time, asks for too much, or when a
//! drain begins (the client is then told to go elsewhere). It holds its session, the state it was last sent, and no
//! queue: what it is not sent yet is in the difference to the newest state.
//!
//! States are published to streams at most every [`Config::pace`] and longer with many clients, so that a busy mesh costs
//! each client a few responses a second and not one for each change; the first change after a pause goes at once. Nothing
//! is served before the cache's first state.
//!
//! Errors say to the client what to do; here they are logged with its node id and address.

use std::{
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use tasks::{DrainMode, DrainSignal};
use tokio::sync::watch;
use tonic::{Status, body::Body, codec::Streaming, server::NamedService, transport};

use super::{
    acknowledged::{Acknowledged, Counters},
    admission::{self, Admission, busy},
    cache::Cache,
    codec::Requests,
    connection::Peer,
    push::Pushes,
    session::{self, Session},
    stream::{Outgoing, Stream},
};

const SERVICE: &str = "envoy.service.discovery.v3.AggregatedDiscoveryService";
const METHOD: &str = "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// Says who opens a stream.
pub trait Authenticate: Send + Sync + 'static {
    /// By the request's headers and the address that it comes from; the refused are told the status.
    fn authenticate<'a>(
        &'a self,
        headers: &'a http::HeaderMap,
        peer: Option<SocketAddr>,
    ) -> BoxFuture<'a, Result<Caller, Status>>;
}

/// Somebody who may listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// For logs and `/debug/syncz`: `namespace/serviceaccount (pod)`, say.
    pub name: String,
}

/// What clients may cost and how long they may take.
#[derive(Clone, Debug)]
pub struct Config {
    /// How many may begin at once.
    pub admission: admission::Limits,
    /// How long a caller's authentication may take.
    pub authenticate: Duration,
    /// How long a client may leave its first request to be waited for, and its first synchronisation keep a place.
    pub first: Duration,
    /// How long a response may stay unacknowledged before the client is dropped.
    pub acknowledge: Duration,
    /// How long the first addresses wait for the client to subscribe to policies, too.
    pub settle: Duration,
    /// The names that a client may subscribe to or report, of each type.
    pub names: usize,
    /// The largest request.
    pub request_bytes: usize,
    /// About how large a response may be.
    pub response_bytes: usize,
    /// The shortest time between two states sent.
    pub pace: Duration,
    /// Added to that for each client.
    pub pace_per_client: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            admission: admission::Limits::default(),
            authenticate: Duration::from_secs(10),
            first: Duration::from_secs(10),
            acknowledge: Duration::from_secs(60),
            settle: Duration::from_millis(20),
            names: 1 << 20,
            request_bytes: 128 << 20,
            response_bytes: 1 << 20,
            pace: Duration::from_millis(5),
            pace_per_client: Duration::from_micros(50),
        }
    }
}

/// The service; cheap to clone.
#[derive(Clone)]
pub struct Discovery(Arc<Shared>);

/// What the streams have in common.
pub(super) struct Shared {
    pub(super) cache: Arc<Cache>,
    pub(super) config: Config,
    pub(super) pushes: Pushes,
    pub(super) acknowledged: Arc<Acknowledged>,
    pub(super) published: watch::Sender<u64>,
    pub(super) drain: DrainSignal,
    authenticate: Arc<dyn Authenticate>,
    admission: Admission,
    streams: AtomicU64,
}

impl Discovery {
    /// Serves a cache until the drain begins. Has to be called on a runtime: it starts the task that paces.
    pub fn start(cache: Arc<Cache>, authenticate: Arc<dyn Authenticate>, config: Config, drain: DrainSignal) -> Self {
        let shared = Arc::new(Shared {
            pushes: Pushes::new(config.response_bytes),
            acknowledged: Arc::default(),
            published: watch::Sender::new(cache.snapshot().generation()),
            admission: Admission::new(config.admission.clone()),
            streams: AtomicU64::new(0),
            cache,
            config,
            drain,
            authenticate,
        });
        tokio::spawn(pace(Arc::clone(&shared)));
        Self(shared)
    }

    /// Which client has what.
    pub fn acknowledged(&self) -> &Arc<Acknowledged> {
        &self.0.acknowledged
    }
}

/// A server with the settings that this service needs, for it and others to be added to. Serve it
/// [`super::Connection`]s.
pub fn transport() -> transport::Server {
    transport::Server::builder()
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(20)))
        // What a client that waits for its turn can make us hold.
        .initial_stream_window_size(256 << 10)
        .initial_connection_window_size(1 << 20)
        .max_concurrent_streams(100)
}

/// Tells the streams of new states, not too often.
async fn pace(shared: Arc<Shared>) {
    let mut generations = shared.cache.watch();
    let mut drain = shared.drain.clone();
    loop {
        let generation = *generations.borrow_and_update();
        shared.published.send_replace(generation);
        let clients = u32::try_from(shared.acknowledged.connected()).unwrap_or(u32::MAX);
        let pause = shared.config.pace + shared.config.pace_per_client * clients;
        let next = async {
            tokio::time::sleep(pause).await;
            generations.changed().await
        };
        tokio::select! {
            changed = next => if changed.is_err() { return },
            _ = drain.reached(DrainMode::Graceful) => return,
        }
    }
}

impl Shared {
    /// Lets a stream in, or says why not.
    async fn open(self: Arc<Self>, request: http::Request<Body>) -> Result<http::Response<Body>, Status> {
        let known = request.extensions().get::<Peer>().cloned();
        let tcp = request.extensions().get::<transport::server::TcpConnectInfo>();
        let address = match &known {
            Some(peer) => Some(peer.address()),
            None => tcp.and_then(transport::server::TcpConnectInfo::remote_addr),
        };
        if self.drain.mode() != DrainMode::Running {
            return Err(leaving());
        }
        if self.cache.snapshot().generation() == 0 {
            return Err(busy("the mesh is not known yet", Duration::from_secs(1)));
        }
        tokio::time::sleep(self.admission.stream(Instant::now())?).await;
        let caller = self.authenticate.authenticate(request.headers(), address);
        let caller = tokio::time::timeout(self.config.authenticate, caller)
            .await
            .map_err(|_| busy("nobody could say in time who you are", Duration::from_secs(1)))?;
        let caller = caller.inspect_err(|status| {
            Counters::count(&self.acknowledged.counters.unauthenticated, 1);
            tracing::warn!(peer = ?address, "xds: refused: {}", status.message());
        })?;
        let waiting = self.admission.queue()?;
        Counters::count(&self.acknowledged.counters.streams, 1);
        let number = self.streams.fetch_add(1, Ordering::Relaxed) + 1;
        let limits = session::Limits {
            names: self.config.names,
            acknowledge: self.config.acknowledge,
            settle: self.config.settle,
        };
        let (outgoing, response) = Outgoing::new(known);
        let requests = Streaming::new_request(Requests, request.into_body(), None, Some(self.config.request_bytes));
        let stream = Stream {
            session: Session::new(number, limits),
            connected: self.acknowledged.connect(number, caller.name.clone(), address),
            outgoing,
            states: self.published.subscribe(),
            label: format!("{} {}", caller.name, address.map(|a| a.to_string()).unwrap_or_default()),
            shared: self,
        };
        tokio::spawn(stream.run(requests, waiting));
        Ok(response)
    }
}

/// What clients are told when this replica ends.
pub(super) fn leaving() -> Status {
    busy("this control plane is going away, connect to another", Duration::ZERO)
}

impl NamedService for Discovery {
    const NAME: &'static str = SERVICE;
}

impl tower::Service<http::Request<Body>> for Discovery {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move {
            if request.uri().path() != METHOD {
                let status = Status::unimplemented("only DeltaAggregatedResources is served");
                return Ok(status.into_http());
            }
            let acknowledged = Arc::clone(&shared.acknowledged);
            Ok(shared.open(request).await.unwrap_or_else(|status| {
                if status.code() == tonic::Code::Unavailable {
                    Counters::count(&acknowledged.counters.turned_away, 1);
                }
                status.into_http()
            }))
        })
    }
}
