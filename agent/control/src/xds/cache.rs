//! Every resource of the mesh as it is now: one writer, any number of readers that never wait.
//!
//! ```text
//! apply(changes) ─► a copy of the state, changed ─► swapped in ─► watchers are told the generation
//! ```
//! A state ([`Snapshot`]) never changes and shares its pages with the states before and after it (`tree`). So what
//! changed between *any* two generations is found by comparing the two, in time that depends on what changed and not on
//! the mesh: already coalesced (what was put and removed, or changed and changed back, in between does not show), and
//! there is no log that a slow client could fall out of. A client pins the one state that it was last sent; those are let
//! go at the latest when it does not acknowledge in time.
//!
//! Does not know of clients. Invariants: a generation names one content of this process
//! (`a_change_that_changes_nothing_is_no_generation`); a reader's state stays as it was (`a_snapshot_does_not_change`);
//! lookups say what a scan would (`lookups_agree_with_a_scan`). Before the first [`Cache::apply`] the generation is 0 and
//! nothing is served: an empty state would tell reconnecting clients to forget the mesh.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arc_swap::ArcSwap;
use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use super::{View, entry::Entry, tree::Tree};
use crate::resources::{Change, Resource, Type};

/// The resources of the mesh.
#[derive(Debug)]
pub struct Cache {
    writer: Mutex<()>,
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
}

impl Default for Cache {
    fn default() -> Self {
        Self::new()
    }
}

impl Cache {
    /// With nothing in it, which is not served until the first [`Cache::apply`].
    pub fn new() -> Self {
        Self {
            writer: Mutex::new(()),
            current: ArcSwap::from_pointee(Snapshot::default()),
            generation: watch::Sender::new(0),
        }
    }

    /// Goes to the next state, if these make one, and says which generation it is in. The changes are seen together or
    /// not at all. The first call has to bring all that is known.
    pub fn apply(&self, changes: Vec<Change>) -> u64 {
        let _one_writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current.load_full();
        let mut next = (*before).clone();
        let mut differs = before.generation == 0;
        for change in changes {
            differs |= match change {
                Change::Put(resource) => next.table_mut(resource.type_).put(&resource),
                Change::Remove { type_, name } => next.table_mut(type_).remove(&name),
            };
        }
        if !differs {
            return before.generation;
        }
        next.generation += 1;
        let generation = next.generation;
        self.current.store(Arc::new(next));
        self.generation.send_replace(generation);
        generation
    }

    /// The state as it is now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.current.load_full()
    }

    /// Tells of every new generation; those that nobody looked at in time are skipped.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.generation.subscribe()
    }
}

/// One state of the mesh.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    generation: u64,
    address: Table,
    authorization: Table,
}

impl Snapshot {
    /// How many states there were before it in this process.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// How many resources of a type there are.
    pub fn len(&self, type_: Type) -> usize {
        self.table(type_).len
    }

    /// The resources of a type, in no order.
    pub fn entries(&self, type_: Type) -> impl Iterator<Item = &Arc<Entry>> {
        self.table(type_).iter()
    }

    /// Whether there is nothing at all.
    pub fn is_empty(&self) -> bool {
        self.address.len + self.authorization.len == 0
    }

    pub(super) fn table(&self, type_: Type) -> &Table {
        match type_ {
            Type::Address => &self.address,
            Type::Authorization => &self.authorization,
        }
    }

    fn table_mut(&mut self, type_: Type) -> &mut Table {
        match type_ {
            Type::Address => &mut self.address,
            Type::Authorization => &mut self.authorization,
        }
    }
}

/// The resources of one type.
#[derive(Clone, Debug)]
pub(super) struct Table {
    len: usize,
    entries: Tree<Page>,
    /// Who else is meant by a name.
    aliases: Tree<Links>,
    /// The workloads of a service.
    endpoints: Tree<Links>,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            len: 0,
            entries: Tree::new(),
            aliases: Tree::new(),
            endpoints: Tree::new(),
        }
    }
}

impl Table {
    fn put(&mut self, resource: &Resource) -> bool {
        let entry = Arc::new(Entry::new(resource));
        if self.get(&entry.name).is_some_and(|now| now.version == entry.version) {
            return false;
        }
        let before = self.entries.page_mut(&entry.name).put(Arc::clone(&entry));
        self.relink(before.as_deref(), Some(&entry));
        self.len += usize::from(before.is_none());
        true
    }

    fn remove(&mut self, name: &str) -> bool {
        if self.get(name).is_none() {
            return false;
        }
        let before = self.entries.page_mut(name).remove(name);
        self.relink(before.as_deref(), None);
        self.len -= 1;
        true
    }

    fn relink(&mut self, before: Option<&Entry>, after: Option<&Entry>) {
        relink(&mut self.aliases, before, after, |entry| &entry.aliases);
        relink(&mut self.endpoints, before, after, |entry| &entry.services);
    }

    /// The resource of this name.
    pub(super) fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.entries.page(name).get(name)
    }

    /// The resources that a name means: of this name, or with it as an alias.
    pub(super) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Arc<Entry>> {
        let others = self.aliases.page(name).of(name).filter_map(|name| self.get(name));
        self.get(name)
            .into_iter()
            .chain(others.filter(move |entry| &*entry.name != name))
    }

    /// The workloads that are endpoints of the service of this name.
    pub(super) fn endpoints<'a>(&'a self, service: &'a str) -> impl Iterator<Item = &'a Arc<Entry>> {
        let names = self.endpoints.page(service).of(service);
        names.filter_map(|name| self.get(name))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.pages().flat_map(|page| page.entries.iter())
    }

    /// The page at a place; `None` after the last.
    pub(super) fn page(&self, place: usize) -> Option<&Arc<Page>> {
        self.entries.at(place)
    }

    /// What has to be put and removed to come here from another state.
    pub(super) fn since(&self, before: &Self) -> Difference {
        let mut difference = Difference::default();
        for (there, here) in self.entries.changed(&before.entries) {
            difference.add(&there.entries, &here.entries);
        }
        difference
    }
}

