//! The client's end: streams to peers, in tunnels that are shared, opened when needed, and reused.
//!
//! ```text
//!  open ─> a tunnel with a free place? ── yes ──> CONNECT ─> 200 ─> ClientStream
//!             │ no                                   └── the tunnel was stale ─> once more, on another
//!             ├── a dial under way with places to spare ──> wait for it, look again
//!             └── dial
//! ```
//! Tunnels are shared by whoever has the same source identity, the same accepted destination identities, the same
//! workload and the same address; whoever knows more of the workloads retires their tunnels ([`Pool::review`]). Opens never wait for each other except for a dial they share. A place is a value: dropping the stream, or
//! the open, gives it back (`counts_return_to_zero`). Credentials with another serial open new tunnels; the old ones
//! take no more streams and close after their last.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    io,
    net::SocketAddr,
    rc::{Rc, Weak},
    sync::Arc,
};

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri};
use identity::{Credentials, Proof};
use model::{Authority, Identity, WorkloadUid};
use tasks::Group;
use tokio::{net::TcpStream, sync::Notify, time::Instant};

use crate::{
    Config, OpenError, TunnelError, reason,
    relay::{Live, RelayEnd, relay},
    tunnel::{self, Slot, Tunnel},
};

/// Whose tunnels may be shared.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct TunnelKey {
    /// Whose certificate is shown.
    pub source: Identity,
    /// Of whom the peer must be one.
    pub destination: Vec<Identity>,
    /// Who stands there: a tunnel to one workload is never taken for another that merely has its address, be their
    /// identity the same.
    pub workload: WorkloadUid,
    /// Where the peer is, usually at port 15008.
    pub address: SocketAddr,
}

/// How it stands with the workload of a tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// New connections may go there.
    Good,
    /// It takes none, or is on its way out: the tunnels that it had when it became so take no more streams.
    Leaving,
    /// It is not there any more, or is another: its tunnels take no more streams.
    Gone,
}

/// What to ask of the peer.
#[derive(Clone, Debug)]
pub struct ConnectRequest {
    /// The target.
    pub authority: Authority,
    /// `baggage`, `forwarded`, `traceparent`, in this order. Names are in lower case.
    pub headers: Vec<(&'static str, String)>,
}

/// A tunnel as a debug view shows it.
#[derive(Clone, Debug)]
pub struct TunnelInfo {
    /// Whose streams go there, and where.
    pub key: TunnelKey,
    /// Streams now.
    pub streams: usize,
    /// Streams at most; 0 once it takes no more.
    pub capacity: usize,
    /// Streams ever.
    pub served: u64,
    /// Since when.
    pub opened: Instant,
    /// The certificate that it was opened with.
    pub serial: String,
}

/// A pod's tunnels on one shard. Cheap to clone; when the last clone is gone, tunnels close after their last stream.
#[derive(Clone)]
pub struct Pool(Rc<State>);

struct State {
    config: Rc<Config>,
    group: Group,
    peers: RefCell<HashMap<TunnelKey, Peer>>,
    draining: Cell<bool>,
}

#[derive(Default)]
struct Peer {
    tunnels: Vec<Rc<Tunnel>>,
    dials: Vec<Rc<Dial>>,
    /// Its workload takes no new connections; said at the last review.
    leaving: Cell<bool>,
}

/// A dial under way, shared by those who wait for its tunnel.
struct Dial {
    serial: String,
    /// No more than the tunnel will have places.
    waiting: Cell<usize>,
    /// Set when it is over: the tunnel's places for those who wait, so that nobody who comes later takes them.
    outcome: RefCell<Option<Result<Vec<Slot>, OpenError>>>,
    over: Notify,
}

/// One who waits for a dial; counted until dropped.
struct Waiting(Rc<Dial>);

impl Pool {
    /// Without any tunnel.
    pub fn new(config: Rc<Config>) -> Self {
        Self::fair(config, Group::default())
    }

    /// Without any tunnel; what its tunnels do takes the turns of this group.
    pub fn fair(config: Rc<Config>, group: Group) -> Self {
        Self(Rc::new(State {
            config,
            group,
            peers: RefCell::default(),
            draining: Cell::new(false),
        }))
    }

