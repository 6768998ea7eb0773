//! DNS over UDP: what a captured pod sends to a name server goes to the agent, and answers come from that name server.
//!
//! ```text
//! connect4/6, sendmsg4/6   server:53      ─► pod's own address : 15053+i    i: the pod's number for that server
//! recvmsg4/6, getpeername  own : 15053+i  ─► server:53
//! ```
//! Nothing is kept for a socket: one may ask several servers in turn and check who answers (musl), be connected and never
//! name an address again (Go), or be a v6 socket that asks a v4 server (then it is `sendmsg4` that is called, and
//! `recvmsg6`). The number of a server is given when it is first asked, and stays until the pod is gone: what was asked before a
//! release is answered after it.
//!
//! Fails open, other than TCP: where the agent does not listen, as when it is away, or where a pod asks more than
//! [`abi::DNS_SLOTS`] servers, its queries go to the server itself. A pod that can't resolve names is dead; UDP is not
//! what the guard holds, and what is resolved is dialled over TCP, which is.

use abi::{Address, CAPTURED, DNS, DNS_MARK, DNS_PORT, DNS_SLOTS, DnsSlot, Endpoint, NAME_SERVER_PORT, Pod, Reason};
use aya_ebpf::{
    bindings::{BPF_NOEXIST, bpf_sock_tuple},
    helpers::{bpf_get_netns_cookie, bpf_sk_lookup_udp, bpf_sk_release},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;

use crate::{
    context,
    maps::{DNS_SERVERS, PODS, count, is_agents_process},
};

pub const IPPROTO_UDP: u32 = 17;

const PROCEED: i32 = 1;
/// `BPF_F_CURRENT_NETNS`.
const CURRENT_NETNS: u64 = u64::MAX;

#[cgroup_sock_addr(sendmsg4)]
pub fn sendmsg4(ctx: SockAddrContext) -> i32 {
    let destination = read4(&ctx);
    if let Some(to) = redirect(&ctx, &destination) {
        write4(&ctx, &to);
    }
    PROCEED
}

#[cgroup_sock_addr(sendmsg6)]
pub fn sendmsg6(ctx: SockAddrContext) -> i32 {
    let destination = read6(&ctx);
    if let Some(to) = redirect(&ctx, &destination) {
        write6(&ctx, &to);
    }
    PROCEED
}

#[cgroup_sock_addr(recvmsg4)]
pub fn recvmsg4(ctx: SockAddrContext) -> i32 {
    let source = read4(&ctx);
    if let Some(server) = server_of(&ctx, &source) {
        write4(&ctx, &server);
    }
    PROCEED
}

#[cgroup_sock_addr(recvmsg6)]
pub fn recvmsg6(ctx: SockAddrContext) -> i32 {
    let source = read6(&ctx);
    if let Some(server) = server_of(&ctx, &source) {
        write6(&ctx, &server);
    }
    PROCEED
}

/// The address of a context.
#[inline(always)]
pub fn read4(ctx: &SockAddrContext) -> Endpoint {
    // SAFETY: the context is valid; read before any branch: see `context`.
    let (address, port) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip4),
            core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port),
        )
    };
    Endpoint::new(Address::v4(address), u16::from_be(port as u16))
}

/// The same of an IPv6 one.
#[inline(always)]
pub fn read6(ctx: &SockAddrContext) -> Endpoint {
    // SAFETY: as in `read4`.
    let (words, port) = unsafe {
        (
            context::words(&raw const (*ctx.sock_addr).user_ip6),
            core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_port),
        )
    };
    Endpoint::new(Address::v6(words), u16::from_be(port as u16))
}

/// Replaces the address of a context.
#[inline(always)]
pub fn write4(ctx: &SockAddrContext, to: &Endpoint) {
    // SAFETY: the context is valid, and these fields may be written by every program of this file.
    unsafe {
        core::ptr::write_volatile(&raw mut (*ctx.sock_addr).user_ip4, to.address.words[3]);
        core::ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, u32::from(to.port.to_be()));
    }
}

/// The same of an IPv6 one.
#[inline(always)]
pub fn write6(ctx: &SockAddrContext, to: &Endpoint) {
    // SAFETY: as in `write4`.
    unsafe {
        context::set_words(&raw mut (*ctx.sock_addr).user_ip6, to.address.words);
        core::ptr::write_volatile(&raw mut (*ctx.sock_addr).user_port, u32::from(to.port.to_be()));
    }
}

