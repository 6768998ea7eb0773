//! The agent's sockets inside a pod: listeners, and connections out and in.
//!
//! They are never handed to anybody: the guard lets out whatever the agent's sockets send.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

use abi::{DnsSlot, Endpoint, HBONE_PORT, INBOUND_PORT, ListenerKind, MARK, OriginalKey};
use model::{OriginalDst, PeerAddr, WorkloadUid, canonical_socket};
use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    dns::datagram,
    maps::Lookups,
    netns::Netns,
    offered::{Offered, Wanted},
    routes::same_family,
    sys,
};

const BACKLOG: i32 = 4096;

/// The agent's listeners in a pod; nonblocking, usually one each, which serves both address families.
#[derive(Debug)]
pub struct PodListeners {
    /// Captured connections of the pod's applications.
    pub outbound: Vec<TcpListener>,
    /// Plaintext connections to the pod; the local address of what is accepted is the original destination.
    pub inbound: Vec<TcpListener>,
    /// HBONE connections to the pod.
    pub hbone: Vec<TcpListener>,
}

/// A pod's DNS sockets, by the number of the name server that each stands for.
pub type DnsQueries = Vec<(usize, std::net::UdpSocket)>;

/// The listeners by kind.
#[derive(Debug)]
pub(crate) struct Listeners([(ListenerKind, TcpListener); 3]);

impl Listeners {
    /// Takes those that are offered and fit, and opens the others in the pod's namespace.
    pub(crate) fn open(netns: &Netns, ip6: bool, mut offered: Offered) -> io::Result<Self> {
        let mut one = |kind: ListenerKind, port| {
            let wanted = Wanted {
                kind: name(kind),
                cookie: netns.cookie(),
                ip6,
                port: None,
            };
            let listener = match offered.take_listener(wanted) {
                Some(listener) => listener,
                None => netns.enter(|| listen(port, ip6))??,
            };
            io::Result::Ok((kind, listener))
        };
        Ok(Self([
            one(ListenerKind::Outbound, abi::CAPTURE_PORTS[0])?,
            one(ListenerKind::Inbound, INBOUND_PORT)?,
            one(ListenerKind::Hbone, HBONE_PORT)?,
        ]))
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (ListenerKind, &TcpListener)> {
        self.0.iter().map(|(kind, listener)| (*kind, listener))
    }

    /// The one of captured outbound connections.
    pub(crate) fn outbound(&self) -> &TcpListener {
        &self.0[0].1
    }

    fn duplicate(&self) -> io::Result<PodListeners> {
        let [(_, outbound), (_, inbound), (_, hbone)] = &self.0;
        Ok(PodListeners {
            outbound: vec![outbound.try_clone()?],
            inbound: vec![inbound.try_clone()?],
            hbone: vec![hbone.try_clone()?],
        })
    }
}

/// What a listener is called where listeners are handed over.
pub(crate) fn name(kind: ListenerKind) -> &'static str {
    match kind {
        // What is rerouted comes to the same one.
        ListenerKind::Outbound | ListenerKind::Rerouted => "outbound",
        ListenerKind::Inbound => "inbound",
        ListenerKind::Hbone => "hbone",
    }
}

/// Listens on the port, or on any if somebody in the pod has it: steering does not look at it. Without SO_REUSEPORT,
/// so that no process of the pod can share it.
fn listen(port: u16, ip6: bool) -> io::Result<TcpListener> {
    match listen_on(port, ip6) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => listen_on(0, ip6),
        result => result,
    }
}

