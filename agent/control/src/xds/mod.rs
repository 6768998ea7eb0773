//! Workload discovery for agents: incremental xDS, served from one cache.
//!
//! ```text
//! index ─ changes ─► Cache ─ snapshots ─► Session (one a client: who is sent what next) ─► stream ─► agent
//!                                            ▲ subscriptions, acknowledgements, refusals ◄──────────┘
//! ```
//! `tree`, `entry`, `cache`, `push`: the mesh, encoded once. `subscription`, `session`: the protocol, without sockets and
//! with time as an argument. `server`, `codec`, `admission`, `connection`: the wire. `acknowledged`: who has what.
//!
//! Knows nothing of Kubernetes or of what a resource means, but for this: a service comes with its endpoints to clients
//! that ask by name, and policies come before the addresses that may name them, but after them where they held without
//! being named.
//!
//! The protocol: <https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol>; istiod's ways with it are said in
//! `subscription`.

mod acknowledged;
mod admission;
mod cache;
mod codec;
mod connection;
mod entry;
mod push;
mod server;
mod session;
mod stream;
mod subscription;
#[cfg(test)]
pub(crate) mod testing;
mod tree;

pub use acknowledged::{Acknowledged, Client, Counters, REFUSALS, Refusal};
pub use admission::Limits as AdmissionLimits;
pub use cache::{Cache, Snapshot};
pub use connection::{Connection, Peer};
pub use entry::{Entry, Version};
pub use server::{Authenticate, Caller, Config, Discovery, transport};

use crate::resources::Type;

/// What a client may subscribe to: a type of the cache, as it is or in a narrower form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// `istio.workload.Address`.
    Address,
    /// `istio.workload.Workload`: the workloads of `Address`, without the message around them.
    Workload,
    /// `istio.security.Authorization`.
    Authorization,
}

impl View {
    /// Every view.
    pub const ALL: [Self; 3] = [Self::Address, Self::Workload, Self::Authorization];

    /// The type URL by which it is asked for.
    pub const fn url(self) -> &'static str {
        match self {
            Self::Address => Type::Address.url(),
            Self::Workload => "type.googleapis.com/istio.workload.Workload",
            Self::Authorization => Type::Authorization.url(),
        }
    }

    /// The view of a URL, if we serve it.
    pub fn from_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|view| view.url() == url)
    }

    /// Where its resources are.
    pub const fn type_(self) -> Type {
        match self {
            Self::Address | Self::Workload => Type::Address,
            Self::Authorization => Type::Authorization,
        }
    }
}
