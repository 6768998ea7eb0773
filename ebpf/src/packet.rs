//! What a packet on the pod's veth is, as far as the guard and the proof need to know.
//!
//! Strict on purpose: what can't be seen through is not let through. TCP could hide in fragments, behind extension
//! headers, under a VLAN tag or inside a tunnel; each of these has a reason of its own.

use abi::{Address, Endpoint, Flow, Reason};
use aya_ebpf::programs::TcContext;

const ETHERNET: usize = 14;
const ETHERTYPE_IP: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;
const ETHERTYPE_IP6: u16 = 0x86dd;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const ACK: u8 = 0x10;

/// Which way a packet goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    FromPod,
    ToPod,
}

/// A TCP segment.
pub struct Segment {
    pub flow: Flow,
    /// FIN, SYN, RST, PSH, ACK, URG.
    pub flags: u8,
    /// No data.
    pub empty: bool,
}

impl Segment {
    /// A SYN that opens a connection, not the answer to one.
    #[inline(always)]
    pub fn opens(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }
}

/// A packet.
pub enum Packet {
    Tcp(Segment),
    Udp(Flow),
    /// What the network itself needs: ARP, neighbour discovery, multicast listener reports; towards the pod also the errors
    /// that TCP learns by, such as that a packet was too big.
    Vital,
    /// Another protocol.
    Other,
    /// Can't be let out.
    Bad(Reason),
}

/// The IP layer's view of what follows it.
struct Transport {
    source: Address,
    destination: Address,
    offset: usize,
    /// From `offset` on; 0 when the header does not say (large offloaded packets).
    length: usize,
}

#[inline(always)]
pub fn parse(ctx: &TcContext, direction: Direction) -> Packet {
    // SAFETY: the context is valid.
    let (vlan, protocol) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).vlan_present),
            core::ptr::read_volatile(&raw const (*ctx.skb.skb).protocol),
        )
    };
    if vlan != 0 {
        return Packet::Bad(Reason::Vlan);
    }
    match u16::from_be(protocol as u16) {
        ETHERTYPE_IP => parse_ip4(ctx, direction),
        ETHERTYPE_IP6 => parse_ip6(ctx, direction),
        ETHERTYPE_ARP => Packet::Vital,
        _ => Packet::Bad(Reason::UnknownEtherType),
    }
}

#[repr(C)]
struct Ip4 {
    version_ihl: u8,
    tos: u8,
    total_length: u16,
    id: u16,
    fragment: u16,
    ttl: u8,
    protocol: u8,
    checksum: u16,
    source: u32,
    destination: u32,
}

#[inline(always)]
fn parse_ip4(ctx: &TcContext, direction: Direction) -> Packet {
    let Ok(ip) = ctx.load::<Ip4>(ETHERNET) else {
        return Packet::Bad(Reason::Malformed);
    };
    let header = usize::from(ip.version_ihl & 0x0f) * 4;
    if ip.version_ihl >> 4 != 4 || header < 20 {
        return Packet::Bad(Reason::Malformed);
    }
    let fragment = u16::from_be(ip.fragment) & 0x3fff != 0;
    match ip.protocol {
        TCP if fragment => Packet::Bad(Reason::Fragment),
        TCP => {
            let total = usize::from(u16::from_be(ip.total_length));
            let transport = Transport {
                source: Address::v4(ip.source),
                destination: Address::v4(ip.destination),
                offset: ETHERNET + header,
                length: total.saturating_sub(header),
            };
            parse_tcp(ctx, direction, &transport)
        }
        UDP if !fragment => {
            let (source, destination) = (Address::v4(ip.source), Address::v4(ip.destination));
            parse_udp(ctx, direction, source, destination, ETHERNET + header)
        }
        // Unreachable (also: too big), time exceeded, a parameter problem.
        ICMP if direction == Direction::ToPod && matches!(ctx.load::<u8>(ETHERNET + header), Ok(3 | 11 | 12)) => {
            Packet::Vital
        }
        protocol if encapsulates(protocol) => Packet::Bad(Reason::Encapsulation),
        _ => Packet::Other,
    }
}

#[repr(C)]
struct Ip6 {
    version: u32,
    payload_length: u16,
    next_header: u8,
    hop_limit: u8,
    source: [u32; 4],
    destination: [u32; 4],
}

/// How many extension headers are looked through. Real packets have one or two.
const EXTENSION_HEADERS: usize = 6;

const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const NO_NEXT_HEADER: u8 = 59;
const DESTINATION_OPTIONS: u8 = 60;
const MOBILITY: u8 = 135;

