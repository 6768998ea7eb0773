//! Deletion: at once, or when finalizers, a kubelet or a namespace's content are through.
//!
//! ```text
//!  no finalizers, no grace ──────────────────────────────► gone
//!  finalizers          ──► deletionTimestamp ─ last one taken off ─► gone
//!  a pod on a node     ──► deletionTimestamp + grace ─ the kubelet deletes with grace 0 ─► gone
//!  a namespace         ──► deletionTimestamp, Terminating ─ `controllers` empty it ─► gone
//! ```

use std::sync::Arc;

use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};

use super::{
    ApiError, DeleteOptions, Deleted, Key, Object, Propagation, Written, metadata, metadata_of, text, timestamp,
    transaction::Transaction,
};
use crate::kinds::Kind;

/// Taken off when the dependents are deleted.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Taken off when the dependents have that owner no more.
pub(crate) const ORPHAN: &str = "orphan";
/// These hold what a cluster needs.
const KEPT_NAMESPACES: &[&str] = &["default", "kube-system", "kube-public"];
const DEFAULT_GRACE: i64 = 30;

impl DeleteOptions {
    pub(super) fn is_dry_run(&self) -> bool {
        self.dry_run.iter().any(|stage| stage == "All")
    }

    fn propagation(&self) -> Result<Option<Propagation>, ApiError> {
        match (self.orphan_dependents, self.propagation_policy) {
            (Some(_), Some(_)) => {
                let message = "orphanDependents and deletionPropagation cannot be both set";
                Err(ApiError::bad_request(message))
            }
            (Some(true), None) => Ok(Some(Propagation::Orphan)),
            (Some(false), None) => Ok(Some(Propagation::Background)),
            (None, policy) => Ok(policy),
        }
    }
}

/// DELETE.
pub(super) fn delete(
    transaction: &mut Transaction<'_>,
    key: &Key,
    options: &DeleteOptions,
) -> Result<Deleted, ApiError> {
    let missing = || ApiError::not_found(key.kind, &key.name);
    let live = transaction.get(key).ok_or_else(missing)?;
    let mut value = live.value();
    check_preconditions(&live, &value, options)?;
    let is_kept = key.kind.group.is_empty() && key.kind.plural == "namespaces";
    if is_kept && KEPT_NAMESPACES.contains(&&*key.name) {
        return Err(ApiError::forbidden(
            key.kind,
            &key.name,
            "this namespace may not be deleted",
        ));
    }
    set_finalizers(&mut value, options.propagation()?);
    let grace = grace(key.kind, &value, options);
    let was_going = value["metadata"]["deletionTimestamp"].is_string();
    let shorter = value["metadata"]["deletionGracePeriodSeconds"]
        .as_i64()
        .is_none_or(|before| grace < before);
    if !was_going || shorter {
        let end = OffsetDateTime::now_utc() + Duration::seconds(grace);
        let metadata = metadata_of(&mut value);
        metadata.insert("deletionTimestamp".to_owned(), timestamp(end).into());
        metadata.insert("deletionGracePeriodSeconds".to_owned(), grace.into());
        if let Some(generation) = metadata
            .get("generation")
            .and_then(Value::as_i64)
            .filter(|_| !was_going)
        {
            metadata.insert("generation".to_owned(), (generation + 1).into());
        }
    }
    if is_kept {
        value["status"]["phase"] = json!("Terminating");
    }
    if is_through(key.kind, &value) {
        // Kubernetes shows an object that goes at once as it was.
        return Ok(Deleted::Gone(
            transaction.remove(key, if was_going { value } else { live.value() }),
        ));
    }
    if !metadata::differ(&live.value(), &value) {
        return Ok(Deleted::Pending(live));
    }
    Ok(Deleted::Pending(transaction.put(key, value)))
}

