//! `sock_ops`: at `TCP_CONNECT_CB` the local port is known and the SYN is not yet sent, so what is written here is
//! there before the other side can need it.
//!
//! On the pods' cgroup: the application's end of a captured connection → where it was meant to go (`ORIGINAL`).
//! On the agent's cgroup: a connection that the agent opens inside a pod to the pod itself, for `sk_lookup` to let
//! through (`ADMITTED`).

use abi::{
    Address, BYPASSES_INBOUND, CAPTURED, EXCLUDES_INBOUND, Endpoint, FROM_HOST, Flow, OriginalKey, PAST_AGENT, Reason,
    is_capture_port,
};
use aya_ebpf::{
    bindings::{
        BPF_ANY, BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
        BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_TCP_CLOSE, BPF_TCP_SYN_SENT, bpf_sock_ops,
    },
    helpers::{bpf_get_netns_cookie, bpf_sock_ops_cb_flags_set},
    macros::sock_ops,
    programs::SockOpsContext,
};

use crate::{
    context, exclusion,
    maps::{ADMITTED, EXCLUDED, ORIGINAL, PODS, PROBES, add},
};

const AF_INET: u32 = 2;

const PROCEED: u32 = 1;

#[sock_ops]
pub fn sock_ops_pods(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid.
    match unsafe { (*ops).op } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => remember(ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(ops),
        BPF_SOCK_OPS_STATE_CB => ended(ops),
        _ => {}
    }
    PROCEED
}

#[inline(always)]
fn remember(ops: *mut bpf_sock_ops) {
    let (local, remote) = ends(ops);
    let to_the_agent =
        is_capture_port(remote.port) && (remote.address.same(&local.address) || local.address.is_loopback());
    // SAFETY: the context is valid; the socket is checked for null, and so is its storage.
    unsafe {
        let sk = (*ops).__bindgen_anon_2.sk;
        if sk.is_null() {
            return;
        }
        let dialled = exclusion::storage(sk, core::ptr::null_mut(), 0);
        if dialled.is_null() {
            return;
        }
        let value = (*dialled).destination;
        if (*dialled).mark == PAST_AGENT {
            // Its bytes are counted when it ends.
            bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32);
            return;
        }
        if !to_the_agent {
            return;
        }
        let _ = ORIGINAL.insert(&original_key(ops, local, remote), &value, u64::from(BPF_ANY));
        bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32);
    }
}

/// A connection that the application takes by itself, because its port is excluded or a process of the host opened it: the
/// socket is marked.
#[inline(always)]
fn accepted(ops: *mut bpf_sock_ops) {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ops.cast()) };
    // SAFETY: as in `connect::decide_for_pod`.
    let Some(pod) = (unsafe { PODS.get(&cookie) }) else {
        return;
    };
    if pod.flags & CAPTURED == 0 {
        return;
    }
    let (local, remote) = ends(ops);
    let flow = Flow { pod: local, remote };
    let may_be_excluded = pod.flags & (EXCLUDES_INBOUND | BYPASSES_INBOUND) != 0;
    // SAFETY: only the presence matters.
    let mark = if unsafe { PROBES.get(&flow).is_some() } {
        FROM_HOST
    } else if may_be_excluded && unsafe { EXCLUDED.get(&flow).is_some() } {
        PAST_AGENT
    } else {
        return;
    };
    // SAFETY: the context is valid; the socket is checked for null.
    unsafe {
        let sk = (*ops).__bindgen_anon_2.sk;
        if !sk.is_null() && exclusion::mark_accepted(sk, &remote, mark) && mark == PAST_AGENT {
            // Its bytes are counted when it ends.
            bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32);
        }
    }
}

#[inline(always)]
fn ended(ops: *mut bpf_sock_ops) {
    forget(ops);
    // SAFETY: the context is valid.
    let (bytes, sk) = unsafe {
        (
            (
                core::ptr::read_volatile(&raw const (*ops).bytes_acked),
                core::ptr::read_volatile(&raw const (*ops).bytes_received),
            ),
            (*ops).__bindgen_anon_2.sk,
        )
    };
    if states(ops).1 != BPF_TCP_CLOSE || sk.is_null() {
        return;
    }
    // SAFETY: not null.
    let dialled = unsafe { exclusion::storage(sk, core::ptr::null_mut(), 0) };
    // SAFETY: checked for null.
    if dialled.is_null() || unsafe { (*dialled).mark } != PAST_AGENT {
        return;
    }
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ops.cast()) };
    // SAFETY: as in `connect::decide_for_pod`.
    if let Some(pod) = unsafe { PODS.get(&cookie) } {
        add(pod.ifindex, Reason::ExcludedSent, bytes.0);
        add(pod.ifindex, Reason::ExcludedReceived, bytes.1);
    }
}

