//! Sockets in pods that another process opened, and handed over: an agent before this one, or the holder of its listeners.
//!
//! A socket is taken only if it is in the very namespace that the pod has now (by the kernel's cookie), so that a mix-up
//! can't give a pod another's listener; one that does not fit is closed, and a new one opened in its place
//! (`a_socket_of_another_namespace_is_not_taken`). Kinds are names, so that an agent passes over what it does not know.

use std::os::fd::OwnedFd;

use socket2::{Domain, Socket};

use crate::sys;

/// A pod's sockets, each with what it is for.
#[derive(Debug, Default)]
pub(crate) struct Offered(Vec<(String, OwnedFd)>);

/// What a socket has to be, besides being in the pod's namespace.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted<'a> {
    pub(crate) kind: &'a str,
    /// The namespace's cookie.
    pub(crate) cookie: u64,
    /// Whether it has to serve IPv6, too.
    pub(crate) ip6: bool,
    /// The port that it has to be bound to; none: any.
    pub(crate) port: Option<u16>,
}

impl Offered {
    pub(crate) fn new(sockets: Vec<(String, OwnedFd)>) -> Self {
        Self(sockets)
    }

    /// Takes a listener that fits.
    pub(crate) fn take_listener(&mut self, wanted: Wanted<'_>) -> Option<std::net::TcpListener> {
        let socket = self.take(wanted)?;
        socket.is_listener().ok()?.then(|| socket.into())
    }

    /// Takes a socket that fits. Others of its kind are closed.
    pub(crate) fn take(&mut self, wanted: Wanted<'_>) -> Option<Socket> {
        let (of_kind, others) = std::mem::take(&mut self.0)
            .into_iter()
            .partition(|(kind, _)| kind == wanted.kind);
        self.0 = others;
        let of_kind: Vec<(String, OwnedFd)> = of_kind;
        let mut sockets = of_kind.into_iter().map(|(_, socket)| Socket::from(socket));
        sockets.find(|socket| fits(socket, wanted))
    }
}

fn fits(socket: &Socket, wanted: Wanted<'_>) -> bool {
    let port = || socket.local_addr().ok()?.as_socket().map(|address| address.port());
    sys::netns_cookie(socket).is_ok_and(|cookie| cookie == wanted.cookie)
        && socket
            .domain()
            .is_ok_and(|domain| (domain == Domain::IPV6) == wanted.ip6)
        && wanted.port.is_none_or(|wanted| port() == Some(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, UdpSocket};

    fn offered() -> (Offered, u64, u16) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let own = Socket::from(listener.try_clone().unwrap());
        let cookie = sys::netns_cookie(&own).unwrap();
        let other = OwnedFd::from(UdpSocket::bind("127.0.0.1:0").unwrap());
        let sockets = vec![("dns".to_owned(), other), ("inbound".to_owned(), listener.into())];
        (Offered::new(sockets), cookie, port)
    }

    fn wanted(kind: &str, cookie: u64) -> Wanted<'_> {
        Wanted {
            kind,
            cookie,
            ip6: false,
            port: None,
        }
    }

    #[test]
    fn a_socket_that_fits_is_taken_once() {
        let (mut offered, cookie, port) = offered();
        let exactly = Wanted {
            port: Some(port),
            ..wanted("inbound", cookie)
        };
        assert!(offered.take_listener(exactly).is_some());
        assert!(offered.take_listener(exactly).is_none());
        assert!(
            offered.take_listener(wanted("dns", cookie)).is_none(),
            "it is not a listener"
        );
    }

    #[test]
    fn a_socket_of_another_namespace_is_not_taken() {
        let (mut offered, cookie, _) = offered();
        assert!(offered.take_listener(wanted("inbound", cookie + 1)).is_none());
        assert!(
            offered.take_listener(wanted("inbound", cookie)).is_none(),
            "it was closed"
        );
    }

    #[test]
    fn one_of_another_port_or_family_is_not_taken() {
        let (mut one, cookie, port) = offered();
        let elsewhere = Some(port.wrapping_add(1));
        let other_port = Wanted {
            port: elsewhere,
            ..wanted("inbound", cookie)
        };
        assert!(one.take_listener(other_port).is_none());
        let (mut other, cookie, _) = offered();
        let ip6 = Wanted {
            ip6: true,
            ..wanted("inbound", cookie)
        };
        assert!(other.take_listener(ip6).is_none());
    }
}
