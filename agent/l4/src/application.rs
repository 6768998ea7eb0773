//! The pod's application is dialled, from the client's address and a port that the client does not use itself.
//!
//! ```text
//! a port above the usual range ── taken ──► another … ── all taken ──► whichever the kernel chooses
//! ```
//! The application's socket has the client's address, and in the pod's network a SYN with the same ends is that socket's.
//! A client that comes by itself, in plaintext, because the pod or the client left the mesh or was never in it, would be
//! answered by nobody while the other connection lives. So ports are those that no client with the usual settings has;
//! with more connections at once from one client to one port of the pod than there are, about 4,500, the others share the
//! clients' own range (`a_client_has_a_port_however_many_connections_it_has`).
//!
//! Chosen here and not by the kernel, a port in TIME_WAIT can be used again at once, and nobody searches for one.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpStream;

use crate::{
    connection::Connection,
    socket::{self, ConnectError},
};

/// Above Linux's default range for clients, 32768 to 60999.
const FIRST: u16 = 61000;
const COUNT: u64 = (u16::MAX - FIRST) as u64 + 1;
/// How many are tried before the kernel is asked for any. With 2,000 connections one in a million comes to that.
const TRIES: usize = 16;

/// Connects to the application from this address.
pub(crate) async fn dial(
    connection: &Connection,
    target: SocketAddr,
    source: IpAddr,
) -> Result<TcpStream, ConnectError> {
    let within = connection.shard.config.connect_timeout;
    let from = async |port: u16| {
        let socket = connection
            .pod
            .sockets
            .inbound_socket(target, SocketAddr::new(source, port));
        socket::connect(socket, target, within).await
    };
    from_a_free_port(|| connection.shard.random(), from).await
}

async fn from_a_free_port<T>(
    random: impl Fn() -> u64,
    from: impl AsyncFn(u16) -> Result<T, ConnectError>,
) -> Result<T, ConnectError> {
    for _ in 0..TRIES {
        let port = FIRST + u16::try_from(random() % COUNT).unwrap_or_default();
        match from(port).await {
            Err(error) if is_taken(&error) => {}
            outcome => return outcome,
        }
    }
    from(0).await
}

/// Whether another port may do.
fn is_taken(error: &ConnectError) -> bool {
    match error {
        ConnectError::Socket(error) => error.kind() == io::ErrorKind::AddrInUse,
        ConnectError::NoPort { .. } => true,
        ConnectError::Refused { .. } | ConnectError::Timeout { .. } => false,
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use futures_util::FutureExt;

    use super::*;

    fn taken() -> ConnectError {
        ConnectError::NoPort {
            target: ([127, 0, 0, 1], 80).into(),
            source: io::ErrorKind::AddrNotAvailable.into(),
        }
    }

    /// The ports that were tried, with each answered by `answer`, and what came of it.
    fn tried(answer: impl Fn(u16) -> Result<u16, ConnectError>) -> (Vec<u16>, Result<u16, ConnectError>) {
        let (ports, next) = (RefCell::new(Vec::new()), Cell::new(u64::MAX - 3));
        let from = async |port| {
            ports.borrow_mut().push(port);
            answer(port)
        };
        let outcome = from_a_free_port(|| next.replace(next.get().wrapping_add(1)), from)
            .now_or_never()
            .expect("nothing waits");
        (ports.into_inner(), outcome)
    }

    #[test]
    fn no_port_is_that_of_a_usual_client() {
        let (ports, outcome) = tried(Ok);
        assert!(ports.len() == 1 && outcome.unwrap() >= FIRST);
    }

    #[test]
    fn a_client_has_a_port_however_many_connections_it_has() {
        let (ports, outcome) = tried(|port| if port == 0 { Ok(40_000) } else { Err(taken()) });
        assert!(
            ports.len() == TRIES + 1 && ports[..TRIES].iter().all(|port| *port >= FIRST),
            "{ports:?}"
        );
        assert_eq!(outcome.unwrap(), 40_000);
    }

    #[test]
    fn another_port_is_tried_where_that_may_help_and_only_there() {
        let bound = || ConnectError::Socket(io::ErrorKind::AddrInUse.into());
        let nth = Cell::new(0);
        let (ports, outcome) = tried(|port| {
            nth.set(nth.get() + 1);
            if nth.get() < 3 { Err(bound()) } else { Ok(port) }
        });
        assert!(ports.len() == 3 && outcome.is_ok());
        let (ports, outcome) = tried(|_| Err(ConnectError::Socket(io::ErrorKind::PermissionDenied.into())));
        assert!(ports.len() == 1 && outcome.is_err());
    }
}
