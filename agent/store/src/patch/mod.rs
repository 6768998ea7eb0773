//! What an object is to be after a patch.
//!
//! ```text
//! application/json-patch+json              json
//! application/merge-patch+json             merge
//! application/strategic-merge-patch+json   strategic ┐
//! application/apply-patch+yaml             apply     ┴─ by schema's descriptions of the kind
//! after every other write                  update_managed
//! ```
//! Pure: knows neither the engine nor time. Whether the result is valid is admission's question.
//!
//! Invariants: see `json`, `strategic`, `apply`; nothing here panics on any JSON (`any_json_*` in each).
//!
//! Failure: an [`ApiError`](crate::ApiError) in the words of the API server; the live object is never touched.

mod apply;
mod fields;
mod json;
mod managed;
mod strategic;
mod typed;

use time::OffsetDateTime;

pub use apply::{apply, update_managed};
pub(crate) use json::{DEEPEST, depth};
pub use json::{json, merge};
pub use strategic::strategic;

/// Who writes: what `managedFields` says of the fields that it leaves behind.
#[derive(Clone, Copy, Debug)]
pub struct Manager<'a> {
    /// `fieldManager` of the request; see [`default_manager`] where there is none.
    pub name: &'a str,
    /// `apiVersion` of the objects in the request.
    pub api_version: &'a str,
    /// `status`, or empty for the object itself.
    pub subresource: &'a str,
    /// When.
    pub now: OffsetDateTime,
}

/// The manager of a write that names none: the program that sent it, as its user agent says.
pub fn default_manager(user_agent: &str) -> &str {
    let name = user_agent.split('/').next().unwrap_or_default();
    // At most 128 bytes, at a character's boundary.
    let end = name
        .char_indices()
        .map(|(at, c)| at + c.len_utf8())
        .take_while(|end| *end <= 128)
        .last();
    match name.get(..end.unwrap_or(0)) {
        Some(name) if !name.is_empty() => name,
        _ => "unknown",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value};

    /// Any JSON, with the words that mean something here among it.
    pub(crate) fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i8>().prop_map(Value::from),
            words().prop_map(Value::from),
        ];
        leaf.prop_recursive(6, 60, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((words(), inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect::<Map<_, _>>())),
            ]
        })
    }

    fn words() -> impl Strategy<Value = String> {
        const WORDS: &[&str] = &[
            "metadata",
            "name",
            "labels",
            "annotations",
            "finalizers",
            "ownerReferences",
            "uid",
            "managedFields",
            "spec",
            "template",
            "containers",
            "ports",
            "containerPort",
            "protocol",
            "env",
            "volumes",
            "status",
            "conditions",
            "type",
            "$patch",
            "$retainKeys",
            "$setElementOrder/containers",
            "delete",
            "replace",
            "merge",
            "$deleteFromPrimitiveList/finalizers",
            "f:spec",
            "k:{\"name\":\"a\"}",
            "v:1",
            ".",
            "a",
            "b",
            "op",
            "path",
            "manager",
            "operation",
            "Apply",
            "Update",
            "fieldsV1",
            "$setElementOrder/finalizers",
        ];
        prop_oneof![8 => prop::sample::select(WORDS).prop_map(str::to_owned), 1 => "\\PC{0,4}"]
    }

    #[test]
    fn a_manager_is_named_after_the_program() {
        let name = super::default_manager;
        assert_eq!(name("kubectl/v1.33.0 (linux/amd64)"), "kubectl");
        assert_eq!(name(""), "unknown");
        assert_eq!(name(&"ä".repeat(100)), "ä".repeat(64));
    }
}
