//! Server-side apply, and the ownership that every other write leaves behind.
//!
//! ```text
//! apply:   live + applied ─merge─► without what was given up ─compare with live─► conflicts? ─► owners, time
//! update:  before, after ─compare─► what changed is the writer's, and nobody else's
//! ```
//! See <https://kubernetes.io/docs/reference/using-api/server-side-apply/>.
//!
//! Invariants:
//! - Applying the same twice changes nothing, the time included (`applying_twice_is_applying_once`).
//! - After an apply its manager owns exactly what it applied (`a_manager_owns_what_it_applied`).
//! - Managers of different fields do not disturb each other (`disjoint_appliers_commute`).
//! - Any JSON at all is refused or taken, without a panic (`any_json_is_applied_or_refused`).
//!
//! Deviations: a field applied as `null` is not applied (Kubernetes owns it, empty); a field that the descriptions do
//! not know is kept and owned instead of refused: `schema::unknown_fields` is for that; what admission fills in
//! belongs to nobody.

#[cfg(test)]
mod laws;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{
    Manager,
    fields::FieldSet,
    managed::{Entry, Managers, Operation},
    typed::{self, Comparison},
};
use crate::{
    engine::{ApiError, Cause},
    kinds::Kind,
    schema::Node,
};

const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Fields that are nobody's: what names an object and what the server writes.
const NOBODYS: &[&[&str]] = &[
    &["f:apiVersion"],
    &["f:kind"],
    &["f:metadata"],
    &["f:metadata", "f:name"],
    &["f:metadata", "f:namespace"],
    &["f:metadata", "f:creationTimestamp"],
    &["f:metadata", "f:selfLink"],
    &["f:metadata", "f:uid"],
    &["f:metadata", "f:clusterName"],
    &["f:metadata", "f:generation"],
    &["f:metadata", "f:managedFields"],
    &["f:metadata", "f:resourceVersion"],
];

fn nobodys() -> FieldSet {
    let mut set = FieldSet::default();
    for path in NOBODYS {
        set.unite(&FieldSet::path(path));
    }
    set
}

/// The object after a manager applied its configuration: created if there is no live one. Equal to the live one if
/// nothing changed.
///
/// Errors: 409 with the other managers' fields, unless `force` takes them; 400 for a configuration that can't be
/// merged.
pub fn apply(
    kind: &Kind,
    live: Option<&Value>,
    applied: &Value,
    manager: &Manager<'_>,
    force: bool,
) -> Result<Value, ApiError> {
    let node = Node::of_kind(kind);
    let applied = taken(kind, node, applied, manager)?;
    let nothing = Value::Object(Map::new());
    let before = without_managers(live.unwrap_or(&nothing));
    let known = live.map(Managers::read).unwrap_or_default();
    let mut managers = known.clone();
    if live.is_some() && managers.0.is_empty() {
        managers.set(before_first_apply(node, &before, manager));
    }

    let mut entry = Entry::new(manager, Operation::Apply);
    let last = managers.find(&entry).cloned();
    entry.fields = typed::field_set(node, &applied);
    managers.set(entry.clone());
    let merged = typed::merge(node, &before, &applied);
    let mut after = match &last {
        Some(last) => prune(node, merged, &managers, &last.fields),
        None => merged,
    };

    let mut comparison = typed::compare(node, Some(&before), Some(&after));
    comparison.forget(&nobodys());
    let conflicts = conflicts(&mut managers, &entry, &comparison);
    if !conflicts.is_empty() && !force && !last_applied_allows(node, manager, &before, &conflicts) {
        return Err(refusal(&conflicts));
    }
    take(&mut managers, &entry, &comparison);
    if manager.name == "kubectl" {
        renew_last_applied(&before, &applied, &mut after);
    }

    entry.fields = entry.fields.difference(&nobodys());
    if let Some(last) = last.filter(|last| last.fields == entry.fields && before == after) {
        entry.time = last.time;
    }
    managers.set(entry);
    managers.settle();
    managers.write(&mut after);
    Ok(after)
}

