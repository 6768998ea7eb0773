//! A service's endpoints, by uid, in chunks that snapshots share: one that comes or goes copies its chunk and the list
//! of chunks, however many there are.

use std::sync::Arc;

use model::{HealthStatus, Workload, WorkloadUid};

/// Endpoints of a chunk before it is split.
const CHUNK: usize = 64;
/// Chunks that it costs nothing to walk along.
const FEW: usize = 4;
/// Draws that may meet an empty place before the list is walked along; were chunks but a quarter full, one in ten
/// thousand choices would.
const DRAWS: usize = 32;

/// A sequence of numbers out of one; not for secrets. The first is the one itself. (splitmix64)
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(first: u64) -> Self {
        Self(first)
    }

    /// A number below this one, any as likely as another, as far as 64 bits allow.
    pub(crate) fn below(&mut self, limit: usize) -> Option<usize> {
        let drawn = self.0.checked_rem(limit as u64)?;
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = mixed ^ (mixed >> 31);
        usize::try_from(drawn).ok()
    }
}

/// Workloads by uid.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndpointList {
    /// None is empty; each is sorted, and its last comes before the next one's first.
    chunks: Vec<Arc<Vec<Arc<Workload>>>>,
    len: usize,
    /// How many have a share of their own.
    uneven: usize,
}

impl EndpointList {
    pub(crate) const EMPTY: &'static Self = &Self {
        chunks: Vec::new(),
        len: 0,
        uneven: 0,
    };

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// All of them, by uid.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.chunks.iter().flat_map(|chunk| chunk.iter())
    }

    /// The n-th.
    pub(crate) fn nth(&self, mut index: usize) -> Option<&Arc<Workload>> {
        for chunk in &self.chunks {
            match chunk.get(index) {
                Some(found) => return Some(found),
                None => index -= chunk.len(),
            }
        }
        None
    }

    /// Two different ones, any as likely as another, at a cost that does not depend on how many there are; twice the same
    /// where there is but one, and very seldom else.
    pub(crate) fn draw_two(&self, random: &mut Random) -> Option<[&Arc<Workload>; 2]> {
        if self.chunks.len() > FEW {
            return Some([self.draw(random)?, self.draw(random)?]);
        }
        let first = random.below(self.len)?;
        let second = random
            .below(self.len - 1)
            .map_or(first, |step| (first + 1 + step) % self.len);
        Some([self.nth(first)?, self.nth(second)?])
    }

    /// A place of a chunk is drawn, as if all chunks were full, until there is something at it: chunks are seldom less
    /// than half full.
    fn draw(&self, random: &mut Random) -> Option<&Arc<Workload>> {
        for _ in 0..DRAWS {
            let (chunk, place) = (random.below(self.chunks.len())?, random.below(CHUNK)?);
            if let Some(found) = self.chunks.get(chunk)?.get(place) {
                return Some(found);
            }
        }
        self.nth(random.below(self.len)?)
    }

    /// Whether they do not all have the same share.
    pub(crate) fn is_uneven(&self) -> bool {
        self.uneven > 0
    }

    fn chunk_of(&self, uid: &WorkloadUid) -> usize {
        self.chunks
            .partition_point(|chunk| chunk.last().is_some_and(|last| last.uid < *uid))
    }

    fn insert(&mut self, workload: &Arc<Workload>) {
        self.remove(&workload.uid);
        self.len += 1;
        self.uneven += usize::from(workload.capacity != 1);
        let index = self.chunk_of(&workload.uid).min(self.chunks.len().saturating_sub(1));
        let Some(chunk) = self.chunks.get_mut(index) else {
            self.chunks.push(Arc::new(vec![workload.clone()]));
            return;
        };
        let chunk = Arc::make_mut(chunk);
        let position = chunk.partition_point(|other| other.uid < workload.uid);
        chunk.insert(position, workload.clone());
        if chunk.len() > CHUNK {
            let rest = chunk.split_off(CHUNK / 2);
            self.chunks.insert(index + 1, Arc::new(rest));
        }
    }

    fn remove(&mut self, uid: &WorkloadUid) {
        let index = self.chunk_of(uid);
        let Some(chunk) = self.chunks.get_mut(index) else {
            return;
        };
        let Ok(position) = chunk.binary_search_by(|other| other.uid.cmp(uid)) else {
            return;
        };
        let chunk = Arc::make_mut(chunk);
        let removed = chunk.remove(position);
        self.len -= 1;
        self.uneven -= usize::from(removed.capacity != 1);
        if chunk.is_empty() {
            self.chunks.remove(index);
        }
    }
}

