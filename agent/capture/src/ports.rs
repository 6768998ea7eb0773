//! Source ports that no client with the usual settings has.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU16, Ordering},
};

use socket2::Socket;

/// Above Linux's default range for clients, 32768 to 60999.
const FIRST: u16 = 61000;
const COUNT: u16 = u16::MAX - FIRST;
/// How many are tried before the kernel is asked for any.
const TRIES: u16 = 32;

/// Hands out ports in turn. A client's own plaintext connection to the pod, and the agent's from the same address to the
/// application, would otherwise now and then have the same ends.
#[derive(Debug, Default)]
pub(crate) struct PortsBeside(AtomicU16);

impl PortsBeside {
    /// Binds to one of them. False: the next few are all taken.
    pub(crate) fn bind(&self, socket: &Socket, source: IpAddr) -> io::Result<bool> {
        for _ in 0..TRIES {
            let port = FIRST + self.0.fetch_add(1, Ordering::Relaxed) % COUNT;
            match socket.bind(&SocketAddr::new(source, port).into()) {
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                result => return result.map(|()| true),
            }
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Protocol, Type};

    use super::*;

    #[test]
    fn no_port_is_that_of_a_usual_client() {
        let ports = PortsBeside(AtomicU16::new(u16::MAX - 1));
        for _ in 0..3 {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
            assert!(ports.bind(&socket, "127.0.0.1".parse().unwrap()).unwrap());
            assert!(socket.local_addr().unwrap().as_socket().unwrap().port() >= FIRST);
        }
    }
}
