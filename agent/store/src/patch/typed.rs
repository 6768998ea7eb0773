//! Objects as trees of fields: which fields there are, what differs, how two objects merge.
//!
//! The algebra of `sigs.k8s.io/structured-merge-diff`, over JSON values and the descriptions in `schema`. Knows nothing
//! of managers.
//!
//! Deviation: a list whose elements can't be told apart (a key is missing, or there twice) counts as one value.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value};

use super::fields::{self, FieldSet};
use crate::schema::Node;

/// What differs between two objects.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Comparison {
    /// Fields that only the later one has.
    pub added: FieldSet,
    /// Fields with another value.
    pub modified: FieldSet,
    /// Fields that only the earlier one has.
    pub removed: FieldSet,
}

impl Comparison {
    /// Takes a subtree out of all three.
    pub fn without(self, elements: &[&str]) -> Self {
        Self {
            added: self.added.without(elements),
            modified: self.modified.without(elements),
            removed: self.removed.without(elements),
        }
    }

    /// Takes one place, but not what is below, out of all three.
    pub fn forget(&mut self, members: &FieldSet) {
        for set in [&mut self.added, &mut self.modified, &mut self.removed] {
            *set = set.difference(members);
        }
    }

    fn attach(&mut self, element: &str, below: Comparison) {
        self.added.attach(element.to_owned(), below.added);
        self.modified.attach(element.to_owned(), below.modified);
        self.removed.attach(element.to_owned(), below.removed);
    }
}

/// A list's elements by their path elements, in order; `None` if they can't be told apart.
pub(crate) fn elements(node: Node, list: &[Value]) -> Option<Vec<(String, &Value)>> {
    let mut seen = BTreeSet::new();
    let mut all = Vec::with_capacity(list.len());
    for value in list {
        let element = element(node, value)?;
        if !seen.insert(element.clone()) {
            return None;
        }
        all.push((element, value));
    }
    Some(all)
}