pub(crate) fn listen_on(port: u16, ip6: bool) -> io::Result<TcpListener> {
    let (domain, any) = if ip6 {
        (Domain::IPV6, IpAddr::V6(Ipv6Addr::UNSPECIFIED))
    } else {
        (Domain::IPV4, IpAddr::V4(Ipv4Addr::UNSPECIFIED))
    };
    let socket = tcp(domain)?;
    if ip6 {
        socket.set_only_v6(false)?;
    }
    // A restarted agent takes the port again while connections of the last one are in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::new(any, port).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

pub(crate) fn tcp(domain: Domain) -> io::Result<Socket> {
    Socket::new(domain, Type::STREAM.nonblocking(), Some(Protocol::TCP))
}

/// A pod's listeners, as its handle knows them. Whoever holds a handle, as connections do that outlive the capture, does
/// not keep them open: nobody would accept from them, and nobody else could have their ports.
pub(crate) struct WhileCaptured<T>(Weak<T>);

impl<T> WhileCaptured<T> {
    pub(crate) fn new(listeners: &Arc<T>) -> Self {
        Self(Arc::downgrade(listeners))
    }

    pub(crate) fn get(&self) -> io::Result<Arc<T>> {
        let gone = || io::Error::new(io::ErrorKind::NotConnected, "the pod is not captured any more");
        self.0.upgrade().ok_or_else(gone)
    }
}

/// A captured pod, as the proxy uses it.
#[derive(Clone)]
pub struct PodHandle(Arc<Inner>);

struct Inner {
    uid: WorkloadUid,
    netns: Netns,
    lookups: Lookups,
    listeners: WhileCaptured<Listeners>,
}

impl PodHandle {
    pub(crate) fn new(uid: WorkloadUid, netns: Netns, lookups: Lookups, listeners: &Arc<Listeners>) -> Self {
        Self(Arc::new(Inner {
            uid,
            netns,
            lookups,
            listeners: WhileCaptured::new(listeners),
        }))
    }

    /// The pod.
    pub fn uid(&self) -> &WorkloadUid {
        &self.0.uid
    }

    /// Duplicates of the listeners: they share one accept queue each.
    pub fn listeners(&self) -> io::Result<PodListeners> {
        self.0.listeners.get()?.duplicate()
    }

    /// Duplicates of all the agent's listeners in the pod, by what they are for: to be handed over.
    pub fn sockets(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        let listeners = self.0.listeners.get()?;
        listeners
            .iter()
            .map(|(kind, listener)| Ok((name(kind), listener.try_clone()?.into())))
            .collect()
    }

    /// Where a captured connection was meant to go: `peer` is the application's end, as accept tells it, and `local`
    /// the accepted socket's own. The entry is taken: a second call finds nothing. None also for a connection that was
    /// not captured, but made by somebody in the pod to the capture port itself.
    pub fn original_destination(&self, peer: PeerAddr, local: SocketAddr) -> Option<OriginalDst> {
        let key = OriginalKey {
            cookie: self.0.netns.cookie(),
            source: Endpoint::from_socket(canonical_socket(peer.0)),
            capture_port: u32::from(local.port()),
        };
        let found = self.0.lookups.take_original(&key)?;
        Some(OriginalDst(found.to_socket()))
    }

    /// Which name server a number stands for.
    pub fn name_server(&self, slot: usize) -> Option<SocketAddr> {
        let slot = u32::try_from(slot).ok()?;
        let address = self.0.lookups.name_server(&DnsSlot::new(self.0.netns.cookie(), slot))?;
        Some(SocketAddr::new(address.to_ip(), abi::NAME_SERVER_PORT))
    }

    /// A nonblocking datagram socket in the pod's namespace, to ask a name server with.
    pub fn datagram_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        self.0.netns.enter(|| datagram(target))?
    }

    /// A nonblocking socket in the pod's namespace, to dial a peer with.
    pub fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        let socket = self.0.netns.enter(|| tcp(Domain::for_address(target)))??;
        socket.set_tcp_nodelay(true)?;
        Ok(socket)
    }

    /// A nonblocking socket in the pod's namespace, to dial the pod's application with from the client's address and this
    /// port. Port 0: one is chosen when it connects.
    pub fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
        let socket = self.outbound_socket(target)?;
        socket.set_mark(MARK)?;
        // It never leaves the loopback device. Saying so lets the kernel choose a port again that is in TIME_WAIT
        // (`tcp_tw_reuse=2`, the default): else a client could have 28,000 connections a minute, and no more.
        socket.bind_device(Some(b"lo"))?;
        bind_to_client(&socket, target, source)?;
        Ok(socket)
    }
}

/// Binds to the address and the port that the application is to see; another socket may have both, to another place or in
/// TIME_WAIT. Port 0: one is chosen when it connects, and is this connection's alone.
pub(crate) fn bind_to_client(socket: &Socket, target: SocketAddr, source: SocketAddr) -> io::Result<()> {
    let source = canonical_socket(source);
    if !same_family(target.ip(), source.ip()) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("{source} can't be the source of a connection to {target}: another address family"),
        ));
    }
    if target.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    match source.port() {
        0 => sys::set_bind_address_no_port(socket)?,
        _ => socket.set_reuse_address(true)?,
    }
    socket.bind(&source.into())
}

impl std::fmt::Debug for PodHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PodHandle")
            .field("uid", &self.0.uid)
            .field("netns", &self.0.netns.path())
            .finish_non_exhaustive()
    }
}
