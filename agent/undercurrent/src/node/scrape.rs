//! What a scraper gets beside the connections: the build, the process, discovery, capture, certificates. Gathered when it is
//! asked for.

use std::{collections::BTreeMap, fmt, time::SystemTime};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
    registry::Registry,
};
use telemetry::{Metrics, metrics::Process};

/// One metric: name, help, kind, and its values by their labels.
#[derive(Debug)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    values: Vec<(Vec<(&'static str, String)>, u64)>,
}

/// Numbers of one moment.
#[derive(Debug, Default)]
pub struct Gathered(Vec<Family>);

impl Gathered {
    /// What each node agent has.
    pub fn new() -> Self {
        let mut gathered = Self::default();
        // The component that Istio's dashboards look for.
        let labels = vec![
            ("component", "ztunnel".to_owned()),
            ("tag", concat!("undercurrent-", env!("CARGO_PKG_VERSION")).to_owned()),
        ];
        gathered.add(
            "istio_build",
            "The node proxy's version",
            MetricType::Gauge,
            vec![(labels, 1)],
        );
        gathered
    }

    fn add(
        &mut self,
        name: &'static str,
        help: &'static str,
        kind: MetricType,
        values: Vec<(Vec<(&'static str, String)>, u64)>,
    ) {
        self.0.push(Family {
            name,
            help,
            kind,
            values,
        });
    }

    /// A number that goes up and down.
    pub fn gauge(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.add(name, help, MetricType::Gauge, vec![(Vec::new(), value)]);
    }

    /// A number that only goes up.
    pub fn counter(&mut self, name: &'static str, help: &'static str, value: u64) {
        self.add(name, help, MetricType::Counter, vec![(Vec::new(), value)]);
    }

    /// Numbers that only go up, by one label.
    pub fn counters<K: fmt::Display>(
        &mut self,
        name: &'static str,
        help: &'static str,
        label: &'static str,
        values: impl IntoIterator<Item = (K, u64)>,
    ) {
        let values = values.into_iter();
        let values = values.map(|(key, value)| (vec![(label, key.to_string())], value));
        self.add(name, help, MetricType::Counter, values.collect());
    }

    /// Certificates by what they are worth.
    pub fn certificates(&mut self, list: &[identity::CertificateInfo], now: SystemTime) {
        let mut states = BTreeMap::from([("available", 0), ("expired", 0), ("missing", 0)]);
        for info in list {
            let state = match &info.held {
                Some((_, _, until)) if *until > now => "available",
                Some(_) => "expired",
                None => "missing",
            };
            *states.entry(state).or_default() += 1;
        }
        let values = states.into_iter();
        let values = values.map(|(state, count)| (vec![("state", state.to_owned())], count));
        let help = "Certificates of this node's identities";
        self.add("undercurrent_certificates", help, MetricType::Gauge, values.collect());
        let soonest = list.iter().filter_map(|info| Some(info.held.as_ref()?.2)).min();
        if let Some(soonest) = soonest {
            let help = "When the first certificate ends, in seconds since 1970";
            self.gauge(
                "undercurrent_certificate_expiry_timestamp_seconds",
                help,
                super::source::seconds(soonest),
            );
        }
    }

    /// With the connections' counters and the process's, to be written.
    pub fn registry(self, metrics: Metrics) -> Registry {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(metrics));
        registry.register_collector(Box::new(self));
        registry.register_collector(Box::new(Process));
        registry
    }
}

impl Collector for Gathered {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in &self.0 {
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, family.kind)?;
            if let [(labels, value)] = family.values.as_slice()
                && labels.is_empty()
            {
                write(*value, family.kind, metric)?;
                continue;
            }
            for (labels, value) in &family.values {
                write(*value, family.kind, metric.encode_family(labels)?)?;
            }
        }
        Ok(())
    }
}

fn write(value: u64, kind: MetricType, metric: MetricEncoder<'_>) -> fmt::Result {
    match kind {
        MetricType::Counter => ConstCounter::new(value).encode(metric),
        _ => ConstGauge::new(value).encode(metric),
    }
}
