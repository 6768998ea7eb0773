//! The wire formats: Istio's workload API, policies and certificate authority, and the incremental discovery that carries
//! them.
//!
//! The code in `generated/` is made from the `.proto` files of this directory and committed;
//! `UPDATE_PROTO=1 cargo test -p proto` makes it anew, and the same test without the variable fails when it is stale.
//! Bytes fields are [`bytes::Bytes`], so that a decoded message shares the buffer that it came in.

// What prost writes is documented by the .proto files.
#![allow(missing_docs, clippy::all, rust_2018_idioms)]

/// `istio.workload`: addresses of the mesh.
pub mod workload {
    include!("generated/istio.workload.rs");
}

/// `istio.security`: L4 policies.
pub mod security {
    include!("generated/istio.security.rs");
}

/// `istio.v1.auth`: the certificate authority.
pub mod ca {
    include!("generated/istio.v1.auth.rs");
}

/// `envoy.service.discovery.v3`: incremental discovery.
pub mod discovery {
    include!("generated/envoy.service.discovery.v3.rs");
}

pub use prost::Message;
/// `google.protobuf`.
pub use prost_types;

/// `Address` resources: workloads and services.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// `Authorization` resources: L4 policies.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";
