//! The OpenAPI documents: what `kubectl explain`, `apply` and `--validate` ask for.
//!
//! ```text
//! /openapi/v3                    index: where each group and version is described
//! /openapi/v3/apis/apps/v1       paths (which operations take `fieldValidation` and `dryRun`) and components
//! /openapi/v2                    everything, for older clients; in protobuf, too, for kubectl before it applies a `List`
//! ```
//! Made from the descriptions on request; `http` keeps what was asked for.
//!
//! Invariants: every reference of a document is in it (`every_reference_is_in_its_document`); kubectl finds the kind of
//! every resource and the two parameters (`kubectl_finds_what_it_looks_for`).
//!
//! Failure: a group or version that is not served is `None`.

mod component;
mod path;
mod protobuf;

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    sync::LazyLock,
};

use serde_json::{Map, Value, json};

use self::component::{Components, V2, V3};
use super::document::TEXTS;
use crate::kinds::{self, Kind};

/// Counts up when the documents change although their sources do not.
const FORM: u32 = 2;

/// Where the documents are: `GET /openapi/v3`.
pub fn openapi_v3_index() -> Value {
    let hash = openapi_hash();
    let mut paths = Map::new();
    for kind in kinds::ALL {
        for version in kind.versions {
            let place = place(kind.group, version);
            let url = format!("/openapi/v3/{place}?hash={hash}");
            paths.insert(place, json!({"serverRelativeURL": url}));
        }
    }
    json!({"paths": paths})
}

/// What one group is in one version: `GET /openapi/v3/apis/GROUP/VERSION`, or `/openapi/v3/api/v1`.
pub fn openapi_v3(group: &str, version: &str) -> Option<Value> {
    let is_here = |kind: &&Kind| kind.group == group && kind.versions.contains(&version);
    let kinds: Vec<&'static Kind> = kinds::ALL.iter().filter(is_here).collect();
    if kinds.is_empty() {
        return None;
    }
    let mut components = Components::new(&V3, Some((group, version)));
    let mut paths = Map::new();
    for kind in kinds {
        let object = components.kind(kind, version);
        paths.extend(path::of(kind, version, &object));
    }
    for name in ["DeleteOptions", "Status"] {
        components.meta(name);
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths,
        "components": {"schemas": components.finish()},
    }))
}

/// Everything: `GET /openapi/v2`.
pub fn openapi_v2() -> Value {
    let mut components = Components::new(&V2, None);
    let mut paths = Map::new();
    for kind in kinds::ALL {
        for version in kind.versions {
            let object = components.kind(kind, version);
            let of_kind = path::of(kind, version, &object).into_iter();
            paths.extend(of_kind.map(|(path, item)| (path, path::swagger(item))));
        }
    }
    json!({"swagger": "2.0", "info": info(), "paths": paths, "definitions": components.finish()})
}

/// The same in protobuf.
pub fn openapi_v2_protobuf() -> Vec<u8> {
    protobuf::document(&openapi_v2())
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": concat!("undercurrent-", env!("CARGO_PKG_VERSION"))})
}

/// `apis/apps/v1`, `api/v1`.
fn place(group: &str, version: &str) -> String {
    if group.is_empty() {
        return format!("api/{version}");
    }
    format!("apis/{group}/{version}")
}

