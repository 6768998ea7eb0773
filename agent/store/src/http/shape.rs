//! Objects in other shapes than whole: metadata alone, and tables.

use serde_json::{Value, json};

use super::query::IncludeObject;
use crate::kinds::Kind;

/// `PartialObjectMetadata` of an object.
pub fn metadata(mut object: Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"].take(),
    })
}

/// A table of these objects; with the revision, if it is of one object.
pub fn table(kind: &'static Kind, objects: &[Value], include: IncludeObject, revision: Option<u64>) -> Value {
    let _ = (kind, include);
    let rows: Vec<Value> = objects
        .iter()
        .map(|object| {
            json!({"cells": [object["metadata"]["name"], object["metadata"]["creationTimestamp"]],
                "object": metadata(object.clone())})
        })
        .collect();
    let mut metadata = json!({});
    if let Some(revision) = revision {
        metadata["resourceVersion"] = revision.to_string().into();
    }
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": [
            {"name": "Name", "type": "string", "format": "name", "description": "", "priority": 0},
            {"name": "Created At", "type": "date", "format": "", "description": "", "priority": 0},
        ],
        "rows": rows,
    })
}
