//! Garbage collection by owner references, as
//! <https://kubernetes.io/docs/concepts/architecture/garbage-collection/> has it.
//!
//! ```text
//!  each owner of an object is: there │ gone │ going in the foreground ("waiting")
//!    one is there, others gone          ─► the others are taken out of its references
//!    none is there                      ─► it is deleted (in the foreground, where an owner waits for it)
//!  an object that is going and has a finalizer of the collector:
//!    orphan             ─► its dependents lose the reference, then the finalizer goes
//!    foregroundDeletion ─► when no dependent blocks any more, the finalizer goes
//! ```
//! An owner of a kind that is not served here counts as there.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::Value;

use super::{
    owners::{Index, Owner, Ties},
    woken,
};
use crate::{
    engine::{
        ApiError, DeleteOptions, Engine, Event, Expired, FOREGROUND, Key, ORPHAN, Object, Part, Preconditions,
        Propagation, Watch, strings,
    },
    kinds::{self, Keeping},
};

pub(super) async fn run(engine: Engine) {
    let mut revisions = engine.revisions();
    loop {
        // Only a watcher that was overtaken begins anew.
        let Ok(mut collector) = Collector::new(&engine) else {
            continue;
        };
        while collector.follow().is_ok() {
            collector.work().await;
            woken(&mut revisions).await;
        }
    }
}

struct Collector<'a> {
    engine: &'a Engine,
    watches: Vec<Watch>,
    index: Index,
    /// What has to be looked at: bounded by the number of objects.
    dirty: BTreeSet<Key>,
}

/// What an owner is to its dependent.
#[derive(Clone, Copy, PartialEq)]
enum Standing {
    There,
    Gone,
    Waiting,
}

impl<'a> Collector<'a> {
    fn new(engine: &'a Engine) -> Result<Self, Expired> {
        let mut collector = Self {
            engine,
            watches: Vec::new(),
            index: Index::default(),
            dirty: BTreeSet::new(),
        };
        for kind in kinds::ALL.iter().filter(|kind| kind.keeping == Keeping::Stored) {
            let (revision, objects) = engine.list(kind, None);
            collector.watches.push(engine.watch(kind, None, revision)?);
            for object in objects {
                collector.see(&object);
            }
        }
        Ok(collector)
    }

    fn follow(&mut self) -> Result<(), Expired> {
        let mut events = Vec::new();
        for watch in &mut self.watches {
            while let Some(event) = watch.try_next()? {
                events.push(event);
            }
        }
        events.sort_by_key(Event::revision);
        for event in events {
            match event {
                Event::Added(object) | Event::Modified { object, .. } => self.see(&object),
                Event::Deleted(object) => {
                    let ties = Ties::of(&object);
                    self.index.forget(&object.key);
                    self.dirty.extend(self.index.dependents(&ties.uid));
                    // An owner may have waited for it.
                    let owners = ties.owner_references.iter();
                    self.dirty
                        .extend(owners.filter_map(|owner| owner.key(&object.key.namespace)));
                }
            }
        }
        Ok(())
    }

    fn see(&mut self, object: &Object) {
        let ties = Ties::of(object);
        self.index.note(&object.key, &ties);
        let is_going = ties.deletion_timestamp.is_some();
        if is_going {
            self.dirty.extend(self.index.dependents(&ties.uid));
        }
        if is_going || !ties.owner_references.is_empty() {
            self.dirty.insert(object.key.clone());
        }
    }

    /// Looks at everything that is dirty; what fails is looked at again next time.
    async fn work(&mut self) {
        let mut failed = BTreeSet::new();
        while let Some(key) = self.dirty.pop_first() {
            match self.look(&key).await {
                // Changed or gone meanwhile: its event brings it back.
                Ok(()) => {}
                Err(error) if error.code == 404 || error.code == 409 => {}
                Err(error) => {
                    tracing::warn!("garbage collection of {key}: {error}");
                    failed.insert(key);
                }
            }
        }
        self.dirty = failed;
    }

    async fn look(&self, key: &Key) -> Result<(), ApiError> {
        let Some(object) = self.engine.get(key) else {
            return Ok(());
        };
        let ties = Ties::of(&object);
        if ties.waits_for(ORPHAN) {
            for dependent in self.index.dependents(&ties.uid) {
                self.take_out(&dependent, &|owner| owner == ties.uid).await?;
            }
            self.take_off(key, ORPHAN).await
        } else if ties.waits_for(FOREGROUND) && !self.index.is_blocked(&ties.uid) {
            self.take_off(key, FOREGROUND).await
        } else if ties.deletion_timestamp.is_some() || ties.owner_references.is_empty() {
            Ok(())
        } else {
            self.collect(&object, &ties).await
        }
    }

