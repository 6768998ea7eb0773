//! The check that the webhook of a real cluster does: one place, one function, `k8s`'s own.
//!
//! What cannot be right is refused with its field. What is right, but is not acted upon here or only in part, is kept,
//! for it may be meant for somebody else; its author is told by a warning.

use k8s::{
    Effect, Finding, Problem,
    live::{Kind, validate},
};
use serde_json::Value;

use super::Request;
use crate::engine::Cause;

/// Looks at objects that the mesh reads.
pub(super) fn check(request: &mut Request<'_, '_>, value: &Value) {
    let own = request.key.kind;
    let is_read = |kind: &Kind| kind.group() == own.group && kind.name() == own.kind;
    let Some(kind) = Kind::ALL.into_iter().find(is_read) else {
        return;
    };
    // Nobody can do anything about an object that is on its way out.
    if value["metadata"]["deletionTimestamp"].is_string() {
        return;
    }
    for finding in validate(kind, value) {
        let Finding {
            field, problem, effect, ..
        } = finding;
        let is_beyond_us = matches!(problem, Problem::Unsupported(_) | Problem::NotActedUpon);
        // A policy with what nobody here can enforce is right all the same, and closes.
        let is_closing = effect == Effect::Closed && is_beyond_us;
        // What Kubernetes itself defines is not ours alone: others may act upon it.
        let is_others = own.group.is_empty() && is_beyond_us;
        if is_closing {
            request.warnings.push(format!(
                "{field}: {problem}; what the policy selects is closed until it is mended"
            ));
        } else if effect >= Effect::Refused && !is_others {
            let found = at(value, &field).cloned().unwrap_or(Value::Null);
            request.causes.push(Cause::invalid(field, found, problem));
        } else {
            request.warnings.push(format!("{field}: {problem}"));
        }
    }
}

/// The value at a path such as `spec.rules[0].from`.
fn at<'a>(value: &'a Value, path: &str) -> Option<&'a Value> {
    let parts = path.split(['.', '[', ']']).filter(|part| !part.is_empty());
    parts.into_iter().try_fold(value, |value, part| match value {
        Value::Array(items) => items.get(part.parse::<usize>().ok()?),
        value => value.get(part),
    })
}
