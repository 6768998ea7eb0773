//! Events are notes, not state: they go after an hour, and the oldest go when there are too many.

use std::sync::Arc;

use time::{Duration, OffsetDateTime};

use super::woken;
use crate::engine::{ApiError, DeleteOptions, Engine, Object, known, text, timestamp};

/// As kube-apiserver's `--event-ttl`.
const KEPT_FOR: Duration = Duration::hours(1);
/// How many are kept; a quarter more may be there until they are swept.
const MOST: usize = 10_000;

pub(super) async fn run(engine: Engine) {
    let events = known("", "events");
    let mut changes = engine.watch_changes(events);
    let mut swept_at = OffsetDateTime::UNIX_EPOCH;
    loop {
        let now = OffsetDateTime::now_utc();
        // Woken at each event, but a sweep looks at all of them.
        if engine.count(events, None) > MOST + MOST / 4 || now - swept_at >= Duration::minutes(1) {
            swept_at = now;
            if let Err(error) = sweep(&engine, now, MOST).await {
                tracing::warn!("expiry of events: {error}");
            }
        }
        woken(&mut changes).await;
    }
}

/// Drops what is older than an hour at `now`, and the oldest beyond `most`.
pub(super) async fn sweep(engine: &Engine, now: OffsetDateTime, most: usize) -> Result<(), ApiError> {
    let (_, events) = engine.list(known("", "events"), None);
    let mut dated: Vec<(String, Arc<Object>)> = events.into_iter().map(|event| (last_seen(&event), event)).collect();
    dated.sort_by(|(one, _), (other, _)| one.cmp(other));
    let oldest = timestamp(now - KEPT_FOR);
    let expired = dated.partition_point(|(seen, _)| *seen < oldest);
    let drop = expired.max(dated.len().saturating_sub(most));
    let gone: Vec<Arc<Object>> = dated.into_iter().take(drop).map(|(_, event)| event).collect();
    engine
        .delete_collection(&gone, &DeleteOptions::default())
        .await
        .map(|_| ())
}

/// When an event was last written about; texts of this form sort like the times.
fn last_seen(event: &Object) -> String {
    let value = event.value();
    let made = text(&value, &["metadata", "creationTimestamp"]);
    let repeated = text(&value, &["lastTimestamp"]);
    let series = text(&value, &["series", "lastObservedTime"]);
    made.max(repeated).max(series).to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[tokio::test]
    async fn old_events_go_and_so_do_the_oldest_of_too_many() {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::open(directory.path()).unwrap();
        let namespace = json!({"metadata": {"name": "a"}});
        engine
            .create(known("", "namespaces"), "", namespace, false)
            .await
            .unwrap();
        let now = OffsetDateTime::now_utc();
        for index in 0..5 {
            let object = json!({"metadata": {"name": format!("e{index}")}, "involvedObject": {"namespace": "a"},
                "lastTimestamp": timestamp(now + Duration::minutes(index))});
            engine.create(known("", "events"), "a", object, false).await.unwrap();
        }
        let left = || {
            let (_, left) = engine.list(known("", "events"), None);
            left.iter().map(|event| event.key.name.to_string()).collect::<Vec<_>>()
        };
        sweep(&engine, now, 10).await.unwrap();
        assert_eq!(left().len(), 5);
        sweep(&engine, now, 4).await.unwrap();
        assert_eq!(left(), ["e1", "e2", "e3", "e4"]);
        sweep(&engine, now + Duration::minutes(63), 10).await.unwrap();
        assert_eq!(left(), ["e3", "e4"]);
    }
}