/// `after`, with the ownership that a plain create, update or patch leaves: what differs from `before` is the
/// manager's, and nobody else's. Not for server-side apply.
///
/// A client may write `managedFields` itself; `[{}]` drops them all.
pub fn update_managed(kind: &Kind, before: Option<&Value>, after: &Value, manager: &Manager<'_>) -> Value {
    let node = Node::of_kind(kind);
    let nothing = Value::Object(Map::new());
    let known = before.map(Managers::read).unwrap_or_default();
    let sent = after.pointer("/metadata/managedFields").and_then(Value::as_array);
    let dropped =
        sent.is_some_and(|sent| sent.len() == 1 && sent.iter().all(|e| e.as_object().is_some_and(Map::is_empty)));
    let mut managers = Managers::read(after);
    if managers.0.is_empty() && !dropped {
        managers = known;
    }
    let before = before.map(without_managers);
    let mut after = without_managers(after);

    let mut comparison = typed::compare(node, Some(before.as_ref().unwrap_or(&nothing)), Some(&after));
    comparison.forget(&nobodys());
    let comparison = of_part(kind, comparison, manager.subresource);
    let mut entry = Entry::new(manager, Operation::Update);
    take(&mut managers, &entry, &comparison);
    if let Some(mine) = managers.find(&entry) {
        entry.fields = mine.fields.clone();
        if comparison == Comparison::default() {
            entry.time.clone_from(&mine.time);
        }
    }
    entry.fields = entry.fields.difference(&comparison.removed);
    entry.fields.unite(&comparison.modified);
    entry.fields.unite(&comparison.added);
    managers.set(entry);
    managers.settle();
    managers.write(&mut after);
    after
}

/// Only what a write to the object or to its subresource is about.
fn of_part(kind: &Kind, comparison: Comparison, subresource: &str) -> Comparison {
    if subresource == "status" {
        return comparison.without(&["f:spec"]);
    }
    if kind.status_subresource {
        return comparison.without(&["f:status"]);
    }
    comparison
}

/// The configuration as it is applied: checked, without nulls, and without the part that is not written here.
fn taken(kind: &Kind, node: Node, applied: &Value, manager: &Manager<'_>) -> Result<Value, ApiError> {
    let Value::Object(object) = applied else {
        return Err(ApiError::bad_request("error decoding patch: an object is expected"));
    };
    let managed = applied.pointer("/metadata/managedFields");
    if managed.is_some_and(|managed| managed.as_array().is_none_or(|list| !list.is_empty()) && !managed.is_null()) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let mut object = object.clone();
    if manager.subresource == "status" {
        object.remove("spec");
    } else if kind.status_subresource {
        object.remove("status");
    }
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    let applied = without_nulls(Value::Object(object));
    if let Some(why) = typed::unmergeable(node, "", &applied) {
        let text = |path: &str| applied.pointer(path).and_then(Value::as_str).unwrap_or_default();
        let message = format!(
            "failed to create typed patch object ({}/{}; {}, Kind={}): {why}",
            text("/metadata/namespace"),
            text("/metadata/name"),
            text("/apiVersion"),
            text("/kind"),
        );
        return Err(ApiError::bad_request(message));
    }
    Ok(applied)
}

fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => {
            let kept = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        Value::Array(list) => Value::Array(list.into_iter().map(without_nulls).collect()),
        value => value,
    }
}

fn without_managers(object: &Value) -> Value {
    let mut object = object.clone();
    if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    object
}

/// The owner of all that was there before anybody applied.
fn before_first_apply(node: Node, before: &Value, manager: &Manager<'_>) -> Entry {
    let unknown = Manager {
        name: "before-first-apply",
        ..*manager
    };
    let mut entry = Entry::new(&unknown, Operation::Update);
    entry.fields = typed::field_set(node, before).difference(&nobodys());
    entry
}

