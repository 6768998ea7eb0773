//! The operations on a kind.
//!
//! Of each: kind, action and the query parameters; not every answer that there may be.

use serde_json::{Map, Value, json};

use super::place;
use crate::{kinds::Kind, schema::is_custom};

const PATCHES: [&str; 4] = [
    "application/apply-patch+yaml",
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
];

/// The paths of a kind in a version, whose objects are of this schema.
pub(super) fn of(kind: &Kind, version: &str, object: &Value) -> Map<String, Value> {
    let operations = Operations { kind, version, object };
    let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
    let all = format!("/{}{scope}/{}", place(kind.group, version), kind.plural);
    let one = format!("{all}/{{name}}");
    let scope: &[&str] = if kind.namespaced { &["namespace"] } else { &[] };
    let mut paths = Map::new();
    if !kind.is_stored() {
        paths.insert(all, operations.all_of(&["post"], scope));
        return paths;
    }
    if kind.namespaced {
        let everywhere = format!("/{}/{}", place(kind.group, version), kind.plural);
        paths.insert(everywhere, operations.all_of(&["list"], &[]));
    }
    paths.insert(all, operations.all_of(&["list", "post", "deletecollection"], scope));
    let names: Vec<&str> = ["name"].iter().chain(scope).copied().collect();
    if kind.status_subresource {
        paths.insert(
            format!("{one}/status"),
            operations.all_of(&["get", "put", "patch"], &names),
        );
    }
    paths.insert(one, operations.all_of(&["get", "put", "patch", "delete"], &names));
    paths
}

/// A path item as Swagger 2.0 has it: a parameter's type beside its name, the body among the parameters.
pub(super) fn swagger(mut item: Value) -> Value {
    for (what, value) in item.as_object_mut().into_iter().flatten() {
        if what == "parameters" {
            flatten(value);
            continue;
        }
        flatten(&mut value["parameters"]);
        let object = value["responses"]["200"]["content"]["application/json"]["schema"].take();
        value["responses"] = json!({"200": {"description": "OK", "schema": object}});
        let Some(mut body) = value
            .as_object_mut()
            .and_then(|operation| operation.remove("requestBody"))
        else {
            continue;
        };
        let Some(content) = body["content"].as_object_mut() else {
            continue;
        };
        let consumes: Vec<Value> = content.keys().map(|kind| Value::from(kind.as_str())).collect();
        let schema = content.values_mut().next().map(|content| content["schema"].take());
        let body = json!({"name": "body", "in": "body", "required": true, "schema": schema});
        if let Some(parameters) = value["parameters"].as_array_mut() {
            parameters.push(body);
        }
        value["consumes"] = Value::from(consumes);
    }
    item
}

/// Puts the fields of each parameter's schema beside its others.
fn flatten(parameters: &mut Value) {
    for parameter in parameters.as_array_mut().into_iter().flatten() {
        let Some(parameter) = parameter.as_object_mut() else {
            continue;
        };
        if let Some(Value::Object(schema)) = parameter.remove("schema") {
            parameter.extend(schema);
        }
    }
}

struct Operations<'a> {
    kind: &'a Kind,
    version: &'a str,
    object: &'a Value,
}

impl Operations<'_> {
    /// The path item with these actions.
    fn all_of(&self, actions: &[&str], names: &[&str]) -> Value {
        let mut item = Map::new();
        for action in actions {
            let method = match *action {
                "list" => "get",
                "deletecollection" => "delete",
                other => other,
            };
            item.insert(method.to_owned(), self.operation(action));
        }
        let parameter = |name: &&str| {
            let schema = json!({"type": "string", "uniqueItems": true});
            json!({"name": name, "in": "path", "required": true, "schema": schema})
        };
        item.insert("parameters".to_owned(), names.iter().map(parameter).collect());
        Value::Object(item)
    }

    fn operation(&self, action: &str) -> Value {
        let kind = self.kind.kind;
        let mut operation = json!({
            "description": format!("{action} {kind}"),
            "operationId": format!("{action}{}{}{kind}", self.kind.group.replace('.', "_"), self.version),
            "parameters": parameters(action),
            "responses": {"200": {"description": "OK", "content": {"application/json": {"schema": self.object}}}},
            "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": {
                "group": self.kind.group, "version": self.version, "kind": kind,
            },
        });
        let content: Map<String, Value> = match action {
            "post" | "put" => [("application/json".to_owned(), json!({"schema": self.object}))]
                .into_iter()
                .collect(),
            "patch" => {
                let known = PATCHES
                    .iter()
                    .filter(|patch| !(is_custom(self.kind) && patch.contains("strategic")));
                known
                    .map(|patch| ((*patch).to_owned(), json!({"schema": {"type": "object"}})))
                    .collect()
            }
            _ => return operation,
        };
        operation["requestBody"] = json!({"required": true, "content": content});
        operation
    }
}

/// The query parameters of an action.
fn parameters(action: &str) -> Value {
    const WRITE: &[(&str, &str, &str)] = &[
        ("dryRun", "string", "All: nothing is kept."),
        ("fieldManager", "string", "Who owns the fields that this writes."),
        (
            "fieldValidation",
            "string",
            "What to do with unknown and duplicate fields: Ignore, Warn or Strict.",
        ),
    ];
    const FORCE: &[(&str, &str, &str)] = &[("force", "boolean", "Take fields that others own (apply patches only).")];
    const LIST: &[(&str, &str, &str)] = &[
        ("labelSelector", "string", "Only objects with these labels."),
        ("fieldSelector", "string", "Only objects with these fields."),
        ("limit", "integer", "At most so many."),
        ("continue", "string", "Where the list before this one ended."),
        ("resourceVersion", "string", "Not older than this."),
        ("resourceVersionMatch", "string", "NotOlderThan or Exact."),
        ("watch", "boolean", "Go on with the changes."),
        (
            "allowWatchBookmarks",
            "boolean",
            "Say how far the changes are, now and then.",
        ),
        ("timeoutSeconds", "integer", "End after so long."),
    ];
    const DELETE: &[(&str, &str, &str)] = &[
        ("dryRun", "string", "All: nothing is deleted."),
        ("gracePeriodSeconds", "integer", "How long it may take."),
        (
            "propagationPolicy",
            "string",
            "What becomes of the dependents: Orphan, Background or Foreground.",
        ),
    ];
    let groups: &[&[(&str, &str, &str)]] = match action {
        "list" => &[LIST],
        "post" | "put" => &[WRITE],
        "patch" => &[WRITE, FORCE],
        "delete" => &[DELETE],
        "deletecollection" => &[DELETE, LIST],
        _ => &[],
    };
    let mut seen = Vec::new();
    let mut all = Vec::new();
    for (name, type_, description) in groups.concat() {
        if !seen.contains(&name) {
            seen.push(name);
            let schema = json!({"type": type_, "uniqueItems": true});
            all.push(json!({"name": name, "in": "query", "description": description, "schema": schema}));
        }
    }
    Value::Array(all)
}
