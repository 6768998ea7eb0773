//! The agent's sockets inside a pod that is captured by iptables, and what conntrack tells of accepted ones.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use abi::{CAPTURE_PORTS, DNS_PORT, HBONE_PORT, INBOUND_PORT, ListenerKind, MARK};
use model::{OriginalDst, WorkloadUid, canonical_socket};
use socket2::{Domain, SockRef, Socket};

use super::conntrack;
use crate::{
    dns::datagram,
    error::{CaptureError, Tried},
    netns::Netns,
    offered::{Offered, Wanted},
    sockets::{PodListeners, WhileCaptured, bind_to_client, listen_on, name, tcp},
};

const CLOSING: Duration = Duration::from_millis(500);

/// Takes the listeners that are offered, or opens them, on exactly the ports that the rules name.
pub(crate) fn listen(netns: &Netns, ip6: bool, mut offered: Offered) -> Result<PodListeners, CaptureError> {
    let mut listen = |kind, port| {
        let wanted = Wanted {
            kind: name(kind),
            cookie: netns.cookie(),
            ip6,
            port: Some(port),
        };
        if let Some(listener) = offered.take_listener(wanted) {
            return Ok(vec![listener]);
        }
        let listener = netns.enter(|| listen_when_free(port, ip6)).and_then(|result| result);
        match listener {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(CaptureError::PortTaken {
                netns: netns.path().to_owned(),
                port,
            }),
            other => other
                .map(|listener| vec![listener])
                .tried(|| format!("listening on {port} in a pod")),
        }
    };
    Ok(PodListeners {
        outbound: listen(ListenerKind::Outbound, CAPTURE_PORTS[0])?,
        inbound: listen(ListenerKind::Inbound, INBOUND_PORT)?,
        hbone: listen(ListenerKind::Hbone, HBONE_PORT)?,
    })
}

/// The proxy may be about to close its listeners of a capture that just ended.
fn listen_when_free(port: u16, ip6: bool) -> io::Result<TcpListener> {
    let deadline = Instant::now() + CLOSING;
    loop {
        match listen_on(port, ip6) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < deadline => {
                std::thread::sleep(CLOSING / 20);
            }
            result => return result,
        }
    }
}

/// A captured pod, as the proxy uses it.
#[derive(Clone)]
pub struct IptablesPodHandle(Arc<Inner>);

struct Inner {
    uid: WorkloadUid,
    netns: Netns,
    addresses: Vec<IpAddr>,
    listeners: WhileCaptured<PodListeners>,
}

impl IptablesPodHandle {
    pub(crate) fn new(uid: WorkloadUid, netns: Netns, addresses: Vec<IpAddr>, listeners: &Arc<PodListeners>) -> Self {
        Self(Arc::new(Inner {
            uid,
            netns,
            addresses,
            listeners: WhileCaptured::new(listeners),
        }))
    }

    /// Duplicates of the listeners: they share one accept queue each.
    pub fn listeners(&self) -> io::Result<PodListeners> {
        let duplicate =
            |listeners: &[TcpListener]| listeners.iter().map(TcpListener::try_clone).collect::<io::Result<_>>();
        let listeners = self.0.listeners.get()?;
        Ok(PodListeners {
            outbound: duplicate(&listeners.outbound)?,
            inbound: duplicate(&listeners.inbound)?,
            hbone: duplicate(&listeners.hbone)?,
        })
    }

    /// Duplicates of all the agent's listeners in the pod, by what they are for: to be handed over.
    pub fn sockets(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        let PodListeners {
            outbound,
            inbound,
            hbone,
        } = self.listeners()?;
        let named = |kind, listeners: Vec<TcpListener>| listeners.into_iter().map(move |one| (name(kind), one.into()));
        Ok(named(ListenerKind::Outbound, outbound)
            .chain(named(ListenerKind::Inbound, inbound))
            .chain(named(ListenerKind::Hbone, hbone))
            .collect())
    }

    /// Where a redirected connection was meant to go. None for one that was made to the capture port itself.
    pub fn original_destination(&self, accepted: SockRef<'_>, local: SocketAddr) -> Option<OriginalDst> {
        let local = canonical_socket(local);
        original(accepted, local)
            .filter(|original| *original != local)
            .map(OriginalDst)
    }

    /// Where a plaintext connection to the pod was meant to go. Where that is not the pod itself, as with what a nested
    /// namespace sends through the pod, it is the listener: a loop, which is refused.
    pub fn inbound_destination(&self, accepted: SockRef<'_>, local: SocketAddr) -> OriginalDst {
        let local = canonical_socket(local);
        let original = original(accepted, local).filter(|original| self.0.addresses.contains(&original.ip()));
        OriginalDst(original.unwrap_or(local))
    }

    /// Which name server a redirected datagram of this client was going to.
    pub fn name_server(&self, client: SocketAddr) -> Option<SocketAddr> {
        let loopback = match client {
            SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
            SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
        };
        let redirected = SocketAddr::new(loopback, DNS_PORT);
        let ask = || conntrack::original(client, redirected);
        self.0
            .netns
            .enter(ask)
            .and_then(|result| result)
            .inspect_err(|error| tracing::debug!(%client, %error, "conntrack does not know a DNS query"))
            .ok()
    }

    /// A nonblocking datagram socket in the pod's namespace, to ask a name server with; its mark keeps what it sends from
    /// being redirected.
    pub fn datagram_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        let socket = self.0.netns.enter(|| datagram(target))??;
        socket.set_mark(MARK)?;
        Ok(socket)
    }

    /// A nonblocking socket in the pod's namespace, to dial a peer with; its mark keeps it from being redirected.
    pub fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        let socket = self.0.netns.enter(|| tcp(Domain::for_address(target)))??;
        socket.set_tcp_nodelay(true)?;
        socket.set_mark(MARK)?;
        Ok(socket)
    }

    /// A nonblocking socket in the pod's namespace, to dial the pod's application with from the client's address and this
    /// port. Port 0: one is chosen when it connects.
    pub fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
        let socket = self.outbound_socket(target)?;
        bind_to_client(&socket, target, source)?;
        Ok(socket)
    }
}

impl std::fmt::Debug for IptablesPodHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IptablesPodHandle")
            .field("uid", &self.0.uid)
            .field("netns", &self.0.netns.path())
            .finish_non_exhaustive()
    }
}

/// Where a connection was going that former rules redirected to the port of inbound ones, if it is one.
pub(crate) fn redirected_from(accepted: SockRef<'_>, local: SocketAddr) -> Option<SocketAddr> {
    let local = canonical_socket(local);
    let original = original(accepted, local).filter(|original| original.ip() == local.ip());
    original.filter(|_| local.port() == INBOUND_PORT)
}

/// Where a connection was going that a rule for virtual interfaces sent to the first capture port.
pub(crate) fn rerouted_from(accepted: SockRef<'_>, local: SocketAddr) -> Option<OriginalDst> {
    let local = canonical_socket(local);
    if local.port() != CAPTURE_PORTS[0] {
        return None;
    }
    original(accepted, local)
        .filter(|original| *original != local)
        .map(OriginalDst)
}

/// What conntrack remembers of a connection's destination (SO_ORIGINAL_DST).
fn original(accepted: SockRef<'_>, local: SocketAddr) -> Option<SocketAddr> {
    let original = if local.is_ipv4() {
        accepted.original_dst_v4()
    } else {
        accepted.original_dst_v6()
    };
    original.ok()?.as_socket().map(canonical_socket)
}