    /// Opens a stream, in a tunnel that is there or in a new one, and waits for the peer's answer.
    ///
    /// `dial` makes an unconnected, nonblocking socket in the pod's network namespace; it is called at once if a tunnel
    /// must be dialled, and not kept.
    pub async fn open(
        &self,
        key: &TunnelKey,
        credentials: &Arc<Credentials>,
        dial: impl FnOnce() -> io::Result<socket2::Socket>,
        request: ConnectRequest,
    ) -> Result<ClientStream, OpenError> {
        let request = encode(request)?;
        let mut dial = Some(dial);
        let mut retried = false;
        loop {
            let (slot, fresh) = self.slot(key, credentials, &mut dial).await?;
            match self.connect(key, slot, request.clone()).await {
                Err(OpenError::TunnelClosed { .. }) if !fresh && !retried => retried = true,
                result => return result,
            }
        }
    }

    /// Takes no more streams; tunnels close after their last.
    pub fn drain(&self) {
        self.0.draining.set(true);
        for tunnel in self.all() {
            tunnel.retire();
        }
    }

    /// Ends every tunnel now; their applications see resets.
    pub fn close(&self) {
        self.0.draining.set(true);
        for tunnel in self.all() {
            tunnel.abort();
        }
    }

    /// Retires the tunnels of workloads that are gone, and those that one had when it came to take no new connections;
    /// what lives in them goes on. `judge` is asked once for each key, and must not use the pool.
    pub fn review(&self, judge: impl Fn(&TunnelKey) -> Standing) {
        for (key, peer) in &*self.0.peers.borrow() {
            let standing = judge(key);
            let was_leaving = peer.leaving.replace(standing == Standing::Leaving);
            let retire = match standing {
                Standing::Good => false,
                // Once: what is dialled later was dialled in the knowledge of it, by address.
                Standing::Leaving => !was_leaving,
                Standing::Gone => true,
            };
            if retire {
                peer.tunnels.iter().for_each(|tunnel| tunnel.retire());
            }
        }
    }

    /// The tunnels, retired ones included.
    pub fn tunnels(&self) -> Vec<TunnelInfo> {
        let peers = self.0.peers.borrow();
        let info = |key: &TunnelKey, tunnel: &Rc<Tunnel>| TunnelInfo {
            key: key.clone(),
            streams: tunnel.streams(),
            capacity: tunnel.capacity(),
            served: tunnel.served(),
            opened: tunnel.opened,
            serial: tunnel.credentials.serial().to_owned(),
        };
        let of_peer = |(key, peer): (&TunnelKey, &Peer)| -> Vec<TunnelInfo> {
            peer.tunnels.iter().map(|tunnel| info(key, tunnel)).collect()
        };
        peers.iter().flat_map(of_peer).collect()
    }

    /// Whether there is no tunnel, retired ones included, and no dial under way.
    pub fn is_empty(&self) -> bool {
        self.0.peers.borrow().is_empty()
    }

    fn all(&self) -> Vec<Rc<Tunnel>> {
        let peers = self.0.peers.borrow();
        peers.values().flat_map(|peer| peer.tunnels.iter().cloned()).collect()
    }

    /// A place in a tunnel, and whether that tunnel is new.
    async fn slot(
        &self,
        key: &TunnelKey,
        credentials: &Arc<Credentials>,
        dial: &mut Option<impl FnOnce() -> io::Result<socket2::Socket>>,
    ) -> Result<(Slot, bool), OpenError> {
        loop {
            if self.0.draining.get() {
                return Err(OpenError::Draining);
            }
            if let Some(slot) = self.0.free_slot(key, credentials) {
                return Ok((slot, false));
            }
            let under_way = match self.0.dial_to_share(key, credentials) {
                Some(shared) => shared,
                None => {
                    let make = dial.take().ok_or_else(|| OpenError::TunnelClosed {
                        address: key.address,
                        reason: "its places were taken before it could be used".into(),
                    })?;
                    let socket = make().map_err(|error| OpenError::Socket(Arc::new(error)))?;
                    self.0.start_dial(key, credentials, socket)
                }
            };
            if let Some(slot) = Waiting::new(under_way).place().await? {
                return Ok((slot, true));
            }
        }
    }

