//! A service's endpoints, by uid, in chunks that snapshots share: one that comes or goes copies its chunk and the list
//! of chunks, however many there are.

use std::sync::Arc;

use model::{HealthStatus, Workload, WorkloadUid};

/// Endpoints of a chunk before it is split.
const CHUNK: usize = 64;

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

    /// All of them, beginning with the n-th and going round.
    pub(crate) fn iter_from(&self, index: usize) -> impl Iterator<Item = &Arc<Workload>> {
        let (mut skipped, mut chunk) = (index, 0);
        while let Some(len) = self
            .chunks
            .get(chunk)
            .map(|chunk| chunk.len())
            .filter(|len| *len <= skipped)
        {
            skipped -= len;
            chunk += 1;
        }
        let (before, after) = self.chunks.split_at(chunk);
        let (first, rest) = after
            .split_first()
            .map_or((None, after), |(first, rest)| (Some(first), rest));
        let (head, tail) = first.map_or((&[][..], &[][..]), |first| first.split_at(skipped));
        tail.iter()
            .chain(rest.iter().flat_map(|chunk| chunk.iter()))
            .chain(before.iter().flat_map(|chunk| chunk.iter()))
            .chain(head.iter())
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

    fn workload(number: u16) -> Arc<Workload> {
        Arc::new(Workload {
            uid: WorkloadUid(format!("{number:05}").into()),
            ..Workload::default()
        })
    }

    proptest! {
        #[test]
        fn a_list_holds_what_was_put_and_not_removed_in_order(
            steps in proptest::collection::vec((0..3u8, 0..300u16), 1..900), start in 0..400usize
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
            let turned: Vec<_> = list.iter_from(start).collect();
            let mut expected: Vec<_> = map.values().collect();
            expected.rotate_left(start.min(map.len()));
            assert_eq!(turned, expected);
            assert!(list.chunks.iter().all(|chunk| !chunk.is_empty() && chunk.len() <= CHUNK));
        }
    }
}
