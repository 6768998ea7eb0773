//! What `/metrics` has beside the certificate authority's counters: gathered when it is asked for.

use std::sync::{Arc, atomic::Ordering};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

use crate::{ca::Authority, resources::Type, watch::Health, xds};

/// Looks at everything.
pub struct Everything {
    /// Clients.
    pub acknowledged: Arc<xds::Acknowledged>,
    /// The mesh.
    pub cache: Arc<xds::Cache>,
    /// The authority.
    pub authority: Arc<Authority>,
    /// The watches.
    pub health: Health,
}

impl std::fmt::Debug for Everything {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Everything")
    }
}

impl Collector for Everything {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let mut gauge = |name, help, value: i64| {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        };
        let snapshot = self.cache.snapshot();
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        gauge("pilot_xds", "Clients connected", number(self.acknowledged.connected()))?;
        gauge(
            "undercurrent_xds_lagging",
            "Clients that have not acknowledged the newest state",
            number(self.acknowledged.lagging(snapshot.generation())),
        )?;
        gauge(
            "undercurrent_xds_generation",
            "States of the mesh so far",
            i64::try_from(snapshot.generation()).unwrap_or(i64::MAX),
        )?;
        gauge(
            "undercurrent_addresses",
            "Workloads and services",
            number(snapshot.len(Type::Address)),
        )?;
        gauge(
            "undercurrent_policies",
            "Policies",
            number(snapshot.len(Type::Authorization)),
        )?;
        gauge(
            "undercurrent_ca_waiting",
            "Certificate requests that wait",
            number(self.authority.waiting()),
        )?;
        gauge(
            "undercurrent_watches_broken",
            "Watches that are interrupted",
            number(self.health.troubles().len()),
        )?;
        if let Some(until) = self.authority.signer_not_after() {
            let seconds = until
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs();
            gauge(
                "citadel_server_cert_chain_expiry_timestamp",
                "When the signing chain ends, in seconds since 1970",
                i64::try_from(seconds).unwrap_or(i64::MAX),
            )?;
        }
        self.counters(&mut encoder)
    }
}

impl Everything {
    fn counters(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let counters = &self.acknowledged.counters;
        for (name, help, counter) in [
            ("undercurrent_xds_streams", "Streams let in", &counters.streams),
            (
                "undercurrent_xds_turned_away",
                "Streams told to come back later",
                &counters.turned_away,
            ),
            (
                "undercurrent_xds_unauthenticated",
                "Streams of unknown callers",
                &counters.unauthenticated,
            ),
            (
                "undercurrent_xds_dropped",
                "Streams ended because the client did not keep up",
                &counters.dropped,
            ),
            ("pilot_xds_pushes", "Responses sent", &counters.responses),
            (
                "undercurrent_xds_sent_bytes",
                "Bytes of responses sent",
                &counters.bytes,
            ),
            (
                "pilot_total_xds_rejects",
                "Responses refused by clients",
                &counters.refusals,
            ),
        ] {
            let counter = ConstCounter::new(counter.load(Ordering::Relaxed));
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        Ok(())
    }
}
