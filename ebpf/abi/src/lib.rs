//! Map layouts, port numbers and drop reasons shared by the eBPF programs (`ebpf/`) and `agent/capture`.
//!
//! Everything here is `repr(C)` without implicit padding, so that a value has one byte image on both sides. Pinned maps
//! outlive the agent: whoever changes a layout raises [`VERSION`], and the next agent replaces the maps.
#![no_std]

mod address;
mod reason;

pub use address::{Address, Endpoint};
pub use reason::{Outcome, Reason};

/// The version of every layout in this crate; maps are pinned under it.
pub const VERSION: u32 = 6;

/// A number that changes with the size of any layout, for those who forget to raise [`VERSION`].
pub const SIZES: u32 = {
    let sizes = [
        size_of::<Endpoint>(),
        size_of::<Pod>(),
        size_of::<Interface>(),
        size_of::<Flow>(),
        size_of::<OriginalKey>(),
        size_of::<ListenerKey>(),
        size_of::<CounterKey>(),
        size_of::<Restore>(),
        size_of::<Dialled>(),
        size_of::<ExcludedPort>(),
        size_of::<ExcludedRange>(),
        size_of::<DnsSlot>(),
    ];
    let mut number: u32 = 0;
    let mut index = 0;
    while index < sizes.len() {
        number = number.wrapping_mul(31).wrapping_add(sizes[index] as u32);
        index += 1;
    }
    number
};

/// Where captured outbound connections go, on the pod's own address. All but the first are ports that no Istio
/// component uses; an application that serves one of them can't be reached by itself through its own pod address.
pub const CAPTURE_PORTS: [u16; 16] = [
    15001, 15121, 15122, 15123, 15124, 15125, 15126, 15127, 15128, 15129, 15130, 15131, 15132, 15133, 15134, 15135,
];

/// Plaintext inbound connections, as Istio numbers it.
pub const INBOUND_PORT: u16 = 15006;

/// HBONE, as Istio numbers it.
pub const HBONE_PORT: u16 = 15008;

/// The firewall mark of the agent's sockets toward applications (Istio's in-pod mark).
pub const MARK: u32 = 0x539;

/// The bits of the firewall mark that are ours.
pub const MARK_MASK: u32 = 0xfff;

/// Whether a port of the pod's own address belongs to outbound capture.
#[inline(always)]
pub const fn is_capture_port(port: u16) -> bool {
    port == CAPTURE_PORTS[0] || (port >= CAPTURE_PORTS[1] && port <= CAPTURE_PORTS[15])
}

/// The capture port for a destination. Connections to different destinations are spread, because all connections of a
/// pod to one capture port share its ephemeral ports, and one source port can have only one connection to each.
#[inline(always)]
pub const fn capture_port(destination: &Endpoint) -> u16 {
    let words = &destination.address.words;
    let mut hash = words[0] ^ words[1].rotate_left(8) ^ words[2].rotate_left(16) ^ words[3];
    hash ^= (destination.port as u32) << 16;
    hash = (hash ^ (hash >> 16)).wrapping_mul(0x7feb_352d);
    hash = (hash ^ (hash >> 15)).wrapping_mul(0x846c_a68b);
    let index = (hash >> 28) & 15;
    if index == 0 {
        CAPTURE_PORTS[0]
    } else {
        CAPTURE_PORTS[1] + index as u16 - 1
    }
}

/// [`Pod::flags`], [`Interface::flags`]: the pod's TCP is captured.
pub const CAPTURED: u32 = 1;

/// [`Pod::flags`], [`Interface::flags`]: traffic that is not TCP is dropped.
pub const FORBID_NON_TCP: u32 = 2;

/// [`Pod::flags`]: some destination ports are excluded: see `EXCLUDED_PORTS`.
pub const EXCLUDES_PORTS: u32 = 1 << 2;

/// [`Pod::flags`]: some destination ranges are excluded, or captured alone: see `EXCLUDED_RANGES`.
pub const EXCLUDES_RANGES: u32 = 1 << 3;

/// [`Pod::flags`]: what no range holds is excluded.
pub const EXCLUDES_THE_REST: u32 = 1 << 4;

/// [`Interface::flags`]: sockets of the pod may talk to what `connect` excluded for them.
pub const EXCLUDES_OUTBOUND: u32 = 1 << 5;

/// [`Pod::flags`], [`Interface::flags`]: some of the pod's own ports are excluded: see `EXCLUDED_PORTS`.
pub const EXCLUDES_INBOUND: u32 = 1 << 6;

/// [`Pod::flags`], [`Interface::flags`]: all of them are, but HBONE's.
pub const BYPASSES_INBOUND: u32 = 1 << 7;

/// [`Pod::flags`]: rules in the pod send what comes by some interfaces to the agent. Only for user space.
pub const REROUTES: u32 = 1 << 8;

