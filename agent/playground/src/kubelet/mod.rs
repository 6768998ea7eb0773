//! `kubelet` (hidden): runs the pods of one node as Kubernetes' kubelet does, from the node's network namespace and in a
//! cgroup of its own, which is what proves its probes to the mesh.
//!
//! ```text
//! desired/*.json ─> one thread per pod: sandbox ─> agent captures ─> init containers ─> containers ⇄ probes ─> status.json
//! ```
//! It never reads manifests and knows no other node. A pod's containers never start before the agent answered that the
//! pod is captured, or is not to be. When it ends, its pods go on; the next one starts them anew.

pub(crate) use self::container::pod_environment;

mod cni;
mod container;
mod pod;
mod probe;
mod sandbox;

use std::{collections::BTreeMap, sync::atomic::Ordering, thread::sleep, time::Duration};

use anyhow::Result;

use self::pod::{Node, Worker};
use crate::desired::{Desired, KubeletArgs};

const TICK: Duration = Duration::from_millis(100);

/// Runs `kubelet`; ends only by a signal.
pub(crate) fn run(args: &KubeletArgs) -> Result<()> {
    let node = Node::new(args)?;
    node.sweep()?;
    let mut workers: BTreeMap<String, Worker> = BTreeMap::new();
    loop {
        let desired = Desired::read_all(&node.layout);
        for (id, worker) in &workers {
            let keep = desired
                .get(id)
                .is_some_and(|desired| !desired.needs_restart(&worker.desired));
            if !keep {
                worker.stop.store(true, Ordering::Relaxed);
            }
        }
        workers.retain(|_, worker| !worker.is_finished());
        node.forget(|id| !desired.contains_key(id) && !workers.contains_key(id));
        for (id, desired) in desired {
            workers.entry(id).or_insert_with(|| Worker::start(&node, desired));
        }
        sleep(TICK);
    }
}