/// A connection that was never established will never be accepted. Any other entry stays until the agent takes it: an
/// application may connect, write and close before the agent comes to accept.
#[inline(always)]
fn forget(ops: *mut bpf_sock_ops) {
    let (old, new) = states(ops);
    if old != BPF_TCP_SYN_SENT || new != BPF_TCP_CLOSE {
        return;
    }
    let (local, remote) = ends(ops);
    if is_capture_port(remote.port) {
        let _ = ORIGINAL.remove(&original_key(ops, local, remote));
    }
}

#[inline(always)]
fn original_key(ops: *mut bpf_sock_ops, source: Endpoint, remote: Endpoint) -> OriginalKey {
    OriginalKey {
        // SAFETY: the context is valid.
        cookie: unsafe { bpf_get_netns_cookie(ops.cast()) },
        source,
        capture_port: u32::from(remote.port),
    }
}

#[sock_ops]
pub fn sock_ops_agent(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: the context is valid.
    match unsafe { (*ops).op } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => admit(ops),
        BPF_SOCK_OPS_STATE_CB => {
            let (_, new) = states(ops);
            if new == BPF_TCP_CLOSE {
                let (local, remote) = ends(ops);
                let _ = ADMITTED.remove(&Flow {
                    pod: remote,
                    remote: local,
                });
            }
        }
        _ => {}
    }
    PROCEED
}

#[inline(always)]
fn admit(ops: *mut bpf_sock_ops) {
    // SAFETY: the context is valid.
    let cookie = unsafe { bpf_get_netns_cookie(ops.cast()) };
    // SAFETY: as in `connect::decide_for_pod`.
    let Some(pod) = (unsafe { PODS.get(&cookie) }) else {
        return;
    };
    let (local, remote) = ends(ops);
    let own = if remote.address.is_v4() { pod.ip4 } else { pod.ip6 };
    if pod.flags & CAPTURED == 0 || !remote.address.same(&own) {
        return;
    }
    let flow = Flow {
        pod: remote,
        remote: local,
    };
    let _ = ADMITTED.insert(&flow, &0, u64::from(BPF_ANY));
    // SAFETY: the context is valid.
    unsafe { bpf_sock_ops_cb_flags_set(ops, BPF_SOCK_OPS_STATE_CB_FLAG as i32) };
}

#[inline(always)]
fn states(ops: *mut bpf_sock_ops) -> (u32, u32) {
    // SAFETY: the context is valid; for STATE_CB the arguments are the old and the new state.
    unsafe {
        (
            core::ptr::read_volatile(&raw const (*ops).__bindgen_anon_1.args[0]),
            core::ptr::read_volatile(&raw const (*ops).__bindgen_anon_1.args[1]),
        )
    }
}

/// The local and the remote end.
#[inline(always)]
fn ends(ops: *mut bpf_sock_ops) -> (Endpoint, Endpoint) {
    // SAFETY: the context is valid. All fields are read before any branch: see `context`.
    unsafe {
        let local_port = core::ptr::read_volatile(&raw const (*ops).local_port) as u16;
        let remote_port = u32::from_be(core::ptr::read_volatile(&raw const (*ops).remote_port)) as u16;
        let family = core::ptr::read_volatile(&raw const (*ops).family);
        let local4 = core::ptr::read_volatile(&raw const (*ops).local_ip4);
        let remote4 = core::ptr::read_volatile(&raw const (*ops).remote_ip4);
        let local6 = context::words(&raw const (*ops).local_ip6);
        let remote6 = context::words(&raw const (*ops).remote_ip6);
        let (local, remote) = if family == AF_INET {
            (Address::v4(local4), Address::v4(remote4))
        } else {
            (Address::v6(local6), Address::v6(remote6))
        };
        (Endpoint::new(local, local_port), Endpoint::new(remote, remote_port))
    }
}