    async fn collect(&self, object: &Arc<Object>, ties: &Ties) -> Result<(), ApiError> {
        let key = &object.key;
        let standings: Vec<(&Owner, Standing)> = ties
            .owner_references
            .iter()
            .map(|owner| (owner, self.standing(owner, &key.namespace)))
            .collect();
        let any = |wanted: Standing| standings.iter().any(|(_, standing)| *standing == wanted);
        if any(Standing::There) {
            let lost = |uid: &str| {
                let mut lost = standings.iter().filter(|(_, standing)| *standing != Standing::There);
                lost.any(|(owner, _)| owner.uid == uid)
            };
            if any(Standing::Gone) || any(Standing::Waiting) {
                self.take_out(key, &lost).await?;
            }
            return Ok(());
        }
        // Whoever waits for this one waits for what this one owns, too.
        let dependents = self.index.dependents(&ties.uid);
        let owns = !dependents.is_empty();
        let waits = |key: &Key| {
            self.engine
                .get(key)
                .is_some_and(|found| Ties::of(&found).waits_for(FOREGROUND))
        };
        let blocks = ties
            .owner_references
            .iter()
            .any(|owner| owner.block_owner_deletion == Some(true));
        if any(Standing::Waiting) && blocks && dependents.iter().any(waits) {
            // A circle: somebody has to go first. The change brings this object back here.
            return self.unblock(key).await;
        }
        let policy = if any(Standing::Waiting) && owns {
            Propagation::Foreground
        } else {
            Propagation::Background
        };
        let kept = |finalizer: &str| ties.finalizers.iter().any(|own| own == finalizer);
        let options = DeleteOptions {
            propagation_policy: (!kept(ORPHAN) && !kept(FOREGROUND)).then_some(policy),
            preconditions: Some(Preconditions {
                uid: Some(ties.uid.clone()),
                resource_version: Some(object.revision.to_string()),
            }),
            ..DeleteOptions::default()
        };
        self.engine.delete(key, options).await.map(drop)
    }

    fn standing(&self, owner: &Owner, namespace: &str) -> Standing {
        let Some(key) = owner.key(namespace) else {
            return Standing::There;
        };
        let Some(found) = self.engine.get(&key).map(|found| Ties::of(&found)) else {
            return Standing::Gone;
        };
        if found.uid != owner.uid {
            Standing::Gone
        } else if found.waits_for(FOREGROUND) {
            Standing::Waiting
        } else {
            Standing::There
        }
    }

    /// Takes owners out of an object's references.
    async fn take_out(&self, key: &Key, is_out: &(dyn Fn(&str) -> bool + Sync)) -> Result<(), ApiError> {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            if let Some(owners) = new["metadata"]["ownerReferences"].as_array_mut() {
                owners.retain(|owner| !is_out(owner["uid"].as_str().unwrap_or_default()));
            }
            Ok(new)
        };
        self.change(key, &mut change).await
    }

    /// Lets an object's owners go before it.
    async fn unblock(&self, key: &Key) -> Result<(), ApiError> {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            for owner in new["metadata"]["ownerReferences"].as_array_mut().into_iter().flatten() {
                owner["blockOwnerDeletion"] = false.into();
            }
            Ok(new)
        };
        self.change(key, &mut change).await
    }

    async fn take_off(&self, key: &Key, finalizer: &str) -> Result<(), ApiError> {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            let left = strings(&live["metadata"]["finalizers"]);
            let left: Vec<Value> = left
                .into_iter()
                .filter(|own| *own != finalizer)
                .map(Value::from)
                .collect();
            new["metadata"]["finalizers"] = left.into();
            Ok(new)
        };
        self.change(key, &mut change).await
    }

    async fn change(
        &self,
        key: &Key,
        change: &mut (dyn FnMut(&Value) -> Result<Value, ApiError> + Send),
    ) -> Result<(), ApiError> {
        match self.engine.change(key, Part::Main, false, change).await {
            Err(error) if error.code != 404 => Err(error),
            _ => Ok(()),
        }
    }
}
