//! Several changes that are staged together or not at all.

use std::{
    collections::BTreeMap,
    sync::{Arc, PoisonError, RwLockReadGuard},
};

use serde_json::{Map, Value};

use super::{
    addresses::{Addresses, is_service},
    object::{Key, Object},
    state::{Change, Shared, Staged, Visible},
};
use crate::kinds::{self, Kind};

/// A view of staged state that is changed here and nowhere else until it is taken over.
pub(crate) struct Transaction<'a> {
    staged: &'a mut Staged,
    visible: RwLockReadGuard<'a, Visible>,
    changes: Vec<Change>,
    revision: u64,
    /// Nothing of this will be: objects keep their revisions, new ones have none.
    dry_run: bool,
    /// The time of this transaction, as metadata writes it.
    pub(crate) now: String,
}

impl<'a> Transaction<'a> {
    pub(super) fn new(shared: &'a Shared, staged: &'a mut Staged, dry_run: bool) -> Self {
        let revision = staged.revision;
        Self {
            staged,
            visible: shared.visible.read().unwrap_or_else(PoisonError::into_inner),
            changes: Vec::new(),
            revision,
            dry_run,
            now: super::now(),
        }
    }

    /// One object as it will be once everything before is durable.
    pub(crate) fn get(&self, key: &Key) -> Option<Arc<Object>> {
        if let Some(change) = self.changes.iter().rev().find(|change| change.object.key == *key) {
            return (!change.is_deletion).then(|| change.object.clone());
        }
        match self.staged.ahead.get(key) {
            Some((_, object)) => object.clone(),
            None => self.visible.get(key).cloned(),
        }
    }

    /// The namespace of a name.
    pub(crate) fn namespace(&self, name: &str) -> Option<Arc<Object>> {
        self.get(&Key::new(kinds::by_plural("", "namespaces")?, "", name))
    }

    /// Service addresses.
    pub(crate) fn addresses(&mut self) -> &mut Addresses {
        &mut self.staged.addresses
    }

    /// Whether anything was changed.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Writes an object: stamps its revision.
    pub(crate) fn put(&mut self, key: &Key, value: Value) -> Arc<Object> {
        let before = self.get(key);
        let object = self.stamp(key, value, before.as_deref());
        self.changes.push(Change {
            before,
            object: object.clone(),
            is_deletion: false,
        });
        object
    }

    /// Removes an object; what is returned is its last state, with the revision of the deletion.
    pub(crate) fn remove(&mut self, key: &Key, value: Value) -> Arc<Object> {
        let before = self.get(key);
        let object = self.stamp(key, value, before.as_deref());
        self.changes.push(Change {
            before,
            object: object.clone(),
            is_deletion: true,
        });
        object
    }

    fn stamp(&mut self, key: &Key, mut value: Value, before: Option<&Object>) -> Arc<Object> {
        let revision = if self.dry_run {
            before.map_or(0, |before| before.revision)
        } else {
            self.revision += 1;
            self.revision
        };
        let metadata = super::metadata_of(&mut value);
        if revision == 0 {
            metadata.remove("resourceVersion");
        } else {
            metadata.insert("resourceVersion".to_owned(), revision.to_string().into());
        }
        Arc::new(Object {
            key: key.clone(),
            revision,
            labels: labels_of(&value),
            json: value.to_string().into(),
        })
    }

    /// Takes the changes over into staged state.
    pub(super) fn finish(self) -> Vec<Change> {
        let Self { staged, changes, .. } = self;
        for change in &changes {
            let Object { key, revision, .. } = &*change.object;
            let after = (!change.is_deletion).then(|| change.object.clone());
            if is_service(key) {
                staged.addresses.note(change.before.as_deref(), after.as_deref());
            }
            staged.ahead.insert(key.clone(), (*revision, after));
            staged.revision = *revision;
        }
        changes
    }
}

fn labels_of(value: &Value) -> BTreeMap<String, String> {
    let labels = value["metadata"]["labels"].as_object();
    let text = |(name, value): (&String, &Value)| Some((name.clone(), value.as_str()?.to_owned()));
    labels.map(Map::iter).into_iter().flatten().filter_map(text).collect()
}

/// The key of a kind that is in the table, such as `("", "pods")`.
pub(crate) fn known(group: &str, plural: &str) -> &'static Kind {
    kinds::by_plural(group, plural).expect("asked for by a name of the table")
}
