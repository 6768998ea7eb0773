//! A small, Kubernetes-shaped API for machines without Kubernetes: the playground, the tests, a single node.
//!
//! ```text
//! kubectl, kube-rs ─TLS─► http ─► auth       who is it, and may they
//!                          │ ─► patch        what the object is to be
//!                          ├──► table, schema  how it is shown and described
//!                          ▼
//!                        engine ─► admission   defaults, checks, service addresses
//!                          │  ▲
//!                          │  └── controllers   garbage collection, namespaces, bootstrap
//!                          ▼
//!                         redb (one file)
//! ```
//! What it is not: etcd (one process, one file, no replicas), and not kube-apiserver: the kinds are those of
//! [`kinds::ALL`] and no CustomResourceDefinition adds to them; no RBAC (see `auth` for the few rules), no admission
//! webhooks or policies, no quotas, limits or priorities, no aggregation, no protobuf, no encryption at rest. It runs
//! nothing: pods, endpoints and replicas are the business of whoever watches. No node ports, no addresses of load
//! balancers.
//!
//! Invariants, each with what holds it: an acknowledged write outlives a kill (`tests/durability.rs`); a watch replays to
//! the list (`tests/engine.rs`); writes follow the rules that clients of Kubernetes rely on (`tests/writes.rs`); what clients
//! should not do is bounded and named, and harms nobody else (`tests/hostile`).

mod admission;
pub mod auth;
pub mod controllers;
pub mod engine;
pub mod http;
pub mod kinds;
pub mod patch;
pub mod schema;
mod server;
pub mod table;

pub use engine::{
    ApiError, Cause, DeleteOptions, Deleted, Details, Engine, Event, Expired, Key, Object, OpenError, Part,
    Preconditions, Propagation, Settings, Watch, Written,
};
pub use kinds::Kind;
pub use server::{Config, Server, StartError};
