//! `sk_lookup` in the pod's network namespace: gives each new connection to the listener of the agent that it is for.
//!
//! ```text
//! to loopback                                    -> as it is
//! from the pod or loopback, to a capture port    -> outbound listener
//! from the pod itself or loopback                -> as it is
//! recorded: the agent's own, a host's probe      -> as it is
//! recorded: to an excluded port                  -> as it is
//! port 15008                                     -> HBONE listener
//! port 15001, where the pod reroutes interfaces  -> outbound listener, which asks conntrack where to
//! anything else                                  -> inbound listener; its local address is the original destination
//! ```
//! The listeners are found by the pod's address and not by a port, so it does not matter who holds which port. No
//! listener: refused (the kernel answers with RST).

use abi::{Address, CAPTURE_PORTS, Endpoint, Flow, HBONE_PORT, ListenerKey, ListenerKind, Reason, is_capture_port};
use aya_ebpf::{
    bindings::{BPF_SK_LOOKUP_F_NO_REUSEPORT, bpf_sk_lookup, sk_action},
    macros::sk_lookup,
    programs::SkLookupContext,
};
use aya_log_ebpf::debug;

use crate::{
    context,
    maps::{ADMITTED, EXCLUDED, LISTENERS, PROBES, count},
};

const AF_INET: u32 = 2;
const IPPROTO_TCP: u32 = 6;

#[sk_lookup]
pub fn steer(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: the context is valid.
    let protocol = unsafe { core::ptr::read_volatile(&raw const (*lookup).protocol) };
    if protocol != IPPROTO_TCP {
        return sk_action::SK_PASS;
    }
    let (local, remote) = ends(lookup);
    if local.address.is_loopback() {
        return sk_action::SK_PASS;
    }
    let from_here = remote.address.same(&local.address) || remote.address.is_loopback();
    let kind = if from_here {
        if !is_capture_port(local.port) {
            return sk_action::SK_PASS;
        }
        ListenerKind::Outbound
    } else {
        let flow = Flow { pod: local, remote };
        // SAFETY: only the presence matters.
        if unsafe { ADMITTED.get(&flow).is_some() } {
            return sk_action::SK_PASS;
        }
        // SAFETY: as above.
        if unsafe { PROBES.get(&flow).is_some() } {
            count(0, Reason::ProbeAdmitted);
            return sk_action::SK_PASS;
        }
        // SAFETY: as above.
        if unsafe { EXCLUDED.get(&flow).is_some() } {
            return sk_action::SK_PASS;
        }
        if local.port == CAPTURE_PORTS[0] {
            let key = ListenerKey {
                address: local.address,
                kind: ListenerKind::Rerouted as u32,
            };
            let assigned = LISTENERS.redirect_sk_lookup(&ctx, &key, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT));
            if assigned.is_ok() {
                return sk_action::SK_PASS;
            }
        }
        if local.port == HBONE_PORT {
            ListenerKind::Hbone
        } else {
            ListenerKind::Inbound
        }
    };
    let key = ListenerKey {
        address: local.address,
        kind: kind as u32,
    };
    match LISTENERS.redirect_sk_lookup(&ctx, &key, u64::from(BPF_SK_LOOKUP_F_NO_REUSEPORT)) {
        Ok(()) => sk_action::SK_PASS,
        Err(error) => {
            count(0, Reason::NoListener);
            debug!(
                &ctx,
                "no listener of kind {} for port {}: {}", kind as u32, local.port, error
            );
            sk_action::SK_DROP
        }
    }
}

/// The local and the remote end.
#[inline(always)]
fn ends(lookup: *mut bpf_sk_lookup) -> (Endpoint, Endpoint) {
    // SAFETY: the context is valid. All fields are read before any branch: see `context`. `remote_port` is in network
    // order in the field's first two bytes.
    unsafe {
        let local_port = core::ptr::read_volatile(&raw const (*lookup).local_port) as u16;
        let remote_port = u16::from_be(core::ptr::read_volatile(
            (&raw const (*lookup).remote_port).cast::<u16>(),
        ));
        let family = core::ptr::read_volatile(&raw const (*lookup).family);
        let local4 = core::ptr::read_volatile(&raw const (*lookup).local_ip4);
        let remote4 = core::ptr::read_volatile(&raw const (*lookup).remote_ip4);
        let local6 = context::words(&raw const (*lookup).local_ip6);
        let remote6 = context::words(&raw const (*lookup).remote_ip6);
        let (local, remote) = if family == AF_INET {
            (Address::v4(local4), Address::v4(remote4))
        } else {
            (Address::v6(local6), Address::v6(remote6))
        };
        (Endpoint::new(local, local_port), Endpoint::new(remote, remote_port))
    }
}
