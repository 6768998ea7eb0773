//! A persistent hash map: a change copies the path to one small leaf, everything else is shared with the map before.
//!
//! ```text
//! root ─ 6 bits of the hash ─► branch of 64 ─ 6 bits ─► … ─► leaf: a byte of each hash, beside up to 32 entries
//! ```
//! For the indexes of a [`crate::Snapshot`]: readers keep the old one while the writer makes the next. What only the
//! writer has yet is changed in place, so that filling a map is as cheap as filling any other. A hundred thousand
//! entries are two branches deep, whose pointers fit into a core's cache; then come one line of the leaf and the entry
//! itself, as in a `HashMap` (`examples/lookups.rs` compares).
//!
//! Held by `it_holds_what_a_hash_map_holds_and_copies_do_not_change`.

use std::{
    borrow::Borrow,
    fmt,
    hash::{BuildHasher, Hash},
    sync::Arc,
};

use foldhash::quality::RandomState;

/// Entries of a leaf before it becomes a branch.
const LEAF: usize = 32;
const BITS: u32 = 6;
const WIDTH: usize = 1 << BITS;
/// Where a hash has no more bits to tell by: a leaf there grows beyond [`LEAF`]. The last byte is the tag.
const DEEPEST: u32 = 54;

/// A persistent hash map.
pub(crate) struct Trie<K, V> {
    root: Child<K, V>,
    len: usize,
    hasher: RandomState,
}

enum Child<K, V> {
    Empty,
    Leaf(Arc<Leaf<K, V>>),
    Branch(Arc<[Child<K, V>; WIDTH]>),
}

#[derive(Clone)]
struct Leaf<K, V> {
    /// The last byte of each entry's hash, for the first [`LEAF`] entries.
    tags: [[u8; 8]; LEAF / 8],
    entries: Vec<(K, V)>,
}

impl<K, V> Clone for Child<K, V> {
    fn clone(&self) -> Self {
        match self {
            Self::Empty => Self::Empty,
            Self::Leaf(leaf) => Self::Leaf(leaf.clone()),
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
            hasher: RandomState::default(),
        }
    }
}

fn at(hash: u64, shift: u32) -> usize {
    (hash >> shift) as usize & (WIDTH - 1)
}

fn tag(hash: u64) -> u8 {
    (hash >> 56) as u8
}

/// Marks (some too many of) the bytes of a word that equal a byte, each by its highest bit.
fn marked(word: [u8; 8], byte: u8) -> u64 {
    const ONES: u64 = u64::MAX / 255;
    let difference = u64::from_le_bytes(word) ^ (ONES * u64::from(byte));
    difference.wrapping_sub(ONES) & !difference & (ONES << 7)
}

impl<K, V> Leaf<K, V> {
    fn position<Q: Eq + ?Sized>(&self, hash: u64, key: &Q) -> Option<usize>
    where
        K: Borrow<Q>,
    {
        for (word, tags) in self.tags.iter().enumerate() {
            let mut marks = marked(*tags, tag(hash));
            while marks != 0 {
                let position = word * 8 + (marks.trailing_zeros() / 8) as usize;
                if self
                    .entries
                    .get(position)
                    .is_some_and(|(other, _)| other.borrow() == key)
                {
                    return Some(position);
                }
                marks &= marks - 1;
            }
        }
        let beyond = self.entries.get(LEAF..)?;
        beyond
            .iter()
            .position(|(other, _)| other.borrow() == key)
            .map(|position| LEAF + position)
    }
}

impl<K, V> Leaf<K, V> {
    const NONE: Self = Self {
        tags: [[0; 8]; LEAF / 8],
        entries: Vec::new(),
    };

    fn push(&mut self, hash: u64, key: K, value: V) {
        if let Some(place) = self.tags.as_flattened_mut().get_mut(self.entries.len()) {
            *place = tag(hash);
        }
        if self.entries.len() == self.entries.capacity() {
            // There are many leaves, and what they do not use is lost.
            self.entries.reserve_exact(4);
        }
        self.entries.push((key, value));
    }

    fn swap_remove(&mut self, position: usize, hash_of: &dyn Fn(&K) -> u64) -> V {
        let (_, removed) = self.entries.swap_remove(position);
        if let (Some(place), Some((moved, _))) = (
            self.tags.as_flattened_mut().get_mut(position),
            self.entries.get(position),
        ) {
            *place = tag(hash_of(moved));
        }
        removed
    }
}

impl<K: Hash + Eq, V> Trie<K, V> {
    /// The value of a key.
    pub(crate) fn get(&self, key: &K) -> Option<&V> {
        self.get_by(key)
    }

