//! The server's end: one accepted TCP connection, its tunnel, and a task for each of its streams.
//!
//! ```text
//!  accept ─> TLS ─> HTTP/2 ─> each CONNECT ─> Handler::connect ─> Accept ─> 200 ─> relay ─> Handler::relayed
//!             └── HandshakeError                    └── Refuse ─> status, END_STREAM
//! ```
//! The 200 is sent only once the application is connected. A graceful drain sends GOAWAY and lets the streams finish;
//! an immediate one, or dropping [`serve`], ends them with resets. The streams' tasks belong to `serve` and end with it.

use std::{
    cell::OnceCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    rc::Rc,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use h2::{
    RecvStream,
    server::{Connection, SendResponse},
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use identity::Proof;
use model::{Authority, AuthorityError, Identity};
use rustls::ServerConfig;
use tasks::{DrainMode, DrainSignal, Group};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};

use crate::{
    Config,
    error::{HandshakeError, RelayError, TunnelError},
    keepalive::KeepAlive,
    reason,
    relay::{Application, Live, RelayEnd, relay},
    tls,
    wire::Flush,
};

/// Who is at the other end of an accepted tunnel.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// From its verified certificate.
    pub peer: Identity,
    /// That certificate: see [`Credentials::still_trusts`](identity::Credentials::still_trusts).
    pub proof: Arc<Proof>,
    /// The tunnel's remote address.
    pub peer_address: SocketAddr,
    /// The tunnel's local address, which it was accepted at.
    pub local_address: SocketAddr,
}

/// One CONNECT.
#[derive(Debug)]
pub struct IncomingRequest {
    /// The target, or why it cannot be read: to be answered with 400.
    pub authority: Result<Authority, AuthorityError>,
    /// The request's headers.
    pub headers: HeaderMap,
}

/// What becomes of a CONNECT.
pub enum Decision<C> {
    /// Answered with 200, and relayed.
    Accept {
        /// The connection to the application.
        application: TcpStream,
        /// Headers of the answer, such as `baggage`. One with control characters in its value is left out.
        headers: Vec<(&'static str, String)>,
        /// Handed back at the end.
        context: C,
        /// The relay's counters, and the means to cut it; `Live::default()` where nobody looks.
        live: Live,
    },
    /// Answered with this status, and over.
    Refuse {
        /// 400 bad target, 401 denied by policy, 503 no connection to the application, or not known whether it may be.
        status: u16,
        /// Why, for the peer's log. What is longer than [`crate::LONGEST_REASON`], or not printable ASCII, is left out.
        reason: Option<String>,
    },
}

/// Decides on each CONNECT of a tunnel, and hears of its end.
pub trait Handler: Clone + 'static {
    /// What it wants to remember from a request until its end.
    type Context: 'static;

    /// Decides, and dials. Dropped when the peer gives the request up meanwhile.
    fn connect(&self, tunnel: &Accepted, request: IncomingRequest) -> impl Future<Output = Decision<Self::Context>>;

    /// Called once for each accepted request, however it ended but by a panic: that drops its context.
    fn relayed(&self, context: Self::Context, end: RelayEnd);

    /// Whose turns the tunnel's streams take; by default nobody's.
    fn group(&self) -> Group {
        Group::default()
    }
}

/// Serves one accepted connection until its end, on the current thread's `LocalSet`. `Ok` after an orderly end.
pub async fn serve<H: Handler>(
    socket: TcpStream,
    tls: Arc<ServerConfig>,
    config: Rc<Config>,
    handler: H,
    mut drain: DrainSignal,
) -> Result<(), TunnelError> {
    let address = |address: io::Result<SocketAddr>| {
        address
            .map(model::canonical_socket)
            .map_err(|error| HandshakeError::Io(Arc::new(error)))
    };
    let (peer_address, local_address) = (address(socket.peer_addr())?, address(socket.local_addr())?);
    let started = tokio::time::Instant::now();
    let mut drained = drain.clone();
    let (transport, wire, peer, proof) = tokio::select! {
        accepted = tls::accept(socket, tls, config.handshake_timeout) => accepted?,
        _ = drained.reached(DrainMode::Immediate) => return Err(TunnelError::Drained),
    };
    let accepted = Accepted {
        peer,
        proof: Arc::new(proof),
        peer_address,
        local_address,
    };
    let left = config.handshake_timeout.saturating_sub(started.elapsed());
    drive(transport, wire, accepted, config, left, handler, &mut drain).await
}

