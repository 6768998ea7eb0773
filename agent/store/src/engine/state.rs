//! What is in memory: the durable state that readers see, and what is on its way to the disk.
//!
//! ```text
//!  stage: decide on staged state ─► queue ─► commit: one fsync for all that wait ─► visible, history ─► answers, watchers
//!         (a lock, no waiting)              (a thread of its own)
//! ```
//! Invariants:
//! - A reader never sees what is not durable; a writer always sees what was staged before it, so that two of them never
//!   both succeed on the same state (`tests/engine.rs`: `of_many_writers_on_one_revision_one_wins`).
//! - When the disk fails, everything that waits fails, and staged state is again what is visible. The next write after
//!   that, at most two a second, opens the file again: with room on the disk writes go on, without a restart
//!   (`tests/durability.rs`: `a_full_disk_is_named_and_loses_nothing_acknowledged`).
//! - Locks are taken in the order staged, visible.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};

use super::{
    ApiError, Settings,
    addresses::Addresses,
    disk::{Disk, Loaded, Row},
    history::History,
    object::{Event, Key, Object},
};
use crate::kinds::{self, Keeping, Kind};

/// Namespace and name.
type Place = (Arc<str>, Arc<str>);

/// What all handles share.
pub(super) struct Shared {
    pub(super) staged: Mutex<Staged>,
    pub(super) visible: RwLock<Visible>,
    /// Something was staged, or the engine is closed.
    pub(super) work: Condvar,
    /// By kind: its last revision.
    wakes: HashMap<&'static Kind, watch::Sender<u64>>,
    /// The last revision of all.
    pub(super) revisions: watch::Sender<u64>,
}

/// The durable state.
pub(super) struct Visible {
    pub(super) revision: u64,
    pub(super) kinds: HashMap<&'static Kind, KindState>,
}

pub(super) struct KindState {
    pub(super) objects: BTreeMap<Place, Arc<Object>>,
    pub(super) history: History,
}

/// What is ahead of the durable state.
pub(super) struct Staged {
    pub(super) revision: u64,
    /// Objects that differ from the visible ones, with the revision of the change; `None`: gone.
    pub(super) ahead: HashMap<Key, (u64, Option<Arc<Object>>)>,
    pub(super) queue: Vec<Pending>,
    /// A group is being written.
    pub(super) writing: bool,
    pub(super) closed: bool,
    /// Service addresses in use.
    pub(super) addresses: Addresses,
    /// Why nothing can be written now.
    pub(super) failed: Option<Failed>,
}

/// The disk failed, and nothing was written since.
pub(super) struct Failed {
    /// What, and to which file.
    pub(super) why: String,
    /// When that was last found out.
    pub(super) at: Instant,
    /// What was being written: whether it reached the disk is known once that can be read again.
    in_doubt: Vec<Change>,
}

impl Failed {
    /// Whether it is time to see if the disk works again.
    pub(super) fn may_be_over(&self) -> bool {
        self.at.elapsed() >= MEND_EVERY
    }
}

/// How often a failed disk is tried at most: opening reads all of it.
const MEND_EVERY: Duration = Duration::from_millis(500);

/// One change of one object.
pub(super) struct Change {
    pub(super) before: Option<Arc<Object>>,
    /// The new state; of a deletion the last state with the deletion's revision.
    pub(super) object: Arc<Object>,
    pub(super) is_deletion: bool,
}

impl Change {
    fn after(&self) -> Option<&Arc<Object>> {
        (!self.is_deletion).then_some(&self.object)
    }

    fn event(&self) -> Event {
        match (&self.before, self.is_deletion) {
            (_, true) => Event::Deleted(self.object.clone()),
            (None, false) => Event::Added(self.object.clone()),
            (Some(before), false) => Event::Modified {
                object: self.object.clone(),
                before: before.clone(),
            },
        }
    }
}

/// A write that waits for the disk. Without changes: one that waits for those before it.
pub(super) struct Pending {
    pub(super) changes: Vec<Change>,
    pub(super) done: oneshot::Sender<Result<(), ApiError>>,
    /// Bounds how many wait.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

impl Visible {
    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Object>> {
        let state = self.kinds.get(key.kind)?;
        state.objects.get(&(key.namespace.clone(), key.name.clone()))
    }

