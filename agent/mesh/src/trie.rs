//! A persistent hash map: a change copies the path to one small leaf, everything else is shared with the map before.
//!
//! ```text
//! root ─ 5 bits of the hash ─► branch of 32 ─ 5 bits ─► … ─► leaf: up to 16 entries with their hashes, side by side
//! ```
//! For the indexes of a [`crate::Snapshot`]: readers keep the old one while the writer makes the next. What only the
//! writer has yet is changed in place, so that filling a map is as cheap as filling any other. A hundred thousand
//! entries are three branches deep, and a look-up costs one miss of the cache beyond a `HashMap`'s at the most
//! (`examples/lookups.rs` compares).
//!
//! Held by `it_holds_what_a_hash_map_holds_and_copies_do_not_change`.

use std::{
    fmt,
    hash::{BuildHasher, Hash, RandomState},
    sync::Arc,
};

/// Entries of a leaf before it becomes a branch.
const LEAF: usize = 16;
const BITS: u32 = 5;
const WIDTH: usize = 1 << BITS;
/// Where a hash has no more bits to tell by: a leaf there grows beyond [`LEAF`].
const DEEPEST: u32 = 60;

/// A persistent hash map.
pub(crate) struct Trie<K, V> {
    root: Child<K, V>,
    len: usize,
    hasher: RandomState,
}

enum Child<K, V> {
    Empty,
    Leaf(Arc<[Entry<K, V>]>),
    Branch(Arc<[Child<K, V>; WIDTH]>),
}

#[derive(Clone)]
struct Entry<K, V> {
    hash: u64,
    key: K,
    value: V,
}

impl<K, V> Clone for Child<K, V> {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Leaf(entries) => Self::Leaf(entries.clone()),
            Self::Branch(children) => Self::Branch(children.clone()),
        }
    }
}

impl<K, V> Clone for Trie<K, V> {
    fn clone(&self) -> Self {
        Self {
            root: self.root.clone(),
            len: self.len,
            hasher: self.hasher.clone(),
        }
    }
}

impl<K, V> Default for Trie<K, V> {
    fn default() -> Self {
        Self {
            root: Child::Empty,
            len: 0,
            hasher: RandomState::new(),
        }
    }
}

fn at(hash: u64, shift: u32) -> usize {
    (hash >> shift) as usize & (WIDTH - 1)
}

impl<K: Hash + Eq, V> Trie<K, V> {
    /// The value of a key.
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        let (mut child, mut shift) = (&self.root, 0);
        loop {
            match child {
                Child::Empty => return None,
                Child::Leaf(entries) => {
                    let entry = entries.iter().find(|entry| entry.hash == hash && entry.key == *key)?;
                    return Some(&entry.value);
                }
                Child::Branch(children) => {
                    child = &children[at(hash, shift)];
                    shift += BITS;
                }
            }
        }
    }
}

impl<K, V> Trie<K, V> {
    /// How many entries there are.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Every entry, in no order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        let mut stack = vec![&self.root];
        let mut leaf: std::slice::Iter<'_, Entry<K, V>> = [].iter();
        std::iter::from_fn(move || {
            loop {
                if let Some(entry) = leaf.next() {
                    return Some((&entry.key, &entry.value));
                }
                match stack.pop()? {
                    Child::Empty => {}
                    Child::Leaf(entries) => leaf = entries.iter(),
                    Child::Branch(children) => stack.extend(children.iter()),
                }
            }
        })
    }

    /// Every value, in no order.
    pub(crate) fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Trie<K, V> {
    /// Puts a value; gives back the one before.
    pub(crate) fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let before = insert(&mut self.root, 0, Entry { hash, key, value });
        self.len += usize::from(before.is_none());
        before
    }

    /// Takes a value away.
    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        let hash = self.hasher.hash_one(key);
        let removed = remove(&mut self.root, 0, hash, key)?;
        self.len -= 1;
        Some(removed)
    }

    /// The value of a key, to be changed; it is there afterwards.
    pub(crate) fn entry(&mut self, key: &K) -> &mut V
    where
        V: Default,
    {
        let hash = self.hasher.hash_one(key);
        if self.get(key).is_none() {
            self.insert(key.clone(), V::default());
        }
        let (mut child, mut shift) = (&mut self.root, 0);
        loop {
            match child {
                Child::Branch(children) => {
                    child = &mut Arc::make_mut(children)[at(hash, shift)];
                    shift += BITS;
                }
                Child::Leaf(entries) => {
                    let mut entries = Arc::make_mut(entries).iter_mut();
                    let entry = entries.find(|entry| entry.hash == hash && entry.key == *key);
                    return &mut entry.expect("it was there, or was put a moment ago").value;
                }
                Child::Empty => unreachable!("it was there, or was put a moment ago"),
            }
        }
    }
}

