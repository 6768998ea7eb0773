//! `create`, `update`, `patch`, `delete`, `deletecollection`.
//!
//! ```text
//! body ─► form (kind, name, unknown fields) ─► storage version ─► managedFields ─► engine (admission, revision, disk)
//! ```
//! An answer says that the write is durable. What several write at once is decided by the engine, which calls back with
//! the current state: a patch is never computed on an old one.

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::{
    answer::{self, Answer, shown_value, success},
    call::{Call, read},
    dispatch::Api,
    form,
    read::{namespace, one, selected},
};
use crate::{
    engine::{ApiError, Cause, DeleteOptions, Deleted, Key, Part, Written},
    kinds::{from_storage, to_storage},
    patch::{self, Manager},
    schema,
};

/// How often an apply goes back and forth between "it is not there" and "it is there already" until it gives up.
const MOST_TRIES: usize = 5;
/// The patches of every kind, and of those that Kubernetes itself defines.
const PATCHES: &str = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml";
const PATCHES_OF_BUILT_IN: &str = "application/json-patch+json, application/merge-patch+json, \
                                   application/strategic-merge-patch+json, application/apply-patch+yaml";

/// `POST` to a collection.
pub async fn create(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let mut value = call.object()?;
    let warnings = form::check(call, &mut value)?;
    let resource = &call.resource;
    to_storage(resource.kind, &mut value);
    let api_version = resource.kind.api_version(resource.version);
    let value = patch::update_managed(resource.kind, None, &value, &manager(call, &api_version));
    let made = api
        .engine
        .create(resource.kind.stored(), &resource.namespace, value, call.query.dry_run)
        .await?;
    written(call, 201, made, warnings)
}

/// `PUT` to an object, or to its `status`.
pub async fn update(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let mut value = call.object()?;
    let warnings = form::check(call, &mut value)?;
    let resource = &call.resource;
    to_storage(resource.kind, &mut value);
    let api_version = resource.kind.api_version(resource.version);
    let mut change = |live: &Value| {
        Ok(patch::update_managed(
            resource.kind,
            Some(live),
            &value,
            &manager(call, &api_version),
        ))
    };
    let done = api
        .engine
        .change(&key(call), part(call), call.query.dry_run, &mut change)
        .await?;
    written(call, 200, done, warnings)
}

/// `PATCH`, of whichever type.
pub async fn patch(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    if call.media_type == "application/apply-patch+yaml" {
        return apply(api, call).await;
    }
    let resource = &call.resource;
    let kind = resource.kind;
    let strategic = match call.media_type.as_str() {
        "application/json-patch+json" | "application/merge-patch+json" => false,
        "application/strategic-merge-patch+json" if !schema::is_custom(kind) => true,
        _ if schema::is_custom(kind) => return Err(ApiError::unsupported_media_type(PATCHES)),
        _ => return Err(ApiError::unsupported_media_type(PATCHES_OF_BUILT_IN)),
    };
    let json_patch = call.media_type == "application/json-patch+json";
    let sent: Value = serde_json::from_slice(&call.body)
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    let mut warnings = Vec::new();
    let api_version = kind.api_version(resource.version);
    let mut change = |live: &Value| {
        let mut before = live.clone();
        from_storage(kind, resource.version, &mut before);
        let mut after = if strategic {
            patch::strategic(kind, &before, &sent)?
        } else if json_patch {
            patch::json(&before, &sent)?
        } else {
            patch::merge(&before, &sent)?
        };
        warnings = form::check_patched(call, &before, &mut after)?;
        to_storage(kind, &mut after);
        Ok(patch::update_managed(
            kind,
            Some(live),
            &after,
            &manager(call, &api_version),
        ))
    };
    let done = api
        .engine
        .change(&key(call), part(call), call.query.dry_run, &mut change)
        .await?;
    written(call, 200, done, warnings)
}

