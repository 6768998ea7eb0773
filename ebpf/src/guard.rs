//! tcx ingress on the host side of a captured pod's veth: **the guard**, the security boundary for TCP.
//!
//! The packet's socket survives the crossing of the veth, and with it the cgroup of whoever made it. TCP passes when
//!
//! - the agent's socket sent it, and it still carries that socket's addresses and ports (a pod with `CAP_NET_ADMIN`
//!   could otherwise rewrite the agent's packets on their way out), and it does not go to the pod itself;
//! - it belongs to a connection that a process of the host opened (see `proof`), and does not open a new one;
//! - it belongs to a connection older than the enrolment, and does not open a new one;
//! - its socket was connected to an excluded destination, and it goes there, or the connection came from outside to an
//!   excluded port of the pod (see `exclusion`);
//! - the kernel sent it by itself: a bare RST for a closed port, the last ACK of a connection in TIME_WAIT.
//!
//! All other TCP is dropped and counted. What is not TCP passes unless the pod's setting forbids it; what the agent asks
//! name servers from inside the pod passes then, too, and is remembered for the answer (`ASKED`).

use abi::{
    Address, BYPASSES_INBOUND, EXCLUDES_INBOUND, EXCLUDES_OUTBOUND, FORBID_NON_TCP, FROM_HOST, Flow, INBOUND_PORT,
    Interface, Reason,
};
use aya_ebpf::{
    bindings::{BPF_ANY, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_sock},
    helpers::{bpf_ktime_get_ns, bpf_skb_cgroup_id},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::debug;

use crate::{
    context,
    exclusion::{self, is_own, lets_out},
    maps::{ASKED, FLOWS, INTERFACES, PROBES, count, is_agents_packet},
    packet::{ACK, Direction, FIN, Packet, RST, SYN, Segment, parse},
};

/// The cgroup of sockets that belong to the kernel itself.
const ROOT_CGROUP: u64 = 1;

const TCP_TIME_WAIT: u32 = 6;
const TCP_CLOSE: u32 = 7;
const TCP_LISTEN: u32 = 10;
const TCP_NEW_SYN_RECV: u32 = 12;

const AF_INET6: u32 = 10;

/// On to the next program, or on its way when there is none.
const PASS: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;

#[classifier]
pub fn guard(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid.
    let ifindex = unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).ifindex) };
    // SAFETY: entries change only when the agent updates a pod.
    let Some(interface) = (unsafe { INTERFACES.get(&ifindex) }) else {
        count(ifindex, Reason::UnknownInterface);
        return DROP;
    };
    match judge(&ctx, interface) {
        Ok(()) => PASS,
        Err(reason) => {
            count(ifindex, reason);
            debug!(
                &ctx,
                "guard dropped a packet on interface {}: reason {}", ifindex, reason as u32
            );
            DROP
        }
    }
}

#[inline(always)]
fn judge(ctx: &TcContext, interface: &Interface) -> Result<(), Reason> {
    match parse(ctx, Direction::FromPod) {
        Packet::Tcp(segment) => judge_tcp(ctx, interface, &segment),
        Packet::Vital => Ok(()),
        Packet::Udp(_) | Packet::Other if interface.flags & FORBID_NON_TCP == 0 => Ok(()),
        Packet::Udp(flow) if is_agents(ctx) => judge_query(ctx, &flow),
        Packet::Other if is_agents(ctx) => Ok(()),
        Packet::Udp(_) | Packet::Other => Err(Reason::NonTcpForbidden),
        Packet::Bad(reason) => Err(reason),
    }
}

/// What the agent asks a name server; its answer is let in for a while. It still has the ends of its socket: a pod could
/// otherwise bend it, to have somebody else let in.
#[inline(always)]
fn judge_query(ctx: &TcContext, flow: &Flow) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if sk.is_null() || !matches_socket(sk, flow) {
        return Err(Reason::Altered);
    }
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let _ = ASKED.insert(flow, &now, u64::from(BPF_ANY));
    Ok(())
}

#[inline(always)]
fn is_agents(ctx: &TcContext) -> bool {
    // SAFETY: the context is valid.
    unsafe { is_agents_packet(ctx.skb.skb) }
}

#[inline(always)]
fn judge_tcp(ctx: &TcContext, interface: &Interface, segment: &Segment) -> Result<(), Reason> {
    // SAFETY: the context is valid.
    let sk = unsafe { (*ctx.skb.skb).__bindgen_anon_2.sk };
    if !sk.is_null() && is_agents(ctx) {
        // SAFETY: not null, as checked above.
        let state = unsafe { core::ptr::read_volatile(&raw const (*sk).state) };
        // The SYN-ACK of a SYN cookie has only the listener.
        // A connection that nobody had accepted yet is reset when its listener ends, and has lost its ports by the time
        // that the packet gets here. Without that reset the peer would wait in vain; it carries nothing.
        let buried = state == TCP_CLOSE && segment.empty && segment.flags & (RST | SYN | FIN) == RST;
        // What an agent before this one accepted, that captured by iptables, may come from any port of the pod.
        let untouched =
            state == TCP_LISTEN || buried || matches_socket_from(sk, &segment.flow, u32::from(INBOUND_PORT));
        // The agent's connections to the application (and its answers to it) are inside the pod and in clear; a pod that
        // bends its routes must not get them sent out.
        return if untouched && !is_own(interface, &segment.flow.remote.address) {
            Ok(())
        } else {
            Err(Reason::Altered)
        };
    }
    if !segment.opens() && is_recorded(sk, segment) {
        return Ok(());
    }
    if !segment.opens() && is_answer_to_host(interface, sk, segment) {
        return Ok(());
    }
    if interface.flags & (EXCLUDES_OUTBOUND | EXCLUDES_INBOUND | BYPASSES_INBOUND) != 0 {
        let untouched = !sk.is_null() && matches_socket(sk, &segment.flow);
        if lets_out(interface, sk, segment, untouched) {
            return Ok(());
        }
    }
    if segment.empty && is_the_kernels(ctx, sk, segment) {
        return Ok(());
    }
    Err(if sk.is_null() {
        Reason::NoSocket
    } else {
        Reason::ForeignSocket
    })
}

