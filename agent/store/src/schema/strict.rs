//! Fields that nobody knows, for `fieldValidation`.
//!
//! The words are those of Kubernetes: `unknown field "spec.foo"`, `duplicate field "spec.replicas"`; whoever sends them
//! adds `strict decoding error:` in front. Not checked here: values.

use std::{collections::BTreeSet, fmt};

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{Shape, Type, document, root};
use crate::kinds::Kind;

/// The fields of an object that the descriptions do not know, in the order of their paths.
pub fn unknown_fields(kind: &Kind, object: &Value) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(root) = root(kind) {
        in_struct(root, "", object, &mut found);
    }
    found
}

fn in_struct(type_: &'static Type, path: &str, value: &Value, found: &mut Vec<String>) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let path = below(path, name);
        match type_.fields.get(name.as_str()) {
            Some(field) => in_shape(&field.shape, &path, value, found),
            // A type without fields is one that is not described further.
            None if type_.fields.is_empty() => {}
            None => found.push(format!("unknown field {path:?}")),
        }
    }
}

fn in_shape(shape: &'static Shape, path: &str, value: &Value, found: &mut Vec<String>) {
    match shape {
        Shape::Scalar(_) | Shape::Any => {}
        Shape::List(element) => {
            for (at, value) in value.as_array().into_iter().flatten().enumerate() {
                in_shape(element, &format!("{path}[{at}]"), value, found);
            }
        }
        Shape::Map(element) => {
            for (name, value) in value.as_object().into_iter().flatten() {
                in_shape(element, &below(path, name), value, found);
            }
        }
        Shape::Struct(at) => {
            if let Some(type_) = document().types.get(*at) {
                in_struct(type_, path, value, found);
            }
        }
    }
}

fn below(path: &str, name: &str) -> String {
    if path.is_empty() {
        return name.to_owned();
    }
    format!("{path}.{name}")
}

/// The fields that a JSON text has twice; none of what is no JSON.
pub fn duplicate_fields(json: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut reader = serde_json::Deserializer::from_slice(json);
    // What is no JSON is refused by whoever reads it.
    let _ = Within {
        path: String::new(),
        found: &mut found,
    }
    .deserialize(&mut reader);
    found
}

/// Reads a value only for the names of its fields.
struct Within<'a> {
    path: String,
    found: &'a mut Vec<String>,
}

impl<'de> DeserializeSeed<'de> for Within<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Within<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            let path = below(&self.path, &name);
            if !seen.insert(name) {
                self.found.push(format!("duplicate field {path:?}"));
            }
            let found = &mut *self.found;
            map.next_value_seed(Within { path, found })?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut at = 0;
        while let Some(()) = list.next_element_seed(Within {
            path: format!("{}[{at}]", self.path),
            found: self.found,
        })? {
            at += 1;
        }
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::{
        kinds::{self, by_plural},
        patch::tests::any_json,
    };

    #[test]
    fn unknown_fields_are_named_with_their_paths() {
        let pods = by_plural("", "pods").unwrap();
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "bar": 1,
            "metadata": {"name": "a", "labels": {"any": "thing"}, "lables": {}},
            "spec": {"foo": 1, "nodeSelector": {"x": "y"}, "containers": [{"name": "a", "imag": "b", "resources": {"limits": {"cpu": 1}}}]},
        });
        let expected = [
            r#"unknown field "bar""#,
            r#"unknown field "metadata.lables""#,
            r#"unknown field "spec.containers[0].imag""#,
            r#"unknown field "spec.foo""#,
        ];
        assert_eq!(unknown_fields(pods, &pod), expected);
        let policies = by_plural("security.istio.io", "authorizationpolicies").unwrap();
        let policy = json!({"spec": {"rules": [{"from": [{"source": {"principal": ["x"]}}]}], "action": "DENY"}});
        assert_eq!(
            unknown_fields(policies, &policy),
            [r#"unknown field "spec.rules[0].from[0].source.principal""#]
        );
    }

    /// What Go embeds has no name of its own in the objects.
    #[test]
    fn fields_of_embedded_types_are_known() {
        let backend = json!({"group": "", "kind": "Service", "name": "a", "namespace": "b", "port": 80, "weight": 1, "filters": []});
        let parent =
            json!({"group": "", "kind": "Service", "name": "a", "namespace": "b", "port": 80, "sectionName": "c"});
        for plural in ["httproutes", "grpcroutes"] {
            let kind = by_plural("gateway.networking.k8s.io", plural).unwrap();
            let route = json!({
                "spec": {"parentRefs": [parent], "rules": [{"backendRefs": [backend]}]},
                "status": {"parents": [{"parentRef": parent, "controllerName": "x/y", "conditions": []}]},
            });
            assert!(
                unknown_fields(kind, &route).is_empty(),
                "{:?}",
                unknown_fields(kind, &route)
            );
            let wrong = json!({"spec": {"parentRefs": [{"nam": "a"}]}});
            assert_eq!(
                unknown_fields(kind, &wrong),
                [r#"unknown field "spec.parentRefs[0].nam""#]
            );
        }
    }

    #[test]
    fn duplicate_fields_are_named_with_their_paths() {
        let text = br#"{"spec": {"a": 1, "b": [{"c": 1, "c": 2}], "a": {"d": 1.5, "d": null}}}"#;
        let expected = [
            r#"duplicate field "spec.b[0].c""#,
            r#"duplicate field "spec.a""#,
            r#"duplicate field "spec.a.d""#,
        ];
        assert_eq!(duplicate_fields(text), expected);
        assert!(duplicate_fields(b"{\"a\": 1, ").is_empty());
    }

    proptest! {
        #[test]
        fn any_json_is_checked_without_panic(json in any_json()) {
            for kind in kinds::ALL {
                unknown_fields(kind, &json);
            }
            duplicate_fields(json.to_string().as_bytes());
        }
    }
}
