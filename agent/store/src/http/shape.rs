//! Objects in other shapes than whole: metadata alone, and tables.

use serde_json::{Value, json};
use time::OffsetDateTime;

use super::query::IncludeObject;
use crate::{kinds::Kind, table};

/// `PartialObjectMetadata` of an object.
pub fn metadata(mut object: Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"].take(),
    })
}

/// A table of these objects; with the revision, if it is of one object.
pub fn table(kind: &'static Kind, objects: Vec<Value>, include: IncludeObject, revision: Option<u64>) -> Value {
    let now = OffsetDateTime::now_utc();
    let row = |object: Value| {
        let cells = table::row(kind, &object, now);
        let object = match include {
            IncludeObject::None => return json!({"cells": cells}),
            IncludeObject::Metadata => metadata(object),
            IncludeObject::Object => object,
        };
        json!({"cells": cells, "object": object})
    };
    let rows: Vec<Value> = objects.into_iter().map(row).collect();
    let mut metadata = json!({});
    if let Some(revision) = revision {
        metadata["resourceVersion"] = revision.to_string().into();
    }
    json!({
        "kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": metadata,
        "columnDefinitions": table::columns(kind), "rows": rows,
    })
}