    async fn connect(&self, key: &TunnelKey, slot: Slot, request: Request<()>) -> Result<ClientStream, OpenError> {
        let closed = |reason: Arc<str>| OpenError::TunnelClosed {
            address: key.address,
            reason,
        };
        let mut requests = slot.requests().ok_or_else(|| closed("retired".into()))?;
        let failed = |error: &h2::Error| match error.reason() {
            Some(h2::Reason::REFUSED_STREAM) => closed("it takes no more streams".into()),
            Some(reason) if error.is_reset() => OpenError::Reset {
                reason: reason.description().into(),
            },
            _ => match slot.tunnel().end() {
                // With TLS 1.3 the peer looks at our certificate when we have already begun.
                Some(TunnelError::Handshake(source)) => OpenError::Handshake {
                    address: key.address,
                    source,
                },
                Some(end) => closed(end.to_string().into()),
                None => closed(error.to_string().into()),
            },
        };
        let (response, send) = requests.send_request(request, false).map_err(|error| failed(&error))?;
        drop(requests);
        let timeout = self.0.config.response_timeout;
        let response = tokio::time::timeout(timeout, response)
            .await
            .map_err(|_| OpenError::ResponseTimeout(timeout))?;
        let (head, recv) = response.map_err(|error| failed(&error))?.into_parts();
        if head.status != StatusCode::OK {
            let reason = head.headers.get(reason::HEADER).and_then(reason::from_header);
            return Err(OpenError::Refused {
                status: head.status.as_u16(),
                reason: reason.map(Arc::from),
            });
        }
        Ok(ClientStream {
            headers: head.headers,
            send,
            recv,
            slot,
        })
    }
}

impl State {
    /// A place in the first tunnel that has one. Tunnels of other credentials are retired, those that are over removed.
    fn free_slot(&self, key: &TunnelKey, credentials: &Credentials) -> Option<Slot> {
        let peers = self.peers.borrow();
        for tunnel in &peers.get(key)?.tunnels {
            if !credentials.still_trusts(&tunnel.proof) {
                tunnel.retire();
            } else if tunnel.credentials.serial() == credentials.serial() {
                if let Some(slot) = tunnel.slot() {
                    return Some(slot);
                }
            } else if tunnel.credentials.not_before() <= credentials.not_before() {
                tunnel.retire();
            }
        }
        None
    }

    fn dial_to_share(&self, key: &TunnelKey, credentials: &Credentials) -> Option<Rc<Dial>> {
        let peers = self.peers.borrow();
        let limit = self.config.streams_per_tunnel as usize;
        let shareable = |dial: &&Rc<Dial>| dial.serial == credentials.serial() && dial.waiting.get() < limit;
        peers.get(key)?.dials.iter().find(shareable).cloned()
    }

    /// The dial is a task of its own: that one of those who wait gives up must not end it for the others.
    fn start_dial(
        self: &Rc<Self>,
        key: &TunnelKey,
        credentials: &Arc<Credentials>,
        socket: socket2::Socket,
    ) -> Rc<Dial> {
        let dial = Rc::new(Dial {
            serial: credentials.serial().to_owned(),
            waiting: Cell::new(0),
            outcome: RefCell::new(None),
            over: Notify::new(),
        });
        self.peers
            .borrow_mut()
            .entry(key.clone())
            .or_default()
            .dials
            .push(dial.clone());
        let guard = DialGuard {
            pool: Rc::downgrade(self),
            key: key.clone(),
            dial: dial.clone(),
        };
        let (credentials, config, group) = (credentials.clone(), self.config.clone(), self.group.clone());
        tokio::task::spawn_local(self.group.fair(async move {
            let (pool, key) = (guard.pool.clone(), guard.key.clone());
            let ended = move |tunnel: &Weak<Tunnel>| {
                if let Some(pool) = pool.upgrade() {
                    pool.forget(&key, tunnel);
                }
            };
            let dialled = tunnel::dial(socket, &guard.key, credentials, &config, &group, ended).await;
            guard.finish(dialled);
        }));
        dial
    }

    fn forget(&self, key: &TunnelKey, gone: &Weak<Tunnel>) {
        let mut peers = self.peers.borrow_mut();
        if let Some(peer) = peers.get_mut(key) {
            peer.tunnels
                .retain(|tunnel| !std::ptr::eq(Rc::as_ptr(tunnel), gone.as_ptr()));
            if peer.tunnels.is_empty() && peer.dials.is_empty() {
                peers.remove(key);
            }
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        for tunnel in self.peers.get_mut().values().flat_map(|peer| &peer.tunnels) {
            tunnel.retire();
        }
    }
}

impl Waiting {
    fn new(dial: Rc<Dial>) -> Self {
        dial.waiting.set(dial.waiting.get() + 1);
        Self(dial)
    }

