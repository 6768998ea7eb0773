//! What goes into responses, encoded once for all who get the same.
//!
//! A [`Chunk`] is the part of a response that does not depend on the client: resources and the names of those that are
//! gone, bounded in size, for a client holds one at a time. First synchronisations share the pages of a state; clients
//! that go from one generation to another share the [`Push`] between the two, of which the last few are kept (bounded in
//! bytes, too). Nothing here knows who is sent what.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use bytes::Bytes;
use proto::{Message, discovery::DeltaDiscoveryResponse};

use super::{
    View,
    cache::{Difference, Page, Snapshot, body},
    entry::Entry,
};

/// Resources and removals of one response.
#[derive(Clone, Debug)]
pub(super) enum Chunk {
    /// Pages of a state.
    Pages(Vec<Arc<Page>>),
    /// Particular resources.
    Encoded(Arc<Encoded>),
}

/// Resources and removals, encoded.
#[derive(Debug, Default)]
pub(super) struct Encoded {
    pub(super) puts: Vec<Arc<Entry>>,
    removed: Vec<Arc<str>>,
    resources: Bytes,
    removals: Bytes,
}

impl Encoded {
    fn len(&self) -> usize {
        self.resources.len() + self.removals.len()
    }
}

impl Chunk {
    /// With nothing in it: an answer where there is nothing to say.
    pub(super) fn empty() -> Self {
        Self::Encoded(Arc::default())
    }

    /// Its bytes, as fields of a response.
    pub(super) fn segments(&self, view: View) -> Vec<Bytes> {
        match self {
            Self::Pages(pages) => pages.iter().map(|page| page.body(view).clone()).collect(),
            Self::Encoded(encoded) => vec![encoded.resources.clone(), encoded.removals.clone()],
        }
    }

    /// How many resources and removals it has.
    pub(super) fn counts(&self) -> (usize, usize) {
        match self {
            Self::Pages(pages) => (pages.iter().map(|page| page.entries().len()).sum(), 0),
            Self::Encoded(encoded) => (encoded.puts.len(), encoded.removed.len()),
        }
    }

    /// The names of its resources, and of those that are gone.
    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &Arc<str>> + '_> {
        match self {
            Self::Pages(pages) => Box::new(pages.iter().flat_map(|page| page.entries()).map(|entry| &entry.name)),
            Self::Encoded(encoded) => {
                let puts = encoded.puts.iter().map(|entry| &entry.name);
                Box::new(puts.chain(&encoded.removed))
            }
        }
    }

    /// Those of its resources that a client's complaint names, or the first few if it names none.
    pub(super) fn named_in(&self, complaint: &str) -> Vec<Arc<str>> {
        const MOST: usize = 16;
        let entries: Box<dyn Iterator<Item = &Arc<Entry>>> = match self {
            Self::Pages(pages) => Box::new(pages.iter().flat_map(|page| page.entries())),
            Self::Encoded(encoded) => Box::new(encoded.puts.iter()),
        };
        let names: Vec<_> = entries.map(|entry| &entry.name).collect();
        let named = names.iter().filter(|name| mentions(complaint, name));
        let mut named: Vec<_> = named.take(MOST).map(|name| Arc::clone(name)).collect();
        if named.is_empty() {
            named.extend(names.into_iter().take(MOST).cloned());
        }
        named
    }
}

/// Whether the name stands there, and not only a longer one that begins or ends with it.
fn mentions(complaint: &str, name: &str) -> bool {
    let of_name = |c: char| c.is_alphanumeric() || "-_/".contains(c);
    complaint.match_indices(name).any(|(at, _)| {
        let rest = &complaint[at + name.len()..];
        !complaint[..at].ends_with(of_name) && !rest.starts_with(of_name)
    })
}

