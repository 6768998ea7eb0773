//! How many clients may begin at once.
//!
//! ```text
//! stream ─► rate (who is early waits; who would wait for long is refused) ─► authenticated ─► a place for its first
//! synchronisation (so many at once, so many waiting, the rest refused) ─► the place is free when it has what it asked for
//! ```
//! A thousand agents that come back at once, after a restart or from a replica that died, cost the same work; this spreads
//! it, so that those who are connected go on being served and memory does not depend on how many come. The refused are
//! told when to come back (`grpc-retry-pushback-ms`). Knows no protocol; the rate is a decision without a clock of its own
//! (`a_burst_passes_and_the_rest_is_spread`).

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Status, metadata::MetadataValue};

/// How much may begin at once.
#[derive(Clone, Debug)]
pub struct Limits {
    /// First synchronisations at the same time.
    pub first_syncs: usize,
    /// Streams that wait for that.
    pub waiting: usize,
    /// New streams each second, after a burst.
    pub streams_per_second: u32,
    /// New streams that need not wait.
    pub burst: u32,
    /// The longest that a new stream waits for its turn; whose turn is later is refused.
    pub longest_wait: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            first_syncs: 64,
            waiting: 4096,
            streams_per_second: 500,
            burst: 1000,
            longest_wait: Duration::from_secs(5),
        }
    }
}

/// The door.
#[derive(Debug)]
pub(super) struct Admission {
    limits: Limits,
    rate: Mutex<Rate>,
    places: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

/// A place in the queue for a first synchronisation; left when dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    places: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Waiting {
    /// Resolves when it is this one's turn; the turn ends when what it gives is dropped.
    pub(super) async fn turn(self) -> OwnedSemaphorePermit {
        let places = Arc::clone(&self.places);
        places.acquire_owned().await.expect("it is never closed")
    }
}

impl Admission {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            rate: Mutex::new(Rate::new(limits.streams_per_second, limits.burst)),
            places: Arc::new(Semaphore::new(limits.first_syncs)),
            waiting: Arc::default(),
            limits,
        }
    }

    /// How long a stream that comes now has to wait, or that it is refused.
    pub(super) fn stream(&self, now: Instant) -> Result<Duration, Status> {
        let mut rate = self.rate.lock().unwrap_or_else(PoisonError::into_inner);
        rate.admit(now, self.limits.longest_wait)
            .map_err(|wait| busy("too many new streams", wait))
    }

    /// The end of the queue for a first synchronisation, if it is not full.
    pub(super) fn queue(&self) -> Result<Waiting, Status> {
        let waiting = Waiting {
            places: Arc::clone(&self.places),
            waiting: Arc::clone(&self.waiting),
        };
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= self.limits.waiting + self.limits.first_syncs {
            // `waiting` is dropped, and so not counted.
            return Err(busy(
                "too many clients wait for their first synchronisation",
                self.limits.longest_wait,
            ));
        }
        Ok(waiting)
    }
}

/// Refused, for now.
pub(super) fn busy(why: &str, come_back: Duration) -> Status {
    let mut status = Status::unavailable(format!("{why}: come back in {} ms", come_back.as_millis()));
    let wait = MetadataValue::from(u64::try_from(come_back.as_millis()).unwrap_or(u64::MAX));
    status.metadata_mut().insert("grpc-retry-pushback-ms", wait);
    status
}

/// Generic cell rate: each admission pushes the time at which the next is due.
#[derive(Debug)]
struct Rate {
    interval: Duration,
    burst: Duration,
    due: Option<Instant>,
}

impl Rate {
    fn new(per_second: u32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.max(1);
        Self {
            interval,
            burst: interval * burst,
            due: None,
        }
    }

    fn admit(&mut self, now: Instant, longest: Duration) -> Result<Duration, Duration> {
        let due = self.due.map_or(now, |due| due.max(now));
        let wait = (due - now).saturating_sub(self.burst);
        if wait > longest {
            return Err(wait);
        }
        self.due = Some(due + self.interval);
        Ok(wait)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn a_burst_passes_and_the_rest_is_spread() {
        let mut rate = Rate::new(10, 3);
        let now = Instant::now();
        let longest = Duration::from_millis(250);
        let waits: Vec<_> = (0..7)
            .map(|_| rate.admit(now, longest).map(|wait| wait.as_millis()))
            .collect();
        let refused = Err(Duration::from_millis(300));
        assert_eq!(waits, [Ok(0), Ok(0), Ok(0), Ok(0), Ok(100), Ok(200), refused]);
        assert_eq!(
            rate.admit(now + Duration::from_millis(100), longest),
            Ok(Duration::from_millis(200))
        );
        assert_eq!(rate.admit(now + Duration::from_secs(60), longest), Ok(Duration::ZERO));
    }

    #[tokio::test]
    async fn places_are_few_and_the_queue_is_bounded() {
        let admission = Admission::new(Limits {
            first_syncs: 1,
            waiting: 1,
            ..Limits::default()
        });
        let first = admission.queue().unwrap().turn().await;
        let second = admission.queue().unwrap();
        let third = admission.queue().unwrap();
        let refused = admission.queue().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(refused.metadata().contains_key("grpc-retry-pushback-ms"));
        drop(third);
        let mut turn = Box::pin(second.turn());
        assert!((&mut turn).now_or_never().is_none());
        drop(first);
        drop(turn.await);
        assert_eq!(admission.waiting.load(Ordering::Relaxed), 0);
    }
}
