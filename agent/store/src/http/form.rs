//! Whether a body is an object of the kind and place that the URL names, and has only fields that the kind has.
//!
//! Not checked here: values; that is admission's. The words are those of Kubernetes, which kubectl prints.

use serde_json::Value;

use super::{call::Call, query::Validation, route::Resource};
use crate::{engine::ApiError, schema};

/// Checks a whole object, and fills in what the URL says anyway; the answer is what to warn of.
pub fn check(call: &Call, object: &mut Value) -> Result<Vec<String>, ApiError> {
    let resource = &call.resource;
    kind_of(resource, object)?;
    place(resource, object)?;
    if call.query.validation == Validation::Ignore {
        return Ok(Vec::new());
    }
    let mut wrong = schema::unknown_fields(resource.kind, object);
    if call.body.first() == Some(&b'{') {
        wrong.extend(schema::duplicate_fields(&call.body));
    }
    verdict(call, wrong)
}

/// Checks what a patch made of an object: what was wrong before is not the patch's fault.
pub fn check_patched(call: &Call, before: &Value, after: &mut Value) -> Result<Vec<String>, ApiError> {
    let resource = &call.resource;
    kind_of(resource, after)?;
    place(resource, after)?;
    if call.query.validation == Validation::Ignore {
        return Ok(Vec::new());
    }
    let old = schema::unknown_fields(resource.kind, before);
    let mut wrong = schema::unknown_fields(resource.kind, after);
    wrong.retain(|field| !old.contains(field));
    verdict(call, wrong)
}

fn verdict(call: &Call, wrong: Vec<String>) -> Result<Vec<String>, ApiError> {
    if wrong.is_empty() || call.query.validation != Validation::Strict {
        return Ok(wrong);
    }
    let (kind, version) = (call.resource.kind.kind, call.resource.version);
    Err(ApiError::bad_request(format!(
        "{kind} in version {version:?} cannot be handled as a {kind}: strict decoding error: {}",
        wrong.join(", ")
    )))
}

fn kind_of(resource: &Resource, object: &mut Value) -> Result<(), ApiError> {
    let kind = resource.kind;
    let expected = kind.api_version(resource.version);
    for (field, expected, what) in [
        ("apiVersion", expected.as_str(), "API version"),
        ("kind", kind.kind, "kind"),
    ] {
        let given = match &object[field] {
            Value::Null => "",
            Value::String(given) => given,
            _ => return Err(ApiError::bad_request(format!("{field} must be a string"))),
        };
        if !given.is_empty() && given != expected {
            return Err(ApiError::bad_request(format!(
                "the {what} in the data ({given}) does not match the expected {what} ({expected})"
            )));
        }
        object[field] = expected.into();
    }
    Ok(())
}

fn place(resource: &Resource, object: &mut Value) -> Result<(), ApiError> {
    if object["metadata"].is_null() {
        object["metadata"] = Value::Object(serde_json::Map::new());
    }
    let Some(metadata) = object["metadata"].as_object_mut() else {
        return Err(ApiError::bad_request("metadata must be a map"));
    };
    let given = |metadata: &serde_json::Map<String, Value>, field: &str| {
        metadata
            .get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (name, namespace) = (given(metadata, "name"), given(metadata, "namespace"));
    if !resource.name.is_empty() {
        if !name.is_empty() && name != resource.name {
            return Err(ApiError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({})",
                resource.name
            )));
        }
        metadata.insert("name".to_owned(), resource.name.as_str().into());
    }
    if resource.kind.namespaced {
        if !namespace.is_empty() && namespace != resource.namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        metadata.insert("namespace".to_owned(), resource.namespace.as_str().into());
    }
    Ok(())
}
