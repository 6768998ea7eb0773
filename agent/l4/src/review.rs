//! Looks at the tunnels to others, and at what is remembered of endpoints, whenever knowledge changes.
//!
//! A tunnel to a workload that is gone, that is another by now or that takes no new connections takes no more streams;
//! those that it has go on (`tunnels_are_not_reused_for_another_pod_at_the_address`,
//! `a_pod_that_takes_no_new_connections_gets_none_and_keeps_those_it_has`). The other end says the same by a GOAWAY, which
//! may come sooner or later. A shard without connections and tunnels sleeps, whatever changes.

use std::{rc::Rc, time::Instant};

use hbone::{Standing, TunnelKey};
use mesh::Snapshot;
use model::{HealthStatus, TunnelProtocol};

use crate::shard::Shard;

/// Waits for changes and looks, for as long as the shard lives.
pub(crate) async fn run(shard: Rc<Shard>) {
    let mut changed = shard.knowledge.changed();
    loop {
        if shard.has_no_tunnels() {
            shard.first_connection().await;
        }
        if changed.changed().await.is_err() {
            return;
        }
        for pod in shard.all_pods() {
            let snapshot = shard.knowledge.snapshot();
            pod.pool.review(|key| standing(&snapshot, key));
            // One pod in one go: the shard's connections come between.
            tokio::task::yield_now().await;
        }
        shard.experience.forget(Instant::now());
    }
}

/// How it stands with the workload that a tunnel leads to.
fn standing(snapshot: &Snapshot, key: &TunnelKey) -> Standing {
    let Some(workload) = snapshot.workload(&key.workload) else {
        return Standing::Gone;
    };
    // Where it has only a name, its addresses are not the mesh's to say.
    let is_elsewhere = !workload.workload_ips.is_empty() && !workload.workload_ips.contains(&key.address.ip());
    let is_other = workload.protocol != TunnelProtocol::Hbone || !key.destination.contains(&workload.identity());
    match workload.status {
        _ if is_elsewhere || is_other => Standing::Gone,
        HealthStatus::Unhealthy => Standing::Leaving,
        HealthStatus::Healthy => Standing::Good,
    }
}
