//! Listeners and connections.
//!
//! ```text
//! listener ─► permit ─► TLS ─► HTTP/2 or HTTP/1.1 ─► Api::answer
//! ```
//! One task per listener and per connection; all end with [`Front::stop`]: watches end, requests under way are finished
//! for [`GRACE`], then connections are cut. Connections, headers, streams, handshakes and idle peers are bounded here,
//! bodies in `call`, watches in `dispatch`: by [`Limits`] (`tests/limits.rs`).

use std::{
    convert::Infallible,
    io,
    net::{SocketAddr, TcpListener as StdListener},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
};
use tasks::{Backoff, DrainMode, DrainSignal, DrainTrigger, drain_channel};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};
use tokio_rustls::TlsAcceptor;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::dispatch::Api;
use crate::{
    auth::{
        certs::{Authority, CertificateError, Pair, token_key},
        kubeconfig::{administrator, kubeconfig},
        review::Accounts,
        rules::User,
        tokens::Tokens,
    },
    engine::Engine,
};

/// What one server gives its clients at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How many connections there may be at once; more wait in the kernel's queue.
    pub connections: usize,
    /// How many requests, watches among them, one connection may have under way.
    pub streams: u32,
    /// How many watches there may be at once; more are a 429.
    pub watches: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
    /// How long a client may take for its first request, and in HTTP/1.1 for the head of each, also between two.
    pub head: Duration,
    /// How long a client may take for the body of a request; then it is a 408.
    pub body: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 8 << 10,
            streams: 1000,
            watches: 16 << 10,
            handshake: Duration::from_secs(10),
            head: Duration::from_secs(120),
            body: Duration::from_secs(30),
        }
    }
}

/// The most bytes of headers.
const HEADERS: u32 = 64 << 10;
/// How often an HTTP/2 peer is asked whether it is there, and how long it may take to say so.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(15);
/// How long requests that are under way may take once the server is told to stop.
pub const GRACE: Duration = Duration::from_secs(5);

/// What the front is told at start.
#[derive(Debug)]
pub struct Config {
    /// The data directory: keys and certificates are in its `pki/`.
    pub directory: PathBuf,
    /// Where to listen.
    pub listeners: Vec<StdListener>,
    /// Names of the server besides `localhost` and `kubernetes.default.svc`: DNS names and addresses.
    pub names: Vec<String>,
    /// What clients get at most.
    pub limits: Limits,
}

