//! Which threads go before other work of the machine: those that do little, while they do little.
//!
//! ```text
//!             used more than its share of a window, or all that may be urgent have used theirs
//!  urgent ─────────────────────────────────────────────────────────────────────────────────────► usual
//!     ▲                                                                                            │
//!     └─────────── a calm window, and at least [`CALM`] since ─────────────────────────────────────┘
//! ```
//! Fairness between processes is not enough for a thread that carries a quiet pod: the kernel shares processors out by
//! groups (the cgroup of a pod, of the agent), so what a noisy pod has the agent do is put on the account of all of its
//! threads. An urgent thread is outside of that account, and so must be held to little: [`SHARE`] of a [`WINDOW`], and
//! all urgent threads together to a quarter of the machine. A window is over when somebody looks; a single poll may
//! exceed it, and is bounded by itself.

use std::{
    cell::Cell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

/// What use is measured in.
pub const WINDOW: Duration = Duration::from_millis(10);

/// What an urgent thread may use of a window.
pub const SHARE: Duration = Duration::from_millis(2);

/// How long a thread that used more is usual, at least.
pub const CALM: Duration = Duration::from_millis(100);

/// What all urgent threads may use of a window, together.
#[derive(Debug)]
pub struct Allowance {
    of_all: u64,
    window: AtomicU64,
    used: AtomicU64,
}

/// Whether the thread that it lives on is urgent.
pub struct Urgency {
    allowance: Arc<Allowance>,
    /// Makes the thread urgent, or usual again. False: it can't, and is not asked again.
    set: Box<dyn Fn(bool) -> bool>,
    can: Cell<bool>,
    urgent: Cell<bool>,
    window: Cell<u64>,
    used: Cell<u64>,
    not_before: Cell<u64>,
}

impl Allowance {
    /// A quarter of so many processors.
    pub fn of(processors: usize) -> Arc<Self> {
        Arc::new(Self {
            of_all: nanos(WINDOW) / 4 * processors.max(1) as u64,
            window: AtomicU64::new(0),
            used: AtomicU64::new(0),
        })
    }

    /// Whether that was too much. Threads that turn the window over at once may count a little too few.
    fn use_up(&self, window: u64, took: u64) -> bool {
        if self.window.load(Relaxed) != window {
            self.window.store(window, Relaxed);
            self.used.store(0, Relaxed);
        }
        self.used.fetch_add(took, Relaxed) + took > self.of_all
    }
}

impl Urgency {
    /// Makes this thread urgent by `set`, and goes on to do so as it deserves it.
    pub fn new(allowance: Arc<Allowance>, set: impl Fn(bool) -> bool + 'static) -> Self {
        let can = set(true);
        Self {
            allowance,
            set: Box::new(set),
            can: Cell::new(can),
            urgent: Cell::new(can),
            window: Cell::new(0),
            used: Cell::new(0),
            not_before: Cell::new(0),
        }
    }

    /// The thread was at work for so long, until now; both in nanoseconds.
    pub(crate) fn worked(&self, now: u64, took: u64) {
        if !self.can.get() {
            return;
        }
        let window = now / nanos(WINDOW);
        let last = self.window.replace(window);
        if last != window {
            let calm = self.used.replace(0) <= nanos(SHARE) / 2 || window > last + 1;
            if !self.urgent.get() && calm && now >= self.not_before.get() {
                self.become_urgent(true);
            }
        }
        self.used.set(self.used.get() + took);
        if self.urgent.get() && (self.used.get() > nanos(SHARE) || self.allowance.use_up(window, took)) {
            self.not_before.set(now + nanos(CALM));
            self.become_urgent(false);
        }
    }

    fn become_urgent(&self, urgent: bool) {
        self.urgent.set(urgent);
        self.can.set((self.set)(urgent));
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use super::*;

    const MS: u64 = 1_000_000;

    fn watched(allowance: &Arc<Allowance>) -> (Urgency, Rc<RefCell<Vec<bool>>>) {
        let said = Rc::new(RefCell::new(Vec::new()));
        let heard = said.clone();
        let urgency = Urgency::new(allowance.clone(), move |urgent| {
            heard.borrow_mut().push(urgent);
            true
        });
        (urgency, said)
    }

    #[test]
    fn who_does_little_stays_urgent() {
        let (urgency, said) = watched(&Allowance::of(1));
        for at in 0..1000 {
            urgency.worked(at * MS, MS / 10);
        }
        assert_eq!(*said.borrow(), [true]);
    }

    #[test]
    fn who_does_much_is_usual_until_it_is_calm() {
        let (urgency, said) = watched(&Allowance::of(8));
        for at in 0..1000 {
            urgency.worked(at * MS, MS / 2);
        }
        assert_eq!(*said.borrow(), [true, false]);
        let calm = 1000 * MS + nanos(CALM);
        urgency.worked(calm, MS / 10);
        assert_eq!(*said.borrow(), [true, false, true]);
        // In the first window that is too much, and not sooner than that again.
        urgency.worked(calm + 11 * MS, 3 * MS);
        urgency.worked(calm + 40 * MS, MS / 10);
        assert_eq!(*said.borrow(), [true, false, true, false]);
    }

    #[test]
    fn all_together_use_no_more_than_a_quarter() {
        let allowance = Allowance::of(1);
        let threads: Vec<_> = (0..16).map(|_| watched(&allowance)).collect();
        for at in 0..10 {
            for (urgency, _) in &threads {
                urgency.worked(at * MS, MS / 5);
            }
        }
        let urgent = threads.iter().filter(|(urgency, _)| urgency.urgent.get()).count();
        // 2.5 ms were given away after some rounds; who came later is usual.
        assert_eq!(urgent, 0);
        let used = threads
            .iter()
            .filter(|(_, said)| *said.borrow() == [true, false])
            .count();
        assert_eq!(used, 16);
    }

    #[test]
    fn who_can_not_be_urgent_is_not_asked_again() {
        let asked = Rc::new(Cell::new(0));
        let count = asked.clone();
        let urgency = Urgency::new(Allowance::of(1), move |_| {
            count.set(count.get() + 1);
            false
        });
        for at in 0..1000 {
            urgency.worked(at * MS, if at < 500 { MS } else { 0 });
        }
        assert_eq!(asked.get(), 1);
    }
}
