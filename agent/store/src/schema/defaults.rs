//! Defaults that a CustomResourceDefinition gives its objects' fields.
//!
//! As on a cluster: what is left out of an object that is there is filled in, and then looked at in its turn. Only of
//! `spec`, and only of custom kinds: what Kubernetes' own kinds default to is said in `admission`, since much of it
//! depends on other fields.
//!
//! Invariant: filling what was filled changes nothing (`defaults_fill_what_is_left_out`).
//!
//! <https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#defaulting>

use serde_json::Value;

use super::{Field, Shape, Type, document, is_custom, root};
use crate::kinds::Kind;

/// Fills in what a custom object's `spec` leaves out.
pub(crate) fn fill_defaults(kind: &Kind, object: &mut Value) {
    let spec = root(kind).and_then(|root| root.fields.get("spec"));
    if let (true, Some(field), Some(spec)) = (is_custom(kind), spec, object.get_mut("spec")) {
        fill(&field.shape, spec);
    }
}

fn fill(shape: &Shape, value: &mut Value) {
    match shape {
        Shape::Scalar(_) | Shape::Any => {}
        Shape::List(element) => {
            let items = value.as_array_mut().into_iter().flatten();
            items.for_each(|value| fill(element, value));
        }
        Shape::Map(element) => {
            let values = value.as_object_mut().into_iter().flat_map(|map| map.values_mut());
            values.for_each(|value| fill(element, value));
        }
        Shape::Struct(at) => {
            if let Some(type_) = document().types.get(*at) {
                fill_struct(type_, value);
            }
        }
    }
}

fn fill_struct(type_: &Type, value: &mut Value) {
    let Some(map) = value.as_object_mut() else {
        return;
    };
    for (name, field) in &type_.fields {
        if !map.contains_key(*name)
            && let Some(default) = default(field)
        {
            map.insert((*name).to_owned(), default);
        }
        if let Some(value) = map.get_mut(*name) {
            fill(&field.shape, value);
        }
    }
}

/// A field's default, of the field's type.
pub(super) fn default(field: &Field) -> Option<Value> {
    let text = field.default?;
    match field.shape {
        Shape::Scalar("int" | "int64" | "number" | "bool") | Shape::List(_) | Shape::Map(_) | Shape::Struct(_) => {
            serde_json::from_str(text).ok()
        }
        Shape::Scalar(_) | Shape::Any => Some(text.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::kinds::by_plural;

    fn filled(plural: &str, spec: &Value) -> Value {
        let kind = by_plural("gateway.networking.k8s.io", plural).unwrap();
        let mut object = json!({"spec": spec});
        fill_defaults(kind, &mut object);
        let once = object.clone();
        fill_defaults(kind, &mut object);
        assert_eq!(object, once);
        object["spec"].take()
    }

    #[test]
    fn defaults_fill_what_is_left_out() {
        let route = json!({"parentRefs": [{"name": "w", "kind": "Service", "group": ""}, {"name": "g"}],
            "rules": [{"backendRefs": [{"name": "web", "port": 80}], "matches": [{"path": {"value": "/a"}}, {}]}, {}]});
        let all = json!([{"path": {"type": "PathPrefix", "value": "/"}}]);
        let expected = json!({
            "parentRefs": [
                {"name": "w", "kind": "Service", "group": ""},
                {"name": "g", "kind": "Gateway", "group": "gateway.networking.k8s.io"},
            ],
            "rules": [
                {
                    "backendRefs": [{"name": "web", "port": 80, "group": "", "kind": "Service", "weight": 1}],
                    "matches": [{"path": {"type": "PathPrefix", "value": "/a"}}, all[0]],
                },
                {"matches": all},
            ],
        });
        assert_eq!(filled("httproutes", &route), expected);
        assert_eq!(filled("httproutes", &json!({})), json!({"rules": [{"matches": all}]}));
        let listener = json!({"listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]});
        assert_eq!(
            filled("gateways", &listener)["listeners"][0]["allowedRoutes"],
            json!({"namespaces": {"from": "Same"}})
        );
        // What is no object is somebody else's to refuse.
        assert_eq!(filled("httproutes", &json!({"rules": 1})), json!({"rules": 1}));
    }

    #[test]
    fn every_default_is_of_its_fields_type() {
        for type_ in &document().types {
            for (name, field) in &type_.fields {
                let is_one = field.default.is_none() || default(field).is_some();
                assert!(is_one, "{}.{name}: {:?}", type_.name, field.default);
            }
        }
    }
}
