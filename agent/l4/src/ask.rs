//! Knowledge on demand: who lacks some asks for it and waits for the news, for a while.
//!
//! What is asked for is said anew with every snapshot, since an answer may name what is to be asked for next: the service
//! that was dialled its waypoint. Nothing is asked for twice by one connection.

use std::time::Duration;

use mesh::Wanted;

use crate::connection::Connection;

/// Looks until there is an outcome, asking for what each look says is lacking; none after the time that a connection may
/// wait for the control plane (`Config::discovery_timeout`).
pub(crate) async fn until_known<T>(connection: &Connection, look: impl FnMut() -> Result<T, Vec<Wanted>>) -> Option<T> {
    until_known_within(connection, connection.shard.config.discovery_timeout, look).await
}

/// The same, with a time of its own.
pub(crate) async fn until_known_within<T>(
    connection: &Connection,
    within: Duration,
    mut look: impl FnMut() -> Result<T, Vec<Wanted>>,
) -> Option<T> {
    let knowledge = &connection.shard.knowledge;
    let mut changed = knowledge.changed();
    changed.mark_unchanged();
    // Boxed: few connections wait, and all would have room for it.
    let waiting = Box::pin(async {
        let mut asked = Vec::new();
        loop {
            let lacking = match look() {
                Ok(outcome) => return outcome,
                Err(lacking) => lacking,
            };
            for wanted in lacking {
                if !asked.contains(&wanted) {
                    asked.push(wanted.clone());
                    knowledge.want(wanted).await;
                }
            }
            if changed.changed().await.is_err() {
                // The writer is gone: nobody answers, and the wait ends by time.
                std::future::pending::<()>().await;
            }
        }
    });
    tokio::time::timeout(within, waiting).await.ok()
}
