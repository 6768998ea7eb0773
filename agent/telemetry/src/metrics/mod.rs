//! Istio's counters of TCP connections, bounded.
//!
//! ```text
//! shard ─ Recorder::series(who, whom, service) ─► its own cache, by address ──hit──► Arc<Series>: atomics
//!                                                     └─ miss (rare) ─► Metrics: one lock, by content ─┘
//! scrape ─► Metrics (a Collector): every series, under the lock
//! ```
//! A connection formats nothing and takes no lock that is shared, but the first of its kind for a while. It counts as
//! opened once, as closed once, and as failed at most once; `closed` has as many as the access log has lines
//! (`counters_are_what_was_recorded`).
//!
//! Bounded: a series that no connection used for [`Limits::expiry`] is dropped (`a_series_ends_some_time_after_its_last_use`),
//! so those of a workload that is gone end; and there are at most [`Limits::series`]: what is too many is counted under one
//! series for each reporter whose labels say `overflow`, so that sums stay right
//! (`sums_stay_right_when_there_are_too_many`), and `undercurrent_metrics_overflowed_total` counts it; they do not look
//! through all for room each (`connections_that_are_too_many_do_not_look_for_what_expired_each`). ztunnel has no bound.
//!
//! Deliberately unknown here: HTTP, and what a connection is besides its labels.

mod labels;
mod process;
mod recorder;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use labels::{Labels, Parties, Reporter, Written};
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, text},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};

use crate::Direction;

pub use labels::{ResponseFlag, Traffic};
pub use process::Process;
pub use recorder::Recorder;

/// What bounds the series.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// How many sets of labels there are at most.
    pub series: usize,
    /// How long a series stays after its last connection ended.
    pub expiry: Duration,
}

impl Limits {
    /// Between two looks for what expired, where it is connections that need the room.
    fn pause(&self) -> Duration {
        (self.expiry / 10).max(Duration::from_secs(5))
    }
}

impl Default for Limits {
    /// 4,000 series (some 20 MB of text when all are scraped), 10 minutes.
    fn default() -> Self {
        Self {
            series: 4_000,
            expiry: Duration::from_secs(600),
        }
    }
}

/// The counters of one set of labels. Shared by the shards; relaxed atomics.
pub struct Series {
    labels: Labels,
    opened: AtomicU64,
    /// From server to client.
    sent: AtomicU64,
    /// From client to server.
    received: AtomicU64,
    closed: [AtomicU64; ResponseFlag::ALL.len()],
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::default(),
            sent: AtomicU64::default(),
            received: AtomicU64::default(),
            closed: Default::default(),
        }
    }

    /// A connection came to be, or was to.
    pub fn open(&self) {
        self.opened.fetch_add(1, Relaxed);
    }

    /// Bytes that were moved since this was last told: from client to server, and back.
    pub fn add_bytes(&self, to_server: u64, to_client: u64) {
        if to_server > 0 {
            self.received.fetch_add(to_server, Relaxed);
        }
        if to_client > 0 {
            self.sent.fetch_add(to_client, Relaxed);
        }
    }

    /// A connection ended, or did not come to be.
    pub fn close(&self, flag: ResponseFlag) {
        self.closed[flag as usize].fetch_add(1, Relaxed);
    }
}

impl fmt::Debug for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Series")
            .field("labels", &self.labels)
            .finish_non_exhaustive()
    }
}

/// What all connections of this process are counted in. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limits: Limits,
    /// For each reporter.
    overflow: [Arc<Series>; 2],
    overflowed: AtomicU64,
    expired: AtomicU64,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    series: HashMap<Labels, Kept>,
    /// When all were looked through last.
    swept: Instant,
}

