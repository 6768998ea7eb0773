//! What a pod's settings keep out of the mesh: asked where a connection begins, recognised where its packets pass.
//!
//! ```text
//! out: connect marks the socket (DIALLED) ────────────────────────────────► guard: the socket's own segments to there
//! in:  proof sees the SYN come from outside (EXCLUDED) ─► sk_lookup passes ─► application's socket, marked when it stands
//! ```
//! The mark is of one socket and one destination, so neither a port, nor a range, nor an address is a way out by itself:
//! a raw socket, a nested namespace, a socket that was connected past the hook have no mark.

use abi::{
    Address, BYPASSES_INBOUND, Dialled, EXCLUDES_INBOUND, EXCLUDES_PORTS, EXCLUDES_RANGES, EXCLUDES_THE_REST, Endpoint,
    ExcludedPort, ExcludedRange, HBONE_PORT, Interface, PAST_AGENT, Pod,
};
use aya_ebpf::{
    bindings::{BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    helpers::bpf_sk_storage_get,
    maps::lpm_trie::Key,
};

use crate::{
    maps::{DIALLED, EXCLUDED, EXCLUDED_PORTS, EXCLUDED_RANGES},
    packet::{SYN, Segment},
};

/// Whether a pod's connection to a destination is not captured.
#[inline(always)]
pub fn excludes(pod: &Pod, cookie: u64, destination: &Endpoint) -> bool {
    if pod.flags & (EXCLUDES_PORTS | EXCLUDES_RANGES | EXCLUDES_THE_REST) == 0 {
        return false;
    }
    let port = ExcludedPort::new(cookie, destination.port, false);
    // SAFETY: only the presence matters.
    if pod.flags & EXCLUDES_PORTS != 0 && unsafe { EXCLUDED_PORTS.get(&port).is_some() } {
        return true;
    }
    if pod.flags & EXCLUDES_RANGES != 0 {
        let key = Key::new(ExcludedRange::BITS, ExcludedRange::new(cookie, destination.address));
        if let Some(excluded) = EXCLUDED_RANGES.get(&key) {
            return *excluded == 1;
        }
    }
    pod.flags & EXCLUDES_THE_REST != 0
}

/// Whether connections from outside to a port of the pod are not captured.
#[inline(always)]
pub fn excludes_inbound(flags: u32, cookie: u64, port: u16) -> bool {
    if flags & (EXCLUDES_INBOUND | BYPASSES_INBOUND) == 0 || port == HBONE_PORT {
        return false;
    }
    // SAFETY: only the presence matters.
    flags & BYPASSES_INBOUND != 0 || unsafe { EXCLUDED_PORTS.get(&ExcludedPort::new(cookie, port, true)).is_some() }
}

/// Whether a segment of a socket that is not the agent's belongs to a connection that is not captured. `untouched`: it
/// has the ends of its socket.
#[inline(always)]
pub fn lets_out(interface: &Interface, sk: *mut bpf_sock, segment: &Segment, untouched: bool) -> bool {
    let (pod, remote) = (&segment.flow.pod, &segment.flow.remote);
    if !is_own(interface, &pod.address) || is_own(interface, &remote.address) {
        return false;
    }
    if untouched && is_marked(sk, remote, PAST_AGENT) {
        return true;
    }
    // SAFETY: only the presence matters.
    !segment.opens()
        && excludes_inbound(interface.flags, interface.cookie, pod.port)
        && unsafe { EXCLUDED.get(&segment.flow).is_some() }
}

/// Whether a socket was connected to, or accepted from, exactly there, and has the mark.
#[inline(always)]
pub fn is_marked(sk: *mut bpf_sock, remote: &Endpoint, mark: u32) -> bool {
    if sk.is_null() {
        return false;
    }
    // SAFETY: not null; the helper answers null for what is no full socket and for one without storage.
    unsafe {
        let dialled = storage(sk, core::ptr::null_mut(), 0);
        !dialled.is_null()
            && (*dialled).mark == mark
            && (*dialled).destination.port == remote.port
            && (*dialled).destination.address.same(&remote.address)
    }
}

/// A socket's storage.
///
/// # Safety
/// The socket must not be null.
#[inline(always)]
pub unsafe fn storage(sk: *mut bpf_sock, value: *mut Dialled, flags: u32) -> *mut Dialled {
    let map = (&raw const DIALLED).cast_mut().cast();
    // SAFETY: the caller's promise.
    unsafe { bpf_sk_storage_get(map, sk.cast(), value.cast(), u64::from(flags)).cast() }
}

/// Marks an accepted socket.
///
/// # Safety
/// The socket must not be null.
#[inline(always)]
pub unsafe fn mark_accepted(sk: *mut bpf_sock, remote: &Endpoint, mark: u32) -> bool {
    let mut dialled = Dialled {
        destination: *remote,
        mark,
    };
    // SAFETY: the caller's promise.
    unsafe { !storage(sk, &mut dialled, BPF_SK_STORAGE_GET_F_CREATE).is_null() }
}

/// Whether a segment may begin, or answer, a connection to an excluded port: a first SYN from outside.
#[inline(always)]
pub fn begins_inbound(interface: &Interface, segment: &Segment) -> bool {
    segment.flags & SYN != 0
        && segment.opens()
        && excludes_inbound(interface.flags, interface.cookie, segment.flow.pod.port)
}

/// Whether an address is the pod's own.
#[inline(always)]
pub fn is_own(interface: &Interface, address: &Address) -> bool {
    if address.is_v4() {
        address.same(&interface.ip4)
    } else {
        address.same(&interface.ip6)
    }
}
