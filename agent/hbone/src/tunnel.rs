//! A client's tunnel: dialled, driven by a task of its own, and counted by its streams.
//!
//! ```text
//!  dial ─> open ──takes streams──> retired (GOAWAY, rotation, drain, idle) ──last stream ends──> closed
//!            └───────────────────── broken ─────────────────────────────────────────────────────> closed
//! ```

use std::{
    cell::{Cell, OnceCell, RefCell},
    future::poll_fn,
    io,
    pin::pin,
    rc::{Rc, Weak},
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use h2::client::{Connection, SendRequest};
use identity::{Credentials, Proof};
use tasks::Group;
use tokio::{
    net::{TcpSocket, TcpStream},
    task::AbortHandle,
    time::{Instant, Sleep},
};

use crate::{
    Config, OpenError, TunnelKey,
    error::{HandshakeError, TunnelError},
    keepalive::KeepAlive,
    tls::{self, Transport},
    wire::{Flush, Wire},
};

/// A client's tunnel, shared by the pool, its driver and its streams.
pub(crate) struct Tunnel {
    /// Taken away when it is retired: h2 then closes the connection after the last stream.
    requests: RefCell<Option<SendRequest<Bytes>>>,
    pub(crate) credentials: Arc<Credentials>,
    pub(crate) proof: Arc<Proof>,
    pub(crate) opened: Instant,
    limit: usize,
    streams: Cell<usize>,
    served: Cell<u64>,
    /// Since when it has no stream.
    idle_since: Cell<Instant>,
    /// Why it ended.
    end: OnceCell<TunnelError>,
    /// The driver's, woken when the tunnel becomes idle or retired.
    driver: RefCell<Option<Waker>>,
    task: OnceCell<AbortHandle>,
}

/// One stream's place in a tunnel, given back when dropped.
pub(crate) struct Slot(Rc<Tunnel>);

impl Tunnel {
    /// A place for one more stream, if there is one.
    pub(crate) fn slot(self: &Rc<Self>) -> Option<Slot> {
        if self.streams.get() >= self.capacity() || !self.is_usable() {
            return None;
        }
        self.streams.set(self.streams.get() + 1);
        self.served.set(self.served.get() + 1);
        Some(Slot(self.clone()))
    }

    /// Streams it takes at the same time: our limit, or the peer's where that is less.
    pub(crate) fn capacity(&self) -> usize {
        match &*self.requests.borrow() {
            Some(requests) => requests.current_max_send_streams().min(self.limit),
            None => 0,
        }
    }

    /// Streams it has now.
    pub(crate) fn streams(&self) -> usize {
        self.streams.get()
    }

    /// Streams it ever had.
    pub(crate) fn served(&self) -> u64 {
        self.served.get()
    }

    /// Whether it takes streams: not retired, no GOAWAY came, not broken. Retires it otherwise.
    pub(crate) fn is_usable(&self) -> bool {
        let usable = match &mut *self.requests.borrow_mut() {
            Some(requests) => {
                let ready = requests.poll_ready(&mut Context::from_waker(Waker::noop()));
                !matches!(ready, Poll::Ready(Err(_)))
            }
            None => return false,
        };
        if !usable {
            self.retire();
        }
        usable
    }

    /// Takes no more streams; closes after the last.
    pub(crate) fn retire(&self) {
        drop(self.requests.borrow_mut().take());
        self.wake_driver();
    }

    /// Ends it now: its streams see a broken tunnel.
    pub(crate) fn abort(&self) {
        self.retire();
        if let Some(task) = self.task.get() {
            task.abort();
        }
    }

    /// Why it ended, if it has.
    pub(crate) fn end(&self) -> Option<TunnelError> {
        self.end.get().cloned()
    }

    fn wake_driver(&self) {
        if let Some(waker) = &*self.driver.borrow() {
            waker.wake_by_ref();
        }
    }
}

impl Slot {
    pub(crate) fn tunnel(&self) -> &Rc<Tunnel> {
        &self.0
    }

    /// h2's handle for one request.
    pub(crate) fn requests(&self) -> Option<SendRequest<Bytes>> {
        self.0.requests.borrow().clone()
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let left = self.0.streams.get() - 1;
        self.0.streams.set(left);
        if left == 0 {
            self.0.idle_since.set(Instant::now());
        }
    }
}

/// Dials `key`'s address and shakes hands; spawns the driver, which calls `ended` when the tunnel is over.
pub(crate) async fn dial(
    socket: socket2::Socket,
    key: &TunnelKey,
    credentials: Arc<Credentials>,
    config: &Rc<Config>,
    group: &Group,
    ended: impl FnOnce(&Weak<Tunnel>) + 'static,
) -> Result<Rc<Tunnel>, OpenError> {
    let address = key.address;
    let handshake = |source| OpenError::Handshake { address, source };
    let socket = connect(socket, key, config).await?;
    let timeout = config.handshake_timeout;
    let shake = async {
        let (transport, wire, proof) =
            tls::connect(socket, address, credentials.client_config(&key.destination)).await?;
        let (requests, connection) = config
            .client()
            .handshake::<_, Bytes>(transport)
            .await
            .map_err(|error| HandshakeError::Http2(error.to_string().into()))?;
        Ok((requests, connection, wire, proof))
    };
    let (requests, connection, wire, proof) = tokio::time::timeout(timeout, shake)
        .await
        .map_err(|_| handshake(HandshakeError::Timeout(timeout)))?
        .map_err(handshake)?;
    let tunnel = Rc::new(Tunnel {
        requests: RefCell::new(Some(requests)),
        credentials,
        proof: Arc::new(proof),
        opened: Instant::now(),
        limit: config.streams_per_tunnel as usize,
        streams: Cell::new(0),
        served: Cell::new(0),
        idle_since: Cell::new(Instant::now()),
        end: OnceCell::new(),
        driver: RefCell::new(None),
        task: OnceCell::new(),
    });
    spawn_driver(&tunnel, connection, wire, config.clone(), group, ended);
    Ok(tunnel)
}

async fn connect(socket: socket2::Socket, key: &TunnelKey, config: &Config) -> Result<TcpStream, OpenError> {
    let address = key.address;
    let failed = |source: io::Error| OpenError::Dial {
        address,
        source: Arc::new(source),
    };
    let socket = TcpSocket::from_std_stream(socket.into());
    tokio::time::timeout(config.connect_timeout, socket.connect(address))
        .await
        .map_err(|_| OpenError::ConnectTimeout {
            address,
            after: config.connect_timeout,
        })?
        .map_err(failed)
}

fn spawn_driver(
    tunnel: &Rc<Tunnel>,
    connection: Connection<Transport, Bytes>,
    wire: Wire,
    config: Rc<Config>,
    group: &Group,
    ended: impl FnOnce(&Weak<Tunnel>) + 'static,
) {
    /// However the driver ends, by a panic or an abort too, the tunnel is known to be over.
    struct Over<E: FnOnce(&Weak<Tunnel>)>(Weak<Tunnel>, Option<E>, TunnelError);
    impl<E: FnOnce(&Weak<Tunnel>)> Drop for Over<E> {
        fn drop(&mut self) {
            if let Some(tunnel) = self.0.upgrade() {
                let _ = tunnel.end.set(self.2.clone());
                tunnel.retire();
            }
            if let Some(ended) = self.1.take() {
                ended(&self.0);
            }
        }
    }
    let weak = Rc::downgrade(tunnel);
    let task = tokio::task::spawn_local(group.fair(async move {
        let mut over = Over(weak.clone(), Some(ended), TunnelError::Drained);
        over.2 = match drive(weak, connection, wire, &config).await {
            Ok(()) => TunnelError::Io("closed by the peer".into()),
            Err(error) => {
                tracing::debug!(%error, "tunnel broke");
                error
            }
        };
    }));
    // Just made, so nothing is in it yet.
    let _ = tunnel.task.set(task.abort_handle());
}

async fn drive(
    tunnel: Weak<Tunnel>,
    mut connection: Connection<Transport, Bytes>,
    wire: Wire,
    config: &Config,
) -> Result<(), TunnelError> {
    let mut keepalive = KeepAlive::new(config.ping_interval, config.ping_timeout, connection.ping_pong());
    let mut idle = pin!(tokio::time::sleep(config.idle_timeout));
    let mut connection = pin!(connection);
    poll_fn(|cx| {
        wire.begin_turn();
        if let Some(tunnel) = tunnel.upgrade() {
            tunnel.poll_idle(idle.as_mut(), config, cx);
        }
        if let Poll::Ready(ended) = connection.as_mut().poll(cx) {
            return Poll::Ready(ended.map_err(|error| TunnelError::new(&error, wire.take_tls_error())));
        }
        if let Poll::Ready(Err(error)) = wire.poll_flush(cx) {
            return Poll::Ready(Err(TunnelError::Io(error.to_string().into())));
        }
        match keepalive.poll_silent(wire.received(), cx) {
            Poll::Ready(()) => Poll::Ready(Err(TunnelError::Silent(config.ping_timeout))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

impl Tunnel {
    /// Retires the tunnel after `idle_timeout` without a stream.
    fn poll_idle(&self, mut timer: std::pin::Pin<&mut Sleep>, config: &Config, cx: &mut Context<'_>) {
        let mut driver = self.driver.borrow_mut();
        if !driver.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *driver = Some(cx.waker().clone());
        }
        drop(driver);
        while timer.as_mut().poll(cx).is_ready() {
            let idle = match self.streams.get() {
                0 => self.idle_since.get().elapsed(),
                _ => std::time::Duration::ZERO,
            };
            if idle >= config.idle_timeout {
                drop(self.requests.borrow_mut().take());
                return;
            }
            timer.as_mut().reset(Instant::now() + (config.idle_timeout - idle));
        }
    }
}