/// Server-side apply: makes the object if it is not there.
async fn apply(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let resource = &call.resource;
    let kind = resource.kind;
    if call.query.manager.is_empty() {
        let cause = Cause::required("fieldManager", "is required for apply patch");
        let message = format!("PatchOptions.meta.k8s.io \"\" is invalid: {cause}");
        let mut error = ApiError::invalid(kind, &resource.name, vec![cause]);
        error.message = message;
        return Err(error);
    }
    let mut applied = read(&call.body, false)?;
    let warnings = form::check(call, &mut applied)?;
    to_storage(kind, &mut applied);
    let api_version = kind.api_version(resource.version);
    for _ in 0..MOST_TRIES {
        let mut change = |live: &Value| {
            patch::apply(
                kind,
                Some(live),
                &applied,
                &manager(call, &api_version),
                call.query.force,
            )
        };
        match api
            .engine
            .change(&key(call), part(call), call.query.dry_run, &mut change)
            .await
        {
            Err(error) if error.code == 404 && call.resource.subresource.is_empty() => {}
            done => return written(call, 200, done?, warnings),
        }
        if let Some(uid) = applied.pointer("/metadata/uid") {
            let why =
                format!("uid mismatch: the provided object specified uid {uid}, and no existing object was found");
            return Err(ApiError::conflict(kind, &resource.name, why));
        }
        let value = patch::apply(kind, None, &applied, &manager(call, &api_version), call.query.force)?;
        match api
            .engine
            .create(kind.stored(), &resource.namespace, value, call.query.dry_run)
            .await
        {
            Err(error) if error.reason == "AlreadyExists" => {}
            made => return written(call, 201, made?, warnings),
        }
    }
    Err(ApiError::conflict(
        kind,
        &resource.name,
        "it is made and deleted by others all the time",
    ))
}

/// `DELETE` of an object.
pub async fn delete(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let options = delete_options(call)?;
    let deleted = api.engine.delete(&key(call), options).await?;
    let kind = call.resource.kind;
    // A pod that goes at once is shown, too: it is what its node still has to end.
    if matches!(deleted, Deleted::Pending(_)) || (kind.group.is_empty() && kind.plural == "pods") {
        return one(call, 200, deleted.object());
    }
    let object = deleted.object().value();
    let uid = object
        .pointer("/metadata/uid")
        .and_then(Value::as_str)
        .unwrap_or_default();
    Ok(answer::value(
        200,
        call.accepted.format,
        &success(kind, &call.resource.name, uid),
    ))
}

/// `DELETE` of all that is selected.
pub async fn delete_collection(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let kind = call.resource.kind;
    let (revision, objects) = api.engine.list(kind.stored(), namespace(call));
    let options = delete_options(call)?;
    let mut items = Vec::new();
    for object in objects.iter().filter(|object| selected(call, object)) {
        match api.engine.delete(&object.key, options.clone()).await {
            Ok(deleted) => items.push(shown_value(deleted.object(), kind, call.resource.version)),
            // Somebody else was faster.
            Err(error) if error.code == 404 => {}
            Err(error) => return Err(error),
        }
    }
    let list = json!({
        "kind": format!("{}List", kind.kind), "apiVersion": kind.api_version(call.resource.version),
        "metadata": {"resourceVersion": revision.to_string()}, "items": items,
    });
    Ok(answer::value(200, call.accepted.format, &list))
}

/// What a deletion is to heed: the body, if there is one, else the query.
pub fn delete_options(call: &Call) -> Result<DeleteOptions, ApiError> {
    let mut options: DeleteOptions = if call.body.is_empty() {
        DeleteOptions::default()
    } else {
        serde_json::from_value(call.object()?)
            .map_err(|error| ApiError::bad_request(format!("error decoding DeleteOptions: {error}")))?
    };
    options.grace_period_seconds = options.grace_period_seconds.or(call.query.grace_period);
    options.propagation_policy = options.propagation_policy.or(call.query.propagation);
    if call.query.dry_run {
        options.dry_run = vec!["All".to_owned()];
    }
    match options.dry_run.iter().find(|one| *one != "All") {
        Some(other) => Err(ApiError::bad_request(format!(
            "dryRun: Unsupported value: {other:?}: supported values: \"All\""
        ))),
        None => Ok(options),
    }
}

/// The key of the object that a request names.
pub fn key(call: &Call) -> Key {
    Key::new(call.resource.kind, &call.resource.namespace, &call.resource.name)
}

fn part(call: &Call) -> Part {
    if call.resource.subresource == "status" {
        Part::Status
    } else {
        Part::Main
    }
}

/// Who owns what a request writes.
pub fn manager<'a>(call: &'a Call, api_version: &'a str) -> Manager<'a> {
    Manager {
        name: call.manager(),
        api_version,
        subresource: if call.resource.subresource == "status" {
            "status"
        } else {
            ""
        },
        now: OffsetDateTime::now_utc(),
    }
}

/// A write's answer, with everything to warn of.
pub fn written(call: &Call, code: u16, written: Written, mut warnings: Vec<String>) -> Result<Answer, ApiError> {
    let mut answer = one(call, code, &written.object)?;
    warnings.extend(written.warnings);
    answer::warn(&mut answer, &warnings);
    Ok(answer)
}
