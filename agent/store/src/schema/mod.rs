//! What the kinds look like: fields, types, how lists and maps merge.
//!
//! ```text
//! types/*.txt ─ document ─► Type, Field, Shape ─┬─ node      how a value is merged and owned ─► patch
//!                                               ├─ strict    fields that nobody knows
//!                                               └─ openapi   what kubectl asks for
//! ```
//! The text files are the one source for strategic merge, server-side apply, strict validation and OpenAPI alike.
//! They were made from the published schemas (Kubernetes 1.37, Istio 1.24, Gateway API 1.4) with descriptions cut to
//! their first sentences, and are kept by hand since. Knows nothing of values' validity (`admission`): only of form.
//!
//! Invariants:
//! - The files are read whole, and every type that is referred to is there (`every_reference_resolves`).
//! - Every kind that is served is described (`every_kind_is_described`).
//! - No JSON makes a function here panic (`any_json_is_checked_without_panic`).
//!
//! Failure: a kind that is not described is treated as one whose maps merge and whose lists are replaced.

mod defaults;
mod document;
mod node;
mod openapi;
mod strict;

pub(crate) use defaults::fill_defaults;
pub(crate) use document::{Field, ListKind, Shape, Type, document};
pub(crate) use node::Node;
pub use openapi::{openapi_hash, openapi_v2, openapi_v2_protobuf, openapi_v3, openapi_v3_index};
pub use strict::{duplicate_fields, unknown_fields};

use crate::kinds::Kind;

/// Whether a real cluster knows the kind from a CustomResourceDefinition: no strategic merge then.
pub fn is_custom(kind: &Kind) -> bool {
    kind.group.ends_with("istio.io") || kind.group == "gateway.networking.k8s.io"
}

/// The kind's own description.
pub(crate) fn root(kind: &Kind) -> Option<&'static Type> {
    document().root(kind.group, kind.kind)
}
