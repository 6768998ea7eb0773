//! Asks conntrack where a datagram was going before it was redirected (`nfnetlink_conntrack.h`): there is no
//! `SO_ORIGINAL_DST` for UDP. And tells it of connections that are older than it, with a mark.
//!
//! Needs `nf_conntrack_netlink` in the kernel. Without it a pod's queries are not redirected, and it is said why.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use netlink_sys::protocols::NETLINK_NETFILTER;

use crate::netlink;

const GET: u16 = 1 << 8 | 1;
const NEW: u16 = 1 << 8;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NESTED: u16 = 0x8000;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOCOL: u16 = 4;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const TCP: u16 = 1;
const TCP_STATE: u16 = 1;
const TCP_FLAGS_ORIG: u16 = 4;
const TCP_FLAGS_REPLY: u16 = 5;

/// IPS_SEEN_REPLY, IPS_ASSURED, IPS_CONFIRMED.
const STANDS: u32 = 2 | 4 | 8;
const ESTABLISHED: u8 = 3;
/// IP_CT_TCP_FLAG_BE_LIBERAL: its sequence numbers are not known. Flags, and which of them are meant.
const LIBERAL: [u8; 2] = [8, 8];
/// Seconds; conntrack's own for a connection that stands.
const LASTS: u32 = 432_000;

const TUPLE_IP: u16 = 1;
const TUPLE_PROTO: u16 = 2;
const PROTO_NUM: u16 = 1;
const PROTO_SRC_PORT: u16 = 2;
const PROTO_DST_PORT: u16 = 3;

/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const FAMILY: usize = 4;

/// Where a datagram from `client` that came to `redirected` was going, in the namespace that the thread is in.
pub(crate) fn original(client: SocketAddr, redirected: SocketAddr) -> io::Result<SocketAddr> {
    let socket = netlink::connect(NETLINK_NETFILTER)?;
    socket.send(&request(client, redirected), 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        for message in netlink::messages(&datagram) {
            let kind = message.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
            match kind {
                Some(NEW) => return destination(message).ok_or_else(|| io::ErrorKind::InvalidData.into()),
                Some(NLMSG_ERROR) => return Err(error(message)),
                _ => {}
            }
        }
    }
}

/// Tells of a TCP connection that stands, in the namespace that the thread is in. Of one that is known already nothing is
/// changed.
pub(crate) fn tell(client: SocketAddr, server: SocketAddr, mark: u32) -> io::Result<()> {
    let tcp = [
        attribute(TCP_STATE, &[ESTABLISHED]),
        attribute(TCP_FLAGS_ORIG, &LIBERAL),
        attribute(TCP_FLAGS_REPLY, &LIBERAL),
    ]
    .concat();
    let body = [
        attribute(TUPLE_ORIG | NESTED, &tuple(client, server, libc::IPPROTO_TCP as u8)),
        attribute(TUPLE_REPLY | NESTED, &tuple(server, client, libc::IPPROTO_TCP as u8)),
        attribute(STATUS, &STANDS.to_be_bytes()),
        attribute(PROTOCOL | NESTED, &attribute(TCP | NESTED, &tcp)),
        attribute(TIMEOUT, &LASTS.to_be_bytes()),
        attribute(MARK, &mark.to_be_bytes()),
    ]
    .concat();
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let socket = netlink::connect(NETLINK_NETFILTER)?;
    socket.send(&message(NEW, flags, family(server), &body), 0)?;
    let (datagram, _) = socket.recv_from_full()?;
    let answer = netlink::messages(&datagram).next().unwrap_or_default();
    match acknowledged(answer) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        told => told,
    }
}

fn acknowledged(message: &[u8]) -> io::Result<()> {
    match message.get(HEADER..).and_then(|rest| rest.first_chunk::<4>()) {
        Some([0, 0, 0, 0]) => Ok(()),
        _ => Err(error(message)),
    }
}

