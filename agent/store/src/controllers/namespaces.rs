//! The end of a namespace: everything in it is deleted, and when nothing is left, it goes.
//!
//! No new object enters a terminating namespace (`engine::write`), so that "empty" stays true once it is.

use std::{collections::BTreeSet, sync::Arc};

use serde_json::{Value, json};

use super::woken;
use crate::{
    engine::{ApiError, DeleteOptions, Engine, Key, Object, Part, known, strings, text},
    kinds::{self, Keeping, Kind},
};

const FINALIZER: &str = "kubernetes";

pub(super) async fn run(engine: Engine) {
    let mut changes = engine.watch_changes(known("", "namespaces"));
    let mut revisions = engine.revisions();
    loop {
        let terminating = terminating(&engine);
        for namespace in &terminating {
            if let Err(error) = finish(&engine, namespace).await {
                tracing::warn!("end of namespace {}: {error}", namespace.name);
            }
        }
        if terminating.is_empty() {
            woken(&mut changes).await;
        } else {
            // Any deletion may have been the last.
            woken(&mut revisions).await;
        }
    }
}

fn terminating(engine: &Engine) -> Vec<Key> {
    let (_, namespaces) = engine.list(known("", "namespaces"), None);
    let is_going = |object: &Arc<Object>| object.value()["metadata"]["deletionTimestamp"].is_string();
    namespaces
        .into_iter()
        .filter(is_going)
        .map(|object| object.key.clone())
        .collect()
}

fn namespaced() -> impl Iterator<Item = &'static Kind> {
    kinds::ALL
        .iter()
        .filter(|kind| kind.namespaced && kind.keeping == Keeping::Stored)
}

/// Deletes what is in it, and the namespace when that was all.
async fn finish(engine: &Engine, namespace: &Key) -> Result<(), ApiError> {
    let mut left: Vec<Arc<Object>> = Vec::new();
    for kind in namespaced() {
        let (_, objects) = engine.list(kind, Some(&namespace.name));
        let is_new = |object: &&Arc<Object>| !object.value()["metadata"]["deletionTimestamp"].is_string();
        let new: Vec<Arc<Object>> = objects.iter().filter(is_new).cloned().collect();
        engine.delete_collection(&new, &DeleteOptions::default()).await?;
        left.extend(engine.list(kind, Some(&namespace.name)).1);
    }
    if !left.is_empty() {
        return tell(engine, namespace, &left).await;
    }
    let end = engine.write(false, |transaction| {
        let Some(live) = transaction.get(namespace) else {
            return Ok(());
        };
        let mut value = live.value();
        let finalizers = strings(&value["spec"]["finalizers"]);
        let others: Vec<Value> = finalizers
            .into_iter()
            .filter(|own| *own != FINALIZER)
            .map(Value::from)
            .collect();
        let held = !others.is_empty() || !strings(&value["metadata"]["finalizers"]).is_empty();
        if value["spec"]["finalizers"] == Value::from(others.clone()) {
            return Ok(());
        }
        value["spec"] = if others.is_empty() {
            json!({})
        } else {
            json!({"finalizers": others})
        };
        if held {
            transaction.put(namespace, value);
        } else {
            transaction.remove(namespace, value);
        }
        Ok(())
    });
    end.await
}

/// Says in the namespace's status what it waits for.
async fn tell(engine: &Engine, namespace: &Key, left: &[Arc<Object>]) -> Result<(), ApiError> {
    let mut held: Vec<String> = Vec::new();
    for object in left {
        let value = object.value();
        let finalizers = strings(&value["metadata"]["finalizers"]);
        held.extend(
            finalizers
                .into_iter()
                .map(|finalizer| format!("{} of {}", finalizer, object.key)),
        );
        if held.len() > 5 {
            held.push("others".to_owned());
            break;
        }
    }
    // Kinds, not numbers: these change with each object that goes, and the status shall not.
    let kinds: BTreeSet<String> = left.iter().map(|object| object.key.kind.resource()).collect();
    let kinds: Vec<String> = kinds.into_iter().collect();
    let remaining = format!("Some resources are remaining: {}", kinds.join(", "));
    let mut conditions = vec![("NamespaceContentRemaining", "SomeResourcesRemain", remaining)];
    if !held.is_empty() {
        conditions.push(("NamespaceFinalizersRemaining", "SomeFinalizersRemain", held.join(", ")));
    }
    let mut change = |live: &Value| {
        let mut new = live.clone();
        let before = live["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let told = |kind: &str, reason: &str, message: &str| {
            let was = before.iter().find(|was| was["type"] == kind);
            let since = was.map(|was| text(was, &["lastTransitionTime"]).to_owned());
            let since = since.unwrap_or_else(crate::engine::now);
            json!({"type": kind, "status": "True", "reason": reason, "message": message, "lastTransitionTime": since})
        };
        let list: Vec<Value> = conditions
            .iter()
            .map(|(kind, reason, message)| told(kind, reason, message))
            .collect();
        new["status"]["conditions"] = list.into();
        Ok(new)
    };
    match engine.change(namespace, Part::Status, false, &mut change).await {
        Err(error) if error.code != 404 => Err(error),
        _ => Ok(()),
    }
}