    /// A place in the tunnel; `None` if the peer allows too few.
    async fn place(&self) -> Result<Option<Slot>, OpenError> {
        loop {
            let over = self.0.over.notified();
            match &mut *self.0.outcome.borrow_mut() {
                Some(Ok(places)) => return Ok(places.pop()),
                Some(Err(error)) => return Err(error.clone()),
                None => {}
            }
            over.await;
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
        // Who gave up leaves a place that nobody would take.
        if let Some(Ok(places)) = &mut *self.0.outcome.borrow_mut() {
            places.truncate(self.0.waiting.get());
        }
    }
}

/// Ends the dial for those who wait, however its task ends.
struct DialGuard {
    pool: Weak<State>,
    key: TunnelKey,
    dial: Rc<Dial>,
}

impl DialGuard {
    fn finish(self, dialled: Result<Rc<Tunnel>, OpenError>) {
        let outcome = match (dialled, self.pool.upgrade()) {
            (Ok(tunnel), Some(pool)) => {
                if pool.draining.get() {
                    tunnel.retire();
                }
                let places = (0..self.dial.waiting.get()).map_while(|_| tunnel.slot()).collect();
                let mut peers = pool.peers.borrow_mut();
                peers.entry(self.key.clone()).or_default().tunnels.push(tunnel);
                Ok(places)
            }
            (Ok(tunnel), None) => {
                tunnel.retire();
                Err(OpenError::Draining)
            }
            (Err(error), _) => Err(error),
        };
        self.dial.outcome.replace(Some(outcome));
    }
}

impl Drop for DialGuard {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.upgrade() {
            let mut peers = pool.peers.borrow_mut();
            if let Some(peer) = peers.get_mut(&self.key) {
                peer.dials.retain(|dial| !Rc::ptr_eq(dial, &self.dial));
                if peer.tunnels.is_empty() && peer.dials.is_empty() {
                    peers.remove(&self.key);
                }
            }
        }
        self.dial.outcome.borrow_mut().get_or_insert(Err(OpenError::Draining));
        self.dial.over.notify_waiters();
    }
}

fn encode(request: ConnectRequest) -> Result<Request<()>, OpenError> {
    let unusable = |error: &dyn std::fmt::Display| OpenError::Request(error.to_string().into());
    let authority =
        http::uri::Authority::from_maybe_shared(request.authority.to_string()).map_err(|error| unusable(&error))?;
    let mut parts = http::uri::Parts::default();
    parts.authority = Some(authority);
    let uri = Uri::from_parts(parts).map_err(|error| unusable(&error))?;
    let mut encoded = Request::new(());
    *encoded.method_mut() = Method::CONNECT;
    *encoded.uri_mut() = uri;
    for (name, value) in request.headers {
        let value = HeaderValue::try_from(value).map_err(|error| unusable(&error))?;
        encoded.headers_mut().append(HeaderName::from_static(name), value);
    }
    Ok(encoded)
}

/// A stream that the peer has accepted. Dropped without [`relay`](Self::relay), it is reset.
pub struct ClientStream {
    headers: HeaderMap,
    send: SendStream<Bytes>,
    recv: RecvStream,
    slot: Slot,
}

impl ClientStream {
    /// What the peer proved itself by.
    pub fn proof(&self) -> Arc<Proof> {
        self.slot.tunnel().proof.clone()
    }

    /// Of the peer's 200; `baggage` says which workload it is.
    pub fn response_headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Copies both ways between the stream and an application's connection, until both have ended or one failed.
    /// Dropping the future resets both. Without TCP_NODELAY on the connection, what is small may come late.
    pub async fn relay(self, application: TcpStream) -> RelayEnd {
        self.relay_watched(application, Live::default()).await
    }

    /// [`relay`](Self::relay), seen and cut through `live`.
    pub fn relay_watched(self, application: TcpStream, live: Live) -> impl Future<Output = RelayEnd> {
        let Self { send, recv, slot, .. } = self;
        async move {
            let _slot = slot;
            let outcome = relay(application, send, recv, &live).await;
            live.end(outcome)
        }
    }
}