    /// The same, by what a key can be seen as.
    pub(crate) fn get_by<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let (mut child, mut shift) = (&self.root, 0);
        loop {
            match child {
                Child::Empty => return None,
                Child::Leaf(leaf) => return leaf.position(hash, key).map(|position| &leaf.entries[position].1),
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
        let mut leaf: std::slice::Iter<'_, (K, V)> = [].iter();
        std::iter::from_fn(move || {
            loop {
                if let Some((key, value)) = leaf.next() {
                    return Some((key, value));
                }
                match stack.pop()? {
                    Child::Empty => {}
                    Child::Leaf(next) => leaf = next.entries.iter(),
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
        let hash_of = |key: &K| self.hasher.hash_one(key);
        let before = insert(&mut self.root, 0, hash_of(&key), (key, value), &hash_of);
        self.len += usize::from(before.is_none());
        before
    }

    /// Takes a value away.
    pub(crate) fn remove(&mut self, key: &K) -> Option<V> {
        // Looked for first, so that nothing is copied in vain.
        self.get(key)?;
        let hash_of = |key: &K| self.hasher.hash_one(key);
        let removed = remove(&mut self.root, 0, hash_of(key), key, &hash_of)?;
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
                Child::Leaf(leaf) => {
                    let position = leaf.position(hash, key).expect("it was there, or was put a moment ago");
                    return &mut Arc::make_mut(leaf).entries[position].1;
                }
                Child::Empty => unreachable!("it was there, or was put a moment ago"),
            }
        }
    }
}

fn insert<K: Eq + Clone, V: Clone>(
    child: &mut Child<K, V>,
    shift: u32,
    hash: u64,
    (key, value): (K, V),
    hash_of: &dyn Fn(&K) -> u64,
) -> Option<V> {
    match child {
        Child::Empty => {
            let mut leaf = Leaf::NONE;
            leaf.push(hash, key, value);
            *child = Child::Leaf(Arc::new(leaf));
            None
        }
        Child::Leaf(leaf) => {
            if let Some(position) = leaf.position(hash, &key) {
                let place = &mut Arc::make_mut(leaf).entries[position].1;
                return Some(std::mem::replace(place, value));
            }
            if leaf.entries.len() < LEAF || shift >= DEEPEST {
                Arc::make_mut(leaf).push(hash, key, value);
                return None;
            }
            let mut children = [const { Child::Empty }; WIDTH];
            for entry in leaf.entries.iter().cloned().chain([(key, value)]) {
                let hash = hash_of(&entry.0);
                insert(&mut children[at(hash, shift)], shift + BITS, hash, entry, hash_of);
            }
            *child = Child::Branch(Arc::new(children));
            None
        }
        Child::Branch(children) => {
            let next = &mut Arc::make_mut(children)[at(hash, shift)];
            insert(next, shift + BITS, hash, (key, value), hash_of)
        }
    }
}

fn remove<K: Eq + Clone, V: Clone>(
    child: &mut Child<K, V>,
    shift: u32,
    hash: u64,
    key: &K,
    hash_of: &dyn Fn(&K) -> u64,
) -> Option<V> {
    match child {
        Child::Empty => None,
        Child::Leaf(leaf) => {
            let position = leaf.position(hash, key)?;
            let removed = Arc::make_mut(leaf).swap_remove(position, hash_of);
            if leaf.entries.is_empty() {
                *child = Child::Empty;
            }
            Some(removed)
        }
        Child::Branch(children) => {
            let next = Arc::make_mut(children);
            let removed = remove(&mut next[at(hash, shift)], shift + BITS, hash, key, hash_of)?;
            if let Some(few) = few(next, hash_of) {
                *child = few;
            }
            Some(removed)
        }
    }
}

/// One leaf for what is left of a branch, once it is so little that it does not become a branch again at once.
fn few<K: Eq + Clone, V: Clone>(children: &[Child<K, V>; WIDTH], hash_of: &dyn Fn(&K) -> u64) -> Option<Child<K, V>> {
    let mut len = 0;
    for child in children {
        match child {
            Child::Empty => {}
            Child::Leaf(leaf) => len += leaf.entries.len(),
            Child::Branch(_) => return None,
        }
        if len > LEAF / 2 {
            return None;
        }
    }
    let mut all = Leaf::NONE;
    for child in children {
        if let Child::Leaf(leaf) = child {
            for (key, value) in leaf.entries.iter().cloned() {
                all.push(hash_of(&key), key, value);
            }
        }
    }
    Some(if len == 0 {
        Child::Empty
    } else {
        Child::Leaf(Arc::new(all))
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
            steps in proptest::collection::vec((0..4u8, 0..2000u16, any::<u32>()), 1..4000)
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
                if step % 400 == 0 {
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
        for hash in [7, 7 << 56] {
            let (mut root, hash_of) = (Child::Empty, |_: &u16| hash);
            for key in 0..100 {
                insert(&mut root, 0, hash, (key, key), &hash_of);
            }
            for key in 0..100 {
                assert_eq!(remove(&mut root, 0, hash, &key, &hash_of), Some(key));
            }
            assert!(matches!(root, Child::Empty));
        }
    }
}
