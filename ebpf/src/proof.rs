//! tcx egress on the host side of a captured pod's veth: the proof of who opened a connection to the pod.
//!
//! A packet that a process of the host sent still has its socket here; one that was forwarded has none. A host process
//! is one whose cgroup is neither below the pods' (that excludes host-network pods, and bridged pods, whose sockets
//! survive) nor the agent's, and whose socket belongs to the node's own network namespace. The root cgroup counts as
//! the host: no pod can be in it, and the kernel's own answers, which have it too, never open a connection.
//!
//! A connection that comes from elsewhere to an excluded port of the pod is recorded, too, and reaches the application.
//!
//! Packets that lie about belonging to the pod itself, or to a connection of the agent's inside the pod, are dropped.

use abi::{FORBID_NON_TCP, Flow, HBONE_PORT, Interface, Reason};
use aya_ebpf::{
    bindings::{BPF_ANY, TC_ACT_SHOT, TC_ACT_UNSPEC},
    helpers::{bpf_get_netns_cookie, bpf_ktime_get_ns, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    macros::classifier,
    programs::TcContext,
};
use aya_log_ebpf::debug;

use crate::{
    exclusion::{begins_inbound, is_own},
    maps::{ADMITTED, ASKED, EXCLUDED, INTERFACES, NODE_COOKIE, PROBES, count, is_agents_packet, pods_cgroup},
    packet::{Direction, Packet, Segment, parse},
};

/// Longer than the agent waits for a name server. Nanoseconds.
const AWAITED: u64 = 6_000_000_000;

/// On to the next program, or on its way when there is none.
const PASS: i32 = TC_ACT_UNSPEC;
const DROP: i32 = TC_ACT_SHOT as i32;

#[classifier]
pub fn proof(ctx: TcContext) -> i32 {
    let ifindex = interface_index(&ctx);
    // SAFETY: entries change only when the agent updates a pod.
    let Some(interface) = (unsafe { INTERFACES.get(&ifindex) }) else {
        return PASS;
    };
    let verdict = match parse(&ctx, Direction::ToPod) {
        Packet::Tcp(segment) => inspect(&ctx, interface, &segment),
        Packet::Udp(flow) if interface.flags & FORBID_NON_TCP != 0 && !is_awaited(&flow) => {
            Err(Reason::NonTcpForbidden)
        }
        Packet::Other if interface.flags & FORBID_NON_TCP != 0 => Err(Reason::NonTcpForbidden),
        _ => Ok(()),
    };
    match verdict {
        Ok(()) => PASS,
        Err(reason) => {
            count(ifindex, reason);
            debug!(
                &ctx,
                "dropped a packet to interface {}: reason {}", ifindex, reason as u32
            );
            DROP
        }
    }
}

/// Whether it may answer what the agent asked just now. Afterwards its port may be anybody's in the pod.
#[inline(always)]
fn is_awaited(flow: &Flow) -> bool {
    // SAFETY: the value is of one word; the other helper has no arguments.
    unsafe {
        ASKED
            .get(flow)
            .is_some_and(|asked| bpf_ktime_get_ns().wrapping_sub(*asked) < AWAITED)
    }
}

#[inline(always)]
fn interface_index(ctx: &TcContext) -> u32 {
    // SAFETY: the context is valid.
    unsafe { core::ptr::read_volatile(&raw const (*ctx.skb.skb).ifindex) }
}

#[inline(always)]
fn inspect(ctx: &TcContext, interface: &Interface, segment: &Segment) -> Result<(), Reason> {
    let flow = &segment.flow;
    if is_own(interface, &flow.remote.address) {
        return Err(Reason::OwnSource);
    }
    // HBONE is for the agent's listener, never for the application: no need to look.
    // SAFETY: only the presence matters.
    if flow.pod.port != HBONE_PORT && unsafe { ADMITTED.get(flow).is_some() } {
        return Err(Reason::Impersonation);
    }
    if segment.opens() {
        if is_of_the_host(ctx) {
            let _ = PROBES.insert(flow, &0, u64::from(BPF_ANY));
        } else {
            // The ports of a probe that is over may be somebody else's now.
            let _ = PROBES.remove(flow);
            let excluded = begins_inbound(interface, segment);
            // SAFETY: only the presence matters.
            if excluded && unsafe { EXCLUDED.get(flow).is_none() } {
                let _ = EXCLUDED.insert(flow, &0, u64::from(BPF_ANY));
                count(interface_index(ctx), Reason::ExcludedInbound);
            } else if !excluded {
                // It may have been, or that of a pod before this one at the address.
                let _ = EXCLUDED.remove(flow);
            }
        }
    }
    Ok(())
}

#[inline(always)]
fn is_of_the_host(ctx: &TcContext) -> bool {
    let skb = ctx.skb.skb;
    // SAFETY: the context is valid.
    unsafe {
        if (*skb).__bindgen_anon_2.sk.is_null() || bpf_skb_cgroup_id(skb) == 0 {
            return false;
        }
        let (pods, pods_level) = pods_cgroup();
        bpf_skb_ancestor_cgroup_id(skb, pods_level) != pods
            && !is_agents_packet(skb)
            && (NODE_COOKIE.load() == 0 || bpf_get_netns_cookie(skb.cast()) == NODE_COOKIE.load())
    }
}
