//! Who holds which address, where several claim it: the first by rank, whoever came first.
//!
//! ```text
//! held     by key, by claim         what the snapshot shows
//! waiting  claimed by a better one  kept by the writer; takes over at once when its turn comes
//! ```
//! An object is held when nobody held that ranks before it holds any of its claims, else it waits, as a whole: half a
//! workload would be a mix-up. So what is held follows from what was put and not from the order
//! (`what_is_held_follows_from_what_was_put_and_not_from_the_order`). The rank is the key's order; since a pod's uid
//! (`cluster//v1/Pod/…`) sorts before those of other kinds, a WorkloadEntry can't take a pod's address.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    ops::Bound::{Excluded, Unbounded},
    sync::Arc,
};

use crate::trie::Trie;

/// Something that claims what only one can have.
pub(crate) trait Claimant {
    /// Its name.
    type Key: Hash + Ord + Clone;
    /// What it claims.
    type Claim: Hash + Ord + Clone;

    fn key(&self) -> Self::Key;

    /// Whether it goes before those that do not, whatever their keys.
    fn goes_first(&self) -> bool {
        false
    }

    /// What it claims in this network.
    fn claims(&self, network: &str) -> BTreeSet<Self::Claim>;
}

type Rank<T> = (bool, <T as Claimant>::Key);

fn rank<T: Claimant>(object: &T) -> Rank<T> {
    (!object.goes_first(), object.key())
}

/// What the snapshot shows.
#[derive(Debug)]
pub(crate) struct Held<T: Claimant> {
    pub(crate) by_key: Trie<T::Key, Arc<T>>,
    pub(crate) by_claim: Trie<T::Claim, Arc<T>>,
}

impl<T: Claimant> Clone for Held<T> {
    fn clone(&self) -> Self {
        Self {
            by_key: self.by_key.clone(),
            by_claim: self.by_claim.clone(),
        }
    }
}

impl<T: Claimant> Default for Held<T> {
    fn default() -> Self {
        Self {
            by_key: Trie::default(),
            by_claim: Trie::default(),
        }
    }
}

/// What became of an object.
pub(crate) enum Change<T> {
    /// It is held now.
    Gained(Arc<T>),
    /// It is held no more.
    Lost(Arc<T>),
}

/// The writer's side.
pub(crate) struct Claims<T: Claimant> {
    network: Arc<str>,
    waiting: HashMap<T::Key, Arc<T>>,
    queues: HashMap<T::Claim, BTreeSet<Rank<T>>>,
}

impl<T: Claimant> Claims<T> {
    pub(crate) fn new(network: Arc<str>) -> Self {
        Self {
            network,
            waiting: HashMap::new(),
            queues: HashMap::new(),
        }
    }

    /// An object, held or waiting.
    pub(crate) fn get<'a>(&'a self, held: &'a Held<T>, key: &T::Key) -> Option<&'a Arc<T>> {
        held.by_key.get(key).or_else(|| self.waiting.get(key))
    }

    /// What waits, each with the first of its claims that somebody else holds, and who.
    pub(crate) fn conflicts<'a>(
        &'a self,
        held: &'a Held<T>,
    ) -> impl Iterator<Item = (&'a Arc<T>, T::Claim, &'a Arc<T>)> {
        let by_key: BTreeMap<_, _> = self.waiting.iter().collect();
        by_key.into_values().filter_map(|object| {
            let mut claims = object.claims(&self.network).into_iter();
            claims.find_map(|claim| held.by_claim.get(&claim).map(|holder| (object, claim, holder)))
        })
    }

    /// The keys of what waits.
    pub(crate) fn waiting_keys(&self) -> impl Iterator<Item = &T::Key> {
        self.waiting.keys()
    }

    /// Whether this object waits.
    pub(crate) fn is_waiting(&self, key: &T::Key) -> bool {
        self.waiting.contains_key(key)
    }

    /// Puts an object in place of the one of its key.
    pub(crate) fn put(&mut self, held: &mut Held<T>, object: Arc<T>) -> Vec<Change<T>> {
        let mut changes = Vec::new();
        let mut work = self.take(held, &object.key(), &mut changes);
        work.insert(rank(&*object));
        self.wait(object);
        self.settle(held, work, &mut changes);
        changes
    }

    /// Removes an object.
    pub(crate) fn remove(&mut self, held: &mut Held<T>, key: &T::Key) -> Vec<Change<T>> {
        let mut changes = Vec::new();
        let work = self.take(held, key, &mut changes);
        self.settle(held, work, &mut changes);
        changes
    }

    /// Takes an object out; whose turn it may be now.
    fn take(&mut self, held: &mut Held<T>, key: &T::Key, changes: &mut Vec<Change<T>>) -> BTreeSet<Rank<T>> {
        if let Some(waiting) = self.waiting.remove(key) {
            self.leave_queues(&waiting);
            return BTreeSet::new();
        }
        let Some(object) = held.by_key.get(key).cloned() else {
            return BTreeSet::new();
        };
        let mut work = BTreeSet::new();
        for claim in release(held, &object, &self.network) {
            work.extend(self.next(&claim, &rank(&*object)));
        }
        changes.push(Change::Lost(object));
        work
    }

    /// Settles in the order of rank: what is decided for one depends only on those before it.
    fn settle(&mut self, held: &mut Held<T>, mut work: BTreeSet<Rank<T>>, changes: &mut Vec<Change<T>>) {
        while let Some(rank_of_it) = work.pop_first() {
            let Some(object) = self.waiting.get(&rank_of_it.1).cloned() else {
                continue;
            };
            let claims = object.claims(&self.network);
            let holders: BTreeMap<Rank<T>, Arc<T>> = claims
                .iter()
                .filter_map(|claim| held.by_claim.get(claim))
                .map(|holder| (rank(&**holder), holder.clone()))
                .collect();
            if holders.first_key_value().is_some_and(|(first, _)| *first < rank_of_it) {
                // It waits on, and what it does not get may be for the next.
                let free = claims.iter().filter(|claim| held.by_claim.get(claim).is_none());
                work.extend(free.filter_map(|claim| self.next(claim, &rank_of_it)));
                continue;
            }
            for (rank, holder) in holders {
                release(held, &holder, &self.network);
                changes.push(Change::Lost(holder.clone()));
                self.wait(holder);
                work.insert(rank);
            }
            self.waiting.remove(&rank_of_it.1);
            self.leave_queues(&object);
            for claim in claims {
                held.by_claim.insert(claim, object.clone());
            }
            held.by_key.insert(rank_of_it.1, object.clone());
            changes.push(Change::Gained(object));
        }
    }

    fn wait(&mut self, object: Arc<T>) {
        for claim in object.claims(&self.network) {
            self.queues.entry(claim).or_default().insert(rank(&*object));
        }
        self.waiting.insert(object.key(), object);
    }

    fn leave_queues(&mut self, object: &T) {
        for claim in object.claims(&self.network) {
            if let Some(queue) = self.queues.get_mut(&claim) {
                queue.remove(&rank(object));
                if queue.is_empty() {
                    self.queues.remove(&claim);
                }
            }
        }
    }

    fn next(&self, claim: &T::Claim, after: &Rank<T>) -> Option<Rank<T>> {
        let queue = self.queues.get(claim)?;
        queue.range((Excluded(after), Unbounded)).next().cloned()
    }
}

