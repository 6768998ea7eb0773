//! The TCP sockets of a network namespace, and an end to some of them, by sock_diag (`sock_diag(7)`, `inet_diag.h`).

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use abi::{Address, Endpoint};
use netlink_sys::{Socket, protocols::NETLINK_SOCK_DIAG};

use crate::{
    error::{CaptureError, Tried},
    netlink,
    netns::Netns,
};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

const HEADER: usize = 16;
/// `struct inet_diag_msg`: family, state, timer, retransmits, socket id, five counters.
const MESSAGE: usize = 4 + ID + 5 * 4;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;
const INET_DIAG_CGROUP_ID: u16 = 21;

/// The loopback device is the first of every namespace.
pub(crate) const LO: u32 = 1;

/// TCP states, as bits of a request.
pub(crate) mod state {
    pub(crate) const SYN_SENT: u32 = 1 << 2;
    pub(crate) const CLOSE_WAIT: u32 = 1 << 8;
    pub(crate) const LISTEN: u32 = 1 << 10;
    /// A handshake from the other end under way; whose listener it came to, the kernel does not say.
    pub(crate) const SYN_RECV: u32 = 1 << 3;
    /// ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
    pub(crate) const CONNECTED: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
}

/// A TCP socket.
#[derive(Debug, Clone)]
pub(crate) struct TcpSocket {
    pub(crate) local: Endpoint,
    pub(crate) remote: Endpoint,
    /// The id of the cgroup that made it, where the kernel says.
    pub(crate) cgroup: Option<u64>,
    family: u8,
    id: [u8; ID],
}

impl TcpSocket {
    /// The kernel's number of the socket (`SO_COOKIE`).
    pub(crate) fn cookie(&self) -> u64 {
        let half = |at: usize| u64::from(u32_at(&self.id, at).unwrap_or_default());
        half(40) | half(44) << 32
    }

    /// Whether it is bound to the loopback device.
    pub(crate) fn is_of_loopback(&self) -> bool {
        u32_at(&self.id, 36) == Some(LO)
    }

    /// Whether both ends are in the namespace itself, as far as the addresses tell.
    pub(crate) fn is_local(&self) -> bool {
        self.remote.address.is_loopback() || self.remote.address == self.local.address
    }
}

/// The sockets in one of the states, in the namespace that the thread is in.
pub(crate) fn list(states: u32) -> io::Result<Vec<TcpSocket>> {
    let socket = netlink::connect(NETLINK_SOCK_DIAG)?;
    let mut found = Vec::new();
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        let request = request(
            SOCK_DIAG_BY_FAMILY,
            NLM_F_REQUEST | NLM_F_DUMP,
            family,
            states,
            &[0; ID],
        );
        exchange(&socket, &request, |message| found.extend(parse(message)))?;
    }
    Ok(found)
}

/// The sockets in one of the states, in a pod's namespace.
pub(crate) fn list_in(netns: &Netns, states: u32) -> Result<Vec<TcpSocket>, CaptureError> {
    netns
        .enter(|| list(states))
        .and_then(|result| result)
        .tried(|| "listing the pod's connections".into())
}

/// Aborts a socket: its owner gets ECONNABORTED.
pub(crate) fn destroy(target: &TcpSocket) -> io::Result<()> {
    let socket = netlink::connect(NETLINK_SOCK_DIAG)?;
    let request = request(
        SOCK_DESTROY,
        NLM_F_REQUEST | NLM_F_ACK,
        target.family,
        u32::MAX,
        &target.id,
    );
    exchange(&socket, &request, |_| ())
}

/// A message with `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let length = (HEADER + 8 + ID) as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    bytes.extend(length.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(id);
    bytes
}

fn exchange(socket: &Socket, request: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<()> {
    socket.send(request, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in netlink::messages(&datagram) {
            match u16_at(message, 4) {
                Some(NLMSG_DONE) => return Ok(()),
                Some(NLMSG_ERROR) => {
                    return match u32_at(message, HEADER) {
                        Some(0) => Ok(()),
                        code => Err(io::Error::from_raw_os_error(-(code.unwrap_or_default() as i32))),
                    };
                }
                _ => each(message.get(HEADER..).unwrap_or_default()),
            }
        }
    }
}

fn parse(message: &[u8]) -> Option<TcpSocket> {
    let family = *message.first()?;
    let id: [u8; ID] = message.get(4..4 + ID)?.try_into().ok()?;
    let port = |offset: usize| Some(u16::from_be_bytes([*id.get(offset)?, *id.get(offset + 1)?]));
    Some(TcpSocket {
        local: Endpoint::new(address(family, &id[4..20])?, port(0)?),
        remote: Endpoint::new(address(family, &id[20..36])?, port(2)?),
        cgroup: attribute(message.get(MESSAGE..)?, INET_DIAG_CGROUP_ID)
            .and_then(|value| value.try_into().ok())
            .map(u64::from_ne_bytes),
        family,
        id,
    })
}

fn address(family: u8, bytes: &[u8]) -> Option<Address> {
    let octets: [u8; 16] = bytes.try_into().ok()?;
    let ip = if i32::from(family) == libc::AF_INET {
        IpAddr::V4(Ipv4Addr::new(octets[0], octets[1], octets[2], octets[3]))
    } else {
        IpAddr::V6(Ipv6Addr::from(octets))
    };
    Some(Address::from_ip(ip))
}

/// The value of a netlink attribute.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

fn u16_at(bytes: &[u8], offset: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(offset..offset + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(offset..offset + 4)?.try_into().ok()?))
}