    pub(super) fn list(&self, kind: &'static Kind, namespace: Option<&str>) -> Vec<Arc<Object>> {
        let Some(state) = self.kinds.get(kind.stored()) else {
            return Vec::new();
        };
        let Some(namespace) = namespace else {
            return state.objects.values().cloned().collect();
        };
        let from: Place = (namespace.into(), "".into());
        let within = state.objects.range(from..);
        let within = within.take_while(|((place, _), _)| &**place == namespace);
        within.map(|(_, object)| object.clone()).collect()
    }

    pub(super) fn count(&self, kind: &'static Kind, namespace: Option<&str>) -> usize {
        let Some(state) = self.kinds.get(kind.stored()) else {
            return 0;
        };
        let Some(namespace) = namespace else {
            return state.objects.len();
        };
        let from: Place = (namespace.into(), "".into());
        let within = state.objects.range(from..);
        within.take_while(|((place, _), _)| &**place == namespace).count()
    }

    fn apply(&mut self, change: &Change) {
        let Key { kind, namespace, name } = &change.object.key;
        let Some(state) = self.kinds.get_mut(kind) else {
            return;
        };
        let place = (namespace.clone(), name.clone());
        match change.after() {
            Some(object) => state.objects.insert(place, object.clone()),
            None => state.objects.remove(&place),
        };
        state.history.push(change.event());
        self.revision = change.object.revision;
    }
}

impl Shared {
    pub(super) fn new(loaded: Loaded, settings: &Settings) -> Self {
        let stored = kinds::ALL.iter().filter(|kind| kind.keeping == Keeping::Stored);
        let state = || KindState {
            objects: BTreeMap::new(),
            history: History::new(loaded.revision, settings.history),
        };
        let mut visible = Visible {
            revision: loaded.revision,
            kinds: stored.clone().map(|kind| (kind, state())).collect(),
        };
        for object in loaded.objects {
            if let Some(state) = visible.kinds.get_mut(object.key.kind) {
                let place = (object.key.namespace.clone(), object.key.name.clone());
                state.objects.insert(place, object);
            }
        }
        let mut addresses = Addresses::new(&settings.service_cidrs);
        addresses.rebuild(&visible);
        Self {
            staged: Mutex::new(Staged {
                revision: loaded.revision,
                ahead: HashMap::new(),
                queue: Vec::new(),
                writing: false,
                closed: false,
                addresses,
                failed: None,
            }),
            visible: RwLock::new(visible),
            work: Condvar::new(),
            wakes: stored.map(|kind| (kind, watch::Sender::new(loaded.revision))).collect(),
            revisions: watch::Sender::new(loaded.revision),
        }
    }

    pub(super) fn staged(&self) -> MutexGuard<'_, Staged> {
        // A panic in a decision leaves staged state as it was: changes are put there in one step, at its end.
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn wakes(&self, kind: &'static Kind) -> watch::Receiver<u64> {
        match self.wakes.get(kind.stored()) {
            Some(sender) => sender.subscribe(),
            // Nothing of this kind is kept, so nothing ever happens.
            None => watch::channel(0).1,
        }
    }

    /// Takes what waits to the disk, group by group, until the engine is closed.
    pub(super) fn commit_groups(&self, disk: &mut Disk) {
        loop {
            let (group, has_failed) = {
                let mut staged = self.staged();
                while staged.queue.is_empty() && !staged.closed {
                    staged = self.work.wait(staged).unwrap_or_else(PoisonError::into_inner);
                }
                if staged.queue.is_empty() {
                    return;
                }
                staged.writing = true;
                (std::mem::take(&mut staged.queue), staged.failed.is_some())
            };
            let done = if has_failed {
                self.mend(disk)
            } else {
                write(disk, &group)
            };
            match done {
                Ok(()) => self.publish(group),
                Err(why) => self.give_up(group, why),
            }
        }
    }

