//! The lists of a strategic merge patch.
//!
//! Order: what the patch names comes in the order of `$setElementOrder`, or else of the patch; what it does not name
//! keeps its place relative to its neighbours as far as that can be.

use serde_json::{Map, Value};

use super::{At, PATCH, merge_map, unknown_directive};
use crate::{
    engine::ApiError,
    patch::json::impossible,
    schema::{Field, Shape},
};

/// What a patch says of one list.
pub(super) struct Change<'a> {
    patch: &'a [Value],
    order: Option<&'a [Value]>,
    deleted: &'a [Value],
}

impl<'a> Change<'a> {
    /// From the field and its two directives.
    pub fn read(
        patch: Option<&'a Value>,
        order: Option<&'a Value>,
        deleted: Option<&'a Value>,
    ) -> Result<Self, ApiError> {
        let list = |value: Option<&'a Value>, what: &str| match value {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list.as_slice())),
            Some(_) => Err(ApiError::bad_request(format!(
                "invalid patch format of {what}: a list is expected"
            ))),
        };
        Ok(Self {
            patch: list(patch, "a list")?.unwrap_or_default(),
            order: list(order, "setElementOrder list")?,
            deleted: list(deleted, "primitive list")?.unwrap_or_default(),
        })
    }
}

/// The list after the change.
pub(super) fn merge(field: &'static Field, live: Option<&Value>, change: &Change<'_>) -> Result<Value, ApiError> {
    let live = live.and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    let merged = match field.merge_key {
        None => merge_scalars(live, change),
        Some(key) => {
            let element = match &field.shape {
                Shape::List(element) => At::of(element),
                _ => At::Unknown,
            };
            match merge_maps(key, element, live, change)? {
                Merged::Replaced(list) => return Ok(Value::Array(list)),
                Merged::Ordinary(list) => list,
            }
        }
    };
    let key = field.merge_key;
    let named: Vec<&Value> = keys(key, change.patch);
    let order = match change.order {
        Some(order) => {
            let order = keys(key, order);
            in_order(&named, &order)?;
            order
        }
        None => named,
    };
    Ok(Value::Array(ordered(key, merged, &order, &keys(key, live))))
}

fn merge_scalars(live: &[Value], change: &Change<'_>) -> Vec<Value> {
    let kept = live.iter().filter(|value| !change.deleted.contains(value));
    let mut merged: Vec<Value> = Vec::with_capacity(live.len() + change.patch.len());
    for value in kept.chain(change.patch) {
        if !merged.contains(value) {
            merged.push(value.clone());
        }
    }
    merged
}

enum Merged {
    /// `$patch: replace`: the patch's elements as they are.
    Replaced(Vec<Value>),
    Ordinary(Vec<Value>),
}

fn merge_maps(key: &str, element: At, live: &[Value], change: &Change<'_>) -> Result<Merged, ApiError> {
    let mut merged = live.to_vec();
    let mut replaced = false;
    let mut ordinary: Vec<(&Value, &Map<String, Value>)> = Vec::new();
    for value in change.patch {
        let Value::Object(map) = value else {
            let message = format!("invalid patch format of a list: {value} where an object with {key} is expected");
            return Err(ApiError::bad_request(message));
        };
        let named = map
            .get(key)
            .ok_or_else(|| impossible(format!("map: {value} does not contain declared merge key: {key}")));
        match map.get(PATCH).map(|directive| directive.as_str().unwrap_or_default()) {
            None | Some("merge") => ordinary.push((named?, map)),
            Some("replace") => replaced = true,
            Some("delete") => {
                let named = named?;
                merged.retain(|value| value.get(key) != Some(named));
            }
            Some(_) => return Err(unknown_directive(map)),
        }
    }
    if replaced {
        merged.clear();
    }
    for (named, map) in ordinary {
        let known = merged.iter_mut().find(|value| value.get(key) == Some(named));
        match known {
            Some(Value::Object(known)) => *known = merge_map(element, known, map)?,
            _ => merged.push(Value::Object(merge_map(element, &Map::new(), map)?)),
        }
    }
    Ok(if replaced {
        Merged::Replaced(merged)
    } else {
        Merged::Ordinary(merged)
    })
}

/// What tells the elements apart; elements of a patch that are gone afterwards are left out.
fn keys<'a>(key: Option<&str>, list: &'a [Value]) -> Vec<&'a Value> {
    let stays = |value: &&Value| {
        value
            .get(PATCH)
            .and_then(Value::as_str)
            .is_none_or(|directive| directive == "merge")
    };
    list.iter().filter(stays).map(|value| key_of(key, value)).collect()
}

fn key_of<'a>(key: Option<&str>, value: &'a Value) -> &'a Value {
    key.and_then(|key| value.get(key)).unwrap_or(value)
}

/// Refuses a patch whose elements are not listed by `$setElementOrder`, in that order.
fn in_order(named: &[&Value], order: &[&Value]) -> Result<(), ApiError> {
    let mut rest = order.iter();
    if named.iter().all(|key| rest.any(|listed| listed == key)) {
        return Ok(());
    }
    let text = |keys: &[&Value]| Value::Array(keys.iter().map(|key| (*key).clone()).collect()).to_string();
    Err(ApiError::bad_request(format!(
        "The order in patch list:\n{}\n doesn't match $setElementOrder list:\n{}\n",
        text(named),
        text(order)
    )))
}

/// The elements that `order` names in that order, the others between them as the live list had them.
fn ordered(key: Option<&str>, list: Vec<Value>, order: &[&Value], live: &[&Value]) -> Vec<Value> {
    let place = |among: &[&Value], value: &Value| among.iter().position(|listed| *listed == key_of(key, value));
    let (mut named, mut others): (Vec<Value>, Vec<Value>) =
        list.into_iter().partition(|value| place(order, value).is_some());
    named.sort_by_key(|value| place(order, value));
    others.sort_by_key(|value| place(live, value));
    let mut sorted = Vec::with_capacity(named.len() + others.len());
    let mut others = others.into_iter().peekable();
    for value in named {
        let here = place(live, &value);
        while let Some(other) = others.next_if(|other| here.is_some() && place(live, other) < here) {
            sorted.push(other);
        }
        sorted.push(value);
    }
    sorted.extend(others);
    sorted
}