/// The path element of one value of a list.
pub(crate) fn element(node: Node, value: &Value) -> Option<String> {
    let is_scalar = |value: &Value| !value.is_object() && !value.is_array() && !value.is_null();
    match node {
        Node::Set => is_scalar(value).then(|| fields::value(value)),
        Node::Keyed(keys, _) => {
            let object = value.as_object()?;
            let mut found = BTreeMap::new();
            for key in keys {
                let value = object.get(*key).filter(|value| !value.is_null()).cloned();
                let value = value.or_else(|| node.default(key)).filter(is_scalar)?;
                found.insert(*key, value);
            }
            Some(fields::key(&found))
        }
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// The fields that an object has.
pub(crate) fn field_set(node: Node, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    match value {
        Value::Object(map) if node.splits_maps() => {
            for (name, value) in map {
                let mut below = field_set(node.field(name), value);
                let empty = value.is_null() || value.as_object().is_some_and(Map::is_empty);
                below.own |= empty || !node.knows(name);
                set.attach(fields::field(name), below);
            }
        }
        Value::Array(list) if node.splits_lists() => match elements(node, list) {
            Some(elements) => {
                for (element, value) in elements {
                    let mut below = field_set(node.element(), value);
                    below.own = true;
                    set.attach(element, below);
                }
            }
            None => set.own = true,
        },
        _ => set.own = true,
    }
    set
}

/// A part of two values: path element, what the descriptions say, before, after.
type Part<'a> = (String, Node, Option<&'a Value>, Option<&'a Value>);

/// The parts of two values, or `None` if they are compared as wholes.
fn parts<'a>(node: Node, before: Option<&'a Value>, after: Option<&'a Value>) -> Option<Vec<Part<'a>>> {
    let before = before.filter(|value| !value.is_null());
    let after = after.filter(|value| !value.is_null());
    if before.is_none_or(is_empty) && after.is_none_or(is_empty) {
        return None;
    }
    let is = |test: fn(&Value) -> bool| before.is_none_or(test) && after.is_none_or(test);
    if is(Value::is_object) && node.splits_maps() {
        let names = |value: Option<&'a Value>| value.and_then(Value::as_object).into_iter().flat_map(Map::keys);
        let names: BTreeSet<&String> = names(before).chain(names(after)).collect();
        let get = |value: Option<&'a Value>, name: &str| value.and_then(|value| value.get(name));
        let part = |name: &String| {
            (
                fields::field(name),
                node.field(name),
                get(before, name),
                get(after, name),
            )
        };
        return Some(names.into_iter().map(part).collect());
    }
    if is(Value::is_array) && node.splits_lists() {
        let list = |value: Option<&'a Value>| match value.and_then(Value::as_array) {
            Some(list) => elements(node, list).map(|all| all.into_iter().collect::<BTreeMap<_, _>>()),
            None => Some(BTreeMap::new()),
        };
        let (before, after) = (list(before)?, list(after)?);
        let all: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
        let part = |element: &String| {
            let of = |side: &BTreeMap<String, &'a Value>| side.get(element).copied();
            (element.clone(), node.element(), of(&before), of(&after))
        };
        return Some(all.into_iter().map(part).collect());
    }
    None
}

/// What differs between two values, either of which may be missing.
pub(crate) fn compare(node: Node, before: Option<&Value>, after: Option<&Value>) -> Comparison {
    let mut found = Comparison::default();
    if before == after {
        return found;
    }
    match parts(node, before, after) {
        None => found.modified.own = before.is_some() && after.is_some(),
        Some(parts) => {
            for (element, node, before, after) in parts {
                found.attach(&element, compare(node, before, after));
            }
        }
    }
    found.added.own = before.is_none();
    found.removed.own = after.is_none();
    found
}

/// One object over another: what the upper one says holds, the rest stays.
pub(crate) fn merge(node: Node, lower: &Value, upper: &Value) -> Value {
    match (lower, upper) {
        (Value::Object(lower), Value::Object(upper)) if node.splits_maps() => {
            let mut merged = lower.clone();
            for (name, value) in upper {
                let value = match lower.get(name) {
                    Some(lower) => merge(node.field(name), lower, value),
                    None => value.clone(),
                };
                merged.insert(name.clone(), value);
            }
            Value::Object(merged)
        }
        (Value::Array(lower), Value::Array(upper)) if node.splits_lists() => {
            match (elements(node, lower), elements(node, upper)) {
                (Some(lower), Some(upper)) => Value::Array(merge_lists(node, &lower, &upper)),
                _ => Value::Array(upper.clone()),
            }
        }
        _ => upper.clone(),
    }
}

/// Elements that both have come in the upper one's order; those of one only keep their place between their neighbours.
fn merge_lists(node: Node, lower: &[(String, &Value)], upper: &[(String, &Value)]) -> Vec<Value> {
    let in_lower: BTreeMap<&str, &Value> = lower.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let in_upper: BTreeSet<&str> = upper.iter().map(|(key, _)| key.as_str()).collect();
    let keys = upper.iter().map(|(key, _)| key.as_str());
    let mut shared = keys.filter(|key| in_lower.contains_key(key)).peekable();
    let (mut lower, mut upper) = (lower.iter().peekable(), upper.iter().peekable());
    let mut merged = Vec::with_capacity(in_lower.len() + in_upper.len());
    loop {
        let ours = lower.peek().map(|(key, _)| key.as_str());
        let theirs = upper.peek().map(|(key, _)| key.as_str());
        match (ours, theirs) {
            (None, None) => return merged,
            // Only in the lower one: here is its place.
            (Some(ours), _) if !in_upper.contains(ours) => {
                merged.extend(lower.next().map(|(_, value)| (*value).clone()))
            }
            // In both, but its turn was, or is later: the upper one says where.
            (Some(ours), theirs) if Some(ours) != theirs && shared.peek() != Some(&ours) => {
                lower.next();
            }
            (ours, _) => {
                let Some((key, value)) = upper.next() else {
                    lower.next();
                    continue;
                };
                merged.push(match in_lower.get(key.as_str()) {
                    Some(lower) => merge(node.element(), lower, value),
                    None => (*value).clone(),
                });
                shared.next_if_eq(&key.as_str());
                if ours == Some(key.as_str()) {
                    lower.next();
                }
            }
        }
    }
}

/// A value without the members of a set; `None` if nothing is left of what was something.
pub(crate) fn remove(node: Node, value: &Value, set: &FieldSet) -> Option<Value> {
    let kept = match value {
        Value::Object(map) if node.splits_maps() => {
            let kept = map.iter().filter_map(|(name, value)| {
                let left = part_left(node.field(name), value, set.below(&fields::field(name)))?;
                Some((name.clone(), left))
            });
            Value::Object(kept.collect())
        }
        Value::Array(list) if node.splits_lists() => {
            let kept = list.iter().filter_map(|value| {
                let below = element(node, value).and_then(|element| set.below(&element));
                part_left(node.element(), value, below)
            });
            Value::Array(kept.collect())
        }
        _ => return Some(value.clone()),
    };
    (!is_empty(&kept) || is_empty(value)).then_some(kept)
}

fn part_left(node: Node, value: &Value, set: Option<&FieldSet>) -> Option<Value> {
    match set {
        None => Some(value.clone()),
        Some(set) if set.own => None,
        Some(set) => remove(node, value, set),
    }
}

/// The set with every field on the way to a member a member too, where it is a field of a struct.
pub(crate) fn with_named_fields(node: Node, set: &FieldSet) -> FieldSet {
    let mut named = FieldSet {
        own: set.own,
        children: BTreeMap::new(),
    };
    for (element, below) in &set.children {
        let name = element.strip_prefix("f:");
        let child = name.map_or_else(|| node.element(), |name| node.field(name));
        let mut below = with_named_fields(child, below);
        below.own |= name.is_some_and(|name| node.knows(name));
        named.attach(element.clone(), below);
    }
    named
}

/// Where a list says one thing twice or leaves out a key, for a message; `None` if nowhere.
pub(crate) fn unmergeable(node: Node, path: &str, value: &Value) -> Option<String> {
    match value {
        Value::Object(map) if node.splits_maps() => map
            .iter()
            .find_map(|(name, value)| unmergeable(node.field(name), &format!("{path}.{name}"), value)),
        Value::Array(list) if node.splits_lists() => {
            let mut seen = BTreeSet::new();
            for value in list {
                let Some(element) = element(node, value) else {
                    return Some(format!(
                        "{path}: element {value}: omits a key of the list, or is no element of it"
                    ));
                };
                let spoken = FieldSet::path(&[&element]).paths().concat();
                if !seen.insert(element) {
                    return Some(format!("{path}: duplicate entries for key {spoken}"));
                }
                let inner = unmergeable(node.element(), &format!("{path}{spoken}"), value);
                if inner.is_some() {
                    return inner;
                }
            }
            None
        }
        _ => None,
    }
}
