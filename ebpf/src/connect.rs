//! `cgroup/connect4`, `connect6`: sends a captured pod's TCP connections to the agent.
//!
//! The destination goes into the socket's storage and is replaced by the pod's *own* address (not loopback, so that
//! `getsockname` stays true) and a capture port, where `sk_lookup` gives the connection to the agent's listener.
//! Fails closed: an unknown network namespace, or a pod without an address of the family, may not connect at all.
//! What the pod's settings exclude goes where it wants, and its socket is marked for the guard to let it out.
//! A v4-mapped socket, as Java uses, comes only through `connect6`.

use abi::{Address, CAPTURED, Dialled, Endpoint, PAST_AGENT, Reason, capture_port};
use aya_ebpf::{
    helpers::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;

use crate::{
    context, dns, exclusion,
    maps::{DIALLED, PODS, count, is_agents_process},
};

const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const IPPROTO_TCP: u32 = 6;
const IPPROTO_MPTCP: u32 = 262;

const EPERM: i32 = 1;
const ENOMEM: i32 = 12;
const ENETUNREACH: i32 = 101;

const REFUSE: i32 = 0;
const PROCEED: i32 = 1;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the kernel gives a valid context. The fields are copied first: the verifier refuses addresses into the
    // context that the compiler merged across branches.
    let (address, port) = unsafe {
        let sock_addr = ctx.sock_addr;
        (
            core::ptr::read_volatile(&raw const (*sock_addr).user_ip4),
            core::ptr::read_volatile(&raw const (*sock_addr).user_port),
        )
    };
    let destination = Endpoint::new(Address::v4(address), u16::from_be(port as u16));
    match decide(&ctx, &destination) {
        Decision::Proceed | Decision::Exclude => PROCEED,
        Decision::Refuse(errno) => refuse(errno),
        Decision::Capture(to) => {
            // SAFETY: as above.
            unsafe {
                (*ctx.sock_addr).user_ip4 = to.address.words[3];
                (*ctx.sock_addr).user_port = u32::from(to.port.to_be());
            }
            PROCEED
        }
    }
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    // SAFETY: as in `connect4`.
    let (words, port) = unsafe {
        let sock_addr = ctx.sock_addr;
        (
            context::words(&raw const (*sock_addr).user_ip6),
            core::ptr::read_volatile(&raw const (*sock_addr).user_port),
        )
    };
    let destination = Endpoint::new(Address::v6(words), u16::from_be(port as u16));
    match decide(&ctx, &destination) {
        Decision::Proceed | Decision::Exclude => PROCEED,
        Decision::Refuse(errno) => refuse(errno),
        Decision::Capture(to) => {
            // SAFETY: as in `connect4`.
            unsafe {
                context::set_words(&raw mut (*ctx.sock_addr).user_ip6, to.address.words);
                (*ctx.sock_addr).user_port = u32::from(to.port.to_be());
            }
            PROCEED
        }
    }
}

enum Decision {
    Proceed,
    Refuse(i32),
    Capture(Endpoint),
    Exclude,
}

#[inline(always)]
fn decide(ctx: &SockAddrContext, destination: &Endpoint) -> Decision {
    let sock_addr = ctx.sock_addr;
    // SAFETY: as in `connect4`.
    let (kind, protocol, sk) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*sock_addr).type_),
            core::ptr::read_volatile(&raw const (*sock_addr).protocol),
            core::ptr::read_volatile(&raw const (*sock_addr).__bindgen_anon_1.sk),
        )
    };
    if kind == SOCK_DGRAM && protocol == dns::IPPROTO_UDP {
        return match dns::redirect(ctx, destination) {
            Some(to) => Decision::Capture(to),
            None => Decision::Proceed,
        };
    }
    if kind != SOCK_STREAM || (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) {
        return Decision::Proceed;
    }
    if is_agents_process() {
        return Decision::Proceed;
    }
    let decision = decide_for_pod(ctx, destination);
    if !matches!(decision, Decision::Capture(_) | Decision::Exclude) {
        // Or getpeername would tell the address of an earlier connect of the same socket.
        // SAFETY: the context's socket is valid while the program runs.
        let _ = unsafe { DIALLED.delete(sk) };
    }
    decision
}

#[inline(always)]
fn decide_for_pod(ctx: &SockAddrContext, destination: &Endpoint) -> Decision {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    // SAFETY: entries change only when the agent updates a pod; a torn read of one gives an address that leads nowhere.
    let Some(pod) = (unsafe { PODS.get(&cookie) }) else {
        count(0, Reason::UnknownNamespace);
        debug!(ctx, "connect refused: network namespace {} is not known", cookie);
        return Decision::Refuse(EPERM);
    };
    if pod.flags & CAPTURED == 0 || destination.address.is_loopback() || destination.address.is_none() {
        return Decision::Proceed;
    }
    let own = if destination.address.is_v4() { pod.ip4 } else { pod.ip6 };
    if destination.address.same(&own) {
        return Decision::Proceed;
    }
    let excluded = exclusion::excludes(pod, cookie, destination);
    if own.is_none() {
        count(pod.ifindex, Reason::NoAddressOfFamily);
        return Decision::Refuse(ENETUNREACH);
    }
    let mut dialled = Dialled {
        destination: *destination,
        mark: if excluded { PAST_AGENT } else { 0 },
    };
    // SAFETY: the context is valid; a returned pointer is to the socket's own storage.
    let stored = unsafe { DIALLED.get_or_insert_ptr_mut(ctx, Some(&mut dialled)) };
    if stored.is_null() {
        count(pod.ifindex, Reason::NoStorage);
        return Decision::Refuse(ENOMEM);
    }
    // SAFETY: not null; an earlier connect of the same socket may have left another destination there.
    unsafe { *stored = dialled };
    if excluded {
        count(pod.ifindex, Reason::ExcludedOutbound);
        return Decision::Exclude;
    }
    count(pod.ifindex, Reason::Captured);
    let port = capture_port(destination);
    debug!(ctx, "connect captured to port {}", port);
    Decision::Capture(Endpoint::new(own, port))
}

#[inline(always)]
fn refuse(errno: i32) -> i32 {
    // SAFETY: a helper without memory arguments.
    unsafe { bpf_set_retval(-errno) };
    REFUSE
}