/// What serves a service.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Endpoints {
    /// New connections may go there.
    pub(crate) healthy: EndpointList,
    /// Only where the service says that health does not matter.
    pub(crate) unhealthy: EndpointList,
}

impl Endpoints {
    fn of(&mut self, status: HealthStatus) -> &mut EndpointList {
        match status {
            HealthStatus::Healthy => &mut self.healthy,
            HealthStatus::Unhealthy => &mut self.unhealthy,
        }
    }

    pub(crate) fn insert(&mut self, workload: &Arc<Workload>) {
        self.of(workload.status).insert(workload);
    }

    pub(crate) fn remove(&mut self, workload: &Workload) {
        self.of(workload.status).remove(&workload.uid);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.healthy.is_empty() && self.unhealthy.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn whatever_is_drawn_any_is_as_likely_as_another_and_two_are_different() {
        for (count, gaps) in [(1_u16, 1), (2, 1), (5, 1), (200, 1), (700, 1), (2_000, 7)] {
            let mut list = EndpointList::default();
            (0..count).for_each(|number| list.insert(&workload(number)));
            // Some of the chunks are nearly empty.
            let gone = (0..count / 2).filter(|number| number % gaps != 0);
            gone.for_each(|number| list.remove(&workload(number).uid));
            let mut counts: BTreeMap<&WorkloadUid, u32> = list.iter().map(|found| (&found.uid, 0)).collect();
            let mut random = Random::new(1);
            let rounds = 100 * list.len();
            for _ in 0..rounds {
                let [first, second] = list.draw_two(&mut random).unwrap();
                assert!(list.chunks.len() > FEW || list.len() == 1 || first.uid != second.uid);
                *counts.get_mut(&first.uid).unwrap() += 1;
                *counts.get_mut(&second.uid).unwrap() += 1;
            }
            let (least, most) = (counts.values().min().unwrap(), counts.values().max().unwrap());
            assert!(
                *least > 120 && *most < 290,
                "{count} endpoints: {least} to {most} times of 200"
            );
        }
        assert!(EndpointList::EMPTY.draw_two(&mut Random::new(1)).is_none());
    }

    fn workload(number: u16) -> Arc<Workload> {
        Arc::new(Workload {
            uid: WorkloadUid(format!("{number:05}").into()),
            ..Workload::default()
        })
    }

    proptest! {
        #[test]
        fn a_list_holds_what_was_put_and_not_removed_in_order(
            steps in proptest::collection::vec((0..3u8, 0..300u16), 1..900)
        ) {
            let (mut list, mut map) = (EndpointList::default(), BTreeMap::new());
            for (what, number) in steps {
                let workload = workload(number);
                if what > 0 {
                    list.insert(&workload);
                    map.insert(number, workload);
                } else {
                    list.remove(&workload.uid);
                    map.remove(&number);
                }
            }
            assert!(list.iter().eq(map.values()));
            assert_eq!((list.len(), list.is_empty()), (map.len(), map.is_empty()));
            let each: Vec<_> = (0..list.len()).filter_map(|index| list.nth(index)).collect();
            assert!(each.into_iter().eq(map.values()));
            assert!(list.nth(list.len()).is_none());
            assert!(list.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK));
        }
    }
}
