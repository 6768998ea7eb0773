//! Strategic merge patch: a merge patch that knows which lists are keyed.
//!
//! ```text
//! map:   $patch: replace | delete | merge      $retainKeys: [..]        field: null removes it
//! list:  {$patch: delete, KEY: ..}  {$patch: replace}                   else merged by key, or as a set
//!        $setElementOrder/FIELD: [..]          $deleteFromPrimitiveList/FIELD: [..]
//! ```
//! The form is that of `k8s.io/apimachinery/pkg/util/strategicpatch`, see
//! <https://github.com/kubernetes/community/blob/main/contributors/devel/sig-api-machinery/strategic-merge-patch.md>.
//!
//! Invariants:
//! - The documented cases give the documented results (`tests`).
//! - A patch made from two objects turns the one into the other (`a_difference_is_applied`).
//! - Any JSON at all is refused or applied, without a panic (`any_json_is_merged_or_refused`).
//!
//! Deviation: fields that the descriptions do not know merge as in a merge patch instead of being refused.

mod list;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value};

use crate::{
    engine::ApiError,
    kinds::Kind,
    schema::{self, Field, Shape, Type, document},
};

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE: &str = "$deleteFromPrimitiveList/";

/// An object changed by a strategic merge patch.
///
/// Errors: 415 for kinds that a cluster knows from CustomResourceDefinitions, 400 for directives that make no sense,
/// 422 for elements without their key.
pub fn strategic(kind: &Kind, live: &Value, patch: &Value) -> Result<Value, ApiError> {
    if schema::is_custom(kind) {
        return Err(ApiError::unsupported_media_type(
            "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
        ));
    }
    let Value::Object(patch) = patch else {
        return Err(ApiError::bad_request("error decoding patch: an object is expected"));
    };
    let nothing = Map::new();
    let at = schema::root(kind).map_or(At::Unknown, At::Struct);
    merge_map(at, live.as_object().unwrap_or(&nothing), patch).map(Value::Object)
}

/// What the descriptions say of a value.
#[derive(Clone, Copy)]
enum At {
    Struct(&'static Type),
    Map(&'static Shape),
    Unknown,
}

impl At {
    fn of(shape: &'static Shape) -> Self {
        match shape {
            Shape::Struct(at) => document().types.get(*at).map_or(Self::Unknown, Self::Struct),
            Shape::Map(element) => Self::Map(element),
            _ => Self::Unknown,
        }
    }

    fn field(self, name: &str) -> Option<&'static Field> {
        match self {
            Self::Struct(type_) => type_.fields.get(name),
            _ => None,
        }
    }

    fn below(self, name: &str) -> Self {
        match self {
            Self::Struct(type_) => type_
                .fields
                .get(name)
                .map_or(Self::Unknown, |field| Self::of(&field.shape)),
            Self::Map(shape) => Self::of(shape),
            Self::Unknown => Self::Unknown,
        }
    }
}

fn merge_map(at: At, live: &Map<String, Value>, patch: &Map<String, Value>) -> Result<Map<String, Value>, ApiError> {
    let nothing = Map::new();
    let live = match patch.get(PATCH).map(|directive| directive.as_str().unwrap_or_default()) {
        None | Some("merge") => live,
        Some("replace") => &nothing,
        Some("delete") => return Ok(nothing),
        Some(_) => return Err(unknown_directive(patch)),
    };
    let mut merged = live.clone();
    retain(&mut merged, patch)?;
    for name in names(patch) {
        let value = patch.get(name);
        if value.is_some_and(Value::is_null) {
            merged.remove(name);
            continue;
        }
        let is_list = value.is_none_or(Value::is_array);
        let changed = match at.field(name).filter(|field| field.merge && is_list) {
            Some(field) => {
                let directive = |prefix: &str| patch.get(&format!("{prefix}{name}"));
                let change = list::Change::read(value, directive(ORDER), directive(DELETE))?;
                list::merge(field, live.get(name), &change)?
            }
            None => match value {
                None => continue,
                Some(Value::Object(patch)) => {
                    let live = live.get(name).and_then(Value::as_object);
                    Value::Object(merge_map(at.below(name), live.unwrap_or(&nothing), patch)?)
                }
                Some(value) => value.clone(),
            },
        };
        // A directive for a list that is not there makes none.
        if value.is_some() || live.contains_key(name) {
            merged.insert(name.to_owned(), changed);
        }
    }
    Ok(merged)
}

/// The fields that a patch is about, by themselves or by a directive.
fn names(patch: &Map<String, Value>) -> impl Iterator<Item = &str> {
    let named = patch.keys().filter(|name| *name != PATCH && *name != RETAIN_KEYS);
    named.filter_map(
        |name| match name.strip_prefix(ORDER).or_else(|| name.strip_prefix(DELETE)) {
            // Seen with the field itself, or with the other directive.
            Some(field) if patch.contains_key(field) => None,
            Some(field) if name.starts_with(DELETE) && patch.contains_key(&format!("{ORDER}{field}")) => None,
            Some(field) => Some(field),
            None => Some(name.as_str()),
        },
    )
}

/// Drops what `$retainKeys` does not list.
fn retain(merged: &mut Map<String, Value>, patch: &Map<String, Value>) -> Result<(), ApiError> {
    let Some(keys) = patch.get(RETAIN_KEYS) else {
        return Ok(());
    };
    let bad =
        || ApiError::bad_request("invalid patch format of retainKeys: a list that names every field of the patch");
    let keys = keys.as_array().ok_or_else(bad)?;
    let listed = |name: &str| keys.iter().any(|key| key.as_str() == Some(name));
    let set = patch
        .iter()
        .filter(|(name, value)| !name.starts_with('$') && !value.is_null());
    if keys.iter().any(|key| !key.is_string()) || !set.map(|(name, _)| name).all(|name| listed(name)) {
        return Err(bad());
    }
    merged.retain(|name, _| listed(name));
    Ok(())
}

fn unknown_directive(patch: &Map<String, Value>) -> ApiError {
    let directive = patch.get(PATCH).unwrap_or(&Value::Null);
    let map = Value::Object(patch.clone());
    ApiError::bad_request(format!("unknown patch type: {directive} in map: {map}"))
}