/// [`serve`] without TLS on any stream, for fuzzing and tests.
#[doc(hidden)]
pub async fn serve_plain<H: Handler>(
    io: impl AsyncRead + AsyncWrite + Unpin,
    accepted: Accepted,
    config: Rc<Config>,
    handler: H,
    mut drain: DrainSignal,
) -> Result<(), TunnelError> {
    struct Direct;
    impl Flush for Direct {
        fn begin_turn(&self) {}
        fn poll_flush(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn received(&self) -> u64 {
            0
        }
        fn take_tls_error(&self) -> Option<rustls::Error> {
            None
        }
    }
    let timeout = config.handshake_timeout;
    drive(io, Direct, accepted, config, timeout, handler, &mut drain).await
}

async fn drive<T: AsyncRead + AsyncWrite + Unpin, H: Handler>(
    transport: T,
    flush: impl Flush,
    accepted: Accepted,
    config: Rc<Config>,
    handshake_timeout: std::time::Duration,
    handler: H,
    drain: &mut DrainSignal,
) -> Result<(), TunnelError> {
    let builder = config.server();
    let mut handshake = pin!(builder.handshake::<_, Bytes>(transport));
    let handshake = poll_fn(|cx| {
        let polled = handshake.as_mut().poll(cx);
        // Our SETTINGS may be waiting.
        let _ = flush.poll_flush(cx);
        polled
    });
    let mut connection = tokio::time::timeout(handshake_timeout, handshake)
        .await
        .map_err(|_| HandshakeError::Timeout(config.handshake_timeout))?
        .map_err(|error| HandshakeError::Http2(error.to_string().into()))?;
    let keepalive = KeepAlive::new(config.ping_interval, config.ping_timeout, connection.ping_pong());
    let mut server = Server {
        group: handler.group(),
        connection,
        flush,
        keepalive,
        accepted: Rc::new(accepted),
        config,
        handler,
        streams: JoinSet::new(),
        broke: Rc::default(),
        over: false,
    };
    let mut graceful = pin!(drain.clone_reached(DrainMode::Graceful));
    let mut graceful_seen = false;
    let mut immediate = pin!(drain.reached(DrainMode::Immediate));
    poll_fn(|cx| {
        if immediate.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(TunnelError::Drained));
        }
        if !graceful_seen && graceful.as_mut().poll(cx).is_ready() {
            graceful_seen = true;
            server.connection.graceful_shutdown();
        }
        let polled = server.poll(cx);
        if let Poll::Ready(Err(error)) = &polled {
            let _ = server.broke.set(error.clone());
        }
        polled
    })
    .await
}

/// [`DrainSignal::reached`] on a copy of its own.
trait CloneReached {
    fn clone_reached(&self, mode: DrainMode) -> impl Future<Output = DrainMode> + 'static;
}

impl CloneReached for DrainSignal {
    fn clone_reached(&self, mode: DrainMode) -> impl Future<Output = DrainMode> + 'static {
        let mut signal = self.clone();
        async move { signal.reached(mode).await }
    }
}

type Broke = Rc<OnceCell<TunnelError>>;

struct Server<T, F, H> {
    group: Group,
    connection: Connection<T, Bytes>,
    flush: F,
    keepalive: KeepAlive,
    accepted: Rc<Accepted>,
    config: Rc<Config>,
    handler: H,
    streams: JoinSet<()>,
    /// Why the connection failed; known to the streams, which are dropped with it.
    broke: Broke,
    /// The connection has ended; streams may still have bytes for their applications.
    over: bool,
}

