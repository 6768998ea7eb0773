//! Bounds tasks that somebody else's word begins: handshakes that are not finished, connections of strangers.
//!
//! When there are too many, the source with the most of them loses its oldest: so one that opens a thousand and says
//! nothing starves itself and not the others (`the_source_with_the_most_loses_its_oldest`). Whoever comes has a place.

use std::{collections::VecDeque, net::IpAddr};

use tokio::task::{AbortHandle, Id};

/// The tasks that go on, by their sources.
#[derive(Debug)]
pub struct Places {
    entries: VecDeque<Entry>,
    limit: usize,
}

#[derive(Debug)]
struct Entry {
    source: IpAddr,
    task: AbortHandle,
}

impl Places {
    /// At most `limit` of them.
    pub fn new(limit: usize) -> Self {
        Self {
            entries: VecDeque::new(),
            limit: limit.max(1),
        }
    }

    /// Enters a task that begins. Returns whose was aborted to make room.
    pub fn enter(&mut self, source: IpAddr, task: AbortHandle) -> Option<IpAddr> {
        self.entries.push_back(Entry { source, task });
        if self.entries.len() <= self.limit {
            return None;
        }
        let running = self.entries.len();
        self.entries.retain(|entry| !entry.task.is_finished());
        if self.entries.len() < running {
            return None;
        }
        let busiest = busiest(&self.entries);
        let oldest = self.entries.iter().position(|entry| entry.source == busiest)?;
        let dropped = self.entries.remove(oldest)?;
        dropped.task.abort();
        Some(dropped.source)
    }

    /// Takes out a task that is not to be aborted any more. One that has ended need not be taken out.
    pub fn leave(&mut self, task: Id) {
        if let Some(index) = self.entries.iter().position(|entry| entry.task.id() == task) {
            self.entries.remove(index);
        }
    }

    /// Aborts all of them.
    pub fn abort_all(&mut self) {
        for entry in self.entries.drain(..) {
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

    fn waiting() -> tokio::task::JoinHandle<()> {
        tokio::task::spawn(std::future::pending())
    }

    #[tokio::test]
    async fn the_source_with_the_most_loses_its_oldest() {
        let mut places = Places::new(4);
        let (quiet, noisy): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let good = waiting();
        assert_eq!(places.enter(quiet, good.abort_handle()), None);
        let mut noise: Vec<_> = (0..1000).map(|_| waiting()).collect();
        let mut dropped = Vec::new();
        for task in &noise {
            dropped.extend(places.enter(noisy, task.abort_handle()));
        }
        assert_eq!(dropped, vec![noisy; 997]);
        for task in noise.drain(..997) {
            assert!(task.await.unwrap_err().is_cancelled());
        }
        assert!(!good.is_finished() && noise.iter().all(|task| !task.is_finished()));
        places.leave(good.id());
        places.abort_all();
        for task in noise {
            assert!(task.await.unwrap_err().is_cancelled());
        }
        assert!(!good.is_finished());
    }

    #[tokio::test]
    async fn what_has_ended_has_no_place() {
        let mut places = Places::new(2);
        let source = "10.0.0.1".parse().unwrap();
        let (first, second, third) = (waiting(), waiting(), waiting());
        assert_eq!(places.enter(source, first.abort_handle()), None);
        assert_eq!(places.enter(source, second.abort_handle()), None);
        second.abort();
        assert!(second.await.unwrap_err().is_cancelled());
        assert_eq!(places.enter(source, third.abort_handle()), None);
        assert!(!first.is_finished() && !third.is_finished());
    }
}