/// Whether conntrack can be asked here.
pub(crate) fn is_there() -> io::Result<()> {
    let nobody = SocketAddr::from(([127, 0, 0, 1], 1));
    match original(nobody, nobody) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn error(message: &[u8]) -> io::Error {
    let code = message
        .get(HEADER..HEADER + 4)
        .and_then(|bytes| bytes.first_chunk::<4>());
    match code.map(|bytes| i32::from_ne_bytes(*bytes)) {
        Some(code) if code != 0 => io::Error::from_raw_os_error(-code),
        _ => io::ErrorKind::InvalidData.into(),
    }
}

fn request(client: SocketAddr, redirected: SocketAddr) -> Vec<u8> {
    let tuple = tuple(redirected, client, libc::IPPROTO_UDP as u8);
    let body = attribute(TUPLE_REPLY | NESTED, &tuple);
    message(GET, NLM_F_REQUEST, family(redirected), &body)
}

fn family(address: SocketAddr) -> u8 {
    match address {
        SocketAddr::V4(_) => libc::AF_INET as u8,
        SocketAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

fn tuple(source: SocketAddr, target: SocketAddr, protocol: u8) -> Vec<u8> {
    let (from, to, first) = match (source.ip(), target.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (from.octets().to_vec(), to.octets().to_vec(), 1),
        (from, to) => (octets(from), octets(to), 3),
    };
    let ip = [attribute(first, &from), attribute(first + 1, &to)].concat();
    let proto = [
        attribute(PROTO_NUM, &[protocol]),
        attribute(PROTO_SRC_PORT, &source.port().to_be_bytes()),
        attribute(PROTO_DST_PORT, &target.port().to_be_bytes()),
    ]
    .concat();
    [
        attribute(TUPLE_IP | NESTED, &ip),
        attribute(TUPLE_PROTO | NESTED, &proto),
    ]
    .concat()
}

fn message(kind: u16, flags: u16, family: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + FAMILY + body.len());
    bytes.extend(((HEADER + FAMILY + body.len()) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence and port: one request, one answer.
    bytes.extend([0; 8]);
    bytes.extend([family, 0, 0, 0]);
    bytes.extend(body);
    bytes
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped().octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// An attribute, padded to four bytes.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4 + value.len().next_multiple_of(4));
    bytes.extend((4 + value.len() as u16).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// The attributes of a kind's value.
fn find(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while let Some((head, _)) = bytes.split_first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([head[0], head[1]]));
        let kind = u16::from_ne_bytes([head[2], head[3]]) & 0x3fff;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
    None
}

fn destination(message: &[u8]) -> Option<SocketAddr> {
    let tuple = find(message.get(HEADER + FAMILY..)?, TUPLE_ORIG)?;
    let ip = find(tuple, TUPLE_IP)?;
    let address = match (find(ip, 2), find(ip, 4)) {
        (Some(v4), _) => IpAddr::from(*v4.first_chunk::<4>()?),
        (None, Some(v6)) => IpAddr::from(*v6.first_chunk::<16>()?),
        (None, None) => return None,
    };
    let port = find(find(tuple, TUPLE_PROTO)?, PROTO_DST_PORT)?;
    Some(SocketAddr::new(address, u16::from_be_bytes(*port.first_chunk()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_destination_is_found_and_broken_messages_are_not_read() {
        let answer = |ip: Vec<u8>| {
            let proto = [attribute(PROTO_SRC_PORT, &[0, 9]), attribute(PROTO_DST_PORT, &[0, 53])].concat();
            let tuple = [
                attribute(TUPLE_IP | NESTED, &ip),
                attribute(TUPLE_PROTO | NESTED, &proto),
            ]
            .concat();
            [
                vec![0; HEADER + FAMILY],
                attribute(7, &[1]),
                attribute(TUPLE_ORIG | NESTED, &tuple),
            ]
            .concat()
        };
        let v4 = answer([attribute(1, &[10, 0, 0, 1]), attribute(2, &[10, 96, 0, 10])].concat());
        assert_eq!(destination(&v4), Some("10.96.0.10:53".parse().unwrap()));
        let v6 = answer(attribute(4, &octets("fd00::a".parse().unwrap())));
        assert_eq!(destination(&v6), Some("[fd00::a]:53".parse().unwrap()));
        for length in 0..v4.len() {
            assert_eq!(destination(&v4[..length]), None, "{length}");
        }
    }
}
