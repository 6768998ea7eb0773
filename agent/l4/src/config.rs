//! What can be set, with what is right where nothing is said.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use crate::lookup::{Lookup, NoLookup};

/// The proxy's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Shards: threads, each with tunnels and streams of its own. The default is one per core and two at most. The
    /// second gives 30 % more bulk and nothing in requests (PERFORMANCE.md), and a proxy that every pod of a node
    /// shares should not take the node's other cores unasked.
    pub shards: usize,
    /// How tunnels are framed, pooled and kept alive.
    pub hbone: hbone::Config,
    /// How long the application may take to accept a connection; ztunnel's 10 s.
    pub connect_timeout: Duration,
    /// How long a connection may wait for its pod's certificate before it is refused.
    pub credentials_timeout: Duration,
    /// On demand: how long a connection may wait for the control plane to say what its destination is, before it is
    /// refused.
    pub discovery_timeout: Duration,
    /// How many endpoints of a service are tried before the client notices. 3.
    pub attempts: usize,
    /// The pods' name server.
    pub dns: crate::dns::Config,
    /// How long an endpoint may take to be connected to before another one is tried beside it. 2 s: a lost SYN is sent
    /// again after 1 s.
    pub patience: Duration,
    /// Half-open HBONE handshakes per pod and shard; when there are more, the oldest of the source with the most is
    /// dropped.
    pub half_open: usize,
    /// Who knows the addresses of workloads that have only a name; by default nobody does, and they are refused.
    pub lookup: Arc<dyn Lookup>,
    /// Where connections are counted.
    pub metrics: telemetry::Metrics,
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            shards: cores.min(2),
            hbone: hbone::Config::default(),
            connect_timeout: Duration::from_secs(10),
            credentials_timeout: Duration::from_secs(5),
            discovery_timeout: Duration::from_secs(5),
            attempts: 3,
            dns: crate::dns::Config::default(),
            patience: Duration::from_secs(2),
            half_open: 256,
            lookup: Arc::new(NoLookup),
            metrics: telemetry::Metrics::default(),
        }
    }
}
