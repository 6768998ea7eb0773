//! Counts, per shard without contention, summed when somebody asks.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::failure::FailureKind;

/// What one shard has counted. Only its own thread writes.
#[derive(Default)]
pub(crate) struct ShardCounters {
    pub outbound: AtomicU64,
    pub inbound_plaintext: AtomicU64,
    pub inbound_tunnels: AtomicU64,
    pub inbound_streams: AtomicU64,
    pub established: AtomicU64,
    pub completed: AtomicU64,
    pub half_open_dropped: AtomicU64,
    pub accept_errors: AtomicU64,
    pub failed_over: AtomicU64,
    pub dry_run_denied: AtomicU64,
    pub dry_run_allowed: AtomicU64,
    pub dns_queries: AtomicU64,
    pub dns_answered: AtomicU64,
    pub dns_forwarded: AtomicU64,
    pub dns_failed: AtomicU64,
    pub dns_malformed: AtomicU64,
    pub dns_foreign: AtomicU64,
    pub failed: [AtomicU64; FailureKind::ALL.len()],
}

impl ShardCounters {
    pub(crate) fn fail(&self, kind: FailureKind) {
        increment(&self.failed[kind as usize]);
    }
}

/// Adds one. Only the shard's own thread writes, so no locked instruction is needed.
pub(crate) fn increment(counter: &AtomicU64) {
    counter.store(counter.load(Relaxed) + 1, Relaxed);
}

/// What was counted since the start, over all shards.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Connections that pods opened.
    pub outbound: u64,
    /// Plaintext connections that were opened to pods.
    pub inbound_plaintext: u64,
    /// TCP connections to HBONE listeners, handshake or not.
    pub inbound_tunnels: u64,
    /// CONNECT requests in them.
    pub inbound_streams: u64,
    /// Connections whose two ends were joined.
    pub established: u64,
    /// Of those, ended by both ends closing.
    pub completed: u64,
    /// Unfinished handshakes dropped because there were too many.
    pub half_open_dropped: u64,
    /// Times that `accept` failed (out of file descriptors).
    pub accept_errors: u64,
    /// Times that another endpoint was tried since one failed.
    pub failed_over: u64,
    /// Connections that were let in and that policies in dry run would have denied.
    pub dry_run_denied: u64,
    /// Connections that were denied and that policies in dry run would have allowed.
    pub dry_run_allowed: u64,
    /// DNS messages that pods sent.
    pub dns_queries: u64,
    /// Of those, answered from what is known of the mesh.
    pub dns_answered: u64,
    /// Of those, passed on to a name server.
    pub dns_forwarded: u64,
    /// Of those, answered with SERVFAIL: the name server did not answer, or too many were waiting for it.
    pub dns_failed: u64,
    /// Of those, not DNS.
    pub dns_malformed: u64,
    /// Datagrams to a pod's DNS sockets that somebody else than the pod sent: dropped.
    pub dns_foreign: u64,
    /// Failures by kind, those that never happened too.
    pub failed: Vec<(&'static str, u64)>,
}

impl Counters {
    pub(crate) fn sum<'a>(shards: impl Iterator<Item = &'a ShardCounters>) -> Self {
        let mut sum = Self {
            failed: FailureKind::ALL.iter().map(|kind| (kind.as_str(), 0)).collect(),
            ..Self::default()
        };
        for shard in shards {
            sum.outbound += shard.outbound.load(Relaxed);
            sum.inbound_plaintext += shard.inbound_plaintext.load(Relaxed);
            sum.inbound_tunnels += shard.inbound_tunnels.load(Relaxed);
            sum.inbound_streams += shard.inbound_streams.load(Relaxed);
            sum.established += shard.established.load(Relaxed);
            sum.completed += shard.completed.load(Relaxed);
            sum.half_open_dropped += shard.half_open_dropped.load(Relaxed);
            sum.accept_errors += shard.accept_errors.load(Relaxed);
            sum.failed_over += shard.failed_over.load(Relaxed);
            sum.dry_run_denied += shard.dry_run_denied.load(Relaxed);
            sum.dry_run_allowed += shard.dry_run_allowed.load(Relaxed);
            sum.dns_queries += shard.dns_queries.load(Relaxed);
            sum.dns_answered += shard.dns_answered.load(Relaxed);
            sum.dns_forwarded += shard.dns_forwarded.load(Relaxed);
            sum.dns_failed += shard.dns_failed.load(Relaxed);
            sum.dns_malformed += shard.dns_malformed.load(Relaxed);
            sum.dns_foreign += shard.dns_foreign.load(Relaxed);
            for ((_, total), counted) in sum.failed.iter_mut().zip(&shard.failed) {
                *total += counted.load(Relaxed);
            }
        }
        sum
    }

    /// How many failed in this way.
    pub fn failed(&self, kind: FailureKind) -> u64 {
        self.failed
            .iter()
            .find(|(name, _)| *name == kind.as_str())
            .map_or(0, |(_, count)| *count)
    }
}

impl IntoIterator for Counters {
    type Item = (String, u64);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    /// Each count by its name; failures as `failed_<kind>`.
    fn into_iter(self) -> Self::IntoIter {
        let counts = [
            ("outbound", self.outbound),
            ("inbound_plaintext", self.inbound_plaintext),
            ("inbound_tunnels", self.inbound_tunnels),
            ("inbound_streams", self.inbound_streams),
            ("established", self.established),
            ("completed", self.completed),
            ("half_open_dropped", self.half_open_dropped),
            ("accept_errors", self.accept_errors),
            ("failed_over", self.failed_over),
            ("dry_run_denied", self.dry_run_denied),
            ("dry_run_allowed", self.dry_run_allowed),
            ("dns_queries", self.dns_queries),
            ("dns_answered", self.dns_answered),
            ("dns_forwarded", self.dns_forwarded),
            ("dns_failed", self.dns_failed),
            ("dns_malformed", self.dns_malformed),
            ("dns_foreign", self.dns_foreign),
        ];
        let counts = counts.map(|(name, count)| (name.to_owned(), count));
        let failed = self
            .failed
            .into_iter()
            .map(|(kind, count)| (format!("failed_{kind}"), count));
        counts.into_iter().chain(failed).collect::<Vec<_>>().into_iter()
    }
}
