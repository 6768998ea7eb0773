//! Pages of a table, shared between the states of the mesh that have them in common.
//!
//! ```text
//! root ─► 32 branches ─► 32 pages each        a key's page is given by its hash
//! ```
//! A copy is one pointer. A change to a copy clones the way to the page that it touches and nothing else, so the pages of
//! two states are the same allocation unless something in them changed: what changed is found by comparing pointers, in
//! time that does not depend on how much is stored.
//!
//! Does not know what a page holds. Invariant: `only_pages_that_were_touched_differ`.

use std::{
    hash::{BuildHasher, RandomState},
    sync::Arc,
};

const FANOUT: usize = 32;

/// A table in pages.
#[derive(Debug, Clone)]
pub(super) struct Tree<P> {
    /// Of this process: who chooses names can't crowd a page.
    hasher: RandomState,
    root: Arc<Vec<Arc<Vec<Arc<P>>>>>,
}

impl<P: Clone + Default> Tree<P> {
    pub(super) fn new() -> Self {
        // One empty page stands for all until something is put into one.
        let page = Arc::new(P::default());
        let branch = Arc::new(vec![page; FANOUT]);
        Self {
            hasher: RandomState::new(),
            root: Arc::new(vec![branch; FANOUT]),
        }
    }

    fn place(&self, key: &str) -> (usize, usize) {
        let hash = self.hasher.hash_one(key);
        let at = (hash % (FANOUT * FANOUT) as u64) as usize;
        (at / FANOUT, at % FANOUT)
    }

    /// The page that has this key, if any has.
    pub(super) fn page(&self, key: &str) -> &P {
        let (branch, page) = self.place(key);
        &self.root[branch][page]
    }

    /// The same, to change it.
    pub(super) fn page_mut(&mut self, key: &str) -> &mut P {
        let (branch, page) = self.place(key);
        let branch = Arc::make_mut(&mut Arc::make_mut(&mut self.root)[branch]);
        Arc::make_mut(&mut branch[page])
    }

    /// Every page, in an order that is the same for every state.
    pub(super) fn pages(&self) -> impl Iterator<Item = &Arc<P>> {
        self.root.iter().flat_map(|branch| branch.iter())
    }

    /// The page at this place of [`Tree::pages`].
    pub(super) fn at(&self, place: usize) -> Option<&Arc<P>> {
        self.root.get(place / FANOUT).map(|branch| &branch[place % FANOUT])
    }

    /// The pages that differ from those of an earlier or later state: (there, here).
    pub(super) fn changed<'a>(&'a self, other: &'a Self) -> impl Iterator<Item = (&'a P, &'a P)> {
        other
            .root
            .iter()
            .zip(self.root.iter())
            .filter(|(there, here)| !Arc::ptr_eq(there, here))
            .flat_map(|(there, here)| there.iter().zip(here.iter()))
            .filter(|(there, here)| !Arc::ptr_eq(there, here))
            .map(|(there, here)| (&**there, &**here))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_pages_that_were_touched_differ() {
        let mut tree: Tree<Vec<u32>> = Tree::new();
        for n in 0..10_000 {
            tree.page_mut(&n.to_string()).push(n);
        }
        let before = tree.clone();
        assert_eq!(tree.changed(&before).count(), 0);
        tree.page_mut("7").push(70_000);
        let changed: Vec<_> = tree.changed(&before).collect();
        assert_eq!(changed.len(), 1);
        let (there, here) = changed[0];
        assert!(there.contains(&7) && !there.contains(&70_000) && here.contains(&70_000));
        assert_eq!(tree.pages().map(|page| page.len()).sum::<usize>(), 10_001);
        assert!(tree.at(FANOUT * FANOUT).is_none());
        assert!(std::ptr::eq(tree.page("7"), here));
    }
}
