//! Who asks, and whether they may.
//!
//! ```text
//! client certificate ─┐
//! bearer token ───────┼─► review: a User ─► rules: yes, or a refusal in words
//! nothing ────────────┘
//! ```
//! Not RBAC: the rules are fixed, and few (`rules`).

pub mod certs;
pub mod kubeconfig;
pub mod review;
pub mod rules;
pub mod tokens;
