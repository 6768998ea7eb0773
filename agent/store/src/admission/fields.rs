//! Fields of objects whose shape nobody has checked yet: what is not there, or is something else, is left alone.

use serde_json::{Map, Value};

/// The object at a path, made where there is nothing; `None` where something else is in the way.
pub(super) fn object<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Map<String, Value>> {
    let mut at = value;
    for name in path {
        at = at.as_object_mut()?.entry(*name).or_insert(Value::Null);
        if at.is_null() {
            *at = Value::Object(Map::new());
        }
    }
    at.as_object_mut()
}

/// The object at a path, if there is one.
pub(super) fn existing<'a>(value: &'a mut Value, path: &[&str]) -> Option<&'a mut Map<String, Value>> {
    let found = path.iter().try_fold(value, |value, name| value.get_mut(*name));
    found.and_then(Value::as_object_mut)
}

/// The objects of the list at a path.
pub(super) fn items<'a>(value: &'a mut Value, path: &[&str]) -> impl Iterator<Item = &'a mut Value> {
    let found = path.iter().try_fold(value, |value, name| value.get_mut(*name));
    let list = found.and_then(Value::as_array_mut);
    list.into_iter().flatten().filter(|item| item.is_object())
}

/// Sets what is not set.
pub(super) fn default(fields: &mut Map<String, Value>, name: &str, value: impl Into<Value>) {
    let field = fields.entry(name).or_insert(Value::Null);
    let is_empty = |text: &str| text.is_empty();
    if field.is_null() || field.as_str().is_some_and(is_empty) {
        *field = value.into();
    }
}

/// Sets what is not set, to what it was before.
pub(super) fn keep(fields: &mut Map<String, Value>, name: &str, before: &Value) {
    if !before.is_null() {
        default(fields, name, before.clone());
    }
}

/// The text of a field; empty where there is none.
pub(super) fn text<'a>(fields: &'a Map<String, Value>, name: &str) -> &'a str {
    fields.get(name).and_then(Value::as_str).unwrap_or_default()
}
