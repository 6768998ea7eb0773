//! The engine: objects, their revisions and their history, durable.
//!
//! ```text
//! create, change, delete ─► write, delete (metadata rules) ─► admission ─► transaction ─► state ─► disk
//! get, list ◄─────────────────────────── visible state ◄──────────────────────────────────┘
//! watch ◄──────────────────────────────── history ◄───────────────────────────────────────┘
//! ```
//! Knows no HTTP and no users: who may do what was decided before.
//!
//! Invariants:
//! - A revision belongs to one change; revisions rise over restarts, deletions included
//!   (`tests/engine.rs`: `operations_agree_with_a_model`).
//! - A list and the watch from its revision make up the same state as a later list (`a_watch_replays_to_the_list`).
//! - A write is answered when it is durable, and nobody sees it earlier (`tests/durability.rs`).
//! - What waits is bounded: [`WAITING`] writes, then callers wait for their turn.
//!
//! Failure: an [`ApiError`] for the request; while the disk fails, each write says so, and reads go on.
//! One thread writes to the disk; it ends, with everything acknowledged, when the last handle is dropped.

mod addresses;
mod delete;
mod disk;
mod error;
mod history;
mod metadata;
mod names;
mod object;
mod state;
mod transaction;
mod write;

use std::{
    net::IpAddr,
    path::Path,
    sync::{Arc, PoisonError},
    thread::JoinHandle,
};

use ipnet::IpNet;
use serde_json::{Map, Value};
use time::{OffsetDateTime, format_description::BorrowedFormatItem, macros::format_description};
use tokio::sync::{Semaphore, oneshot, watch};

pub(crate) use addresses::Family;
pub use disk::OpenError;
pub use error::{ApiError, Cause, Details};
pub use history::Watch;
pub(crate) use names::{check_labels, label};
pub use object::{DeleteOptions, Deleted, Event, Expired, Key, Object, Part, Preconditions, Propagation, Written};
pub(crate) use transaction::{Transaction, known};

use crate::kinds::Kind;
use disk::Disk;
use state::{Pending, Shared};

pub(crate) use delete::{FOREGROUND, ORPHAN};
pub(crate) use metadata::strings;

/// How many writes may wait for the disk.
const WAITING: usize = 4096;

/// What an engine is told at open.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where service addresses are taken from: at most one range of each family, the first being the default one.
    pub service_cidrs: Vec<IpNet>,
    /// How many events of each kind a watcher may be behind before it has to list again.
    pub history: usize,
}

impl Default for Settings {
    fn default() -> Self {
        let ranges = ["10.96.0.0/16", "fd00:10:96::/112"];
        Self {
            service_cidrs: ranges.iter().filter_map(|range| range.parse().ok()).collect(),
            history: 10_000,
        }
    }
}

/// The objects, their history, and the way to change them. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

/// Ends the writer when nobody is left.
struct Handle {
    shared: Arc<Shared>,
    waiting: Arc<Semaphore>,
    writer: Option<JoinHandle<()>>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.staged().closed = true;
        self.shared.work.notify_one();
        if let Some(writer) = self.writer.take() {
            // Its panic was logged by the runtime's hook; there is nobody left to tell.
            let _ = writer.join();
        }
    }
}

impl Engine {
    /// Opens a directory, or makes it, with the default settings.
    ///
    /// # Errors
    ///
    /// [`OpenError`] says which file, what is the matter, and what to do.
    pub fn open(directory: &Path) -> Result<Self, OpenError> {
        Self::open_with(directory, Settings::default())
    }

    /// Opens a directory, or makes it.
    ///
    /// # Errors
    ///
    /// As of [`Engine::open`].
    pub fn open_with(directory: &Path, settings: Settings) -> Result<Self, OpenError> {
        let (mut disk, loaded) = Disk::open(directory)?;
        let shared = Arc::new(Shared::new(loaded, &settings));
        let writer = std::thread::Builder::new().name("store".to_owned()).spawn({
            let shared = shared.clone();
            move || shared.commit_groups(&mut disk)
        });
        let writer = writer.map_err(|source| OpenError::Io {
            path: directory.to_owned(),
            source,
        })?;
        Ok(Self {
            handle: Arc::new(Handle {
                shared,
                waiting: Arc::new(Semaphore::new(WAITING)),
                writer: Some(writer),
            }),
        })
    }