/// In chunks of about `limit` bytes. Names that are gone come first: one address has no two owners at a client.
pub(super) fn chunks(view: View, puts: &[Arc<Entry>], removed: &[Arc<str>], limit: usize) -> Vec<Arc<Encoded>> {
    let mut chunks = Vec::new();
    let sizes = removed.iter().map(|name| name.len() + 4);
    for part in split(removed, sizes, limit) {
        let names = DeltaDiscoveryResponse {
            removed_resources: part.iter().map(|name| name.to_string()).collect(),
            ..Default::default()
        };
        chunks.push(Encoded {
            removed: part.to_vec(),
            removals: names.encode_to_vec().into(),
            ..Default::default()
        });
    }
    let puts: Vec<_> = puts.iter().filter(|entry| entry.is_seen_in(view)).cloned().collect();
    let sizes = puts.iter().map(|entry| entry.wire(view).len());
    for part in split(&puts, sizes, limit) {
        let resources = body(part, view);
        match chunks.last_mut() {
            Some(last) if last.puts.is_empty() && last.len() + resources.len() <= limit => {
                last.puts = part.to_vec();
                last.resources = resources;
            }
            _ => chunks.push(Encoded {
                puts: part.to_vec(),
                resources,
                ..Default::default()
            }),
        }
    }
    chunks.into_iter().map(Arc::new).collect()
}

/// Cuts where the next would be over the limit; each part has at least one.
fn split<T>(all: &[T], sizes: impl Iterator<Item = usize>, limit: usize) -> Vec<&[T]> {
    let mut parts = Vec::new();
    let (mut first, mut size) = (0, 0);
    for (at, next) in sizes.enumerate() {
        if at > first && size + next > limit {
            parts.push(&all[first..at]);
            (first, size) = (at, 0);
        }
        size += next;
    }
    if first < all.len() {
        parts.push(&all[first..]);
    }
    parts
}

/// From one generation to another, for subscribers to everything.
#[derive(Debug)]
pub(super) struct Push {
    view: View,
    difference: Difference,
    limit: usize,
    whole: OnceLock<Vec<Arc<Encoded>>>,
    puts: OnceLock<Vec<Arc<Encoded>>>,
}

impl Push {
    pub(super) fn between(view: View, from: &Snapshot, to: &Snapshot, limit: usize) -> Self {
        Self {
            view,
            difference: to.table(view.type_()).since(from.table(view.type_())),
            limit,
            whole: OnceLock::new(),
            puts: OnceLock::new(),
        }
    }

    pub(super) fn puts(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.difference.puts.iter().filter(|entry| entry.is_seen_in(self.view))
    }

    pub(super) fn removed(&self) -> impl Iterator<Item = &Arc<Entry>> {
        let removed = self.difference.removed.iter();
        removed.filter(|entry| entry.is_seen_in(self.view))
    }

    /// Everything.
    pub(super) fn chunks(&self) -> &[Arc<Encoded>] {
        self.whole.get_or_init(|| {
            let removed: Vec<_> = self.removed().map(|entry| Arc::clone(&entry.name)).collect();
            chunks(self.view, &self.difference.puts, &removed, self.limit)
        })
    }

    /// All but the removals.
    pub(super) fn put_chunks(&self) -> &[Arc<Encoded>] {
        self.puts
            .get_or_init(|| chunks(self.view, &self.difference.puts, &[], self.limit))
    }

    fn size(&self) -> usize {
        let encoded = [&self.whole, &self.puts]
            .into_iter()
            .filter_map(OnceLock::get)
            .flatten();
        encoded.map(|chunk| chunk.len()).sum()
    }
}

/// The last few pushes.
#[derive(Debug)]
pub(super) struct Pushes {
    /// Newest at the back.
    recent: Mutex<VecDeque<Recent>>,
    chunk_bytes: usize,
}

type Recent = ((View, u64, u64), Arc<Push>);

/// How many pushes are kept, and how many bytes of them.
const KEPT: usize = 64;
const KEPT_BYTES: usize = 64 << 20;

impl Pushes {
    /// With chunks of about so many bytes.
    pub(super) fn new(chunk_bytes: usize) -> Self {
        Self {
            recent: Mutex::default(),
            chunk_bytes,
        }
    }

