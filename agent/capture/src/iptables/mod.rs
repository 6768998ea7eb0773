//! The fallback: traffic to us by iptables rules in each pod, for kernels that lack what the eBPF programs need.
//!
//! ```text
//! app in the pod --connect--> nat OUTPUT -----REDIRECT--> outbound listener (15001)
//! from the network ---------> nat PREROUTING --REDIRECT--> inbound listener (15006); HBONE (15008) as it is
//! agent, from the client's address, mark 0x539 --lo--> app: connection mark 0x111 --> its answers are routed to lo
//! a process of the node --SNAT to 169.254.7.127--> not redirected: probes
//! ```
//! The rules are those of Istio's ambient mode (`cni/pkg/iptables` of istio/istio), with three deviations: chains have
//! names of our own, so that both can be on a machine while pods move; only a connection's first packet is redirected,
//! so that connections older than the capture live on; the node has one rule for each pod instead of an ipset.
//!
//! `plan` says which rules and compares, `program` reads and changes them, `node` does it for pods, `sockets` asks
//! conntrack where a connection was going, `takeover` changes the way of capture of a live node. No eBPF is loaded.
//!
//! Invariants, and the tests that hold them (`tests/iptables*.rs`, and scenarios of the same name in `tests/`):
//! - What is as it should be is not touched; what is not, is repaired: `a_spoiled_rule_is_repaired`.
//! - Connections older than the capture live on: `a_connection_from_before_lives_on`.
//! - Release and uninstall leave no rule, no route: `nothing_is_left`. Empty tables stay.
//! - What an agent carries when its pod is released goes on, also when another agent follows it; what needs the rules
//!   after they are gone is reset, and does not go on in plaintext: `a_redirected_connection_outlives_the_release`.
//! - What a peer sends that hears late of a release finds its way, too: the rules that answers need stay until no tunnel
//!   and no listener is left (`what_comes_after_the_release_still_reaches_the_application`). Only a pod that is gone has
//!   connections reset.
//! - The agent dead, the rules redirect to nobody: refused: `without_an_agent_connections_are_refused`.
//!
//! Limits, which the eBPF capture does not have:
//! - It is no boundary for a hostile pod. With CAP_NET_ADMIN it can delete the rules or give its sockets the mark 0x539,
//!   with CAP_NET_RAW send TCP by itself; nothing outside of the pod looks at what comes out, nothing is counted.
//! - While no agent runs, a process of the pod may listen on our ports, and serve plaintext that policy would refuse.
//! - Any process in the node's network namespace looks like a kubelet, host-network pods too.
//! - A pod that is not captured yet is not refused: it must not start before (`cmdadd` sees to that).
//! - Applications that bind to 15001, 15006 or 15008 keep their pod from being captured.

mod conntrack;
mod node;
mod plan;
mod program;
mod sockets;
mod takeover;

pub use node::{IptablesNode, uninstall_iptables};
pub use sockets::IptablesPodHandle;
pub(crate) use sockets::{redirected_from, rerouted_from};
pub(crate) use takeover::FormerRules;
