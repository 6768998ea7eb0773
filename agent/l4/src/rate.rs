//! How often something may happen.

use std::{
    cell::Cell,
    time::{Duration, Instant},
};

/// At most so many times in a second.
pub(crate) struct Rate {
    a_second: u32,
    /// When the second began, and what happened in it.
    window: Cell<Option<(Instant, u32)>>,
}

impl Rate {
    pub(crate) fn a_second(a_second: u32) -> Self {
        Self {
            a_second,
            window: Cell::default(),
        }
    }

    /// Whether it may happen once more, now; if so, that counts.
    pub(crate) fn may(&self) -> bool {
        self.may_at(Instant::now()).0
    }

    /// The same at a time, and whether a new second began.
    pub(crate) fn may_at(&self, now: Instant) -> (bool, bool) {
        let (since, count, begun) = match self.window.get() {
            Some((since, count)) if now.duration_since(since) < Duration::from_secs(1) => (since, count, false),
            _ => (now, 0, true),
        };
        let may = count < self.a_second;
        self.window.set(Some((since, count + u32::from(may))));
        (may, begun)
    }
}