impl<T: AsyncRead + AsyncWrite + Unpin, F: Flush, H: Handler> Server<T, F, H> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TunnelError>> {
        self.flush.begin_turn();
        self.reap(cx);
        while !self.over {
            match self.connection.poll_accept(cx) {
                Poll::Ready(Some(Ok((request, respond)))) => self.start(request, respond),
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Err(TunnelError::new(&error, self.flush.take_tls_error())));
                }
                Poll::Ready(None) => self.over = true,
                Poll::Pending => break,
            }
        }
        if self.over {
            self.reap(cx);
            return if self.streams.is_empty() {
                Poll::Ready(Ok(()))
            } else {
                Poll::Pending
            };
        }
        if let Poll::Ready(Err(error)) = self.flush.poll_flush(cx) {
            return Poll::Ready(Err(TunnelError::Io(error.to_string().into())));
        }
        match self.keepalive.poll_silent(self.flush.received(), cx) {
            Poll::Ready(()) => Poll::Ready(Err(TunnelError::Silent(self.config.ping_timeout))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn start(&mut self, request: Request<RecvStream>, respond: SendResponse<Bytes>) {
        let broke = self.broke.clone();
        let stream = serve_stream(self.handler.clone(), self.accepted.clone(), broke, request, respond);
        self.streams.spawn_local(self.group.fair(stream));
    }

    fn reap(&mut self, cx: &mut Context<'_>) {
        while let Poll::Ready(Some(ended)) = self.streams.poll_join_next(cx) {
            if let Err(error) = ended
                && error.is_panic()
            {
                tracing::error!(peer = %self.accepted.peer, %error, "a stream's task panicked");
            }
        }
    }
}

async fn serve_stream<H: Handler>(
    handler: H,
    accepted: Rc<Accepted>,
    broke: Broke,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, recv) = request.into_parts();
    if head.method != Method::CONNECT {
        tracing::debug!(peer = %accepted.peer, method = %head.method, "refused: not a CONNECT");
        return refuse(&mut respond, 400, None);
    }
    let authority = head
        .uri
        .authority()
        .map(http::uri::Authority::as_str)
        .unwrap_or_default();
    let request = IncomingRequest {
        authority: authority.parse(),
        headers: head.headers,
    };
    // Boxed, and gone before the relay starts: deciding and dialling needs more room than an idle stream should hold.
    let mut connect = Box::pin(handler.connect(&accepted, request));
    let decision = poll_fn(|cx| {
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        connect.as_mut().poll(cx).map(Some)
    });
    let decision = decision.await;
    drop(connect);
    match decision {
        None => {}
        Some(Decision::Refuse { status, reason }) => refuse(&mut respond, status, reason.as_deref()),
        Some(Decision::Accept {
            application,
            headers,
            context,
            live,
        }) => {
            let ending = Ending {
                handler,
                context: Some(context),
                broke,
                live,
            };
            drop(accepted);
            accept(ending, application, headers, respond, recv).await;
        }
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, status: u16, reason: Option<&str>) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    if let Some(reason) = reason.and_then(reason::to_header) {
        response.headers_mut().insert(reason::HEADER, reason);
    }
    // Fails only when the peer has given the request up.
    let _ = respond.send_response(response, true);
}

/// Reports the end to the handler, by being dropped if need be.
struct Ending<H: Handler> {
    handler: H,
    context: Option<H::Context>,
    broke: Broke,
    live: Live,
}

impl<H: Handler> Ending<H> {
    fn end(&mut self, outcome: Result<(), RelayError>) {
        if let Some(context) = self.context.take() {
            self.handler.relayed(context, self.live.end(outcome));
        }
    }
}

impl<H: Handler> Drop for Ending<H> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let why = self.broke.get().map(|error| error.to_string().into());
        self.end(Err(why.map_or(RelayError::Cut, RelayError::TunnelClosed)));
    }
}

fn accept<H: Handler>(
    mut ending: Ending<H>,
    application: TcpStream,
    headers: Vec<(&'static str, String)>,
    mut respond: SendResponse<Bytes>,
    recv: RecvStream,
) -> Pin<Box<dyn Future<Output = ()>>> {
    let mut response = Response::new(());
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().append(name, value);
        }
    }
    let sent = respond.send_response(response, false);
    drop(respond);
    Box::pin(async move {
        let outcome = match sent {
            Ok(send) => relay(application, send, recv, &ending.live).await,
            Err(error) => {
                drop(Application::new(application));
                Err(RelayError::from_h2(&error))
            }
        };
        ending.end(outcome);
    })
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, panic};

    use super::*;

    /// Counts what it hears of.
    #[derive(Clone, Default)]
    struct Counting(Rc<Cell<usize>>);

    impl Handler for Counting {
        type Context = Rc<()>;

        async fn connect(&self, _: &Accepted, _: IncomingRequest) -> Decision<Rc<()>> {
            Decision::Refuse {
                status: 503,
                reason: None,
            }
        }

        fn relayed(&self, _: Rc<()>, _: RelayEnd) {
            self.0.set(self.0.get() + 1);
        }
    }

    #[test]
    fn a_panic_is_not_reported_as_an_end() {
        let (handler, context) = (Counting::default(), Rc::new(()));
        let ending = || Ending {
            handler: handler.clone(),
            context: Some(context.clone()),
            broke: Rc::default(),
            live: Live::default(),
        };
        drop(ending());
        assert_eq!(handler.0.get(), 1);
        let dropped = ending();
        let caught = panic::catch_unwind(panic::AssertUnwindSafe(move || {
            let _dropped = dropped;
            panic!("a bug");
        }));
        assert!(caught.is_err());
        assert_eq!((handler.0.get(), Rc::strong_count(&context)), (1, 1));
    }
}
