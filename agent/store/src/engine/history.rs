//! The recent past of one kind, and who follows it.
//!
//! A watcher has no queue of its own: it is a place in the history. One that falls behind the history's end is told
//! so ([`Expired`], HTTP 410) and lists again; so a slow watcher costs nothing (`a_watcher_that_lags_is_told`).

use std::{
    collections::VecDeque,
    sync::{Arc, PoisonError},
};

use tokio::sync::watch;

use super::{
    object::{Event, Expired},
    state::Shared,
};
use crate::kinds::Kind;

/// A watcher takes this many events at once, so that it does not lock for each.
const TAKEN_AT_ONCE: usize = 64;
/// How many bytes of objects a kind's history holds on to.
const BYTES: usize = 32 << 20;

/// The events of one kind, oldest first.
#[derive(Debug)]
pub(super) struct History {
    events: VecDeque<Event>,
    bytes: usize,
    most: usize,
    /// All events after this revision are there.
    floor: u64,
}

impl History {
    pub(super) fn new(floor: u64, most: usize) -> Self {
        Self {
            events: VecDeque::new(),
            bytes: 0,
            most: most.max(1),
            floor,
        }
    }

    pub(super) fn push(&mut self, event: Event) {
        self.bytes += size(&event);
        self.events.push_back(event);
        while self.events.len() > self.most || (self.bytes > BYTES && self.events.len() > 1) {
            if let Some(old) = self.events.pop_front() {
                self.bytes -= size(&old);
                self.floor = old.revision();
            }
        }
    }

    fn after(&self, revision: u64) -> impl Iterator<Item = &Event> {
        let start = self.events.partition_point(|event| event.revision() <= revision);
        self.events.range(start..)
    }
}

fn size(event: &Event) -> usize {
    event.object().json.len()
}

/// The changes of one kind after a revision, as they become durable.
pub struct Watch {
    shared: Arc<Shared>,
    kind: &'static Kind,
    namespace: Option<Arc<str>>,
    /// Everything up to here was taken out of the history.
    position: u64,
    taken: VecDeque<Event>,
    wake: watch::Receiver<u64>,
}

impl Watch {
    pub(super) fn new(
        shared: Arc<Shared>,
        kind: &'static Kind,
        namespace: Option<&str>,
        since: u64,
    ) -> Result<Self, Expired> {
        let kind = kind.stored();
        let wake = shared.wakes(kind);
        let mut watch = Self {
            kind,
            namespace: namespace.map(Arc::from),
            position: since,
            taken: VecDeque::new(),
            wake,
            shared,
        };
        watch.take()?;
        Ok(watch)
    }

    /// The next event: waits for one. Dropping the future loses nothing.
    ///
    /// # Errors
    ///
    /// [`Expired`] once the history has overtaken this watcher; from then on always.
    pub async fn next(&mut self) -> Result<Event, Expired> {
        loop {
            if let Some(event) = self.taken.pop_front() {
                return Ok(event);
            }
            self.wake.borrow_and_update();
            self.take()?;
            if self.taken.is_empty() && self.wake.changed().await.is_err() {
                // The sender is part of `shared`, which this watcher holds.
                std::future::pending::<()>().await;
            }
        }
    }

    /// The next event if there is one now.
    ///
    /// # Errors
    ///
    /// As of [`Watch::next`].
    pub fn try_next(&mut self) -> Result<Option<Event>, Expired> {
        if self.taken.is_empty() {
            self.take()?;
        }
        Ok(self.taken.pop_front())
    }

    /// A revision up to which everything was handed out, for a bookmark; `None` while there is more to hand out.
    pub fn bookmark(&mut self) -> Option<u64> {
        if self.taken.is_empty() {
            self.take().ok()?;
        }
        self.taken.is_empty().then_some(self.position)
    }

    fn take(&mut self) -> Result<(), Expired> {
        let visible = self.shared.visible.read().unwrap_or_else(PoisonError::into_inner);
        let Some(state) = visible.kinds.get(self.kind) else {
            return Ok(());
        };
        let floor = state.history.floor;
        // A revision from the future is one of another store: this one will not come to mean the same by it.
        if self.position < floor || self.position > visible.revision {
            return Err(Expired {
                since: self.position,
                oldest: floor,
            });
        }
        for event in state.history.after(self.position) {
            if self.taken.len() == TAKEN_AT_ONCE {
                return Ok(());
            }
            self.position = event.revision();
            let matches = |namespace: &Arc<str>| event.object().key.namespace == *namespace;
            if self.namespace.as_ref().is_none_or(matches) {
                self.taken.push_back(event.clone());
            }
        }
        self.position = visible.revision;
        Ok(())
    }
}