/// Changes whenever a document does: clients keep what they read under it for good.
pub fn openapi_hash() -> &'static str {
    static HASH: LazyLock<String> = LazyLock::new(|| {
        let mut hasher = DefaultHasher::new();
        (FORM, env!("CARGO_PKG_VERSION"), TEXTS).hash(&mut hasher);
        format!("{:?}", kinds::ALL).hash(&mut hasher);
        format!("{:016X}", hasher.finish())
    });
    &HASH
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(value: &Value, prefix: &str, into: &mut Vec<String>) {
        match value {
            Value::Object(map) => {
                if let Some(name) = map.get("$ref").and_then(Value::as_str) {
                    into.push(name.strip_prefix(prefix).unwrap().to_owned());
                }
                map.values().for_each(|value| references(value, prefix, into));
            }
            Value::Array(list) => list.iter().for_each(|value| references(value, prefix, into)),
            _ => {}
        }
    }

    fn schema<'a>(document: &'a Value, name: &str) -> &'a Value {
        &document["components"]["schemas"][name]
    }

    #[test]
    fn every_reference_is_in_its_document() {
        let check = |schemas: &Value, document: &Value, prefix: &str| {
            let mut found = Vec::new();
            references(document, prefix, &mut found);
            assert!(!found.is_empty());
            for name in found {
                assert!(schemas.get(&name).is_some(), "{name} is missing");
            }
        };
        for kind in kinds::ALL {
            for version in kind.versions {
                let document = openapi_v3(kind.group, version).unwrap();
                check(&document["components"]["schemas"], &document, "#/components/schemas/");
            }
        }
        let document = openapi_v2();
        check(&document["definitions"], &document, "#/definitions/");
        assert_eq!(openapi_v3("apps", "v1beta1"), None);
    }

    /// What kubectl's validation, dry run and `explain` search for.
    #[test]
    fn kubectl_finds_what_it_looks_for() {
        let index = openapi_v3_index();
        for kind in kinds::ALL.iter().filter(|kind| kind.is_stored()) {
            for version in kind.versions {
                let place = place(kind.group, version);
                let url = index["paths"][&place]["serverRelativeURL"].as_str().unwrap();
                assert!(url.starts_with(&format!("/openapi/v3/{place}?hash=")), "{url}");
                let document = openapi_v3(kind.group, version).unwrap();
                let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
                let path = format!("/{place}{scope}/{}/{{name}}", kind.plural);
                let patch = &document["paths"][&path]["patch"];
                let gvk = json!({"group": kind.group, "version": version, "kind": kind.kind});
                assert_eq!(patch["x-kubernetes-group-version-kind"], gvk, "{path}");
                let parameters = patch["parameters"].as_array().unwrap();
                for name in ["fieldValidation", "dryRun"] {
                    let is_it = |p: &&Value| p["name"] == name && p["in"] == "query";
                    assert!(parameters.iter().any(|p| is_it(&p)), "{path}: {name}");
                }
                let schemas = document["components"]["schemas"].as_object().unwrap();
                let described = schemas.values().filter(|schema| {
                    let gvks = schema.get("x-kubernetes-group-version-kind").and_then(Value::as_array);
                    gvks.is_some_and(|gvks| gvks.contains(&gvk))
                });
                assert_eq!(described.count(), 1, "{path}");
            }
        }
    }

    #[test]
    fn components_describe_fields_and_how_they_merge() {
        let core = openapi_v3("", "v1").unwrap();
        let spec = schema(&core, "io.k8s.api.core.v1.PodSpec");
        let containers = &spec["properties"]["containers"];
        assert_eq!(containers["x-kubernetes-patch-merge-key"], "name");
        assert_eq!(containers["x-kubernetes-patch-strategy"], "merge");
        assert_eq!(containers["x-kubernetes-list-type"], "map");
        assert_eq!(containers["x-kubernetes-list-map-keys"], json!(["name"]));
        assert!(
            containers["description"]
                .as_str()
                .unwrap()
                .starts_with("List of containers")
        );
        let item = json!({"allOf": [{"$ref": "#/components/schemas/io.k8s.api.core.v1.Container"}]});
        assert_eq!(containers["items"], item);
        assert_eq!(
            spec["properties"]["volumes"]["x-kubernetes-patch-strategy"],
            "merge,retainKeys"
        );
        assert_eq!(spec["required"], json!(["containers"]));
        assert_eq!(
            schema(&core, "io.k8s.api.core.v1.PodList")["properties"]["items"]["type"],
            "array"
        );
        let security = openapi_v3("security.istio.io", "v1").unwrap();
        let policy = schema(&security, "io.istio.security.v1.AuthorizationPolicy");
        let gvk = json!([{"group": "security.istio.io", "version": "v1", "kind": "AuthorizationPolicy"}]);
        assert_eq!(policy["x-kubernetes-group-version-kind"], gvk);
    }
}
