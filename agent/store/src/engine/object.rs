//! What the engine holds and tells: keys, objects, events.

use std::{collections::BTreeMap, fmt, sync::Arc};

use bytes::Bytes;
use serde_json::Value;

use crate::kinds::Kind;

/// Names one object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The kind whose storage it is in ([`Kind::stored`]).
    pub kind: &'static Kind,
    /// Empty for what has no namespace.
    pub namespace: Arc<str>,
    /// The name.
    pub name: Arc<str>,
}

impl Key {
    /// A key; the namespace of a kind without namespaces is dropped.
    pub fn new(kind: &'static Kind, namespace: &str, name: &str) -> Self {
        let namespace = if kind.namespaced { namespace } else { "" };
        Self {
            kind: kind.stored(),
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() {
            return write!(f, "{} {}", self.kind, self.name);
        }
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name)
    }
}

/// One state of one object. Never changes: a change makes another.
#[derive(Clone, Debug, PartialEq)]
pub struct Object {
    /// Which.
    pub key: Key,
    /// Its `resourceVersion`.
    pub revision: u64,
    /// Its labels, for selectors.
    pub labels: BTreeMap<String, String>,
    /// All of it, in the storage version, with its `resourceVersion`.
    pub json: Bytes,
}

impl Object {
    /// The object, parsed.
    pub fn value(&self) -> Value {
        // What is kept was serialised here, or read and checked at open.
        serde_json::from_slice(&self.json).unwrap_or_default()
    }
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It is new.
    Added(Arc<Object>),
    /// It is another.
    Modified {
        /// As it is now.
        object: Arc<Object>,
        /// As it was, for selectors that it matched before.
        before: Arc<Object>,
    },
    /// It is gone: its last state, with the revision of the deletion.
    Deleted(Arc<Object>),
}

impl Event {
    /// The object, with the revision of this event.
    pub fn object(&self) -> &Arc<Object> {
        match self {
            Self::Added(object) | Self::Modified { object, .. } | Self::Deleted(object) => object,
        }
    }

    /// The revision of this event.
    pub fn revision(&self) -> u64 {
        self.object().revision
    }
}

/// Which part of an object a request writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// All but `status`, where the kind has a status subresource.
    Main,
    /// `status` alone.
    Status,
}

/// What a write came to.
#[derive(Clone, Debug)]
pub struct Written {
    /// The object as it is now.
    pub object: Arc<Object>,
    /// What the author should know, each for one `Warning` header.
    pub warnings: Vec<String>,
}

/// What a deletion came to.
#[derive(Clone, Debug)]
pub enum Deleted {
    /// It is gone: its last state.
    Gone(Arc<Object>),
    /// It has a `deletionTimestamp` and goes when its finalizers, or its kubelet, are through.
    Pending(Arc<Object>),
}

impl Deleted {
    /// The object, as it is or last was.
    pub fn object(&self) -> &Arc<Object> {
        match self {
            Self::Gone(object) | Self::Pending(object) => object,
        }
    }
}

/// `metav1.DeleteOptions`.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct DeleteOptions {
    /// How long a pod has to end; the kind's own default where it is not given.
    pub grace_period_seconds: Option<i64>,
    /// What has to hold.
    pub preconditions: Option<Preconditions>,
    /// What becomes of what it owns; `Background` where nothing is said.
    pub propagation_policy: Option<Propagation>,
    /// The old form of `propagationPolicy: Orphan`.
    pub orphan_dependents: Option<bool>,
    /// `["All"]`: only say what would happen.
    pub dry_run: Vec<String>,
}

/// What has to hold for a deletion.
#[derive(Clone, Debug, Default, PartialEq, serde::Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Preconditions {
    /// The object's uid.
    pub uid: Option<String>,
    /// The object's revision.
    pub resource_version: Option<String>,
}

/// What becomes of the objects that a deleted one owns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
pub enum Propagation {
    /// They stay, without that owner.
    Orphan,
    /// They are deleted after it.
    Background,
    /// They are deleted before it.
    Foreground,
}

/// A revision that the history does not reach back to (or that never was): list again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("too old resource version: {since} ({oldest})")]
pub struct Expired {
    /// What was asked for.
    pub since: u64,
    /// The oldest that can be.
    pub oldest: u64,
}

impl From<Expired> for super::ApiError {
    fn from(expired: Expired) -> Self {
        Self::gone(expired.to_string())
    }
}
