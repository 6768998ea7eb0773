//! The control plane: what agents know, and who they are, from the objects of a Kubernetes API.
//!
//! ```text
//!            ┌─ watch ─► index ─► xds::Cache ─► Discovery ─┐
//! API (kube) ┤    └─► views ─► auth ────────────────┬──────┼─► serve :15012 ─► agents
//!            └─ ca::Secrets ─► Authority ─► service ┴──────┘        :15014 ─► Prometheus, kubelet, people
//!                                  └─► trust (ConfigMaps)   status (conditions, Events)   ◄─ the replica that leads
//! ```
//! [`Control::start`] wires it. Replicas do the same work from the same objects; only writing (conditions, ConfigMaps, the
//! addresses of ServiceEntries) is one replica's, by a Lease. With the API away, what is known is served; with the process away, agents go on with what
//! they have. Drain: streams are told to go to another replica, then the ports close.

mod allot;
mod auth;
mod ca;
mod config;
pub mod index;
mod leader;
mod metrics;
pub mod resources;
mod run;
mod serve;
mod status;
mod trust;
mod watch;
pub mod wire;
pub mod xds;

pub use ca::{Bounds, Lifetimes};
pub use config::Config;
pub use run::{Control, StartError, client, run};
pub use serve::{Limits, ListenError};
