//! Namespaces: `Active`, with the label that selectors go by, and the finalizer that the controller takes off.

use serde_json::{Value, json};

use super::{
    Request,
    fields::{object, text},
};

const NAME_LABEL: &str = "kubernetes.io/metadata.name";

pub(super) fn create(request: &mut Request<'_, '_>, value: &mut Value) {
    label(request, value);
    if let Some(spec) = object(value, &["spec"]) {
        spec.insert("finalizers".to_owned(), json!(["kubernetes"]));
    }
    if let Some(status) = object(value, &["status"]) {
        status.insert("phase".to_owned(), "Active".into());
    }
}

pub(super) fn update(request: &mut Request<'_, '_>, value: &mut Value) {
    label(request, value);
    // Only through its own subresource, which here nobody but the controller needs.
    let before = request
        .live
        .map_or(Value::Null, |live| live["spec"]["finalizers"].clone());
    if let Some(spec) = object(value, &["spec"]) {
        match before {
            Value::Null => spec.remove("finalizers"),
            before => spec.insert("finalizers".to_owned(), before),
        };
    }
}

fn label(request: &Request<'_, '_>, value: &mut Value) {
    if let Some(labels) = object(value, &["metadata", "labels"])
        && text(labels, NAME_LABEL) != &*request.key.name
    {
        labels.insert(NAME_LABEL.to_owned(), (*request.key.name).into());
    }
}
