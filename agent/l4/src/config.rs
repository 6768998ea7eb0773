//! What can be set, with what is right where nothing is said.

use std::{num::NonZeroUsize, sync::Arc, time::Duration};

use crate::lookup::{Lookup, NoLookup};

/// The proxy's settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Shards: threads, each with tunnels and streams of its own; 16, whatever the number of cores. Pods that share none
    /// do not hold each other up, since the kernel shares the processors out between threads.
    pub shards: usize,
    /// On how many shards a pod is: one per core and two at most. The second gives 30 % more bulk and nothing in requests
    /// (PERFORMANCE.md), and one pod should not take all of the node's cores by the proxy.
    pub shards_per_pod: usize,
    /// Makes the thread that calls it urgent, or usual again; false if it can't. Shards are urgent while they do little
    /// ([`tasks::urgency`]). Without it, none ever is.
    pub set_urgent: Option<fn(bool) -> bool>,
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
    /// How long a connection waits where what is known here may be behind: until it is known of a destination that takes no
    /// tunnel that it has left the mesh (then it is dialled as it is now), or enough of this pod to judge who comes by a
    /// tunnel. 1 s, which is what a client waits longer whose destination has no agent.
    pub second_look: Duration,
    /// Half-open HBONE handshakes per pod and shard; when there are more, the oldest of the source with the most is
    /// dropped.
    pub half_open: usize,
    /// Who knows the addresses of workloads that have only a name; by default nobody does, and they are refused.
    pub lookup: Arc<dyn Lookup>,
    /// Where connections are counted.
    pub metrics: telemetry::Metrics,
    /// How often a shard that counts connections looks for what expired among [`Config::metrics`], scraped or not. 60 s.
    pub sweep: Duration,
}

impl Default for Config {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            shards: 16,
            shards_per_pod: cores.min(2),
            set_urgent: None,
            hbone: hbone::Config::default(),
            connect_timeout: Duration::from_secs(10),
            credentials_timeout: Duration::from_secs(5),
            discovery_timeout: Duration::from_secs(5),
            attempts: 3,
            dns: crate::dns::Config::default(),
            patience: Duration::from_secs(2),
            second_look: Duration::from_secs(1),
            half_open: 256,
            lookup: Arc::new(NoLookup),
            metrics: telemetry::Metrics::default(),
            sweep: Duration::from_secs(60),
        }
    }
}
