//! Which shards carry which pod.
//!
//! ```text
//! shard   0   1   2   3   4   5         a pod is on a few shards (its lanes), one of which is its home
//! pod a   H   x                         first the shards that carry nobody yet
//! pod b           H   x
//! pod c                   H   x
//! pod d   x           H                 then those that carry few, and never a pair twice while another is left
//! ```
//! A shard is a thread, and the kernel shares the processors out between threads: who shares none with a noisy pod is not
//! held up by it, however busy its shards are. Two pods that do share one still have another each, as long as there are
//! pairs (`pods_share_as_little_as_they_can`).

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
};

use model::WorkloadUid;

/// The shards of a pod, by their numbers. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Lanes(Arc<[usize]>);

impl Lanes {
    /// All of them.
    pub(crate) fn all(&self) -> &[usize] {
        &self.0
    }

    /// The one that polls the pod's listeners.
    pub(crate) fn home(&self) -> usize {
        self.0.first().copied().unwrap_or_default()
    }

    /// All but the home.
    pub(crate) fn others(&self) -> &[usize] {
        self.0.get(1..).unwrap_or_default()
    }
}

/// Where the pods are. Asked when pods come and go, never for a connection.
pub(crate) struct Placement {
    shards: usize,
    width: usize,
    placed: Mutex<HashMap<WorkloadUid, Lanes>>,
}

impl Placement {
    /// Over so many shards, `width` of them for each pod; at least one of both, and no pod on more than there are.
    pub(crate) fn new(shards: usize, width: usize) -> Self {
        let shards = shards.max(1);
        Self {
            shards,
            width: width.clamp(1, shards),
            placed: Mutex::default(),
        }
    }

    /// Finds a pod its place, a new one if it had one.
    pub(crate) fn place(&self, uid: &WorkloadUid) -> Lanes {
        let mut placed = self.placed();
        placed.remove(uid);
        let lanes = choose(self.shards, self.width, placed.values());
        placed.insert(uid.clone(), lanes.clone());
        lanes
    }

    /// Where a pod is.
    pub(crate) fn of(&self, uid: &WorkloadUid) -> Option<Lanes> {
        self.placed().get(uid).cloned()
    }

    /// A pod takes nothing new any more.
    pub(crate) fn leave(&self, uid: &WorkloadUid) {
        self.placed().remove(uid);
    }

    fn placed(&self) -> std::sync::MutexGuard<'_, HashMap<WorkloadUid, Lanes>> {
        self.placed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn choose<'a>(shards: usize, width: usize, placed: impl Iterator<Item = &'a Lanes>) -> Lanes {
    let placed: Vec<&Lanes> = placed.collect();
    let on = |shard: usize| placed.iter().filter(|lanes| lanes.all().contains(&shard)).count();
    let homes = |shard: usize| placed.iter().filter(|lanes| lanes.home() == shard).count();
    let mut chosen: Vec<usize> = Vec::with_capacity(width);
    // Who carries the fewest pods; of those, who accepts for the fewest.
    chosen.extend((0..shards).min_by_key(|shard| (on(*shard), homes(*shard))));
    while chosen.len() < width {
        let shared = |shard: usize| {
            let both =
                |lanes: &&&Lanes| lanes.all().contains(&shard) && chosen.iter().any(|own| lanes.all().contains(own));
            placed.iter().filter(both).count()
        };
        let others = (0..shards).filter(|shard| !chosen.contains(shard));
        let Some(next) = others.min_by_key(|shard| (shared(*shard), on(*shard))) else {
            break;
        };
        chosen.push(next);
    }
    Lanes(chosen.into())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn uid(name: usize) -> WorkloadUid {
        WorkloadUid(format!("cluster//v1/Pod/test/{name}").into())
    }

    fn sorted(lanes: &Lanes) -> Vec<usize> {
        let mut lanes = lanes.all().to_vec();
        lanes.sort_unstable();
        lanes
    }

    /// How many shards every two of these have in common, at most.
    fn most_shared(pods: &[Lanes]) -> usize {
        let shared = |a: &Lanes, b: &Lanes| a.all().iter().filter(|shard| b.all().contains(shard)).count();
        let pairs = pods
            .iter()
            .enumerate()
            .flat_map(|(at, pod)| pods[..at].iter().map(move |other| (pod, other)));
        pairs.map(|(a, b)| shared(a, b)).max().unwrap_or(0)
    }

    #[test]
    fn pods_share_as_little_as_they_can() {
        let placement = Placement::new(16, 2);
        let few: Vec<Lanes> = (0..8).map(|pod| placement.place(&uid(pod))).collect();
        assert_eq!(most_shared(&few), 0);
        let many: Vec<Lanes> = (0..110).map(|pod| placement.place(&uid(pod))).collect();
        let load = |shard: usize| many.iter().filter(|lanes| lanes.all().contains(&shard)).count();
        let loads: Vec<usize> = (0..16).map(load).collect();
        let (least, most) = (loads.iter().min().unwrap(), loads.iter().max().unwrap());
        assert!(most - least <= 4, "{loads:?}");
        let homes: HashSet<usize> = many.iter().map(Lanes::home).collect();
        assert_eq!(homes.len(), 16);
        let mut pairs: HashMap<Vec<usize>, usize> = HashMap::new();
        for lanes in &many {
            *pairs.entry(sorted(lanes)).or_default() += 1;
        }
        // Of 120 pairs hardly one is used twice.
        assert!(pairs.len() >= 100, "{} pairs", pairs.len());
    }

    #[test]
    fn a_place_that_was_left_is_taken_next() {
        let placement = Placement::new(4, 2);
        let first = placement.place(&uid(0));
        let second = placement.place(&uid(1));
        assert_eq!(placement.of(&uid(0)), Some(first.clone()));
        placement.leave(&uid(0));
        assert_eq!(placement.of(&uid(0)), None);
        let third = placement.place(&uid(2));
        assert_eq!(sorted(&third), sorted(&first));
        assert_eq!(most_shared(&[second, third]), 0);
    }

    #[test]
    fn a_pod_is_on_all_shards_where_there_are_few_and_on_one_at_least() {
        assert_eq!(Placement::new(1, 2).place(&uid(0)).all(), [0]);
        assert_eq!(Placement::new(0, 0).place(&uid(0)).all(), [0]);
        let placement = Placement::new(2, 2);
        let homes: Vec<usize> = (0..4).map(|pod| placement.place(&uid(pod)).home()).collect();
        assert_eq!(homes.iter().filter(|home| **home == 0).count(), 2, "{homes:?}");
    }
}