/// Where a datagram to this address goes instead, if that is to a name server and the pod's is ours.
#[inline(always)]
pub fn redirect(ctx: &SockAddrContext, destination: &Endpoint) -> Option<Endpoint> {
    if destination.port != NAME_SERVER_PORT || destination.address.is_loopback() || destination.address.is_none() {
        return None;
    }
    // SAFETY: the context is valid.
    let protocol = unsafe { core::ptr::read_volatile(&raw const (*ctx.sock_addr).protocol) };
    if protocol != IPPROTO_UDP {
        return None;
    }
    if is_agents_process() {
        return None;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: as in `connect`.
    let pod = unsafe { PODS.get(&cookie) }?;
    if pod.flags & (CAPTURED | DNS) != CAPTURED | DNS {
        return None;
    }
    let own = own_address(pod, &destination.address)?;
    if destination.address.same(&own) {
        return None;
    }
    let Some(slot) = slot_of(cookie, &destination.address) else {
        count(pod.ifindex, Reason::DnsTooManyServers);
        return None;
    };
    let to = Endpoint::new(own, DNS_PORT + slot as u16);
    if !agent_listens(ctx, &to) {
        count(pod.ifindex, Reason::DnsNoListener);
        return None;
    }
    count(pod.ifindex, Reason::DnsCaptured);
    debug!(ctx, "a name server's address replaced by port {}", to.port);
    Some(to)
}

/// Which name server this end of the agent's stands for.
#[inline(always)]
pub fn server_of(ctx: &SockAddrContext, end: &Endpoint) -> Option<Endpoint> {
    if end.port < DNS_PORT || end.port >= DNS_PORT + DNS_SLOTS as u16 {
        return None;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: as in `connect`.
    let pod = unsafe { PODS.get(&cookie) }?;
    if !own_address(pod, &end.address)?.same(&end.address) {
        return None;
    }
    let key = DnsSlot::new(cookie, u32::from(end.port - DNS_PORT));
    // SAFETY: an entry does not change while the pod is there.
    let server = unsafe { DNS_SERVERS.get(&key) }?;
    // A server of the other family can't have been asked by this address.
    if server.is_v4() != end.address.is_v4() {
        return None;
    }
    Some(Endpoint::new(*server, NAME_SERVER_PORT))
}

/// The pod's own address of the family of another.
#[inline(always)]
fn own_address(pod: &Pod, other: &Address) -> Option<Address> {
    let own = if other.is_v4() { pod.ip4 } else { pod.ip6 };
    if own.is_none() { None } else { Some(own) }
}

/// The pod's number for a server; a new one is given its own. None: there are no more numbers.
#[inline(always)]
fn slot_of(cookie: u64, server: &Address) -> Option<u32> {
    let mut slot = 0;
    while slot < DNS_SLOTS {
        let key = DnsSlot::new(cookie, slot);
        // SAFETY: an entry does not change while the pod is there.
        if unsafe { DNS_SERVERS.get(&key).is_none() }
            && DNS_SERVERS.insert(&key, server, u64::from(BPF_NOEXIST)).is_ok()
        {
            return Some(slot);
        }
        // Another processor may have been the one to put it there.
        // SAFETY: as above.
        if unsafe { DNS_SERVERS.get(&key) }.is_some_and(|known| known.same(server)) {
            return Some(slot);
        }
        slot += 1;
    }
    None
}

/// Whether the agent has a socket at this end. A process of the pod that took the port has not its mark.
#[inline(always)]
fn agent_listens(ctx: &SockAddrContext, end: &Endpoint) -> bool {
    // SAFETY: all zero is a valid value of a union of integers.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let size = if end.address.is_v4() {
        // SAFETY: both members of the union are integers.
        let ipv4 = unsafe { &mut tuple.__bindgen_anon_1.ipv4 };
        ipv4.saddr = end.address.words[3];
        ipv4.daddr = end.address.words[3];
        ipv4.dport = end.port.to_be();
        size_of_val(ipv4)
    } else {
        // SAFETY: as above.
        let ipv6 = unsafe { &mut tuple.__bindgen_anon_1.ipv6 };
        ipv6.saddr = end.address.words;
        ipv6.daddr = end.address.words;
        ipv6.dport = end.port.to_be();
        size_of_val(ipv6)
    };
    // SAFETY: the tuple is ours and as long as is said; what is found is given back.
    unsafe {
        let sk = bpf_sk_lookup_udp(ctx.sock_addr.cast(), &raw mut tuple, size as u32, CURRENT_NETNS, 0);
        if sk.is_null() {
            return false;
        }
        let mark = core::ptr::read_volatile(&raw const (*sk).mark);
        bpf_sk_release(sk.cast());
        mark == DNS_MARK
    }
}
