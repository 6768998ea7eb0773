//! The rules for `metadata` that hold for every kind (`k8s.io/apimachinery/pkg/api/validation`, `.../registry/rest`).

use serde_json::{Map, Value};

use super::{ApiError, Cause, metadata_of, names, text};
use crate::kinds::Kind;

/// As in Kubernetes: all annotations of an object together.
const ANNOTATIONS: usize = 256 << 10;

/// Whether `metadata.generation` counts the changes of a kind. Kubernetes counts where there is a spec with a status
/// that may lag behind it.
pub(super) fn has_generation(kind: &Kind) -> bool {
    match kind.group {
        "" => kind.plural == "pods",
        "coordination.k8s.io" => false,
        _ => true,
    }
}

/// Refuses what is of another shape than `metav1.ObjectMeta`, so that everything after may rely on it.
pub(super) fn check_shape(kind: &Kind, value: &Value) -> Result<(), ApiError> {
    let wrong = |field: &str, wanted: &str| {
        let (kind, version) = (kind.kind, kind.storage);
        let what = format!("{kind} in version {version:?} cannot be handled as a {kind}");
        ApiError::bad_request(format!("{what}: {field} must be {wanted}"))
    };
    if !value.is_object() {
        return Err(wrong("the object", "an object"));
    }
    let metadata = match &value["metadata"] {
        Value::Null => return Ok(()),
        Value::Object(metadata) => metadata,
        _ => return Err(wrong("metadata", "an object")),
    };
    for field in ["name", "generateName", "namespace", "uid", "resourceVersion"] {
        if metadata
            .get(field)
            .is_some_and(|value| !value.is_string() && !value.is_null())
        {
            return Err(wrong(&format!("metadata.{field}"), "a string"));
        }
    }
    for field in ["labels", "annotations"] {
        let is_text = |map: &Map<String, Value>| map.values().all(Value::is_string);
        let is_good = |value: &Value| value.is_null() || value.as_object().is_some_and(is_text);
        if metadata.get(field).is_some_and(|value| !is_good(value)) {
            return Err(wrong(&format!("metadata.{field}"), "a map from strings to strings"));
        }
    }
    let all = |field: &str, is_good: fn(&Value) -> bool| match metadata.get(field) {
        None | Some(Value::Null) => true,
        Some(Value::Array(items)) => items.iter().all(is_good),
        Some(_) => false,
    };
    if !all("finalizers", Value::is_string) {
        return Err(wrong("metadata.finalizers", "a list of strings"));
    }
    for field in ["ownerReferences", "managedFields"] {
        if !all(field, Value::is_object) {
            return Err(wrong(&format!("metadata.{field}"), "a list of objects"));
        }
    }
    Ok(())
}

/// A field that is null is one that is not there.
pub(super) fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// Drops what is null or empty, so that two ways to write nothing are one.
pub(super) fn tidy(metadata: &mut Map<String, Value>) {
    metadata.remove("selfLink");
    metadata.retain(|_, value| match value {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    });
}

/// What is wrong with labels, annotations, finalizers and owners.
pub(super) fn check(value: &Value, causes: &mut Vec<Cause>) {
    let metadata = &value["metadata"];
    names::check_labels(&metadata["labels"], "metadata.labels", causes);
    let annotations = metadata["annotations"].as_object();
    let mut size = 0;
    for (name, value) in annotations.into_iter().flatten() {
        size += name.len() + value.as_str().map_or(0, str::len);
        // An annotation's name may have capitals in the prefix.
        if let Some(why) = names::qualified(&name.to_ascii_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", name.as_str(), why));
        }
    }
    if size > ANNOTATIONS {
        let message = format!("may not be more than {ANNOTATIONS} bytes");
        causes.push(Cause::invalid("metadata.annotations", size, message));
    }
    for finalizer in strings(&metadata["finalizers"]) {
        if let Some(why) = names::qualified(finalizer) {
            causes.push(Cause::invalid("metadata.finalizers", finalizer, why));
        }
    }
    let owners = metadata["ownerReferences"].as_array();
    let mut controllers = 0;
    for (index, owner) in owners.into_iter().flatten().enumerate() {
        for field in ["apiVersion", "kind", "name", "uid"] {
            if text(owner, &[field]).is_empty() {
                let path = format!("metadata.ownerReferences[{index}].{field}");
                causes.push(Cause::invalid(path, "", "must not be empty"));
            }
        }
        controllers += usize::from(owner["controller"] == true);
    }
    if controllers > 1 {
        let why = "Only one reference can have Controller set to true";
        causes.push(Cause::invalid("metadata.ownerReferences", controllers, why));
    }
}