/// Without what the manager applied last and now gives up, unless somebody else owns it.
fn prune(node: Node, merged: Value, managers: &Managers, last: &FieldSet) -> Value {
    let mut managed = FieldSet::default();
    for entry in &managers.0 {
        managed.unite(&entry.fields);
    }
    let kept = typed::with_named_fields(node, &managed);
    let mut given_up = typed::with_named_fields(node, last).difference(&kept);
    given_up.own = false;
    // What names the object stays, whoever owned it.
    let given_up = given_up.difference(&nobodys());
    typed::remove(node, &merged, &given_up).unwrap_or(merged)
}

/// Other managers' fields that the write changes.
fn conflicts(managers: &mut Managers, entry: &Entry, comparison: &Comparison) -> Vec<(Entry, FieldSet)> {
    let mut changed = comparison.modified.clone();
    changed.unite(&comparison.added);
    let others = managers
        .others(entry)
        .map(|other| (other.clone(), other.fields.intersection(&changed)));
    others.filter(|(_, fields)| !fields.is_empty()).collect()
}

/// Takes what the write changes or removes from everybody else.
fn take(managers: &mut Managers, entry: &Entry, comparison: &Comparison) {
    for other in managers.others(entry) {
        for changed in [&comparison.modified, &comparison.added, &comparison.removed] {
            other.fields = other.fields.difference(changed);
        }
    }
}

/// `kubectl apply --server-side` after `kubectl apply`: what conflicts was applied by the same person, and is as it
/// was applied then.
fn last_applied_allows(node: Node, manager: &Manager<'_>, before: &Value, conflicts: &[(Entry, FieldSet)]) -> bool {
    if manager.name != "kubectl" {
        return false;
    }
    let Some(last) = last_applied(before) else { return false };
    let mut allowed = typed::field_set(node, &last);
    let changed_since = typed::compare(node, Some(&last), Some(before));
    allowed = allowed
        .difference(&changed_since.modified)
        .difference(&changed_since.removed);
    conflicts
        .iter()
        .all(|(_, fields)| fields.difference(&allowed).is_empty())
}

fn last_applied(object: &Value) -> Option<Value> {
    let text = object.get("metadata")?.get("annotations")?.get(LAST_APPLIED)?;
    serde_json::from_str(text.as_str()?).ok()
}

/// An object that `kubectl apply` began to manage keeps its annotation true for a later client-side apply.
fn renew_last_applied(before: &Value, applied: &Value, after: &mut Value) {
    if last_applied(before).is_none() || last_applied(after).is_none() {
        return;
    }
    if let Some(Value::Object(annotations)) = after.pointer_mut("/metadata/annotations") {
        annotations.insert(LAST_APPLIED.to_owned(), Value::from(format!("{applied}\n")));
    }
}

fn refusal(conflicts: &[(Entry, FieldSet)]) -> ApiError {
    let mut by_manager: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (entry, fields) in conflicts {
        by_manager.entry(entry.spoken()).or_default().extend(fields.paths());
    }
    let cause = |manager: &String, path: &String| Cause {
        reason: "FieldManagerConflict",
        message: format!("conflict with {manager}"),
        field: path.clone(),
    };
    let causes = by_manager
        .iter()
        .flat_map(|(manager, paths)| paths.iter().map(move |path| cause(manager, path)));
    let causes: Vec<Cause> = causes.collect();
    let message = match causes.as_slice() {
        [one] => format!("Apply failed with 1 conflict: {}: {}", one.message, one.field),
        all => {
            let of = |(manager, paths): (&String, &Vec<String>)| {
                format!("conflicts with {manager}:\n- {}", paths.join("\n- "))
            };
            let managers: Vec<String> = by_manager.iter().map(of).collect();
            format!("Apply failed with {} conflicts: {}", all.len(), managers.join("\n"))
        }
    };
    ApiError::apply_conflict(message, causes)
}
