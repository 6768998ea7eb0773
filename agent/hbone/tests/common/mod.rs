//! A mesh of one thread: an authority, a server that dials what it is asked for, applications on loopback.
#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::{
    cell::{Cell, RefCell},
    future::Future,
    io,
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use hbone::{
    Accepted, Config, ConnectRequest, Decision, Handler, IncomingRequest, Live, OpenError, Pool, RelayEnd, TunnelError,
    TunnelKey,
};
use identity::{Authority as _, Clock, Credentials, LocalAuthority, generate_root};
use model::{Authority, Identity, TrustDomain};
use tasks::{DrainMode, DrainTrigger, drain_channel};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc},
    task::LocalSet,
};

pub const CLIENT: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub const SERVER: &str = "spiffe://cluster.local/ns/shop/sa/db";

pub struct Mesh {
    pub authority: LocalAuthority,
    pub domain: TrustDomain,
}

impl Mesh {
    pub fn new() -> Self {
        Self::of("cluster.local")
    }

    pub fn of(domain: &str) -> Self {
        let domain = TrustDomain::new(domain);
        let (certificate, key) = generate_root(&domain).unwrap();
        let authority = LocalAuthority::from_pem(&certificate, &key).unwrap();
        Self { authority, domain }
    }

    pub async fn credentials(&self, identity: &str) -> Arc<Credentials> {
        self.credentials_at(identity, &Clock::system()).await
    }

    pub async fn credentials_at(&self, identity: &str, clock: &Clock) -> Arc<Credentials> {
        let identity: Identity = identity.parse().unwrap();
        let issued = self.authority.issue(&identity).await.unwrap();
        Arc::new(Credentials::new(identity, &self.domain, issued, clock).unwrap())
    }
}

/// What the server has seen; shared by its connections.
#[derive(Default)]
pub struct Seen {
    pub ends: RefCell<Vec<RelayEnd>>,
    pub tunnels: Cell<usize>,
    pub tunnel_ends: RefCell<Vec<Result<(), TunnelError>>>,
    pub peers: RefCell<Vec<Identity>>,
    pub lives: RefCell<Vec<Live>>,
    pub changed: Notify,
}

impl Seen {
    /// Waits for a condition on what was seen.
    pub async fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if condition(self) {
                    return;
                }
                changed.await;
            }
        };
        within(what, wait).await;
    }
}

#[derive(Clone)]
pub struct DialTarget {
    pub seen: Rc<Seen>,
    /// Never answers while set.
    pub stalls: Rc<Cell<bool>>,
}

fn refused(status: u16) -> Decision<()> {
    Decision::Refuse { status, reason: None }
}

impl Handler for DialTarget {
    type Context = ();

    async fn connect(&self, tunnel: &Accepted, request: IncomingRequest) -> Decision<()> {
        self.seen.peers.borrow_mut().push(tunnel.peer.clone());
        if self.stalls.get() {
            std::future::pending::<()>().await;
        }
        let target = match request.authority {
            Ok(Authority::Address(address)) => address,
            Ok(Authority::Host(_, port)) => return refused(port),
            Err(_) => return refused(400),
        };
        match TcpStream::connect(target).await {
            Ok(application) => {
                let live = Live::default();
                self.seen.lives.borrow_mut().push(live.clone());
                self.seen.changed.notify_waiters();
                Decision::Accept {
                    application,
                    headers: vec![("baggage", "service.name=db".into())],
                    context: (),
                    live,
                }
            }
            Err(_) => refused(503),
        }
    }

    fn relayed(&self, (): (), end: RelayEnd) {
        self.seen.ends.borrow_mut().push(end);
        self.seen.changed.notify_waiters();
    }
}

/// A served port.
pub struct Server {
    pub address: SocketAddr,
    pub seen: Rc<Seen>,
    pub stalls: Rc<Cell<bool>>,
    pub drain: DrainTrigger,
}