fn relink(links: &mut Tree<Links>, before: Option<&Entry>, after: Option<&Entry>, of: impl Fn(&Entry) -> &[Arc<str>]) {
    let keys = |entry: Option<&Entry>| entry.map(&of).map(<[_]>::to_vec).unwrap_or_default();
    let (gone, new) = (keys(before), keys(after));
    for key in gone.iter().filter(|key| !new.contains(key)) {
        links.page_mut(key).remove(key, &before.expect("it has keys").name);
    }
    for key in new.iter().filter(|key| !gone.contains(key)) {
        links.page_mut(key).put(key, &after.expect("it has keys").name);
    }
}

/// What separates two states.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// New, or other than before.
    pub(super) puts: Vec<Arc<Entry>>,
    /// Gone: as they were.
    pub(super) removed: Vec<Arc<Entry>>,
}

impl Difference {
    /// Adds that of two pages, both in the order of names.
    fn add(&mut self, mut there: &[Arc<Entry>], mut here: &[Arc<Entry>]) {
        loop {
            match (there.split_first(), here.split_first()) {
                (None, _) => return self.puts.extend_from_slice(here),
                (_, None) => return self.removed.extend_from_slice(there),
                (Some((old, _)), Some((new, rest))) if new.name < old.name => {
                    self.puts.push(Arc::clone(new));
                    here = rest;
                }
                (Some((old, rest)), Some((new, _))) if old.name < new.name => {
                    self.removed.push(Arc::clone(old));
                    there = rest;
                }
                (Some((old, old_rest)), Some((new, new_rest))) => {
                    if old.version != new.version {
                        self.puts.push(Arc::clone(new));
                    }
                    (there, here) = (old_rest, new_rest);
                }
            }
        }
    }
}

/// Resources that are stored, and first sent, together.
#[derive(Debug, Default)]
pub(super) struct Page {
    /// In the order of their names.
    entries: Vec<Arc<Entry>>,
    /// All of them as fields of a response, for each view; made when first asked for.
    bodies: [OnceLock<Bytes>; View::ALL.len()],
}

impl Clone for Page {
    fn clone(&self) -> Self {
        Self {
            entries: self.entries.clone(),
            // The copy is made to be changed.
            bodies: Default::default(),
        }
    }
}

impl Page {
    fn find(&self, name: &str) -> Result<usize, usize> {
        self.entries.binary_search_by(|entry| (*entry.name).cmp(name))
    }

    fn get(&self, name: &str) -> Option<&Arc<Entry>> {
        self.find(name).ok().map(|at| &self.entries[at])
    }

    fn put(&mut self, entry: Arc<Entry>) -> Option<Arc<Entry>> {
        self.bodies = Default::default();
        match self.find(&entry.name) {
            Ok(at) => Some(std::mem::replace(&mut self.entries[at], entry)),
            Err(at) => {
                self.entries.insert(at, entry);
                None
            }
        }
    }

    fn remove(&mut self, name: &str) -> Option<Arc<Entry>> {
        self.bodies = Default::default();
        self.find(name).ok().map(|at| self.entries.remove(at))
    }

    pub(super) fn entries(&self) -> &[Arc<Entry>] {
        &self.entries
    }

    /// All of it as fields of a response; every client of this state shares it.
    pub(super) fn body(&self, view: View) -> &Bytes {
        self.bodies[view as usize].get_or_init(|| body(&self.entries, view))
    }
}

/// These as fields of a response.
pub(super) fn body(entries: &[Arc<Entry>], view: View) -> Bytes {
    let wires = entries
        .iter()
        .filter(|entry| entry.is_seen_in(view))
        .map(|entry| entry.wire(view));
    let wires: Vec<_> = wires.collect();
    match &wires[..] {
        [one] => one.clone(),
        several => {
            let mut all = BytesMut::with_capacity(several.iter().map(Bytes::len).sum());
            several.iter().for_each(|wire| all.extend_from_slice(wire));
            all.freeze()
        }
    }
}

/// From names to names, in order.
#[derive(Clone, Debug, Default)]
struct Links(Vec<(Arc<str>, Arc<str>)>);

impl Links {
    fn find(&self, key: &str, name: &str) -> Result<usize, usize> {
        self.0
            .binary_search_by(|(other, to)| (&**other, &**to).cmp(&(key, name)))
    }

    fn put(&mut self, key: &Arc<str>, name: &Arc<str>) {
        if let Err(at) = self.find(key, name) {
            self.0.insert(at, (Arc::clone(key), Arc::clone(name)));
        }
    }

    fn remove(&mut self, key: &str, name: &str) {
        if let Ok(at) = self.find(key, name) {
            self.0.remove(at);
        }
    }

    fn of<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a Arc<str>> {
        let first = self.0.partition_point(|(other, _)| &**other < key);
        let of_it = self.0[first..].iter().take_while(move |(other, _)| &**other == key);
        of_it.map(|(_, name)| name)
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