/// A host's connection, or one older than the enrolment.
#[inline(always)]
fn is_recorded(sk: *mut bpf_sock, segment: &Segment) -> bool {
    // SAFETY: only the presence matters.
    if unsafe { PROBES.get(&segment.flow).is_some() } {
        return true;
    }
    if segment.flags & SYN != 0 && !is_of_handshake(sk, segment) {
        return false;
    }
    // The agent removes what has ended otherwise.
    if segment.flags & RST != 0 {
        return FLOWS.remove(&segment.flow).is_ok();
    }
    // SAFETY: only the presence matters.
    unsafe { FLOWS.get(&segment.flow).is_some() }
}

/// Whether a SYN-ACK, maybe not the first, answers the SYN that the kernel has of this very flow: no process can make a
/// socket of that kind.
#[inline(always)]
fn is_of_handshake(sk: *mut bpf_sock, segment: &Segment) -> bool {
    if sk.is_null() || !segment.empty || segment.flags & (RST | SYN | FIN | ACK) != SYN | ACK {
        return false;
    }
    // SAFETY: not null.
    let state = unsafe { core::ptr::read_volatile(&raw const (*sk).state) };
    state == TCP_NEW_SYN_RECV && matches_socket(sk, &segment.flow)
}

/// What [`PROBES`] had once, and has no more: it holds so many. The socket that was accepted is marked.
#[inline(always)]
fn is_answer_to_host(interface: &Interface, sk: *mut bpf_sock, segment: &Segment) -> bool {
    let (pod, remote) = (&segment.flow.pod, &segment.flow.remote);
    !sk.is_null()
        && is_own(interface, &pod.address)
        && matches_socket(sk, &segment.flow)
        && exclusion::is_marked(sk, remote, FROM_HOST)
}

/// Bare RSTs and ACKs that no process caused to be sent. A pod can't make one of these: its raw and packet sockets have
/// its own cgroup. What a nested namespace forwards has no socket, as has the kernel's own RST over IPv6; that one row
/// can't be told apart, and carries no data.
#[inline(always)]
fn is_the_kernels(ctx: &TcContext, sk: *mut bpf_sock, segment: &Segment) -> bool {
    let reset = segment.flags & (RST | SYN | FIN) == RST;
    let acknowledgement = segment.flags & (RST | SYN | FIN | ACK) == ACK;
    if sk.is_null() {
        return reset && !segment.flow.pod.address.is_v4();
    }
    // SAFETY: not null.
    let state = unsafe { core::ptr::read_volatile(&raw const (*sk).state) };
    if state == TCP_TIME_WAIT {
        return (reset || acknowledgement) && matches_socket(sk, &segment.flow);
    }
    // SAFETY: the context is valid.
    let cgroup = unsafe { bpf_skb_cgroup_id(ctx.skb.skb) };
    (reset || acknowledgement) && cgroup == ROOT_CGROUP
}

/// Whether a packet has the addresses and ports of the socket that sent it.
#[inline(always)]
fn matches_socket(sk: *mut bpf_sock, flow: &Flow) -> bool {
    matches_socket_from(sk, flow, 0)
}

/// The same, where a socket of this port may have sent from another.
#[inline(always)]
fn matches_socket_from(sk: *mut bpf_sock, flow: &Flow, redirected: u32) -> bool {
    // SAFETY: the caller has checked for null; these fields are in the part that all sockets have. All are read before
    // any branch: see `context`.
    let (family, ports, ip4, source6, destination6) = unsafe {
        (
            core::ptr::read_volatile(&raw const (*sk).family),
            (
                core::ptr::read_volatile(&raw const (*sk).src_port),
                u16::from_be(core::ptr::read_volatile(&raw const (*sk).dst_port)),
            ),
            (
                core::ptr::read_volatile(&raw const (*sk).src_ip4),
                core::ptr::read_volatile(&raw const (*sk).dst_ip4),
            ),
            context::words(&raw const (*sk).src_ip6),
            context::words(&raw const (*sk).dst_ip6),
        )
    };
    let (pod, remote) = (&flow.pod, &flow.remote);
    // A socket that was closed since it sent the packet has given its port back.
    let port = ports.0 == u32::from(pod.port) || ports.0 == 0 || ports.0 == redirected;
    if !port || ports.1 != remote.port {
        return false;
    }
    if pod.address.is_v4() {
        // A dual-stack socket has them too.
        return ip4 == (pod.address.words[3], remote.address.words[3]);
    }
    family == AF_INET6 && Address::v6(source6).same(&pod.address) && Address::v6(destination6).same(&remote.address)
}
