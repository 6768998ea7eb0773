//! Bounds handshakes that are not finished.
//!
//! When there are too many, the source with the most of them loses its oldest: so one that opens a thousand and says
//! nothing starves itself and not the others (`the_source_with_the_most_loses_its_oldest`).

use std::{cell::RefCell, collections::VecDeque, net::IpAddr, rc::Rc};

use tokio::task::AbortHandle;

/// The handshakes of one pod on one shard.
#[derive(Clone)]
pub(crate) struct HalfOpen {
    entries: Rc<RefCell<VecDeque<Entry>>>,
    limit: usize,
}

struct Entry {
    source: IpAddr,
    task: AbortHandle,
}

impl HalfOpen {
    /// At most `limit` of them.
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            entries: Rc::default(),
            limit: limit.max(1),
        }
    }

    /// Enters a task that begins its handshake. Returns whose was dropped to make room.
    pub(crate) fn enter(&self, source: IpAddr, task: AbortHandle) -> Option<IpAddr> {
        let mut entries = self.entries.borrow_mut();
        entries.push_back(Entry { source, task });
        if entries.len() <= self.limit {
            return None;
        }
        let busiest = busiest(&entries);
        let oldest = entries.iter().position(|entry| entry.source == busiest)?;
        let dropped = entries.remove(oldest)?;
        dropped.task.abort();
        Some(dropped.source)
    }

    /// Takes out a task whose handshake is over.
    pub(crate) fn leave(&self, task: tokio::task::Id) {
        let mut entries = self.entries.borrow_mut();
        if let Some(index) = entries.iter().position(|entry| entry.task.id() == task) {
            entries.remove(index);
        }
    }

    /// Ends all of them.
    pub(crate) fn abort_all(&self) {
        for entry in self.entries.borrow_mut().drain(..) {
            entry.task.abort();
        }
    }
}

/// The source with the most entries; of several the one that came first.
fn busiest(entries: &VecDeque<Entry>) -> IpAddr {
    let mut counts: Vec<(IpAddr, usize)> = Vec::new();
    for entry in entries {
        match counts.iter_mut().find(|(source, _)| *source == entry.source) {
            Some((_, count)) => *count += 1,
            None => counts.push((entry.source, 1)),
        }
    }
    let mut best = counts[0];
    for count in counts {
        if count.1 > best.1 {
            best = count;
        }
    }
    best.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "local")]
    async fn the_source_with_the_most_loses_its_oldest() {
        let half_open = HalfOpen::new(4);
        let waiting = || tokio::task::spawn_local(std::future::pending::<()>());
        let (quiet, noisy): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let good = waiting();
        assert_eq!(half_open.enter(quiet, good.abort_handle()), None);
        let mut noise: Vec<_> = (0..1000).map(|_| waiting()).collect();
        let mut dropped = Vec::new();
        for task in &noise {
            dropped.extend(half_open.enter(noisy, task.abort_handle()));
        }
        assert_eq!(dropped, vec![noisy; 997]);
        for task in noise.drain(..997) {
            assert!(task.await.unwrap_err().is_cancelled());
        }
        assert!(!good.is_finished() && noise.iter().all(|task| !task.is_finished()));
        half_open.leave(good.id());
        half_open.abort_all();
        for task in noise {
            assert!(task.await.unwrap_err().is_cancelled());
        }
        assert!(!good.is_finished());
    }
}