/// Several at once; those that are gone meanwhile are passed over.
pub(super) fn delete_all(
    transaction: &mut Transaction<'_>,
    objects: &[Arc<Object>],
    options: &DeleteOptions,
) -> Result<Vec<Arc<Object>>, ApiError> {
    let mut deleted = Vec::with_capacity(objects.len());
    for object in objects {
        match delete(transaction, &object.key, options) {
            Ok(done) => deleted.push(done.object().clone()),
            Err(error) if error.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    Ok(deleted)
}

/// `namespaces/NAME/finalize`: other finalizers in a namespace's `spec`; without the last one that is going, goes.
pub(super) fn finalize(
    transaction: &mut Transaction<'_>,
    key: &Key,
    revision: &str,
    finalizers: &[String],
) -> Result<Written, ApiError> {
    let missing = || ApiError::not_found(key.kind, &key.name);
    let live = transaction.get(key).ok_or_else(missing)?;
    if !revision.is_empty() && revision != live.revision.to_string() {
        return Err(ApiError::modified(key.kind, &key.name));
    }
    let mut value = live.value();
    if finalizers.is_empty() {
        value["spec"] = json!({});
    } else {
        value["spec"] = json!({"finalizers": finalizers});
    }
    let object = if is_through(key.kind, &value) {
        transaction.remove(key, value)
    } else if metadata::differ(&live.value(), &value) {
        transaction.put(key, value)
    } else {
        live
    };
    let warnings = Vec::new();
    Ok(Written { object, warnings })
}

/// Whether nothing stands between an object that is being deleted and its end.
pub(super) fn is_through(kind: &Kind, value: &Value) -> bool {
    let metadata = &value["metadata"];
    let has = |list: &Value| list.as_array().is_some_and(|items| !items.is_empty());
    let is_namespace = kind.group.is_empty() && kind.plural == "namespaces";
    metadata["deletionTimestamp"].is_string()
        && !has(&metadata["finalizers"])
        && metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
        && !(is_namespace && has(&value["spec"]["finalizers"]))
}

fn check_preconditions(live: &Object, value: &Value, options: &DeleteOptions) -> Result<(), ApiError> {
    let Some(preconditions) = &options.preconditions else {
        return Ok(());
    };
    let Key { kind, name, .. } = &live.key;
    let uid = text(value, &["metadata", "uid"]);
    if let Some(wanted) = preconditions.uid.as_deref().filter(|wanted| *wanted != uid) {
        let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}");
        return Err(ApiError::conflict(kind, name, why));
    }
    let revision = live.revision.to_string();
    if let Some(wanted) = preconditions
        .resource_version
        .as_deref()
        .filter(|wanted| *wanted != revision)
    {
        let why = format!(
            "the ResourceVersion in the precondition ({wanted}) does not match the ResourceVersion in record \
             ({revision}). The object might have been modified"
        );
        return Err(ApiError::conflict(kind, name, why));
    }
    Ok(())
}

/// The collector's own finalizers, by what shall become of the dependents. Without a word they stay as they are.
fn set_finalizers(value: &mut Value, propagation: Option<Propagation>) {
    let Some(propagation) = propagation else {
        return;
    };
    let before = metadata::strings(&value["metadata"]["finalizers"]);
    let own = |finalizer: &&str| *finalizer != FOREGROUND && *finalizer != ORPHAN;
    let mut finalizers: Vec<Value> = before.into_iter().filter(own).map(Value::from).collect();
    match propagation {
        Propagation::Foreground => finalizers.push(FOREGROUND.into()),
        Propagation::Orphan => finalizers.push(ORPHAN.into()),
        Propagation::Background => {}
    }
    let metadata = metadata_of(value);
    if finalizers.is_empty() {
        metadata.remove("finalizers");
    } else {
        metadata.insert("finalizers".to_owned(), finalizers.into());
    }
}

/// Only a pod on a node has something to do before it ends.
fn grace(kind: &Kind, value: &Value, options: &DeleteOptions) -> i64 {
    let ended = matches!(text(value, &["status", "phase"]), "Failed" | "Succeeded");
    let is_pod = kind.group.is_empty() && kind.plural == "pods";
    if !is_pod || ended || text(value, &["spec", "nodeName"]).is_empty() {
        return 0;
    }
    let own = || {
        value["spec"]["terminationGracePeriodSeconds"]
            .as_i64()
            .unwrap_or(DEFAULT_GRACE)
    };
    // As in Kubernetes: less than nothing is nearly nothing.
    let asked = options.grace_period_seconds.unwrap_or_else(own);
    // A year is as good as for ever, and dates stay dates.
    if asked < 0 { 1 } else { asked.min(366 * 24 * 3600) }
}
