//! The PROXY header, version 2, that a waypoint's own listener expects before the bytes: who connected, what it asked
//! for, and, as TLV 0xD0, the SPIFFE id that it proved. <https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt>
//!
//! Form and type are ztunnel's. Where the two addresses are of two families, IPv4 is written as IPv6 has it
//! (`::ffff:a.b.c.d`), since the header has one family only.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use model::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// The TLV with the source's SPIFFE id.
const SOURCE_IDENTITY: u8 = 0xd0;

/// The header of a connection.
pub(crate) fn encode(source: SocketAddr, destination: SocketAddr, identity: &Identity) -> Vec<u8> {
    let mut body = Vec::with_capacity(160);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            body.extend(from.octets());
            body.extend(to.octets());
            TCP4
        }
        (from, to) => {
            body.extend(as_v6(from).octets());
            body.extend(as_v6(to).octets());
            TCP6
        }
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    let identity = identity.to_string();
    body.push(SOURCE_IDENTITY);
    push_length(&mut body, identity.len());
    body.extend(identity.as_bytes());
    let mut header = SIGNATURE.to_vec();
    header.extend([VERSION_AND_COMMAND, family]);
    push_length(&mut header, body.len());
    header.extend(body);
    header
}

fn as_v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

/// An identity comes from a certificate's name, which is far shorter than this has room for.
fn push_length(to: &mut Vec<u8>, length: usize) {
    to.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_is_as_the_protocol_says() {
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let of =
            |source: &str, destination: &str| encode(source.parse().unwrap(), destination.parse().unwrap(), &identity);
        let mut expected = vec![
            0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, 0x21, 0x11, 0, 36, 10, 0, 0, 9, 10,
            96, 0, 1, 0x12, 0x34, 0, 80, 0xd0, 0, 21,
        ];
        expected.extend(b"spiffe://td/ns/a/sa/b");
        assert_eq!(of("10.0.0.9:4660", "10.96.0.1:80"), expected);

        let six = of("[fd00::9]:1", "[fd00::1]:80");
        assert_eq!((six[13], u16::from_be_bytes([six[14], six[15]])), (0x21, 36 + 24));
        let mixed = of("10.0.0.9:1", "[fd00::1]:80");
        assert_eq!(mixed[13], 0x21);
        assert_eq!(mixed[26..32], [0xff, 0xff, 10, 0, 0, 9]);
    }
}
