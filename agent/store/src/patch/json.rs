//! JSON patch (RFC 6902) and merge patch (RFC 7386), bounded.
//!
//! Invariants: a patch can't grow an object without end, nor nest it deeper than can be read back
//! (`a_patch_cannot_grow_or_nest_without_end`); a patch that fails leaves nothing behind, since the live object is not
//! touched.

use json_patch::{Patch, PatchErrorKind, PatchOperation};
use serde_json::Value;

use crate::engine::ApiError;

/// Operations in one patch, as in Kubernetes.
const MOST_OPERATIONS: usize = 10_000;
/// JSON that `copy` may add in one patch.
const MOST_COPIED: usize = 3 << 20;
/// Deeper than any object, and well under what a reader takes.
pub(crate) const DEEPEST: usize = 100;

/// An object changed by a JSON patch.
///
/// Errors: 400 for what is no patch, 413 for too many operations, 422 for one that can't be done, or a `test` that
/// fails.
pub fn json(live: &Value, patch: &Value) -> Result<Value, ApiError> {
    let patch: Patch = serde_json::from_value(patch.clone())
        .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}")))?;
    if patch.0.len() > MOST_OPERATIONS {
        let message = format!(
            "Request entity too large: The allowed maximum operations in a JSON patch is {MOST_OPERATIONS}, got {}",
            patch.0.len()
        );
        return Err(ApiError {
            message,
            ..ApiError::too_large(0)
        });
    }
    let mut changed = live.clone();
    let mut left = MOST_COPIED;
    for operation in patch.0 {
        if let PatchOperation::Copy(copy) = &operation {
            let source = copy.from.resolve(&changed).ok();
            left = source
                .map_or(Some(left), |source| left.checked_sub(size(source, left)))
                .ok_or_else(|| impossible("the copies of this patch are too large"))?;
        }
        if tests_for_nothing(&changed, &operation) {
            continue;
        }
        let path = operation.path().to_buf();
        json_patch::patch_unsafe(&mut changed, std::slice::from_ref(&operation))
            .map_err(|error| impossible(failure(&operation, &error.kind)))?;
        let nested = path.resolve(&changed).map_or(0, |value| depth(value, DEEPEST));
        if path.count() + nested > DEEPEST {
            return Err(impossible("the object would be nested too deeply"));
        }
    }
    Ok(changed)
}

/// A field that is not there is null, to a `test`: against RFC 6902, but as in the API server, and clients rely on it.
fn tests_for_nothing(value: &Value, operation: &PatchOperation) -> bool {
    match operation {
        PatchOperation::Test(test) => test.value.is_null() && test.path.resolve(value).is_err(),
        _ => false,
    }
}

/// An object changed by a merge patch: what is there replaces, `null` removes.
///
/// Errors: 400 for what is no object.
pub fn merge(live: &Value, patch: &Value) -> Result<Value, ApiError> {
    if !patch.is_object() {
        return Err(ApiError::bad_request("error decoding patch: an object is expected"));
    }
    let mut changed = live.clone();
    json_patch::merge(&mut changed, patch);
    Ok(changed)
}

/// 422, in the API server's words and with the reason that it keeps to itself.
pub(super) fn impossible(why: impl std::fmt::Display) -> ApiError {
    ApiError {
        code: 422,
        reason: "Invalid",
        ..ApiError::bad_request(format!(
            "the server rejected our request due to an error in our request: {why}"
        ))
    }
}

/// Why an operation can't be done, in the words of the API server's library.
fn failure(operation: &PatchOperation, kind: &PatchErrorKind) -> String {
    let path = operation.path();
    let name = match operation {
        PatchOperation::Add(_) => "add",
        PatchOperation::Remove(_) => "remove",
        PatchOperation::Replace(_) => "replace",
        PatchOperation::Move(_) => "move",
        PatchOperation::Copy(_) => "copy",
        PatchOperation::Test(_) => "test",
    };
    match kind {
        PatchErrorKind::TestFailed => format!("testing value {path} failed: test failed"),
        PatchErrorKind::InvalidPointer => {
            format!("{name} operation does not apply: doc is missing path: {path}: missing value")
        }
        other => format!("{name} operation does not apply: {other}: {path}"),
    }
}

