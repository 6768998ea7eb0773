//! One thread's way to the series: a cache of handles, found by the addresses of what is talked about.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    hash::{BuildHasher, Hash, Hasher},
    sync::Arc,
    time::Instant,
};

use foldhash::fast::RandomState;
use model::{Identity, Service, Workload};

use super::{Found, Metrics, Series, Traffic};
use crate::Direction;

/// Handles that one thread keeps; when there are more, all are looked up anew.
const HANDLES: usize = 4096;

/// One thread's way to the series.
pub struct Recorder {
    metrics: Metrics,
    hasher: RandomState,
    handles: RefCell<HashMap<u64, Handle>>,
}

/// A series, and what it is for. It holds what it is found by, so that no other thing can come to have its address.
struct Handle {
    reporter: Direction,
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    peer: Option<Identity>,
    series: Arc<Series>,
    used: Cell<bool>,
}

fn same<T>(one: Option<&Arc<T>>, other: Option<&Arc<T>>) -> bool {
    one.map(Arc::as_ptr) == other.map(Arc::as_ptr)
}

impl Handle {
    fn is_for(&self, traffic: &Traffic<'_>) -> bool {
        self.reporter == traffic.reporter
            && same(self.source.as_ref(), traffic.source)
            && same(self.destination.as_ref(), traffic.destination)
            && same(self.service.as_ref(), traffic.service)
            && self.peer.as_ref() == traffic.peer
    }
}

impl Recorder {
    /// For one thread.
    pub fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            hasher: RandomState::default(),
            handles: RefCell::default(),
        }
    }

    fn hash(&self, traffic: &Traffic<'_>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        (traffic.reporter == Direction::Inbound).hash(&mut hasher);
        traffic.source.map(Arc::as_ptr).hash(&mut hasher);
        traffic.destination.map(Arc::as_ptr).hash(&mut hasher);
        traffic.service.map(Arc::as_ptr).hash(&mut hasher);
        traffic.peer.hash(&mut hasher);
        hasher.finish()
    }

    /// What a connection is counted in.
    pub fn series(&self, traffic: &Traffic<'_>) -> Arc<Series> {
        let hash = self.hash(traffic);
        let mut handles = self.handles.borrow_mut();
        if let Some(handle) = handles.get(&hash).filter(|handle| handle.is_for(traffic)) {
            handle.used.set(true);
            return handle.series.clone();
        }
        let series = match self.metrics.series(traffic, Instant::now()) {
            Found::Own(series) => series,
            Found::Overflow(series) => return series,
        };
        if handles.len() >= HANDLES {
            handles.clear();
        }
        let handle = Handle {
            reporter: traffic.reporter,
            source: traffic.source.cloned(),
            destination: traffic.destination.cloned(),
            service: traffic.service.cloned(),
            peer: traffic.peer.cloned(),
            series: series.clone(),
            used: Cell::new(true),
        };
        handles.insert(hash, handle);
        series
    }

    /// Whether nothing waits for a sweep: it has no handles, and there are no series, nobody's.
    pub fn is_empty(&self) -> bool {
        self.handles.borrow().is_empty() && self.metrics.is_empty()
    }

    /// To be called every minute or so, by the owner: handles that were not used since the last call are given up, and
    /// series that nobody used for long end. Until then what a handle is for does not end.
    pub fn sweep(&self, now: Instant) {
        self.handles.borrow_mut().retain(|_, handle| handle.used.replace(false));
        self.metrics.sweep(now);
    }
}
