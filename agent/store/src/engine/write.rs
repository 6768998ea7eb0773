//! Creation and change, with the rules of kube-apiserver that hold for every kind.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::{
    ApiError, Cause, Key, Object, Part, Written, delete, metadata, metadata_of, names, text, transaction::Transaction,
};
use crate::{
    admission::{self, Request},
    kinds::{self, Kind},
    patch::{DEEPEST, depth},
};

/// The most bytes of an object: what a body may have. Patches could make more, one after the other.
const LARGEST: usize = 3 << 20;

/// How often another name is tried when a generated one is taken.
const NAMES_TRIED: usize = 8;

/// POST: the kind and namespace of the URL, and what the client sent.
pub(super) fn create(
    transaction: &mut Transaction<'_>,
    kind: &'static Kind,
    namespace: &str,
    mut value: Value,
) -> Result<Written, ApiError> {
    if !kind.is_stored() {
        return Err(ApiError::method_not_allowed(kind, "create"));
    }
    metadata::drop_nulls(&mut value);
    metadata::check_shape(kind, &value)?;
    kinds::to_storage(kind, &mut value);
    let kind = kind.stored();
    let given = text(&value, &["metadata", "namespace"]);
    if kind.namespaced && !given.is_empty() && given != namespace {
        let message = "the namespace of the provided object does not match the namespace sent on the request";
        return Err(ApiError::bad_request(message));
    }
    if !text(&value, &["metadata", "resourceVersion"]).is_empty() {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    let key = name(transaction, kind, namespace, &value)?;
    check_namespace(transaction, &key)?;
    if transaction.get(&key).is_some() {
        return Err(ApiError::already_exists(kind, &key.name));
    }
    stamp(transaction, &key, &mut value)?;
    let mut request = Request::new(transaction, &key, None);
    metadata::check(&value, &mut request.causes);
    request.causes.extend(names::check_name(kind, &key.name));
    admission::create(&mut request, &mut value)?;
    let warnings = request.finish()?;
    let object = put(transaction, &key, value)?;
    Ok(Written { object, warnings })
}

/// What is kept can be read back, and is no larger than what may be sent (`tests/hostile`:
/// `nothing_grows_or_nests_past_what_can_be_read_back`).
fn put(transaction: &mut Transaction<'_>, key: &Key, value: Value) -> Result<Arc<Object>, ApiError> {
    if depth(&value, DEEPEST) > DEEPEST {
        let cause = Cause::invalid("", "", format!("must not be nested deeper than {DEEPEST}"));
        return Err(ApiError::invalid(key.kind, &key.name, vec![cause]));
    }
    let object = transaction.put(key, value);
    if object.json.len() > LARGEST {
        return Err(ApiError::too_large(LARGEST));
    }
    Ok(object)
}

/// The object's name: given or made.
fn name(transaction: &Transaction<'_>, kind: &'static Kind, namespace: &str, value: &Value) -> Result<Key, ApiError> {
    let given = text(value, &["metadata", "name"]);
    if !given.is_empty() {
        return Ok(Key::new(kind, namespace, given));
    }
    let prefix = text(value, &["metadata", "generateName"]);
    if prefix.is_empty() {
        let cause = Cause::required("metadata.name", "name or generateName is required");
        return Err(ApiError::invalid(kind, "", vec![cause]));
    }
    let mut key = Key::new(kind, namespace, "");
    for _ in 0..NAMES_TRIED {
        key.name = metadata::generated_name(prefix)?.into();
        if transaction.get(&key).is_none() {
            break;
        }
    }
    Ok(key)
}

fn check_namespace(transaction: &Transaction<'_>, key: &Key) -> Result<(), ApiError> {
    if !key.kind.namespaced {
        return Ok(());
    }
    let Some(namespace) = transaction.namespace(&key.namespace) else {
        return Err(ApiError::not_found(super::known("", "namespaces"), &key.namespace));
    };
    if !namespace.value()["metadata"]["deletionTimestamp"].is_string() {
        return Ok(());
    }
    let namespace = &key.namespace;
    let why = format!("unable to create new content in namespace {namespace} because it is being terminated");
    let mut error = ApiError::forbidden(key.kind, &key.name, why);
    if let Some(details) = &mut error.details {
        details.causes.push(Cause {
            reason: "NamespaceTerminating",
            message: format!("namespace {namespace} is being terminated"),
            field: "metadata.namespace".to_owned(),
        });
    }
    Err(error)
}

/// What only the API says of an object.
fn stamp(transaction: &Transaction<'_>, key: &Key, value: &mut Value) -> Result<(), ApiError> {
    let uid = metadata::uid()?;
    // A node reports its status as it registers; all others begin with none.
    if key.kind.status_subresource && key.kind.plural != "nodes" {
        value.as_object_mut().map(|object| object.remove("status"));
    }
    let metadata = metadata_of(value);
    // As in Kubernetes: what was copied from an object that is being deleted begins a life of its own.
    for field in [
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
    ] {
        metadata.remove(field);
    }
    metadata.insert("name".to_owned(), (*key.name).into());
    metadata.remove("namespace");
    if key.kind.namespaced {
        metadata.insert("namespace".to_owned(), (*key.namespace).into());
    }
    metadata.insert("uid".to_owned(), uid.into());
    metadata.insert("creationTimestamp".to_owned(), transaction.now.as_str().into());
    if metadata::has_generation(key.kind) {
        metadata.insert("generation".to_owned(), 1.into());
    }
    metadata::tidy(metadata);
    Ok(())
}

/// PUT and PATCH, of the object or of its status.
pub(super) fn change(
    transaction: &mut Transaction<'_>,
    key: &Key,
    part: Part,
    change: &mut (dyn FnMut(&Value) -> Result<Value, ApiError> + Send),
) -> Result<Written, ApiError> {
    let kind = key.kind;
    let missing = || ApiError::not_found(kind, &key.name);
    let live_object = transaction.get(key).ok_or_else(missing)?;
    let live = live_object.value();
    let mut new = change(&live)?;
    metadata::drop_nulls(&mut new);
    metadata::check_shape(kind, &new)?;
    kinds::to_storage(kind, &mut new);
    let given = text(&new, &["metadata", "resourceVersion"]);
    if !given.is_empty() && given != live_object.revision.to_string() {
        return Err(ApiError::modified(kind, &key.name));
    }
    let mut request = Request::new(transaction, key, Some(&live));
    metadata::carry_over(kind, &live, &mut new, &mut request.causes)?;
    keep_other_part(kind, part, &live, &mut new)?;
    metadata::check(&new, &mut request.causes);
    admission::update(&mut request, part, &mut new)?;
    let warnings = request.finish()?;
    if metadata::has_generation(kind) && metadata::is_of_the_spec(&live, &new) {
        let generation = live["metadata"]["generation"].as_i64().unwrap_or(0) + 1;
        new["metadata"]["generation"] = generation.into();
    }
    if !metadata::differ(&live, &new) {
        return Ok(Written {
            object: live_object,
            warnings,
        });
    }
    let object = if delete::is_through(kind, &new) {
        transaction.remove(key, new)
    } else {
        put(transaction, key, new)?
    };
    Ok(Written { object, warnings })
}

/// A write of one part leaves the other as it is.
fn keep_other_part(kind: &'static Kind, part: Part, live: &Value, new: &mut Value) -> Result<(), ApiError> {
    let put = |object: &mut Map<String, Value>, field: &str, value: &Value| {
        match value {
            Value::Null => object.remove(field),
            value => object.insert(field.to_owned(), value.clone()),
        };
    };
    match part {
        Part::Main => {
            if let Some(object) = new.as_object_mut().filter(|_| kind.status_subresource) {
                put(object, "status", &live["status"]);
            }
        }
        Part::Status if kind.status_subresource => {
            let mut kept = live.clone();
            if let Some(object) = kept.as_object_mut() {
                put(object, "status", &new["status"]);
            }
            // Of a built-in kind's metadata the status subresource takes annotations: Istio's node agent annotates
            // pods that way. Of a custom resource's it takes nothing.
            let fields: &[&str] = match crate::schema::is_custom(kind) {
                true => &["managedFields"],
                false => &["managedFields", "annotations"],
            };
            for field in fields {
                put(metadata_of(&mut kept), field, &new["metadata"][*field]);
            }
            *new = kept;
        }
        Part::Status => return Err(ApiError::no_such_resource()),
    }
    Ok(())
}
