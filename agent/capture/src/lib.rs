//! Traffic to us: eBPF programs, pod network namespaces, listeners.
//!
//! The only crate that uses aya, netlink, network namespaces and `unsafe`. It knows pods by their network namespace and
//! addresses, and nothing of identities, services or policy: it brings connections to the agent's listeners, tells
//! where they were meant to go, and makes the sockets that the proxy dials with.
//!
//! ```text
//! app in the pod --connect--> [connect4/6] --pod's own IP--> [sk_lookup] --> outbound listener (15001)
//! from the network ---------> [proof] --> [sk_lookup] --> HBONE (15008) or inbound listener (15006)
//! DNS of the pod ------------> [sendmsg4/6, recvmsg4/6] --> DNS sockets (15053 and up), for each name server one
//! out of the pod -----------> [guard]: the agent's TCP, and what is not TCP
//! ```
//!
//! That is [`Node`], the capture by eBPF. For kernels that lack what it needs there is [`IptablesNode`], with other limits;
//! [`Capture`] is either.
//!
//! Invariants, and the tests that hold them (`tests/`):
//! - No TCP leaves a captured pod but through the agent, whatever a process in it does: `escapes.rs`.
//! - The application sees the peer that it dialled, the server sees the client's address: `capture.rs`.
//! - A process of the host reaches a captured pod directly, nobody else does: `probes.rs`.
//! - Connections that are older than the enrolment live on, also through the release, and so do those that the agent
//!   carries: `lifecycle.rs`.
//! - The agent may die at any time: what it captured stays captured, and fails closed; the next one takes over:
//!   `restart.rs`.
//! - Nothing is left after [`uninstall`]: `lifecycle.rs`.
//!
//! Since `unsafe` lives here, so does the one system call that lets a thread go before others ([`set_urgent`]).
//!
//! What it does not do: it spawns no task. [`Node::reconcile`] wants to be called now and then, and a [`KernelLog`] to
//! be run.

mod agents;
mod capabilities;
mod cgroup;
mod counters;
mod diag;
mod dns;
mod error;
mod exclusions;
mod hooks;
mod interfaces;
mod iptables;
mod kernel_log;
mod maps;
mod mode;
mod named;
mod netlink;
mod netns;
mod node;
mod offered;
mod pins;
mod plan;
mod pod;
mod programs;
mod routes;
mod sockets;
mod sys;
mod uninstall;
mod urgency;

pub use abi::{Outcome, Reason};
pub use capabilities::{Capabilities, Hook, Support, probe};
pub use cgroup::mount_point as cgroup_mount;
pub use counters::GuardCounters;
pub use error::CaptureError;
pub use iptables::{IptablesNode, IptablesPodHandle, uninstall_iptables};
pub use kernel_log::KernelLog;
pub use mode::{Capture, CapturedPod};
pub use named::{NamedNetns, named_netns};
pub use node::{Node, NodeConfig, PodSpec};
pub use sockets::{DnsQueries, PodHandle, PodListeners};
pub use uninstall::uninstall;
pub use urgency::{allow_urgency, set_urgent};
