//! The server: listeners and what each of them speaks.

use std::{io, net::SocketAddr, str::FromStr, time::Duration};

use anyhow::{Context, Result, bail};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream, UdpSocket},
    task::JoinSet,
};

use super::{http, tcp, udp};

/// Options of `app serve`.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct ServeArgs {
    /// HTTP/1.1, HTTP/2 without TLS, gRPC (any unary method: echo) and WebSocket, all on this port. `/echo` answers with the
    /// request's body, `/status/NNN` with that status, anything else with a report.
    #[arg(long, value_name = "PORT")]
    http: Vec<u16>,
    /// TCP. MODE is echo (the default), greet (the server speaks first, then echoes), report (reads to the end, then says
    /// what it saw), farewell (says something, half-closes, and reads on), reset (resets after the first byte), mute
    /// (never reads), flood (writes without end).
    #[arg(long, value_name = "PORT[=MODE]")]
    tcp: Vec<TcpPort>,
    /// UDP: each datagram comes back.
    #[arg(long, value_name = "PORT")]
    udp: Vec<u16>,
}

#[derive(Clone, Copy, Debug)]
struct TcpPort {
    port: u16,
    mode: tcp::Mode,
}

impl FromStr for TcpPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (port, mode) = text.split_once('=').unwrap_or((text, "echo"));
        Ok(Self {
            port: port.parse().map_err(|_| format!("{port:?} is not a port"))?,
            mode: clap::ValueEnum::from_str(mode, true)?,
        })
    }
}

pub(super) async fn run(args: ServeArgs) -> Result<()> {
    let mut tasks = JoinSet::new();
    for port in args.http {
        let listener = listen(port)?;
        tasks.spawn(accept(listener, http::serve));
    }
    for TcpPort { port, mode } in args.tcp {
        let listener = listen(port)?;
        tasks.spawn(accept(listener, move |stream, peer, local| {
            tcp::serve(stream, peer, local, mode)
        }));
    }
    for port in args.udp {
        let socket = bind(port, Type::DGRAM, Protocol::UDP).with_context(|| format!("cannot bind UDP port {port}"))?;
        let socket = UdpSocket::from_std(socket.into()).context("cannot use the socket")?;
        tasks.spawn(udp::serve(socket));
    }
    if tasks.is_empty() {
        bail!("nothing to serve: give --http, --tcp or --udp");
    }
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        ended = tasks.join_next() => match ended {
            Some(Ok(result)) => result,
            Some(Err(panic)) => Err(panic.into()),
            None => Ok(()),
        },
    }
}

fn listen(port: u16) -> Result<TcpListener> {
    let listen = || {
        let socket = bind(port, Type::STREAM, Protocol::TCP)?;
        socket.listen(4096)?;
        TcpListener::from_std(socket.into())
    };
    listen().with_context(|| format!("cannot listen on port {port}"))
}

/// On all addresses of both IP versions, or of IPv4 where there is no other.
fn bind(port: u16, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let bind = |domain: Domain, address: SocketAddr| {
        let socket = Socket::new(domain, kind, Some(protocol))?;
        if domain == Domain::IPV6 {
            socket.set_only_v6(false)?;
        }
        if kind == Type::STREAM {
            socket.set_reuse_address(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok::<_, io::Error>(socket)
    };
    match bind(Domain::IPV6, SocketAddr::from(([0; 16], port))) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => bind(Domain::IPV4, SocketAddr::from(([0; 4], port))),
        result => result,
    }
}

/// Every connection is a task of its own, which ends with it.
async fn accept<F, T>(listener: TcpListener, serve: F) -> Result<()>
where
    F: Fn(TcpStream, SocketAddr, SocketAddr) -> T + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    loop {
        let accepted = listener.accept().await.and_then(|(stream, peer)| {
            // Small answers should not wait for more.
            stream.set_nodelay(true)?;
            let local = stream.local_addr()?;
            Ok((stream, peer, local))
        });
        match accepted {
            Ok((stream, peer, local)) => drop(tokio::spawn(serve(stream, peer, local))),
            // Out of descriptors, or the peer is gone already.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}