/// Takes what is held out of the indexes; the claims that are free now.
fn release<T: Claimant>(held: &mut Held<T>, object: &T, network: &str) -> BTreeSet<T::Claim> {
    let claims = object.claims(network);
    for claim in &claims {
        held.by_claim.remove(claim);
    }
    held.by_key.remove(&object.key());
    claims
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, PartialEq, Clone)]
    struct Object {
        key: u8,
        first: bool,
        claims: BTreeSet<u8>,
    }

    impl Claimant for Object {
        type Key = u8;
        type Claim = u8;

        fn key(&self) -> u8 {
            self.key
        }

        fn goes_first(&self) -> bool {
            self.first
        }

        fn claims(&self, _: &str) -> BTreeSet<u8> {
            self.claims.clone()
        }
    }

    /// The rule, said plainly: one after another, whoever's claims are all free.
    fn plainly(objects: &BTreeMap<u8, Object>) -> BTreeMap<u8, Object> {
        let mut ranked: Vec<&Object> = objects.values().collect();
        ranked.sort_by_key(|object| rank(*object));
        let (mut taken, mut held) = (BTreeSet::new(), BTreeMap::new());
        for object in ranked {
            if taken.is_disjoint(&object.claims) {
                taken.extend(&object.claims);
                held.insert(object.key, object.clone());
            }
        }
        held
    }

    fn step() -> impl Strategy<Value = (u8, Option<(bool, BTreeSet<u8>)>)> {
        let claims = proptest::collection::btree_set(0..6u8, 0..4);
        (0..10u8, proptest::option::weighted(0.75, (any::<bool>(), claims)))
    }

    proptest! {
        #[test]
        fn what_is_held_follows_from_what_was_put_and_not_from_the_order(
            steps in proptest::collection::vec(step(), 1..80)
        ) {
            let (mut claims, mut held) = (Claims::<Object>::new("".into()), Held::default());
            let (mut put, mut told) = (BTreeMap::new(), BTreeMap::new());
            for (key, object) in steps {
                let changes = match object {
                    Some((first, wants)) => {
                        let object = Object { key, first, claims: wants };
                        put.insert(key, object.clone());
                        claims.put(&mut held, Arc::new(object))
                    }
                    None => {
                        put.remove(&key);
                        claims.remove(&mut held, &key)
                    }
                };
                for change in changes {
                    match change {
                        Change::Gained(object) => assert!(told.insert(object.key, Object::clone(&object)).is_none()),
                        Change::Lost(object) => assert_eq!(told.remove(&object.key), Some(Object::clone(&object))),
                    }
                }
                let is_held: BTreeMap<u8, Object> =
                    held.by_key.iter().map(|(key, object)| (*key, Object::clone(object))).collect();
                assert_eq!(is_held, plainly(&put));
                assert_eq!(told, is_held);
                let by_claim: BTreeMap<u8, u8> =
                    held.by_claim.iter().map(|(claim, object)| (*claim, object.key)).collect();
                let expected: BTreeMap<u8, u8> = is_held
                    .values()
                    .flat_map(|object| object.claims.iter().map(|claim| (*claim, object.key)))
                    .collect();
                assert_eq!(by_claim, expected);
                assert_eq!(is_held.len() + claims.conflicts(&held).count(), put.len());
            }
        }
    }
}