    /// The last durable revision.
    pub fn revision(&self) -> u64 {
        self.visible(|visible| visible.revision)
    }

    /// One object.
    pub fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.visible(|visible| visible.get(key).cloned())
    }

    /// All objects of a kind, of one namespace or of all, sorted by namespace and name; and the revision of that state,
    /// from which [`Engine::watch`] goes on.
    pub fn list(&self, kind: &'static Kind, namespace: Option<&str>) -> (u64, Vec<Arc<Object>>) {
        self.visible(|visible| (visible.revision, visible.list(kind, namespace)))
    }

    /// Makes an object: the URL's kind and namespace, and what the client sent.
    ///
    /// # Errors
    ///
    /// What Kubernetes would refuse, in its words.
    pub async fn create(
        &self,
        kind: &'static Kind,
        namespace: &str,
        value: Value,
        dry_run: bool,
    ) -> Result<Written, ApiError> {
        self.write(dry_run, |transaction| {
            write::create(transaction, kind, namespace, value)
        })
        .await
    }

    /// Reads, changes and writes an object in one step. `change` gets the object as it is and returns what it is to be;
    /// a `metadata.resourceVersion` in the result has to be the current one. A result that says nothing new is no write.
    ///
    /// # Errors
    ///
    /// What `change` returns, and what Kubernetes would refuse, in its words.
    pub async fn change(
        &self,
        key: &Key,
        part: Part,
        dry_run: bool,
        change: &mut (dyn FnMut(&Value) -> Result<Value, ApiError> + Send),
    ) -> Result<Written, ApiError> {
        self.write(dry_run, |transaction| write::change(transaction, key, part, change))
            .await
    }

    /// Deletes an object, or marks it where something has to happen first.
    ///
    /// # Errors
    ///
    /// What Kubernetes would refuse, in its words.
    pub async fn delete(&self, key: &Key, options: DeleteOptions) -> Result<Deleted, ApiError> {
        let dry_run = options.is_dry_run();
        self.write(dry_run, |transaction| delete::delete(transaction, key, &options))
            .await
    }

    /// Deletes the objects of a list that a client's selector chose, some at a time; what is gone already is passed over.
    ///
    /// # Errors
    ///
    /// As of [`Engine::delete`], from the first object that is refused; those before it are deleted.
    pub async fn delete_collection(
        &self,
        objects: &[Arc<Object>],
        options: &DeleteOptions,
    ) -> Result<Vec<Arc<Object>>, ApiError> {
        let mut deleted = Vec::with_capacity(objects.len());
        for some in objects.chunks(128) {
            let delete = |transaction: &mut Transaction<'_>| delete::delete_all(transaction, some, options);
            deleted.extend(self.write(options.is_dry_run(), delete).await?);
        }
        Ok(deleted)
    }

    /// Gives a namespace other finalizers in its `spec`. A revision, if one is given, has to be the current one.
    ///
    /// # Errors
    ///
    /// 404, or 409 for another revision.
    pub(crate) async fn finalize(
        &self,
        namespace: &Key,
        revision: &str,
        finalizers: &[String],
        dry_run: bool,
    ) -> Result<Written, ApiError> {
        let decide = |transaction: &mut Transaction<'_>| delete::finalize(transaction, namespace, revision, finalizers);
        self.write(dry_run, decide).await
    }

    /// What happens to objects of a kind after a revision, in order.
    ///
    /// # Errors
    ///
    /// [`Expired`] where the history does not reach back to `since`, or `since` is no revision of this store.
    pub fn watch(&self, kind: &'static Kind, namespace: Option<&str>, since: u64) -> Result<Watch, Expired> {
        Watch::new(self.handle.shared.clone(), kind, namespace, since)
    }

    /// Wakes at each durable change; the value is the revision.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.handle.shared.revisions.subscribe()
    }

    /// Wakes when something of a kind changes.
    pub(crate) fn watch_changes(&self, kind: &'static Kind) -> watch::Receiver<u64> {
        self.handle.shared.wakes(kind)
    }

    /// The service address that belongs to the API itself.
    pub(crate) fn first_service_address(&self) -> Option<IpAddr> {
        self.handle.shared.staged().addresses.first()
    }

    /// How many objects of a kind there are, in one namespace or in all.
    pub(crate) fn count(&self, kind: &'static Kind, namespace: Option<&str>) -> usize {
        self.visible(|visible| visible.count(kind, namespace))
    }

    fn visible<T>(&self, read: impl FnOnce(&state::Visible) -> T) -> T {
        read(
            &self
                .handle
                .shared
                .visible
                .read()
                .unwrap_or_else(PoisonError::into_inner),
        )
    }

    /// Waits until the disk that failed was tried again, if it is time for that.
    async fn mended(&self) -> Result<(), ApiError> {
        let tried = {
            let mut staged = self.handle.shared.staged();
            if !staged.failed.as_ref().is_some_and(state::Failed::may_be_over) {
                return Ok(());
            }
            let (done, tried) = oneshot::channel();
            staged.queue.push(Pending {
                changes: Vec::new(),
                done,
                _permit: None,
            });
            tried
        };
        self.handle.shared.work.notify_one();
        tried.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Decides on staged state, and waits until that and what it was decided on is durable.
    pub(crate) async fn write<T>(
        &self,
        dry_run: bool,
        decide: impl FnOnce(&mut Transaction<'_>) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        self.mended().await?;
        // The semaphore is never closed.
        let permit = self.handle.waiting.clone().acquire_owned().await.ok();
        let (decided, durable) = {
            let shared = &*self.handle.shared;
            let mut staged = shared.staged();
            if let Some(failed) = &staged.failed {
                return Err(state::not_written(&failed.why));
            }
            let mut transaction = Transaction::new(shared, &mut staged, dry_run);
            let decided = decide(&mut transaction);
            let is_write = decided.is_ok() && !dry_run && !transaction.is_empty();
            let changes = if is_write {
                transaction.finish()
            } else {
                discard(transaction)
            };
            // A refusal, too, may rest on what is not durable yet: nobody is told of it before it is.
            if changes.is_empty() && !staged.writing && staged.queue.is_empty() {
                return decided;
            }
            let (done, durable) = oneshot::channel();
            staged.queue.push(Pending {
                changes,
                done,
                _permit: permit,
            });
            (decided, durable)
        };
        self.handle.shared.work.notify_one();
        match durable.await {
            Ok(result) => result.and(decided),
            Err(_) => Err(ended()),
        }
    }
}

fn ended() -> ApiError {
    ApiError::internal("the writer of the store has ended; start it again")
}

fn discard(transaction: Transaction<'_>) -> Vec<state::Change> {
    drop(transaction);
    Vec::new()
}

/// `metadata` of an object, made where there is none; what is no object becomes one.
pub(crate) fn metadata_of(value: &mut Value) -> &mut Map<String, Value> {
    if !value["metadata"].is_object() {
        value["metadata"] = Value::Object(Map::new());
    }
    value["metadata"].as_object_mut().expect("made above")
}

/// Text at a path: empty where there is none.
pub(crate) fn text<'a>(value: &'a Value, path: &[&str]) -> &'a str {
    let found = path.iter().try_fold(value, |value, name| value.get(name));
    found.and_then(Value::as_str).unwrap_or_default()
}

/// The time as `metav1.Time` writes it; texts of this form sort like the times.
pub(crate) fn timestamp(time: OffsetDateTime) -> String {
    const FORMAT: &[BorrowedFormatItem<'_>] = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    time.to_offset(time::UtcOffset::UTC).format(FORMAT).unwrap_or_default()
}

/// [`timestamp`] of this moment.
pub(crate) fn now() -> String {
    timestamp(OffsetDateTime::now_utc())
}