/// [`Pod::flags`]: the pod's name server is the agent.
pub const DNS: u32 = 1 << 9;

/// Where name servers listen.
pub const NAME_SERVER_PORT: u16 = 53;

/// Where the agent's DNS sockets are, on the pod's own address: this port and those after it, one for each name server
/// that the pod asks. The first is Istio's.
pub const DNS_PORT: u16 = 15053;

/// How many name servers of a pod are told apart; it reaches more directly.
pub const DNS_SLOTS: u32 = 8;

/// The firewall mark by which the programs know the agent's DNS sockets.
pub const DNS_MARK: u32 = 0x53d;

/// The one entry of the map `CONFIG`: what tells the node's processes apart.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// The id of the agent's cgroup.
    pub agent_cgroup: u64,
    /// The id of the cgroup of all pods of the node.
    pub pods_cgroup: u64,
    /// The cookie of the node's network namespace.
    pub node_cookie: u64,
    /// The depth of the agent's cgroup; the root's is 0.
    pub agent_level: u32,
    /// The depth of the pods' cgroup.
    pub pods_level: u32,
}

/// A pod, in the map `PODS` under the cookie of its network namespace.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pod {
    /// Its IPv4 address, v4-mapped; [`Address::NONE`] where it has none.
    pub ip4: Address,
    /// Its IPv6 address; [`Address::NONE`] where it has none.
    pub ip6: Address,
    /// [`CAPTURED`], [`FORBID_NON_TCP`], [`EXCLUDES_PORTS`] and what follows it.
    pub flags: u32,
    /// The host side of its veth, under which it is counted.
    pub ifindex: u32,
}

/// The host side of a captured pod's veth, in the map `INTERFACES` under its index.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Interface {
    /// The pod's IPv4 address, v4-mapped; [`Address::NONE`] where it has none.
    pub ip4: Address,
    /// The pod's IPv6 address; [`Address::NONE`] where it has none.
    pub ip6: Address,
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// [`FORBID_NON_TCP`], [`EXCLUDES_OUTBOUND`] and what follows it.
    pub flags: u32,
    /// Always 0.
    pub reserved: u32,
}

/// Where a socket's application wanted to go, in the sockets' storage `DIALLED`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Dialled {
    /// Where to.
    pub destination: Endpoint,
    /// 0: the connection is captured. Else [`PAST_AGENT`] or [`FROM_HOST`].
    pub mark: u32,
}

/// [`Dialled::mark`]: the connection goes there, or came from there, by itself, past the agent.
pub const PAST_AGENT: u32 = 1;

/// [`Dialled::mark`]: the socket was accepted from there, where a process of the host opened the connection.
pub const FROM_HOST: u32 = 2;

/// A port that is not captured, in the map `EXCLUDED_PORTS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExcludedPort {
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// The port, as a number.
    pub port: u16,
    /// 1: of the pod; 0: of destinations.
    pub inbound: u16,
    /// Always 0.
    pub reserved: u32,
}

impl ExcludedPort {
    /// A port of a pod, or of the destinations of a pod.
    #[inline(always)]
    pub const fn new(cookie: u64, port: u16, inbound: bool) -> Self {
        Self {
            cookie,
            port,
            inbound: inbound as u16,
            reserved: 0,
        }
    }
}

/// A pod's destinations, in the map `EXCLUDED_RANGES`, by longest prefix; the value is 1 where they are excluded, and 0
/// where they are captured.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ExcludedRange {
    /// The cookie of the pod's network namespace, in two words so that nothing needs more than their alignment.
    pub cookie: [u32; 2],
    /// The address, v4-mapped if IPv4.
    pub address: Address,
}

impl ExcludedRange {
    /// The bits before the address: no prefix is shorter.
    pub const COOKIE_BITS: u32 = 64;
    /// The length of a whole key.
    pub const BITS: u32 = Self::COOKIE_BITS + 128;

    /// A destination of a pod.
    #[inline(always)]
    pub const fn new(cookie: u64, address: Address) -> Self {
        Self {
            cookie: [cookie as u32, (cookie >> 32) as u32],
            address,
        }
    }

    /// Whose it is.
    pub const fn cookie(&self) -> u64 {
        self.cookie[0] as u64 | (self.cookie[1] as u64) << 32
    }
}

/// A TCP connection seen from a pod: the key of `ADMITTED`, `PROBES`, `EXCLUDED` and `FLOWS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Flow {
    /// The pod's end.
    pub pod: Endpoint,
    /// The other end.
    pub remote: Endpoint,
}

/// The key of `ORIGINAL`: a captured connection as the agent sees it when it accepts.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct OriginalKey {
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// The application's own end.
    pub source: Endpoint,
    /// Which of [`CAPTURE_PORTS`] it was sent to.
    pub capture_port: u32,
}

