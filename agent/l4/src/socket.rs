//! What is done to a single socket: options, connecting, resetting.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::descriptors;

/// Why an address could not be connected to.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No socket could be made in the pod's network: our side, not the destination's.
    #[error("no socket could be made in the pod's network: {0}")]
    Socket(#[source] io::Error),
    /// No port is left to dial it from: our side, too.
    #[error(
        "no port is left to connect to {target} from: {source}; net.ipv4.ip_local_port_range of the pod has no more, and \
         each connection to the same address and port takes one"
    )]
    NoPort {
        /// Where to.
        target: SocketAddr,
        /// What the kernel said: EADDRNOTAVAIL.
        #[source]
        source: io::Error,
    },
    /// The destination said no, or the network did.
    #[error("{target} could not be connected to: {source}")]
    Refused {
        /// Where to.
        target: SocketAddr,
        /// What was answered.
        #[source]
        source: io::Error,
    },
    /// Nothing was answered.
    #[error("{target} did not answer within {within:?}")]
    Timeout {
        /// Where to.
        target: SocketAddr,
        /// How long was waited.
        within: Duration,
    },
}

/// Connects a socket that was made for it.
pub(crate) async fn connect(
    socket: io::Result<socket2::Socket>,
    target: SocketAddr,
    within: Duration,
) -> Result<TcpStream, ConnectError> {
    let socket = descriptors::spared(socket).map_err(ConnectError::Socket)?;
    let connecting = TcpSocket::from_std_stream(socket.into()).connect(target);
    match tokio::time::timeout(within, connecting).await {
        Ok(connected) => connected.map_err(|source| match source.kind() {
            io::ErrorKind::AddrNotAvailable => ConnectError::NoPort { target, source },
            _ => ConnectError::Refused { target, source },
        }),
        Err(_) => Err(ConnectError::Timeout { target, within }),
    }
}

/// Two ends of a connection of the agent with itself, for what wants to relay to a socket.
pub(crate) async fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let ours = TcpStream::connect(listener.local_addr()?).await?;
    loop {
        let (theirs, peer) = listener.accept().await?;
        // Somebody else of this machine may have dialled it.
        if peer == ours.local_addr()? {
            ours.set_nodelay(true)?;
            theirs.set_nodelay(true)?;
            return Ok((ours, theirs));
        }
    }
}

/// Closes with a RST, so that the other end sees that this was no orderly end.
pub(crate) fn reset(socket: TcpStream) {
    // Fails only when the socket is no longer connected, and then there is nobody to tell.
    let _ = socket.set_zero_linger();
}

/// A connection that is reset when it is dropped, by a panic too, unless it was kept.
pub(crate) struct ResetOnDrop(Option<TcpStream>);

impl ResetOnDrop {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self(Some(socket))
    }

    /// The socket, to be closed in whatever way the caller sees fit.
    pub(crate) fn keep(mut self) -> TcpStream {
        self.0.take().expect("taken only here, where self ends")
    }
}

impl std::ops::Deref for ResetOnDrop {
    type Target = TcpStream;

    fn deref(&self) -> &TcpStream {
        self.0.as_ref().expect("taken only in keep(), where self ends")
    }
}

impl std::ops::DerefMut for ResetOnDrop {
    fn deref_mut(&mut self) -> &mut TcpStream {
        self.0.as_mut().expect("taken only in keep(), where self ends")
    }
}

impl Drop for ResetOnDrop {
    fn drop(&mut self) {
        if let Some(socket) = self.0.take() {
            reset(socket);
        }
    }
}

/// Sets on a listener what every socket that it accepts shall have: Linux hands these options down, which saves each
/// connection the system calls. Keep-alive as ztunnel has it, so that a peer that vanished is noticed.
pub(crate) fn prepare_listener(listener: &std::net::TcpListener) -> io::Result<()> {
    let listener = SockRef::from(listener);
    listener.set_nonblocking(true)?;
    listener.set_tcp_nodelay(true)?;
    listener.set_tcp_keepalive(&keepalive())
}

/// Keep-alive on a socket that leaves the pod.
pub(crate) fn keep_alive(socket: &TcpStream) -> io::Result<()> {
    SockRef::from(socket).set_tcp_keepalive(&keepalive())
}

fn keepalive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(180))
        .with_interval(Duration::from_secs(180))
        .with_retries(9)
}
