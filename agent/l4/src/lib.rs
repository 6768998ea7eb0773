//! Connections: outbound, inbound, passthrough, on shards.
//!
//! ```text
//!            ┌────────────── Proxy ───────────────┐      one thread each: its own runtime, tunnels, streams
//!            │ shard 0 │ shard 1 │ …              │
//!  pod A ──► │ outbound: dialled → route → tunnel ─┼──► HBONE ──► inbound: verdict → application ──► pod B
//!  15001     │ inbound:  15008 (HBONE), 15006 ◄────┼── …
//!            └────────────────────────────────────┘
//! ```
//! Each pod is on a few shards (`placement`). One of them is its home, which polls its listeners and shares what it accepts
//! out to the one that carries the fewest; there a connection or a tunnel stays.
//!
//! What holds:
//! - Nothing is dialled before the verdict; without knowledge, certificate or route a connection is refused
//!   (`without_knowledge_everything_is_refused`).
//! - A refusal looks like one: a reset at the client (`a_refused_upstream_is_a_reset_at_the_client`).
//! - Live connections are judged again when knowledge changes (`a_live_connection_is_closed_when_policy_changes`).
//! - Unfinished handshakes are bounded for each pod (`a_thousand_half_open_handshakes_do_not_harm_a_good_one`).
//! - Each connection leaves exactly one access-log record, however it ends.
//!
//! Deliberately unknown here: how traffic is captured ([`PodSockets`] is asked), how a tunnel is framed and encrypted
//! (`hbone`), what is allowed (`policy`), and HTTP inside connections.
//!
//! Tasks: a shard owns its pods' accept loops, connections and tunnels. [`Proxy::retire_pod`],
//! [`Proxy::remove_pod`] and [`Proxy::drain`] end them: gracefully, by force, one and then the other. A panic in a connection ends that connection; a shard that dies is reported by
//! [`Proxy::failed`].

mod accept;
mod application;
mod ask;
mod attempts;
mod config;
mod connection;
mod counters;
mod counting;
mod descriptors;
mod distrust;
pub mod dns;
mod egress;
mod experience;
mod failure;
mod half_open;
mod handed;
mod headers;
mod inbound;
mod lookup;
pub mod names;
mod outbound;
mod passing_over;
mod placement;
mod pod;
mod proxy;
mod proxy_header;
mod rate;
mod recheck;
mod relay;
mod review;
mod say;
mod shard;
mod socket;
mod stay;
#[cfg(test)]
mod testing;

pub use config::Config;
pub use connection::ConnectionInfo;
pub use counters::Counters;
pub use descriptors::OutOfDescriptors;
pub use failure::{Failure, FailureKind};
pub use lookup::{Answer, Lookup, LookupError, NoLookup};
pub use pod::{OWN_PORTS, Pod, PodListeners, PodSockets};
pub use proxy::{Proxy, ShardFailure};
pub use socket::ConnectError;
