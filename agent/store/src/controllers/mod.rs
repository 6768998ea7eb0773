//! What the API does by itself, as kube-controller-manager does for a cluster.
//!
//! ```text
//! bootstrap   once, before anybody is served: namespaces, their accounts, Service default/kubernetes
//! garbage     every kind: what its owners left behind, foreground and orphaning deletion
//! namespaces  terminating ones are emptied, then gone
//! accounts    ServiceAccount `default` and ConfigMap `kube-root-ca.crt` in each namespace
//! expiry      Events are dropped after an hour, and beyond a number
//! ```
//! Each is a reconciler: it compares what is with what should be, is woken by changes and by a timer, and may be run at
//! any time, any number of times. None makes pods, replicas or endpoints.
//!
//! Invariants (`tests/controllers.rs`): what has lost its last owner goes, circles too (`what_is_owned_goes_after_its_last_owner`,
//! `a_circle_of_owners_goes_all_the_same`); an orphan stays (`orphans_stay_without_their_owner`); a namespace goes when it is
//! empty, not before, and says what it waits for (`a_namespace_goes_when_it_is_empty`).
//!
//! Failure: logged, and tried again at the next change or tick. Tasks are owned by [`Controllers`] and end with it; each
//! write is one transaction, so that nothing is left half done.

mod accounts;
mod bootstrap;
mod expiry;
mod garbage;
mod namespaces;
mod owners;

use std::time::Duration;

use tokio::{sync::watch, task::JoinSet};

pub use bootstrap::bootstrap;

use crate::engine::Engine;

/// How often reconcilers look without being woken.
const TICK: Duration = Duration::from_secs(30);

/// The running reconcilers. They end when this is dropped.
pub struct Controllers {
    tasks: JoinSet<()>,
}

impl Controllers {
    /// Starts them; needs a tokio runtime. `ca_pem` is what `kube-root-ca.crt` holds.
    pub fn start(engine: &Engine, ca_pem: String) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(garbage::run(engine.clone()));
        tasks.spawn(namespaces::run(engine.clone()));
        tasks.spawn(accounts::run(engine.clone(), Some(ca_pem)));
        tasks.spawn(expiry::run(engine.clone()));
        Self { tasks }
    }

    /// Ends them.
    pub async fn stop(mut self) {
        self.tasks.shutdown().await;
    }
}

/// Waits for a change or a tick.
async fn woken(changes: &mut watch::Receiver<u64>) {
    tokio::select! {
        changed = changes.changed() => {
            if changed.is_err() {
                // Nothing will ever change again.
                std::future::pending::<()>().await;
            }
        }
        () = tokio::time::sleep(TICK) => {}
    }
}