#[derive(Debug)]
struct Kept {
    series: Arc<Series>,
    /// When it was last seen in use.
    used: Instant,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl Metrics {
    /// Nothing counted yet.
    pub fn new(limits: Limits) -> Self {
        let overflow = [Reporter::Source, Reporter::Destination].map(|reporter| {
            Arc::new(Series::new(Labels {
                reporter,
                parties: Parties::Overflow,
            }))
        });
        let held = Held {
            series: HashMap::new(),
            swept: Instant::now(),
        };
        Self(Arc::new(Shared {
            limits,
            overflow,
            overflowed: AtomicU64::default(),
            expired: AtomicU64::default(),
            held: Mutex::new(held),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The series of these labels: the one that is there, a new one, or, where there are too many, the one for those;
    /// that one is to be asked for again at the next connection.
    fn series(&self, traffic: &Traffic<'_>, now: Instant) -> Found {
        let labels = Labels::from(traffic);
        let mut held = self.lock();
        if let Some(kept) = held.series.get(&labels) {
            return Found::Own(kept.series.clone());
        }
        if held.series.len() >= self.0.limits.series
            && now.saturating_duration_since(held.swept) >= self.0.limits.pause()
        {
            self.drop_expired(&mut held, now);
        }
        if held.series.len() >= self.0.limits.series {
            self.0.overflowed.fetch_add(1, Relaxed);
            let overflow = match traffic.reporter {
                Direction::Outbound => &self.0.overflow[0],
                Direction::Inbound => &self.0.overflow[1],
            };
            return Found::Overflow(overflow.clone());
        }
        let series = Arc::new(Series::new(labels.clone()));
        let kept = Kept {
            series: series.clone(),
            used: now,
        };
        held.series.insert(labels, kept);
        Found::Own(series)
    }

    /// Drops what nobody used for long. To be called now and then: between two calls lies the precision of expiry.
    pub fn sweep(&self, now: Instant) {
        self.drop_expired(&mut self.lock(), now);
    }

    fn drop_expired(&self, held: &mut Held, now: Instant) {
        let expiry = self.0.limits.expiry;
        held.swept = now;
        let before = held.series.len();
        held.series.retain(|_, kept| {
            // A handle is only given out under this lock, so one that is nobody's stays nobody's meanwhile.
            if Arc::strong_count(&kept.series) > 1 {
                kept.used = now;
            }
            now.saturating_duration_since(kept.used) < expiry
        });
        let expired = before - held.series.len();
        self.0.expired.fetch_add(expired as u64, Relaxed);
    }

    /// How many series there are, those for what is too many not among them.
    pub fn len(&self) -> usize {
        self.lock().series.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every series, as of now.
    fn all(&self) -> Vec<Arc<Series>> {
        let held = self.lock();
        let own = held.series.values().map(|kept| kept.series.clone());
        let overflow = self.0.overflow.iter().filter(|series| series.opened.load(Relaxed) > 0);
        own.chain(overflow.cloned()).collect()
    }
}

enum Found {
    Own(Arc<Series>),
    Overflow(Arc<Series>),
}

type Counted = fn(&Series) -> &AtomicU64;

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let all = self.all();
        let plain: [(&str, &str, Counted); 3] = [
            ("istio_tcp_connections_opened", "Connections opened", |series| {
                &series.opened
            }),
            ("istio_tcp_sent_bytes", "Bytes sent to clients", |series| &series.sent),
            ("istio_tcp_received_bytes", "Bytes received from clients", |series| {
                &series.received
            }),
        ];
        for (name, help, of) in plain {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let labels = Written(&series.labels, ResponseFlag::None);
                let counter = ConstCounter::new(of(series).load(Relaxed));
                counter.encode(family.encode_family(&labels)?)?;
            }
        }
        type Flagged = (&'static str, &'static str, fn(ResponseFlag) -> bool);
        let flagged: [Flagged; 2] = [
            ("istio_tcp_connections_closed", "Connections closed", |_| true),
            (
                "istio_tcp_connections_failed",
                "Connections that did not come to be, or were ended by other than their two ends",
                ResponseFlag::is_failure,
            ),
        ];
        for (name, help, concerns) in flagged {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                for (flag, count) in ResponseFlag::ALL.into_iter().zip(&series.closed) {
                    let count = count.load(Relaxed);
                    if concerns(flag) && count > 0 {
                        let labels = Written(&series.labels, flag);
                        ConstCounter::new(count).encode(family.encode_family(&labels)?)?;
                    }
                }
            }
        }
        self.encode_own(&mut encoder)
    }
}

impl Metrics {
    fn encode_own(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let series = ConstGauge::new(self.len() as u64);
        let help = "Sets of labels that connections are counted under";
        let name = "undercurrent_metrics_series";
        series.encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        for (name, help, count) in [
            (
                "undercurrent_metrics_overflowed",
                "Connections counted under the labels overflow, since there were too many sets of labels",
                &self.0.overflowed,
            ),
            (
                "undercurrent_metrics_expired",
                "Sets of labels dropped since no connection used them for long",
                &self.0.expired,
            ),
        ] {
            let counter = ConstCounter::new(count.load(Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, MetricType::Counter)?)?;
        }
        Ok(())
    }
}

/// What a scraper reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Exposition {
    /// OpenMetrics 1.0, for those who ask for it.
    OpenMetrics,
    /// Prometheus' older text format.
    Text,
}

impl Exposition {
    /// What an `Accept` header asks for.
    pub fn of_accept(accept: &str) -> Self {
        match accept.contains("application/openmetrics-text") {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    /// The `Content-Type` of it.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// Everything that is registered, as text.
    ///
    /// # Errors
    /// A collector failed to write itself.
    pub fn write(self, registry: &Registry) -> Result<String, fmt::Error> {
        let mut text = String::new();
        text::encode(&mut text, registry)?;
        Ok(match self {
            Self::OpenMetrics => text,
            Self::Text => older_text(&text),
        })
    }
}

/// The older format names a counter as its samples are named, with `_total`, and has no end mark.
fn older_text(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len() + 1024);
    let mut lines = open_metrics.lines().peekable();
    while let Some(line) = lines.next() {
        if line == "# EOF" {
            continue;
        }
        let described = line.strip_prefix("# HELP ").and_then(|rest| rest.split_once(' '));
        let next = lines.peek().copied().unwrap_or_default();
        match described {
            Some((name, help)) if next == format!("# TYPE {name} counter") => {
                text.push_str(&format!("# HELP {name}_total {help}\n# TYPE {name}_total counter\n"));
                lines.next();
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests;