/// Which of the agent's listeners a connection is for.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum ListenerKind {
    /// Captured outbound connections (15001).
    Outbound = 1,
    /// Plaintext inbound connections (15006).
    Inbound = 2,
    /// HBONE (15008).
    Hbone = 3,
    /// What machines inside the pod open, sent to the first capture port by a rule: the outbound listener, too.
    Rerouted = 4,
}

/// The key of the SockHash `LISTENERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct ListenerKey {
    /// The pod's address, v4-mapped if IPv4.
    pub address: Address,
    /// A [`ListenerKind`].
    pub kind: u32,
}

/// The key of `DNS_SERVERS`, whose values are the addresses of the name servers that pods ask.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DnsSlot {
    /// The cookie of the pod's network namespace.
    pub cookie: u64,
    /// The pod's number for it, less than [`DNS_SLOTS`].
    pub slot: u32,
    /// Always 0.
    pub reserved: u32,
}

impl DnsSlot {
    /// A name server of a pod.
    #[inline(always)]
    pub const fn new(cookie: u64, slot: u32) -> Self {
        Self {
            cookie,
            slot,
            reserved: 0,
        }
    }
}

/// The key of the per-CPU map `COUNTERS`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct CounterKey {
    /// The host side of the pod's veth; 0 where the hook can't know the pod.
    pub ifindex: u32,
    /// A [`Reason`].
    pub reason: u32,
}

/// What is to be put back when a pod is released, in the map `RESTORE` under the cookie of its network namespace. Only
/// user space uses it: it is here because bpffs is the one place that lives exactly as long as the capture.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Restore {
    /// Where the network namespace was found; zero-terminated.
    pub netns: [u8; 240],
    /// `net.ipv4.tcp_fwmark_accept` as it was.
    pub tcp_fwmark_accept: u32,
    /// `net.ipv4.conf.all.rp_filter` as it was; [`Restore::UNTOUCHED`] where it did not need a change.
    pub rp_filter_all: u32,
    /// `net.ipv4.fwmark_reflect` as it was.
    pub fwmark_reflect4: u32,
    /// `net.ipv6.fwmark_reflect` as it was; [`Restore::UNTOUCHED`] where there is none.
    pub fwmark_reflect6: u32,
}

impl Restore {
    /// A setting that was not changed.
    pub const UNTOUCHED: u32 = u32::MAX;
}

#[cfg(feature = "user")]
mod user {
    #![expect(unsafe_code, reason = "aya's Pod is an unsafe trait")]

    macro_rules! plain {
        ($($name:ident),*) => { $(
            // SAFETY: repr(C), made of integers, without padding (see the test), valid for every bit pattern.
            unsafe impl aya::Pod for crate::$name {}
        )* };
    }

    plain!(
        Address,
        Endpoint,
        Config,
        Pod,
        Interface,
        Flow,
        OriginalKey,
        ListenerKey,
        CounterKey,
        DnsSlot,
        Restore,
        Dialled,
        ExcludedPort,
        ExcludedRange
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_have_no_padding() {
        assert_eq!(size_of::<Endpoint>(), 16 + 4);
        assert_eq!(size_of::<Config>(), 8 * 3 + 4 * 2);
        assert_eq!(size_of::<Pod>(), 16 * 2 + 4 * 2);
        assert_eq!(size_of::<Interface>(), 16 * 2 + 8 + 4 * 2);
        assert_eq!(size_of::<Flow>(), 2 * size_of::<Endpoint>());
        assert_eq!(size_of::<OriginalKey>(), 8 + 20 + 4);
        assert_eq!(size_of::<ListenerKey>(), 16 + 4);
        assert_eq!(size_of::<Restore>(), 240 + 4 * 4);
        assert_eq!(size_of::<DnsSlot>(), 8 + 2 * 4);
        assert_eq!(size_of::<Dialled>(), 20 + 4);
        assert_eq!(size_of::<ExcludedPort>(), 8 + 2 * 2 + 4);
        assert_eq!(size_of::<ExcludedRange>() * 8, ExcludedRange::BITS as usize);
        assert_eq!(ExcludedRange::new(u64::MAX - 1, Address::NONE).cookie(), u64::MAX - 1);
    }

    #[test]
    fn capture_ports_are_recognised_and_all_used() {
        let mut used = [false; CAPTURE_PORTS.len()];
        for low in 0..=255u8 {
            for port in [80, 443, 8080] {
                let destination = Endpoint::new(Address::from_ip([10, 96, 3, low].into()), port);
                let capture = capture_port(&destination);
                assert!(is_capture_port(capture));
                used[CAPTURE_PORTS.iter().position(|known| *known == capture).unwrap()] = true;
            }
        }
        assert_eq!(used, [true; CAPTURE_PORTS.len()]);
        for port in [15000, 15002, INBOUND_PORT, HBONE_PORT, 15053, 15120, 15136] {
            assert!(!is_capture_port(port));
        }
    }
}