/// Roughly the length of a value's text; counting ends above `enough`.
fn size(value: &Value, enough: usize) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(list) => list.iter().fold(2, |sum, value| match sum > enough {
            true => sum,
            false => sum + 1 + size(value, enough),
        }),
        Value::Object(map) => map.iter().fold(2, |sum, (name, value)| match sum > enough {
            true => sum,
            false => sum + name.len() + 4 + size(value, enough),
        }),
        _ => 8,
    }
}

/// How deeply a value is nested; `limit + 1` for anything deeper.
pub(crate) fn depth(value: &Value, limit: usize) -> usize {
    if limit == 0 {
        return 1;
    }
    let below = |value| depth(value, limit - 1);
    match value {
        Value::Array(list) => 1 + list.iter().map(below).max().unwrap_or(0),
        Value::Object(map) => 1 + map.values().map(below).max().unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_patch_is_applied() {
        let live = json!({"spec": {"replicas": 1, "list": [1, 2]}});
        let patch = json!([
            {"op": "test", "path": "/spec/replicas", "value": 1},
            {"op": "test", "path": "/spec/nothing/there", "value": null},
            {"op": "replace", "path": "/spec/replicas", "value": 2},
            {"op": "remove", "path": "/spec/list/0"},
            {"op": "add", "path": "/spec/list/-", "value": 3},
        ]);
        let expected = json!({"spec": {"replicas": 2, "list": [2, 3]}});
        assert_eq!(super::json(&live, &patch).unwrap(), expected);
        let merged = merge(&live, &json!({"spec": {"replicas": null, "x": {"y": null}}})).unwrap();
        assert_eq!(merged, json!({"spec": {"list": [1, 2], "x": {}}}));
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_a_reason() {
        let live = json!({"spec": {"replicas": 1}});
        let refused = |patch: Value| super::json(&live, &patch).unwrap_err();
        assert_eq!(refused(json!({"op": "add"})).code, 400);
        assert_eq!(refused(json!([{"op": "jump", "path": "/a"}])).code, 400);
        let failed = refused(json!([{"op": "test", "path": "/spec/replicas", "value": 2}]));
        assert_eq!((failed.code, failed.reason), (422, "Invalid"));
        assert_eq!(
            failed.message,
            "the server rejected our request due to an error in our request: testing value /spec/replicas failed: test failed"
        );
        assert_eq!(refused(json!([{"op": "remove", "path": "/nowhere"}])).code, 422);
        assert_eq!(
            refused(json!([{"op": "replace", "path": "/spec/x/y", "value": 1}])).code,
            422
        );
        assert_eq!(merge(&live, &json!([1])).unwrap_err().code, 400);
        let many = Value::Array(vec![json!({"op": "test", "path": "", "value": 1}); MOST_OPERATIONS + 1]);
        assert_eq!(refused(many).code, 413);
    }

    #[test]
    fn a_patch_cannot_grow_or_nest_without_end() {
        let live = json!({"x": {"text": "0123456789".repeat(100)}, "y": {}});
        let doubling: Vec<Value> = (0..40)
            .map(|at| json!({"op": "copy", "from": "/x", "path": format!("/x/c{at}")}))
            .collect();
        assert_eq!(json(&live, &Value::Array(doubling)).unwrap_err().code, 422);
        let mut nesting = Vec::new();
        for _ in 0..200 {
            nesting.push(json!({"op": "add", "path": "/z", "value": {}}));
            nesting.push(json!({"op": "move", "from": "/y", "path": "/z/y"}));
            nesting.push(json!({"op": "move", "from": "/z", "path": "/y"}));
        }
        assert_eq!(json(&live, &Value::Array(nesting)).unwrap_err().code, 422);
    }
}