/// The strings of a list.
pub(crate) fn strings(list: &Value) -> Vec<&str> {
    list.as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

/// Checks what an update may not change, and carries over what it may not say.
pub(super) fn carry_over(
    kind: &'static Kind,
    live: &Value,
    new: &mut Value,
    causes: &mut Vec<Cause>,
) -> Result<(), ApiError> {
    let name = text(live, &["metadata", "name"]);
    for field in ["name", "namespace"] {
        let (was, is) = (text(live, &["metadata", field]), text(new, &["metadata", field]));
        if !is.is_empty() && is != was {
            causes.push(Cause::invalid(format!("metadata.{field}"), is, "field is immutable"));
        }
    }
    let (was, is) = (text(live, &["metadata", "uid"]), text(new, &["metadata", "uid"]));
    if !is.is_empty() && is != was {
        let why = format!("Precondition failed: UID in precondition: {is}, UID in object meta: {was}");
        return Err(ApiError::conflict(kind, name, why));
    }
    let is_going = live["metadata"]["deletionTimestamp"].is_string();
    if is_going {
        let before = strings(&live["metadata"]["finalizers"]);
        let mut added = strings(&new["metadata"]["finalizers"]);
        added.retain(|finalizer| !before.contains(finalizer));
        if !added.is_empty() {
            let why = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
            );
            causes.push(Cause::forbidden("metadata.finalizers", why));
        }
    }
    let metadata = metadata_of(new);
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "generation",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "resourceVersion",
    ] {
        match &live["metadata"][field] {
            Value::Null => metadata.remove(field),
            value => metadata.insert(field.to_owned(), value.clone()),
        };
    }
    tidy(metadata);
    Ok(())
}

/// Whether two states differ in more than the times at which managers wrote.
pub(super) fn differ(one: &Value, other: &Value) -> bool {
    let untimed = |value: &Value| -> Value {
        let mut fields = value["metadata"]["managedFields"].clone();
        for entry in fields.as_array_mut().into_iter().flatten() {
            entry.as_object_mut().map(|entry| entry.remove("time"));
        }
        fields
    };
    let same = |skip: &[&str], one: &Value, other: &Value| match (one.as_object(), other.as_object()) {
        (Some(one), Some(other)) => {
            let rest = |map: &Map<String, Value>| map.keys().filter(|key| !skip.contains(&key.as_str())).count();
            let is_same = |(key, value): (&String, &Value)| {
                skip.contains(&key.as_str()) || other.get(key).is_some_and(|found| found == value)
            };
            rest(one) == rest(other) && one.iter().all(is_same)
        }
        _ => one == other,
    };
    !same(&["metadata"], one, other)
        || !same(&["managedFields"], &one["metadata"], &other["metadata"])
        || untimed(one) != untimed(other)
}

/// Whether a change is one of the desired state: of anything but `metadata` and `status`.
pub(super) fn is_of_the_spec(before: &Value, after: &Value) -> bool {
    let desired = |value: &Value| -> Map<String, Value> {
        let mut fields = value.as_object().cloned().unwrap_or_default();
        for field in ["metadata", "status", "apiVersion", "kind"] {
            fields.remove(field);
        }
        fields
    };
    desired(before) != desired(after)
}

/// A uid: a random (version 4) UUID.
pub(super) fn uid() -> Result<String, ApiError> {
    let mut bytes = [0u8; 16];
    random(&mut bytes)?;
    let bits = u128::from_be_bytes(bytes) & !(0xf << 76 | 0x3 << 62) | 0x4 << 76 | 0x2 << 62;
    let hex = format!("{bits:032x}");
    Ok(format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    ))
}

/// A name from `generateName`, as Kubernetes makes it: five letters that spell no word.
pub(super) fn generated_name(prefix: &str) -> Result<String, ApiError> {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut bytes = [0u8; 5];
    random(&mut bytes)?;
    let end = prefix.char_indices().map(|(at, _)| at).nth(58).unwrap_or(prefix.len());
    let suffix = bytes
        .iter()
        .map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
    Ok(prefix[..end].chars().chain(suffix).collect())
}

fn random(bytes: &mut [u8]) -> Result<(), ApiError> {
    aws_lc_rs::rand::fill(bytes).map_err(|_| ApiError::internal("no random numbers"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_uid_is_a_version_4_uuid() {
        let uid = uid().unwrap();
        assert_eq!((uid.len(), &uid[14..15]), (36, "4"));
        assert!("89ab".contains(&uid[19..20]), "{uid}");
    }

    #[test]
    fn the_time_of_a_manager_alone_is_no_difference() {
        let at =
            |time: &str, manager: &str| json!({"metadata": {"managedFields": [{"manager": manager, "time": time}]}});
        assert!(!differ(&at("1", "a"), &at("2", "a")));
        assert!(differ(&at("1", "a"), &at("1", "b")));
        assert!(differ(&json!({"a": 1}), &json!({})) && differ(&json!({}), &json!({"a": 1})));
    }

    #[test]
    fn metadata_of_another_shape_is_refused_and_never_a_panic() {
        let pods = super::super::known("", "pods");
        for wrong in [
            json!([]),
            json!({"metadata": 1}),
            json!({"metadata": {"labels": {"a": 1}}}),
            json!({"metadata": {"finalizers": "x"}}),
            json!({"metadata": {"ownerReferences": ["x"]}}),
            json!({"metadata": {"name": 3}}),
        ] {
            assert_eq!(check_shape(pods, &wrong).unwrap_err().code, 400, "{wrong}");
        }
        assert!(check_shape(pods, &json!({})).is_ok());
    }
}
