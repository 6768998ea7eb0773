//! Who owns whom: the part of `metadata` that garbage collection goes by, and an index of it.

use std::collections::{BTreeSet, HashMap};

use serde::Deserialize;

use crate::{
    engine::{Key, Object},
    kinds,
};

/// One owner, as `metadata.ownerReferences` names it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Owner {
    api_version: String,
    kind: String,
    name: String,
    pub(super) uid: String,
    #[serde(default)]
    pub(super) block_owner_deletion: Option<bool>,
}

impl Owner {
    /// Where the owner is; `None` for a kind that is not served here, of which nothing is known.
    pub(super) fn key(&self, namespace: &str) -> Option<Key> {
        let kind = kinds::of_object(&self.api_version, &self.kind)?;
        Some(Key::new(kind, namespace, &self.name))
    }
}

/// What the collector looks at in an object.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Ties {
    pub(super) uid: String,
    pub(super) owner_references: Vec<Owner>,
    pub(super) finalizers: Vec<String>,
    pub(super) deletion_timestamp: Option<String>,
}

#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    metadata: Ties,
}

impl Ties {
    pub(super) fn of(object: &Object) -> Self {
        // The engine checked the shape; what a client got past it has no ties.
        serde_json::from_slice::<Head>(&object.json)
            .map(|head| head.metadata)
            .unwrap_or_default()
    }

    /// Whether it is being deleted and waits for a finalizer.
    pub(super) fn waits_for(&self, finalizer: &str) -> bool {
        self.deletion_timestamp.is_some() && self.finalizers.iter().any(|own| own == finalizer)
    }
}

/// Owners and dependents, as last seen.
#[derive(Debug, Default)]
pub(super) struct Index {
    ties: HashMap<Key, Ties>,
    /// By the owner's uid.
    dependents: HashMap<String, BTreeSet<Key>>,
}

impl Index {
    /// Takes note of an object. Only those with owners are kept.
    pub(super) fn note(&mut self, key: &Key, ties: &Ties) {
        self.forget(key);
        if ties.owner_references.is_empty() {
            return;
        }
        for owner in &ties.owner_references {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(key.clone());
        }
        self.ties.insert(key.clone(), ties.clone());
    }

    /// An object is gone.
    pub(super) fn forget(&mut self, key: &Key) {
        let Some(ties) = self.ties.remove(key) else {
            return;
        };
        for owner in &ties.owner_references {
            if let Some(keys) = self.dependents.get_mut(&owner.uid) {
                keys.remove(key);
                if keys.is_empty() {
                    self.dependents.remove(&owner.uid);
                }
            }
        }
    }

    /// What an object owns.
    pub(super) fn dependents(&self, uid: &str) -> Vec<Key> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// Whether one of its dependents holds up its deletion in the foreground.
    pub(super) fn is_blocked(&self, uid: &str) -> bool {
        let blocks = |key: &Key| {
            let ties = self.ties.get(key);
            let mut owners = ties.into_iter().flat_map(|ties| &ties.owner_references);
            owners.any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
        };
        self.dependents.get(uid).is_some_and(|keys| keys.iter().any(blocks))
    }
}
