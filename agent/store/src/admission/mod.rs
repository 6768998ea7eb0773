//! What is done to an object before it is kept: defaults, checks, addresses.
//!
//! ```text
//! engine::write ─► Request ─► mesh (is it an object of ours that can be?) ─► the kind's own module: defaults, then checks
//!                     └─ causes: 422 with each field      └─ warnings: kept, and its author is told
//! ```
//! As much of Kubernetes' defaulting and validation as its users see or rely on; not all of it: what a field may hold
//! beyond that is the business of `schema` and of whoever acts on it. Node ports are not given out, and no volume with a
//! token is added to pods (a node's role asks for tokens itself).
//!
//! Invariants:
//! - An object of whatever shape is refused or kept, never a panic (`any_shape_is_refused_or_kept`).
//! - No address belongs to two services (`tests/services.rs`: `no_two_services_share_an_address`).
//! - Defaulting a defaulted object changes nothing (`defaults_are_stable`).

mod fields;
mod mesh;
mod namespace;
mod plain;
mod pod;
mod selector;
mod service;
mod workload;

use serde_json::Value;

pub(crate) use selector::LabelSelector;

use crate::{
    engine::{ApiError, Cause, Key, Part, Transaction},
    schema,
};

/// One object on its way in.
pub(crate) struct Request<'r, 't> {
    /// Staged state: to look things up, and to take addresses.
    pub(crate) transaction: &'r mut Transaction<'t>,
    /// Which object.
    pub(crate) key: &'r Key,
    /// As it is; `None` for a new one.
    pub(crate) live: Option<&'r Value>,
    /// What is wrong.
    pub(crate) causes: Vec<Cause>,
    /// What its author should know.
    pub(crate) warnings: Vec<String>,
}

impl<'r, 't> Request<'r, 't> {
    pub(crate) fn new(transaction: &'r mut Transaction<'t>, key: &'r Key, live: Option<&'r Value>) -> Self {
        Self {
            transaction,
            key,
            live,
            causes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// The warnings, or 422.
    pub(crate) fn finish(self) -> Result<Vec<String>, ApiError> {
        if self.causes.is_empty() {
            return Ok(self.warnings);
        }
        Err(ApiError::invalid(self.key.kind, &self.key.name, self.causes))
    }
}

/// Of a new object.
pub(crate) fn create(request: &mut Request<'_, '_>, value: &mut Value) -> Result<(), ApiError> {
    check_shape(request.key, value)?;
    let (group, plural) = (request.key.kind.group, request.key.kind.plural);
    match (group, plural) {
        ("", "namespaces") => namespace::create(request, value),
        ("", "pods") => pod::create(request, value),
        ("", "services") => service::admit(request, value),
        ("apps" | "batch", _) => workload::admit(request, value),
        _ => {
            schema::fill_defaults(request.key.kind, value);
            plain::admit(request, value);
        }
    }
    mesh::check(request, value);
    Ok(())
}

/// Of a changed object.
pub(crate) fn update(request: &mut Request<'_, '_>, part: Part, value: &mut Value) -> Result<(), ApiError> {
    check_shape(request.key, value)?;
    if part == Part::Status {
        return Ok(());
    }
    let (group, plural) = (request.key.kind.group, request.key.kind.plural);
    match (group, plural) {
        ("", "namespaces") => namespace::update(request, value),
        ("", "pods") => pod::update(request, value),
        ("", "services") => service::admit(request, value),
        ("apps" | "batch", _) => workload::admit(request, value),
        _ => {
            schema::fill_defaults(request.key.kind, value);
            plain::admit(request, value);
        }
    }
    mesh::check(request, value);
    Ok(())
}

/// `spec` and `status` are objects, whatever the kind.
fn check_shape(key: &Key, value: &Value) -> Result<(), ApiError> {
    for field in ["spec", "status"] {
        if value
            .get(field)
            .is_some_and(|value| !value.is_object() && !value.is_null())
        {
            let kind = key.kind.kind;
            let version = key.kind.storage;
            let message =
                format!("{kind} in version {version:?} cannot be handled as a {kind}: {field} must be an object");
            return Err(ApiError::bad_request(message));
        }
    }
    Ok(())
}