    /// Sees whether the disk works again, and what became of the write that failed. Until then nothing was staged.
    fn mend(&self, disk: &mut Disk) -> Result<(), String> {
        let on_disk = disk.mend()?;
        let mut staged = self.staged();
        let mut visible = self.visible.write().unwrap_or_else(PoisonError::into_inner);
        let in_doubt = staged.failed.take().map(|failed| failed.in_doubt).unwrap_or_default();
        let last = in_doubt.iter().map(|change| change.object.revision).max();
        if on_disk != visible.revision && Some(on_disk) != last {
            let expected = visible.revision;
            return Err(format!(
                "the file is at revision {on_disk}, not at {expected}: somebody else wrote it; start the store again"
            ));
        }
        tracing::info!(revision = on_disk, "the disk can be written again");
        if on_disk == visible.revision {
            return Ok(());
        }
        // It was told to have failed, and was done: what cannot be undone is told to watchers like any change.
        for change in &in_doubt {
            visible.apply(change);
        }
        staged.revision = visible.revision;
        staged.addresses.rebuild(&visible);
        drop((staged, visible));
        self.wake(&in_doubt);
        Ok(())
    }

    fn wake(&self, changes: &[Change]) {
        for change in changes {
            let Object { key, revision, .. } = &*change.object;
            self.revisions.send_replace(*revision);
            if let Some(wake) = self.wakes.get(key.kind) {
                wake.send_replace(*revision);
            }
        }
    }

    fn publish(&self, group: Vec<Pending>) {
        let mut touched: BTreeMap<&'static Kind, u64> = BTreeMap::new();
        {
            let mut staged = self.staged();
            let mut visible = self.visible.write().unwrap_or_else(PoisonError::into_inner);
            for change in group.iter().flat_map(|pending| &pending.changes) {
                visible.apply(change);
                let Object { key, revision, .. } = &*change.object;
                touched.insert(key.kind, *revision);
                if staged.ahead.get(key).is_some_and(|(newest, _)| newest == revision) {
                    staged.ahead.remove(key);
                }
            }
            staged.writing = false;
        }
        if let Some(last) = touched.values().max() {
            self.revisions.send_replace(*last);
        }
        for (kind, revision) in touched {
            if let Some(wake) = self.wakes.get(kind) {
                wake.send_replace(revision);
            }
        }
        for pending in group {
            // Whoever asked may have gone away.
            let _ = pending.done.send(Ok(()));
        }
    }

    fn give_up(&self, group: Vec<Pending>, why: String) {
        tracing::error!("{why}");
        let mut staged = self.staged();
        let visible = self.visible.read().unwrap_or_else(PoisonError::into_inner);
        staged.ahead.clear();
        staged.revision = visible.revision;
        staged.addresses.rebuild(&visible);
        staged.writing = false;
        let mut in_doubt = staged.failed.take().map(|failed| failed.in_doubt).unwrap_or_default();
        for pending in group {
            in_doubt.extend(pending.changes);
            let _ = pending.done.send(Err(not_written(&why)));
        }
        // What came after the failed group was never written.
        for pending in std::mem::take(&mut staged.queue) {
            let _ = pending.done.send(Err(not_written(&why)));
        }
        staged.failed = Some(Failed {
            why,
            at: Instant::now(),
            in_doubt,
        });
    }
}

/// What a writer is told while the disk fails.
pub(super) fn not_written(why: &str) -> ApiError {
    ApiError::internal(format!(
        "{why}; reads go on, and writes as soon as the disk takes them: make room on it"
    ))
}

/// One transaction; of an object that changed more than once only the last state.
fn write(disk: &mut Disk, group: &[Pending]) -> Result<(), String> {
    let changes = || group.iter().flat_map(|pending| &pending.changes);
    let Some(revision) = changes().map(|change| change.object.revision).max() else {
        return Ok(());
    };
    let last: BTreeMap<&Key, Option<&Object>> = changes()
        .map(|change| (&change.object.key, change.after().map(|object| &**object)))
        .collect();
    let rows: Vec<Row<'_>> = last.into_iter().collect();
    disk.commit(revision, &rows)
}