/// Why the server can't start.
#[derive(Debug, thiserror::Error)]
pub enum FrontError {
    /// Keys or certificates.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A listener.
    #[error("cannot listen: {0}")]
    Listen(#[from] io::Error),
}

/// The running front.
pub struct Front {
    authority: Authority,
    administrator: Pair,
    addresses: Vec<SocketAddr>,
    trigger: DrainTrigger,
}

impl Front {
    /// Starts to answer from this engine; needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// [`FrontError`] says which file or listener, and why.
    pub fn start(config: Config, engine: Engine) -> Result<Self, FrontError> {
        let authority = Authority::open(&config.directory)?;
        let tokens = Tokens::new(&token_key(&config.directory)?);
        let tls = TlsAcceptor::from(Arc::new(authority.server_config(&config.names)?));
        let (trigger, drain) = drain_channel();
        let accounts = Accounts::new(engine.clone(), Arc::new(tokens));
        let api = Arc::new(Api::new(engine, accounts, drain.clone(), &config.limits));
        let connections = Arc::new(Semaphore::new(config.limits.connections));
        let mut addresses = Vec::new();
        for listener in config.listeners {
            listener.set_nonblocking(true)?;
            addresses.push(listener.local_addr()?);
            let accepting = Accepting {
                listener: TcpListener::from_std(listener)?,
                tls: tls.clone(),
                api: api.clone(),
                connections: connections.clone(),
                limits: config.limits,
                drain: drain.clone(),
            };
            tokio::spawn(accepting.run());
        }
        Ok(Self {
            administrator: administrator(&authority)?,
            authority,
            addresses,
            trigger,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// The certificate that signed the server's own, as PEM.
    pub fn ca_pem(&self) -> String {
        self.authority.certificate_pem()
    }

    /// A kubeconfig for the administrator of the server at this URL.
    pub fn kubeconfig(&self, url: &str) -> String {
        kubeconfig(&self.authority, &self.administrator, url)
    }

    /// Ends watches, finishes what is under way, and closes.
    pub async fn stop(self) {
        self.trigger.drain(DrainMode::Graceful);
        if timeout(GRACE, self.trigger.ended()).await.is_err() {
            self.trigger.drain(DrainMode::Immediate);
            self.trigger.ended().await;
        }
    }
}

/// One listener's task.
struct Accepting {
    listener: TcpListener,
    tls: TlsAcceptor,
    api: Arc<Api>,
    connections: Arc<Semaphore>,
    limits: Limits,
    drain: DrainSignal,
}

impl Accepting {
    async fn run(mut self) {
        // Out of descriptors, most of all: they come back when connections end.
        let mut pause = Backoff::new(Duration::from_millis(10), Duration::from_secs(1));
        loop {
            let connections = self.connections.clone();
            let listener = &self.listener;
            let next = async {
                // The semaphore is never closed.
                let permit = connections.acquire_owned().await.map_err(io::Error::other)?;
                let (stream, peer) = listener.accept().await?;
                Ok::<_, io::Error>((permit, stream, peer))
            };
            let accepted = tokio::select! {
                _ = self.drain.reached(DrainMode::Graceful) => return,
                accepted = next => accepted,
            };
            match accepted {
                Ok((permit, stream, peer)) => {
                    pause.reset();
                    let connection = Connection {
                        tls: self.tls.clone(),
                        api: self.api.clone(),
                        limits: self.limits,
                        drain: self.drain.clone(),
                        _permit: permit,
                    };
                    let connection = connection.run(stream);
                    tokio::spawn(async move {
                        if let Err(error) = connection.await {
                            tracing::debug!(%peer, error, "a connection ended");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(pause.next(512)).await;
                }
            }
        }
    }
}

/// One connection's task.
struct Connection {
    tls: TlsAcceptor,
    api: Arc<Api>,
    limits: Limits,
    drain: DrainSignal,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// From its handshake to its end.
    async fn run(mut self, stream: TcpStream) -> Result<(), String> {
        // Small events are to leave at once.
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        let stream = tokio::select! {
            _ = self.drain.reached(DrainMode::Graceful) => return Ok(()),
            stream = timeout(self.limits.handshake, self.tls.accept(stream)) => stream,
        };
        let stream = stream
            .map_err(|_| "no handshake in time".to_owned())?
            .map_err(|error| format!("handshake: {error}"))?;
        let certificates = stream.get_ref().1.peer_certificates();
        let peer = certificates
            .and_then(|chain| chain.first())
            .and_then(|leaf| user_of(leaf))
            .map(Arc::new);
        let api = self.api;
        let asked = Arc::new(AtomicBool::new(false));
        // Who never asks anything shall not keep the place. hyper has no limit of its own for that in HTTP/2.
        let silent = {
            let (asked, within) = (asked.clone(), self.limits.head);
            async move {
                tokio::time::sleep(within).await;
                if asked.load(Relaxed) {
                    std::future::pending::<()>().await;
                }
            }
        };
        let service = service_fn(move |request| {
            asked.store(true, Relaxed);
            let (api, peer) = (api.clone(), peer.clone());
            async move { Ok::<_, Infallible>(api.answer(peer.as_deref(), request).await) }
        });
        let builder = builder(&self.limits);
        let mut connection = std::pin::pin!(builder.serve_connection(TokioIo::new(stream), service));
        tokio::select! {
            ended = connection.as_mut() => return ended.map_err(|error| error.to_string()),
            () = silent => return Err("no request in time".to_owned()),
            _ = self.drain.reached(DrainMode::Graceful) => connection.as_mut().graceful_shutdown(),
        }
        tokio::select! {
            ended = connection.as_mut() => ended.map_err(|error| error.to_string()),
            _ = self.drain.reached(DrainMode::Immediate) => Err("cut: the server stops".to_owned()),
        }
    }
}

fn builder(limits: &Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(HEADERS as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(HEADERS)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PONG);
    builder
}

/// Who a client certificate, already verified, says that the client is.
fn user_of(leaf: &[u8]) -> Option<User> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let subject = certificate.subject();
    let name = subject.iter_common_name().next()?.as_str().ok()?.to_owned();
    let organizations = subject.iter_organization();
    let organizations = organizations
        .filter_map(|one| one.as_str().ok().map(str::to_owned))
        .collect();
    Some(User::from_certificate(name, organizations))
}
