//! Knowledge in: what the control plane says, by Istio's incremental xDS, into the mesh.
//!
//! ```text
//!  disk ──► books ◄──────────────┐             ┌─ one of the addresses behind the name, in turn
//!             │   responses      │             ▼
//!             │              connection ◄──► control plane   DeltaAggregatedResources: Authorization and Address
//!             ▼                  ▲
//!  mesh::Writer (one snapshot a state), then the disk, then the ACK; on demand: mesh::Demands ─► subscriptions
//! ```
//! `decode` reads one resource; `books` is the protocol, without sockets; `connection` is one stream; `state` is the disk.
//! Knows nothing of what the mesh does with it.
//!
//! Whatever the control plane does (away, slow, flapping, sending garbage) traffic goes on with what is known:
//! - a connection is tried again for ever, with back-off and jitter, at the next of the addresses that the name has then
//!   (`a_dead_replica_is_left_for_the_other`); one that answers nothing is given up (`who_never_answers_is_left`);
//! - a resource that can't be read is refused by name and its last good version stays; the others of the response count;
//! - a response is acknowledged when it is in force here: what the control plane counts is true;
//! - what is held is told on connecting, so that only what changed is sent;
//! - an agent that starts while the control plane is away begins with the state on the disk.
//!
//! One task, owned by [`Client`]; dropped, it ends and the disk has what was known. Bounds: a response of
//! [`Limits::response_bytes`], 16 requests under way, one change on its way to the disk per resource.
//!
//! The protocol: <https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol#incremental-xds>.

mod books;
mod client;
mod config;
mod connection;
mod decode;
mod demanded;
mod held;
mod state;
mod status;

pub use books::RejectedResource;
pub use client::{Client, Handle};
pub use config::{Config, Limits, Mode, NodeId};
pub use status::{Connected, Source, Status, Traffic};
