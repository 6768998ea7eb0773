//! Asks conntrack where a datagram was going before it was redirected (`nfnetlink_conntrack.h`): there is no
//! `SO_ORIGINAL_DST` for UDP.
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
const NESTED: u16 = 0x8000;

const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
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
    let (source, target, family, first) = match (redirected.ip(), client.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => (from.octets().to_vec(), to.octets().to_vec(), libc::AF_INET, 1),
        (from, to) => (octets(from), octets(to), libc::AF_INET6, 3),
    };
    let ip = [attribute(first, &source), attribute(first + 1, &target)].concat();
    let proto = [
        attribute(PROTO_NUM, &[libc::IPPROTO_UDP as u8]),
        attribute(PROTO_SRC_PORT, &redirected.port().to_be_bytes()),
        attribute(PROTO_DST_PORT, &client.port().to_be_bytes()),
    ]
    .concat();
    let tuple = [
        attribute(TUPLE_IP | NESTED, &ip),
        attribute(TUPLE_PROTO | NESTED, &proto),
    ]
    .concat();
    let body = attribute(TUPLE_REPLY | NESTED, &tuple);
    let mut bytes = Vec::with_capacity(HEADER + FAMILY + body.len());
    bytes.extend(((HEADER + FAMILY + body.len()) as u32).to_ne_bytes());
    bytes.extend(GET.to_ne_bytes());
    bytes.extend(NLM_F_REQUEST.to_ne_bytes());
    // Sequence and port: one request, one answer.
    bytes.extend([0; 8]);
    bytes.extend([family as u8, 0, 0, 0]);
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