    pub(super) fn chunk_bytes(&self) -> usize {
        self.chunk_bytes
    }

    /// From one state to another; clients that ask for the same share it. Who comes while it is made waits for it.
    pub(super) fn between(&self, view: View, from: &Snapshot, to: &Snapshot) -> Arc<Push> {
        let key = (view, from.generation(), to.generation());
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, push)) = recent.iter().rev().find(|(other, _)| *other == key) {
            return Arc::clone(push);
        }
        let push = Arc::new(Push::between(view, from, to, self.chunk_bytes));
        let mut size: usize = recent.iter().map(|(_, push)| push.size()).sum();
        while recent.len() >= KEPT || size > KEPT_BYTES {
            let Some((_, old)) = recent.pop_front() else { break };
            size -= old.size().min(size);
        }
        recent.push_back((key, Arc::clone(&push)));
        push
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cache, testing::*};
    use super::*;
    use crate::resources::Change;

    #[test]
    fn chunks_are_bounded_and_removals_come_first() {
        let entry = |n: u32| Arc::new(Entry::new(&workload(&n.to_string(), "10.0.0.1", &[], n)));
        let puts: Vec<_> = (0..100).map(entry).collect();
        let removed: Vec<Arc<str>> = (0..50).map(|n| format!("gone-{n}").into()).collect();
        let limit = puts[0].wire(View::Address).len() * 10;
        let chunks = chunks(View::Address, &puts, &removed, limit);
        assert!(chunks.len() >= 11 && chunks.iter().all(|chunk| chunk.len() <= limit));
        assert_eq!(chunks.iter().map(|chunk| chunk.puts.len()).sum::<usize>(), 100);
        let with_removals = chunks.iter().take_while(|chunk| !chunk.removed.is_empty());
        assert_eq!(with_removals.map(|chunk| chunk.removed.len()).sum::<usize>(), 50);
        for chunk in chunks {
            let chunk = Chunk::Encoded(chunk);
            let response = DeltaDiscoveryResponse::decode(chunk.segments(View::Address).concat().as_slice()).unwrap();
            assert_eq!(
                (response.resources.len(), response.removed_resources.len()),
                chunk.counts()
            );
        }
    }

    #[test]
    fn clients_of_one_generation_share_a_push() {
        let cache = Cache::new();
        cache.apply(vec![Change::Put(service("ns/s", "10.1.0.1", 0))]);
        let before = cache.snapshot();
        cache.apply(vec![Change::Put(service("ns/s", "10.1.0.1", 1))]);
        let now = cache.snapshot();
        let pushes = Pushes::new(1 << 20);
        let (one, other) = (
            pushes.between(View::Address, &before, &now),
            pushes.between(View::Address, &before, &now),
        );
        assert!(Arc::ptr_eq(&one, &other));
        let bodies = |push: &Push| push.chunks()[0].resources.as_ptr();
        assert_eq!(bodies(&one), bodies(&other));
        assert!(pushes.between(View::Authorization, &before, &now).chunks().is_empty());
        assert!(pushes.between(View::Workload, &before, &now).chunks().is_empty());
        for generation in 0..200 {
            cache.apply(vec![Change::Put(service("ns/s", "10.1.0.1", generation))]);
            pushes.between(View::Address, &before, &cache.snapshot());
        }
        assert_eq!(pushes.recent.lock().unwrap().len(), KEPT);
    }

    #[test]
    fn a_complaint_names_its_resources() {
        let puts: Vec<_> = (0..40)
            .map(|n| Arc::new(Entry::new(&policy(&format!("ns/p{n}"), 0))))
            .collect();
        let chunk = Chunk::Encoded(Arc::clone(&chunks(View::Authorization, &puts, &[], 1 << 20)[0]));
        assert_eq!(chunk.named_in("ns/p39: no such action"), ["ns/p39".into()]);
        assert_eq!(chunk.named_in("bad").len(), 16);
    }
}
