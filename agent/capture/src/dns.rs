//! The agent's DNS sockets in a pod: one for each name server that the pod may ask, and address family.
//!
//! They are on the pod's own address, so that `getsockname` of a client stays true. Others can send to them, too: who
//! serves them answers the pod alone, which the kernel knows by its address (a source that is the pod's own does not come
//! in from outside).
//!
//! Another agent may open the same ones beside (`SO_REUSEPORT`), so that one follows the other without a gap. When the
//! last is closed, the hooks see it and let queries go to the name servers themselves (`ebpf/src/dns.rs`): nobody hands
//! these sockets on, and nobody holds them for an agent that has died.
//!
//! A port that a process of the pod holds is passed over: what would come there goes to the name server itself.

use std::{
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use abi::{DNS_MARK, DNS_PORT, DNS_SLOTS};
use socket2::{Domain, Protocol, Socket, Type};

use crate::netns::Netns;

/// What waits in a socket that is not read; the kernel's default is a little less.
const RECEIVE_BUFFER: usize = 256 * 1024;

/// DNS sockets by the number of the name server that they stand for.
#[derive(Debug)]
pub(crate) struct DnsSockets(Vec<(usize, UdpSocket)>);

impl DnsSockets {
    /// Opens them on these addresses of the pod, by eBPF's way: one for each name server.
    pub(crate) fn open(netns: &Netns, addresses: &[IpAddr]) -> io::Result<Self> {
        let wanted = addresses.iter().flat_map(|ip| (0..DNS_SLOTS).map(|slot| (*ip, slot)));
        Self::open_all(netns, wanted)
    }

    /// Opens one on each of these addresses of the pod, which stands for whatever name server conntrack says.
    pub(crate) fn open_first(netns: &Netns, addresses: &[IpAddr]) -> io::Result<Self> {
        Self::open_all(netns, addresses.iter().map(|ip| (*ip, 0)))
    }

    fn open_all(netns: &Netns, wanted: impl Iterator<Item = (IpAddr, u32)>) -> io::Result<Self> {
        netns.enter(|| {
            let mut sockets = Vec::new();
            for (ip, slot) in wanted {
                let end = SocketAddr::new(ip, DNS_PORT + slot as u16);
                match listen(end) {
                    Ok(socket) => sockets.push((slot as usize, socket)),
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        tracing::warn!(netns = %netns.path().display(), %end, "somebody in the pod has the port: \
                            DNS queries that would come there go to the name server itself");
                    }
                    Err(error) => return Err(error),
                }
            }
            Ok(Self(sockets))
        })?
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Duplicates: they share one queue each.
    pub(crate) fn duplicate(&self) -> io::Result<Vec<(usize, UdpSocket)>> {
        let duplicates = self.0.iter().map(|(slot, socket)| Ok((*slot, socket.try_clone()?)));
        duplicates.collect()
    }
}

fn listen(end: SocketAddr) -> io::Result<UdpSocket> {
    let socket = datagram(end)?;
    if end.is_ipv6() {
        socket.set_only_v6(true)?;
        // The address may still be under duplicate address detection.
        socket.set_freebind_v6(true)?;
    }
    socket.set_mark(DNS_MARK)?;
    socket.set_reuse_port(true)?;
    socket.set_recv_buffer_size(RECEIVE_BUFFER)?;
    socket.bind(&end.into())?;
    Ok(socket.into())
}

/// A nonblocking datagram socket.
pub(crate) fn datagram(target: SocketAddr) -> io::Result<Socket> {
    Socket::new(
        Domain::for_address(target),
        Type::DGRAM.nonblocking(),
        Some(Protocol::UDP),
    )
}