fn insert<K: Eq + Clone, V: Clone>(child: &mut Child<K, V>, shift: u32, entry: Entry<K, V>) -> Option<V> {
    match child {
        Child::Empty => {
            *child = Child::Leaf([entry].into());
            None
        }
        Child::Leaf(entries) => {
            let same = |other: &Entry<K, V>| other.hash == entry.hash && other.key == entry.key;
            if let Some(position) = entries.iter().position(same) {
                let value = &mut Arc::make_mut(entries)[position].value;
                return Some(std::mem::replace(value, entry.value));
            }
            let all = entries.iter().cloned().chain([entry]);
            if entries.len() < LEAF || shift >= DEEPEST {
                *child = Child::Leaf(all.collect());
            } else {
                let mut children = [const { Child::Empty }; WIDTH];
                for entry in all {
                    insert(&mut children[at(entry.hash, shift)], shift + BITS, entry);
                }
                *child = Child::Branch(Arc::new(children));
            }
            None
        }
        Child::Branch(children) => {
            let children = Arc::make_mut(children);
            insert(&mut children[at(entry.hash, shift)], shift + BITS, entry)
        }
    }
}

fn remove<K: Eq + Clone, V: Clone>(child: &mut Child<K, V>, shift: u32, hash: u64, key: &K) -> Option<V> {
    match child {
        Child::Empty => None,
        Child::Leaf(entries) => {
            let position = entries
                .iter()
                .position(|entry| entry.hash == hash && entry.key == *key)?;
            let removed = entries[position].value.clone();
            *child = match entries.len() {
                1 => Child::Empty,
                _ => Child::Leaf(
                    entries[..position]
                        .iter()
                        .chain(&entries[position + 1..])
                        .cloned()
                        .collect(),
                ),
            };
            Some(removed)
        }
        Child::Branch(children) => {
            // Looked for first, so that nothing is copied in vain.
            let next = Arc::make_mut(children);
            let removed = remove(&mut next[at(hash, shift)], shift + BITS, hash, key)?;
            if let Some(entries) = few(next) {
                *child = entries;
            }
            Some(removed)
        }
    }
}

/// One leaf for what is left of a branch, once it is so little that it does not become a branch again at once.
fn few<K: Clone, V: Clone>(children: &[Child<K, V>; WIDTH]) -> Option<Child<K, V>> {
    let mut len = 0;
    for child in children {
        match child {
            Child::Empty => {}
            Child::Leaf(entries) => len += entries.len(),
            Child::Branch(_) => return None,
        }
        if len > LEAF / 2 {
            return None;
        }
    }
    let entries = children.iter().flat_map(|child| match child {
        Child::Leaf(entries) => &**entries,
        Child::Empty | Child::Branch(_) => &[],
    });
    let entries: Arc<[_]> = entries.cloned().collect();
    Some(if entries.is_empty() {
        Child::Empty
    } else {
        Child::Leaf(entries)
    })
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Trie<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn same(trie: &Trie<u16, u32>, map: &HashMap<u16, u32>) {
        assert_eq!(trie.len(), map.len());
        let read: HashMap<u16, u32> = trie.iter().map(|(key, value)| (*key, *value)).collect();
        assert_eq!(&read, map);
        assert!(map.iter().all(|(key, value)| trie.get(key) == Some(value)));
    }

    proptest! {
        #[test]
        fn it_holds_what_a_hash_map_holds_and_copies_do_not_change(
            steps in proptest::collection::vec((0..4u8, 0..400u16, any::<u32>()), 1..1200)
        ) {
            let (mut trie, mut map) = (Trie::default(), HashMap::new());
            let mut copies = Vec::new();
            for (step, (what, key, value)) in steps.into_iter().enumerate() {
                match what {
                    0 | 1 => assert_eq!(trie.insert(key, value), map.insert(key, value)),
                    2 => assert_eq!(trie.remove(&key), map.remove(&key)),
                    _ => {
                        *trie.entry(&key) ^= value;
                        *map.entry(key).or_default() ^= value;
                    }
                }
                if step % 100 == 0 {
                    copies.push((trie.clone(), map.clone()));
                }
            }
            copies.push((trie, map));
            for (trie, map) in &copies {
                same(trie, map);
            }
        }
    }

    #[test]
    fn a_trie_that_was_emptied_holds_no_memory_of_it() {
        let mut trie = Trie::default();
        for key in 0..10_000 {
            trie.insert(key, key);
        }
        for key in 0..10_000 {
            assert_eq!(trie.remove(&key), Some(key));
        }
        assert!(matches!(trie.root, Child::Empty));
    }

    #[test]
    fn equal_hashes_are_told_apart_by_their_keys() {
        let mut root = Child::Empty;
        for key in 0..100 {
            insert(
                &mut root,
                0,
                Entry {
                    hash: 7,
                    key,
                    value: key,
                },
            );
        }
        for key in 0..100 {
            assert_eq!(remove(&mut root, 0, 7, &key), Some(key));
        }
        assert!(matches!(root, Child::Empty));
    }
}