#[inline(always)]
fn parse_ip6(ctx: &TcContext, direction: Direction) -> Packet {
    let Ok(ip) = ctx.load::<Ip6>(ETHERNET) else {
        return Packet::Bad(Reason::Malformed);
    };
    if u32::from_be(ip.version) >> 28 != 6 {
        return Packet::Bad(Reason::Malformed);
    }
    let mut offset = ETHERNET + 40;
    let mut next = ip.next_header;
    for _ in 0..EXTENSION_HEADERS {
        match next {
            TCP => {
                let total = usize::from(u16::from_be(ip.payload_length));
                let transport = Transport {
                    source: Address::v6(ip.source),
                    destination: Address::v6(ip.destination),
                    offset,
                    length: total.saturating_sub(offset - ETHERNET - 40),
                };
                return parse_tcp(ctx, direction, &transport);
            }
            HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS => {
                let Ok([following, length]) = ctx.load::<[u8; 2]>(offset) else {
                    return Packet::Bad(Reason::Malformed);
                };
                next = following;
                offset += (usize::from(length) + 1) * 8;
            }
            FRAGMENT => {
                // What follows may be cut anywhere: only a protocol that is surely not TCP passes.
                let Ok([following, _]) = ctx.load::<[u8; 2]>(offset) else {
                    return Packet::Bad(Reason::Malformed);
                };
                return match following {
                    HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | TCP => Packet::Bad(Reason::Fragment),
                    protocol if encapsulates(protocol) => Packet::Bad(Reason::Encapsulation),
                    _ => Packet::Other,
                };
            }
            UDP => {
                let (source, destination) = (Address::v6(ip.source), Address::v6(ip.destination));
                return parse_udp(ctx, direction, source, destination, offset);
            }
            ICMP6 => return parse_icmp6(ctx, direction, offset),
            NO_NEXT_HEADER => return Packet::Other,
            MOBILITY | 139 | 140 | 253 | 254 => return Packet::Bad(Reason::ExtensionHeaders),
            protocol if encapsulates(protocol) => return Packet::Bad(Reason::Encapsulation),
            _ => return Packet::Other,
        }
    }
    Packet::Bad(Reason::ExtensionHeaders)
}

#[inline(always)]
fn parse_icmp6(ctx: &TcContext, direction: Direction, offset: usize) -> Packet {
    match ctx.load::<u8>(offset) {
        // Errors, as above.
        Ok(1..=4) if direction == Direction::ToPod => Packet::Vital,
        // Multicast listener queries and reports, neighbour discovery.
        Ok(130..=137 | 143) => Packet::Vital,
        Ok(_) => Packet::Other,
        Err(_) => Packet::Bad(Reason::Malformed),
    }
}

/// Protocols that carry others: IPIP, IPv6, GRE, ESP, AH, minimal encapsulation, IPIP's older kin, EtherIP, IPComp,
/// L2TP, MPLS, ROHC, Ethernet.
#[inline(always)]
fn encapsulates(protocol: u8) -> bool {
    matches!(
        protocol,
        4 | 41 | 47 | 50 | 51 | 55 | 94 | 97 | 98 | 108 | 115 | 137 | 142 | 143
    )
}

#[repr(C)]
struct Tcp {
    source: u16,
    destination: u16,
    sequence: u32,
    acknowledgement: u32,
    offset: u8,
    flags: u8,
    window: u16,
}

#[inline(always)]
fn parse_tcp(ctx: &TcContext, direction: Direction, transport: &Transport) -> Packet {
    let Ok(tcp) = ctx.load::<Tcp>(transport.offset) else {
        return Packet::Bad(Reason::Malformed);
    };
    let source = Endpoint::new(transport.source, u16::from_be(tcp.source));
    let destination = Endpoint::new(transport.destination, u16::from_be(tcp.destination));
    Packet::Tcp(Segment {
        flow: flow(direction, source, destination),
        flags: tcp.flags & 0x3f,
        empty: transport.length == usize::from(tcp.offset >> 4) * 4,
    })
}

#[inline(always)]
fn parse_udp(ctx: &TcContext, direction: Direction, source: Address, destination: Address, offset: usize) -> Packet {
    let Ok([from, to]) = ctx.load::<[u16; 2]>(offset) else {
        return Packet::Bad(Reason::Malformed);
    };
    let (source, destination) = (
        Endpoint::new(source, u16::from_be(from)),
        Endpoint::new(destination, u16::from_be(to)),
    );
    Packet::Udp(flow(direction, source, destination))
}

#[inline(always)]
fn flow(direction: Direction, source: Endpoint, destination: Endpoint) -> Flow {
    match direction {
        Direction::FromPod => Flow {
            pod: source,
            remote: destination,
        },
        Direction::ToPod => Flow {
            pod: destination,
            remote: source,
        },
    }
}
