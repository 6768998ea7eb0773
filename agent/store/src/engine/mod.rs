//! The engine: objects, their revisions and their history, durable.

mod error;
mod object;

use std::{path::Path, sync::Arc};

use ipnet::IpNet;
use serde_json::Value;

pub use error::{ApiError, Cause, Details};
pub use object::{DeleteOptions, Deleted, Event, Expired, Key, Object, Part, Preconditions, Propagation, Written};

use crate::kinds::Kind;

/// What an engine is told at open.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where service addresses are taken from: at most one range of each family.
    pub service_cidrs: Vec<IpNet>,
}

/// The objects, their history, and the way to change them. Cheap to clone.
#[derive(Clone)]
pub struct Engine {}

/// Why a directory can't be opened.
#[derive(Debug, thiserror::Error)]
#[error("not yet")]
pub struct OpenError {}

impl Engine {
    /// Opens a directory, or makes it, with the default settings.
    pub fn open(_directory: &Path) -> Result<Self, OpenError> {
        Ok(Self {})
    }

    /// Opens a directory, or makes it.
    pub fn open_with(_directory: &Path, _settings: Settings) -> Result<Self, OpenError> {
        Ok(Self {})
    }

    /// The last durable revision.
    pub fn revision(&self) -> u64 {
        0
    }

    /// One object.
    pub fn get(&self, _key: &Key) -> Option<Arc<Object>> {
        None
    }

    /// All objects of a kind, of one namespace or of all, sorted by namespace and name; and the revision of that state.
    pub fn list(&self, _kind: &'static Kind, _namespace: Option<&str>) -> (u64, Vec<Arc<Object>>) {
        (0, Vec::new())
    }

    /// Makes an object.
    pub async fn create(
        &self,
        _kind: &'static Kind,
        _namespace: &str,
        _value: Value,
        _dry_run: bool,
    ) -> Result<Written, ApiError> {
        Err(ApiError::unavailable("not yet"))
    }

    /// Reads, changes and writes an object in one step. `change` gets the object as it is and returns what it is to be;
    /// a `metadata.resourceVersion` in the result has to be the current one.
    pub async fn change(
        &self,
        _key: &Key,
        _part: Part,
        _dry_run: bool,
        _change: &mut (dyn FnMut(&Value) -> Result<Value, ApiError> + Send),
    ) -> Result<Written, ApiError> {
        Err(ApiError::unavailable("not yet"))
    }

    /// Deletes an object, or marks it.
    pub async fn delete(&self, _key: &Key, _options: DeleteOptions) -> Result<Deleted, ApiError> {
        Err(ApiError::unavailable("not yet"))
    }

    /// What happens to objects of a kind after a revision, in order.
    pub fn watch(&self, _kind: &'static Kind, _namespace: Option<&str>, since: u64) -> Result<Watch, Expired> {
        Err(Expired { since, oldest: 0 })
    }
}

/// Changes as they become durable.
pub struct Watch {}

impl Watch {
    /// The next event: waits for one. [`Expired`] ends a watcher that the history has overtaken.
    pub async fn next(&mut self) -> Result<Event, Expired> {
        Err(Expired { since: 0, oldest: 0 })
    }

    /// A revision up to which everything was handed out, for a bookmark; `None` while there is more to hand out.
    pub fn bookmark(&self) -> Option<u64> {
        None
    }
}
