//! Endpoints that could not be connected to, and for how long others go before them.
//!
//! ```text
//!  (none) ── failed ──> passed over for 1 s ── time is over ──> on trial: one connection finds out
//!     ▲                    ▲                                       │
//!     │                    └── failed: twice as long, 30 s at most─┤
//!     └──────────────────────── succeeded ────────────────────────┘
//! ```
//! By endpoint, address and port: another port of the pod, or another pod at its address, is not blamed. Pure: the time is
//! an argument. That it is not the last endpoints of a service that are passed over is for whoever chooses (`mesh`).
//!
//! Bounded: what is not tried again for [`FORGET`] is forgotten, and when [`LIMIT`] are known, further failures are not
//! remembered; then connections find out each for themselves, as they do anyway at first.

use std::{
    collections::HashMap,
    net::SocketAddr,
    time::{Duration, Instant},
};

use model::WorkloadUid;

/// Endpoints that are remembered.
pub(crate) const LIMIT: usize = 4096;
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// How long one connection may take to find out, before another one may.
const TRIAL: Duration = Duration::from_secs(10);
/// What was not tried again for so long is no longer known to be bad.
const FORGET: Duration = Duration::from_secs(300);

type Key = (WorkloadUid, SocketAddr);

/// Endpoints that failed.
#[derive(Default, Debug)]
pub(crate) struct PassedOver(HashMap<Key, Failed>);

#[derive(Debug)]
struct Failed {
    /// One after another, without a success between.
    failures: u32,
    until: Instant,
    on_trial: bool,
}

impl PassedOver {
    /// How many are remembered.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether others go first.
    pub(crate) fn contains(&self, endpoint: &WorkloadUid, at: SocketAddr, now: Instant) -> bool {
        // Whoever looks up has only references; the clone counts, and copies nothing.
        let failed = self.0.get(&(endpoint.clone(), at));
        failed.is_some_and(|failed| now < failed.until)
    }

    /// A connection goes there. Of one whose time is over it is the trial, and others still go elsewhere until it is known
    /// how that ended.
    pub(crate) fn begin(&mut self, endpoint: &WorkloadUid, at: SocketAddr, now: Instant) {
        if let Some(failed) = self.0.get_mut(&(endpoint.clone(), at))
            && now >= failed.until
        {
            (failed.until, failed.on_trial) = (now + TRIAL, true);
        }
    }

    /// It could be connected to.
    pub(crate) fn succeeded(&mut self, endpoint: &WorkloadUid, at: SocketAddr) {
        self.0.remove(&(endpoint.clone(), at));
    }

    /// It could not. Connections that began before that was known are one failure together.
    pub(crate) fn failed(&mut self, endpoint: &WorkloadUid, at: SocketAddr, now: Instant) {
        let key = (endpoint.clone(), at);
        if !self.0.contains_key(&key) && self.0.len() >= LIMIT {
            self.forget(now);
            if self.0.len() >= LIMIT {
                return;
            }
        }
        let failed = self.0.entry(key).or_insert(Failed {
            failures: 0,
            until: now,
            on_trial: true,
        });
        if failed.on_trial || now >= failed.until {
            let longer = FIRST.saturating_mul(1 << failed.failures.min(5));
            *failed = Failed {
                failures: failed.failures.saturating_add(1),
                until: now + longer.min(LONGEST),
                on_trial: false,
            };
        }
    }

    /// Forgets what was not tried again for a while.
    pub(crate) fn forget(&mut self, now: Instant) {
        self.0.retain(|_, failed| now < failed.until + FORGET);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn endpoint(number: usize) -> (WorkloadUid, SocketAddr) {
        let uid = WorkloadUid(format!("pod-{number}").into());
        (uid, "10.0.0.1:80".parse().unwrap())
    }

    #[test]
    fn each_failure_in_a_row_doubles_the_time_to_half_a_minute_and_a_success_ends_it() {
        let (uid, at) = endpoint(1);
        let (mut passed_over, mut now) = (PassedOver::default(), Instant::now());
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            passed_over.begin(&uid, at, now);
            passed_over.failed(&uid, at, now);
            // Others that were under way make it no worse.
            passed_over.failed(&uid, at, now);
            now += Duration::from_secs(seconds);
            assert!(
                passed_over.contains(&uid, at, now - Duration::from_millis(1)),
                "{seconds}"
            );
            assert!(!passed_over.contains(&uid, at, now), "{seconds}");
        }
        passed_over.begin(&uid, at, now);
        passed_over.succeeded(&uid, at);
        assert!(!passed_over.contains(&uid, at, now));
        passed_over.failed(&uid, at, now);
        assert!(!passed_over.contains(&uid, at, now + FIRST));
    }

    #[test]
    fn one_connection_finds_out_and_the_others_go_elsewhere_meanwhile() {
        let (uid, at) = endpoint(1);
        let (mut passed_over, now) = (PassedOver::default(), Instant::now());
        passed_over.failed(&uid, at, now);
        let over = now + FIRST;
        passed_over.begin(&uid, at, over);
        assert!(passed_over.contains(&uid, at, over), "somebody is finding out");
        assert!(
            !passed_over.contains(&uid, at, over + TRIAL),
            "nobody came back to tell"
        );
    }

    #[test]
    fn another_port_and_another_pod_of_the_address_are_not_blamed() {
        let ((uid, at), (successor, _)) = (endpoint(1), endpoint(2));
        let (mut passed_over, now) = (PassedOver::default(), Instant::now());
        passed_over.failed(&uid, at, now);
        assert!(passed_over.contains(&uid, at, now));
        assert!(!passed_over.contains(&successor, at, now));
        assert!(!passed_over.contains(&uid, SocketAddr::new(at.ip(), 81), now));
    }

    proptest! {
        #[test]
        fn it_is_bounded_in_number_and_time(steps in proptest::collection::vec((0..3u8, 0..6000usize, 0..100u64), 1..200)) {
            let (mut passed_over, mut now) = (PassedOver::default(), Instant::now());
            for number in 0..LIMIT - 10 {
                let (uid, at) = endpoint(number);
                passed_over.failed(&uid, at, now);
            }
            for (what, number, seconds) in steps {
                let (uid, at) = endpoint(number);
                match what {
                    0 => passed_over.failed(&uid, at, now),
                    1 => passed_over.succeeded(&uid, at),
                    _ => passed_over.begin(&uid, at, now),
                }
                assert!(passed_over.len() <= LIMIT);
                assert!(!passed_over.contains(&uid, at, now + LONGEST));
                now += Duration::from_secs(seconds);
            }
            passed_over.forget(now + LONGEST + FORGET);
            assert_eq!(passed_over.len(), 0);
        }
    }
}