pub async fn server(credentials: &Credentials, config: &Rc<Config>) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Rc::new(Seen::default());
    let stalls = Rc::new(Cell::new(false));
    let handler = DialTarget {
        seen: seen.clone(),
        stalls: stalls.clone(),
    };
    let tls = credentials.server_config();
    let (trigger, drain) = drain_channel();
    let (config, shown) = (config.clone(), seen.clone());
    tokio::task::spawn_local(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            shown.tunnels.set(shown.tunnels.get() + 1);
            let served = hbone::serve(socket, tls.clone(), config.clone(), handler.clone(), drain.clone());
            let shown = shown.clone();
            tokio::task::spawn_local(async move {
                let end = served.await;
                shown.tunnel_ends.borrow_mut().push(end);
                shown.changed.notify_waiters();
            });
        }
    });
    Server {
        address,
        seen,
        stalls,
        drain: trigger,
    }
}

pub fn dial() -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

pub fn request(target: SocketAddr) -> ConnectRequest {
    ConnectRequest {
        authority: Authority::Address(target),
        headers: vec![("baggage", "service.name=web".into())],
    }
}

/// A client, a server, and the listener of an application behind the server.
pub struct Pair {
    pub mesh: Mesh,
    pub server: Server,
    pub pool: Pool,
    pub key: TunnelKey,
    pub credentials: Arc<Credentials>,
    pub application: TcpListener,
    pub target: SocketAddr,
}

impl Pair {
    pub async fn new() -> Self {
        Self::with(Config::default(), Config::default()).await
    }

    pub async fn with(client: Config, server_config: Config) -> Self {
        let mesh = Mesh::new();
        let server = server(&*mesh.credentials(SERVER).await, &Rc::new(server_config)).await;
        let application = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self {
            key: TunnelKey {
                source: CLIENT.parse().unwrap(),
                destination: vec![SERVER.parse().unwrap()],
                workload: model::WorkloadUid::of_pod("Kubernetes", "shop", "server"),
                address: server.address,
            },
            credentials: mesh.credentials(CLIENT).await,
            pool: Pool::new(Rc::new(client)),
            target: application.local_addr().unwrap(),
            mesh,
            server,
            application,
        }
    }

    pub async fn open(&self) -> Result<hbone::ClientStream, OpenError> {
        self.open_to(self.target).await
    }

    pub async fn open_to(&self, target: SocketAddr) -> Result<hbone::ClientStream, OpenError> {
        self.pool
            .open(&self.key, &self.credentials, dial, request(target))
            .await
    }

    /// One relayed connection: the client's socket, the server's, and how the client's relay ends.
    pub async fn connect(&self) -> (TcpStream, TcpStream, mpsc::UnboundedReceiver<RelayEnd>) {
        let opened = async { self.open().await.unwrap() };
        let accepted = async { self.application.accept().await.unwrap().0 };
        let (stream, server) = tokio::join!(opened, accepted);
        let (client, captured) = socket_pair().await;
        let (sender, ended) = mpsc::unbounded_channel();
        tokio::task::spawn_local(async move {
            let end = stream.relay(captured).await;
            let _ = sender.send(end);
        });
        (client, server, ended)
    }

    pub fn streams(&self) -> usize {
        self.pool.tunnels().iter().map(|tunnel| tunnel.streams).sum()
    }

    pub fn drain(&self, mode: DrainMode) {
        self.server.drain.drain(mode);
    }
}

/// An application that echoes, for as long as the test runs.
pub fn echo(application: TcpListener) {
    tokio::task::spawn_local(async move {
        loop {
            let (mut socket, _) = application.accept().await.unwrap();
            tokio::task::spawn_local(async move {
                let (mut reads, mut writes) = socket.split();
                let _ = tokio::io::copy(&mut reads, &mut writes).await;
                let _ = writes.shutdown().await;
            });
        }
    });
}

pub async fn socket_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (client, server) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (client, server) = (client.unwrap(), server.unwrap().0);
    client.set_nodelay(true).unwrap();
    (client, server)
}

/// Runs a test on a thread of its own kind: current-thread runtime, `LocalSet`.
pub fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    LocalSet::new().block_on(&runtime, test)
}

/// Fails a test that hangs, with what it waited for.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(Duration::from_secs(60), future).await {
        Ok(value) => value,
        Err(_) => panic!("waited in vain for: {what}"),
    }
}

/// Bytes that repeat after 2^64, the same for the same seed.
pub struct Noise(pub u64);

impl Noise {
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            let bytes = self.0.to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }
}
