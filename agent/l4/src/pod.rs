//! What the proxy is given of a pod: its name in the mesh, its listeners and a way to make sockets in its network.

use std::{io, net::SocketAddr, sync::Arc};

use model::{OriginalDst, PeerAddr, WorkloadUid};
use socket2::SockRef;

/// Sockets in a pod's network namespace. Implemented where capture is; by plain loopback sockets in tests.
pub trait PodSockets: Send + Sync + 'static {
    /// Where a captured connection was going, by the accepted socket and its two ends: `peer` is the application's
    /// address as `accept` told it. `None` if nobody captured it: somebody dialled the capture port itself.
    fn original_destination(&self, accepted: SockRef<'_>, peer: PeerAddr, local: SocketAddr) -> Option<OriginalDst>;

    /// Where a plaintext connection that was steered to the inbound listener was going. With `sk_lookup` that is the
    /// accepted socket's own address.
    fn inbound_destination(&self, _accepted: SockRef<'_>, local: SocketAddr) -> OriginalDst {
        OriginalDst(local)
    }

    /// A new, unconnected, non-blocking TCP socket of the target's family in the pod's network namespace, with TCP_NODELAY.
    fn outbound_socket(&self, target: SocketAddr) -> io::Result<socket2::Socket>;

    /// A new, unconnected, non-blocking UDP socket of the target's family in the pod's network namespace, to ask a name
    /// server with.
    fn datagram_socket(&self, _target: SocketAddr) -> io::Result<socket2::Socket> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Which name server a client of the pod sent its datagram to, by the number of the socket that it came to
    /// ([`crate::dns::Sockets`]). None if nobody captured it.
    fn name_server(&self, _slot: usize, _client: SocketAddr) -> Option<SocketAddr> {
        None
    }

    /// The same toward the pod's application, bound to the client's address so that the application sees it, and to this
    /// port, which others may have to other destinations. Port 0: the kernel chooses one when it connects.
    fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<socket2::Socket>;
}

/// A pod's listeners, non-blocking; usually one dual-stack socket each.
#[derive(Debug, Default)]
pub struct PodListeners {
    /// What the pod's applications dialled (15001).
    pub outbound: Vec<std::net::TcpListener>,
    /// Plaintext that others sent to the pod (15006).
    pub inbound: Vec<std::net::TcpListener>,
    /// HBONE (15008).
    pub hbone: Vec<std::net::TcpListener>,
}

/// A pod to serve. What it is (identity, addresses, services) is asked of the mesh by its uid at each connection.
pub struct Pod {
    /// Its name in the mesh.
    pub uid: WorkloadUid,
    /// Sockets in its network namespace.
    pub sockets: Arc<dyn PodSockets>,
    /// Its listeners.
    pub listeners: PodListeners,
    /// Its DNS sockets, where its name server is ours; none: its queries are not touched.
    pub dns: Option<crate::dns::Sockets>,
}

/// The ports that are the proxy's own in every pod: a connection to one of them on the pod itself is a loop.
pub const OWN_PORTS: [u16; 3] = [15001, 15006, 15008];

pub(crate) fn is_own_port(port: u16) -> bool {
    OWN_PORTS.contains(&port)
}
