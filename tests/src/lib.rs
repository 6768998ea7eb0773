//! The harness for scenarios on real network namespaces: one mesh of two nodes, made by `undercurrent playground`.
//!
//! ```text
//! suite (one process, one test after another, one lock for the machine)
//!   └ Mesh: up ─ manifests ─ logs, access logs, status of the agents ─ down, and nothing may be left
//!       ├ Pod: exec, python, background          through `undercurrent playground exec`, as a person would
//!       ├ Kubectl: a stock kubectl with the playground's kubeconfig
//!       ├ Capture: every frame on the fabric      tcpdump, bracketed by a packet of our own: nothing is missed
//!       ├ Api: the API without a program between    and when every agent has what it says
//!       ├ Stopped: a process that stands still   and goes on in any case
//!       └ Peer: a forged HBONE client             from inside any network namespace
//! ```
//! It knows the product by its outside alone: command line, files of the state directory, the agent's local socket,
//! and what is on the wire.
//!
//! Every wait is for a condition ([`wait::until`]), never for a time. A scenario that can't run on this machine says
//! `not run: why` and appends that to the file of `UNDERCURRENT_NOT_RUN`; under `CI=true` it fails instead.

#![allow(missing_docs, reason = "a harness for the scenarios beside it, not an interface")]

pub mod api;
pub mod capture;
pub mod chance;
pub mod envoy;
pub mod forge;
pub mod gate;
pub mod kubectl;
pub mod leftovers;
pub mod machine;
pub mod manifests;
pub mod mesh;
pub mod netns;
pub mod oracle;
pub mod pod;
pub mod stopped;
pub mod suite;
pub mod wait;

pub use api::Api;
pub use capture::Capture;
pub use kubectl::Kubectl;
pub use leftovers::Leftovers;
pub use mesh::Mesh;
pub use pod::{Background, Pod};
pub use stopped::Stopped;
pub use suite::Scenario;
