//! How `kubectl get` shows the kinds: columns, and a row for each object.
//!
//! ```text
//! columns(kind) ─► name, type, priority (1: only with -o wide), description
//! row(kind, object, now) ─► cells, in the same order
//! ```
//! As `k8s.io/kubernetes/pkg/printers/internalversion` prints builtin kinds, and as the `additionalPrinterColumns` of
//! the Istio and Gateway API CRDs say for theirs. Knows nothing of HTTP: the `Table` around it is made there.
//!
//! Invariants:
//! - A row has as many cells as there are columns, for any JSON at all (`any_json_has_a_row`).
//! - What stands in a cell is what Kubernetes prints (the tests of each module).
//!
//! Failure: what is missing or of the wrong type is shown as Kubernetes shows nothing (`<none>`, `<unknown>`, …).

mod age;
mod cluster;
mod custom;
mod event;
mod network;
mod pod;
mod workload;

use serde_json::{Value, json};
use time::OffsetDateTime;

use crate::kinds::Kind;

/// The columns of a kind, as `columnDefinitions` of a `meta.k8s.io/v1` Table.
pub fn columns(kind: &Kind) -> Vec<Value> {
    let definition = |column: &Column| {
        json!({
            "name": column.name,
            "type": column.type_,
            "format": if column.name == "Name" { "name" } else { "" },
            "description": column.description,
            "priority": column.priority,
        })
    };
    of(kind).columns.iter().map(definition).collect()
}

/// The cells of one object.
pub fn row(kind: &Kind, object: &Value, now: OffsetDateTime) -> Vec<Value> {
    (of(kind).cells)(object, now)
}

struct Table {
    columns: &'static [Column],
    cells: fn(&Value, OffsetDateTime) -> Vec<Value>,
}

struct Column {
    name: &'static str,
    type_: &'static str,
    priority: u8,
    description: &'static str,
}

impl Column {
    const fn text(name: &'static str, description: &'static str) -> Self {
        Self::typed(name, "string", description)
    }

    const fn number(name: &'static str, description: &'static str) -> Self {
        Self::typed(name, "integer", description)
    }

    const fn typed(name: &'static str, type_: &'static str, description: &'static str) -> Self {
        Self {
            name,
            type_,
            priority: 0,
            description,
        }
    }

    /// Only with `-o wide`.
    const fn wide(self) -> Self {
        Self { priority: 1, ..self }
    }
}

const NAME: Column = Column::text(
    "Name",
    "Name must be unique within a namespace. Is required when creating resources.",
);
const AGE: Column = Column::text(
    "Age",
    "CreationTimestamp is a timestamp representing the server time when this object was created.",
);
const CONTAINERS: Column = Column::text("Containers", "Names of each container in the template.").wide();
const IMAGES: Column = Column::text("Images", "Images referenced by each container in the template.").wide();
const SELECTOR: Column = Column::text("Selector", "Label selector of the pods that this is about.").wide();

fn of(kind: &Kind) -> Table {
    match (kind.group, kind.kind) {
        ("", "Pod") => pod::TABLE,
        ("", "Service") => network::SERVICE,
        ("", "Endpoints") => network::ENDPOINTS,
        ("discovery.k8s.io", "EndpointSlice") => network::ENDPOINT_SLICE,
        ("", "Node") => cluster::NODE,
        ("", "Namespace") => cluster::NAMESPACE,
        ("", "ConfigMap") => cluster::CONFIG_MAP,
        ("", "Secret") => cluster::SECRET,
        ("", "ServiceAccount") => cluster::SERVICE_ACCOUNT,
        ("coordination.k8s.io", "Lease") => cluster::LEASE,
        ("" | "events.k8s.io", "Event") => event::TABLE,
        ("apps", "Deployment") => workload::DEPLOYMENT,
        ("apps", "ReplicaSet") => workload::REPLICA_SET,
        ("apps", "DaemonSet") => workload::DAEMON_SET,
        ("apps", "StatefulSet") => workload::STATEFUL_SET,
        ("batch", "Job") => workload::JOB,
        (group, kind) => custom::of(group, kind),
    }
}

/// What is at a path, if it is there at all.
fn at<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(object, |value, name| value.get(name))
}

/// The text at a path; empty where there is none.
fn text<'a>(object: &'a Value, path: &str) -> &'a str {
    at(object, path).and_then(Value::as_str).unwrap_or_default()
}

fn number(object: &Value, path: &str) -> i64 {
    at(object, path).and_then(Value::as_i64).unwrap_or_default()
}

fn list<'a>(object: &'a Value, path: &str) -> &'a [Value] {
    at(object, path).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// How many entries a map has.
fn entries(object: &Value, path: &str) -> usize {
    at(object, path).and_then(Value::as_object).map_or(0, |map| map.len())
}

fn or<'a>(text: &'a str, nothing: &'a str) -> &'a str {
    if text.is_empty() { nothing } else { text }
}

fn name(object: &Value) -> Value {
    Value::from(text(object, "metadata.name"))
}

/// How long ago the object was made.
fn created(object: &Value, now: OffsetDateTime) -> Value {
    Value::from(age::since(text(object, "metadata.creationTimestamp"), now))
}

/// The status of a condition; empty where there is none.
fn condition<'a>(object: &'a Value, type_: &str) -> &'a str {
    let conditions = list(object, "status.conditions").iter();
    conditions
        .filter(|condition| text(condition, "type") == type_)
        .map(|condition| text(condition, "status"))
        .next()
        .unwrap_or_default()
}

/// `a=b,c=d` of a map at a path.
fn labels(object: &Value, path: &str) -> String {
    let map = at(object, path).and_then(Value::as_object);
    let pairs = map.into_iter().flatten();
    let pairs: Vec<String> = pairs
        .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default()))
        .collect();
    or(&pairs.join(","), "<none>").to_owned()
}

/// At most three, and how many more.
fn first_three(all: &[String], nothing: &str) -> String {
    let (shown, more) = all.split_at(all.len().min(3));
    let shown = shown.join(",");
    if more.is_empty() {
        return or(&shown, nothing).to_owned();
    }
    format!("{shown} + {} more...", more.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;
    use time::macros::datetime;

    use super::*;
    use crate::{
        kinds::{self, by_plural},
        patch::tests::any_json,
    };

    /// Five minutes after `2026-11-22T03:00:00Z`.
    pub(super) const NOW: OffsetDateTime = datetime!(2026-11-22 03:05:00 UTC);

    /// The cells of an object, as one line.
    pub(super) fn line(group: &str, plural: &str, mut object: Value) -> String {
        object["metadata"]["creationTimestamp"] = Value::from("2026-11-22T03:00:00Z");
        let cells = row(by_plural(group, plural).unwrap(), &object, NOW);
        let text = |cell: &Value| cell.as_str().map_or_else(|| cell.to_string(), str::to_owned);
        cells.iter().map(text).collect::<Vec<_>>().join(" | ")
    }

    #[test]
    fn columns_say_what_they_hold() {
        let pods = columns(by_plural("", "pods").unwrap());
        let names: Vec<&str> = pods.iter().map(|column| column["name"].as_str().unwrap()).collect();
        let expected = [
            "Name",
            "Ready",
            "Status",
            "Restarts",
            "Age",
            "IP",
            "Node",
            "Nominated Node",
            "Readiness Gates",
        ];
        assert_eq!(names, expected);
        assert_eq!(
            (&pods[0]["format"], &pods[0]["type"]),
            (&json!("name"), &json!("string"))
        );
        assert_eq!((&pods[4]["priority"], &pods[5]["priority"]), (&json!(0), &json!(1)));
    }

    proptest! {
        #[test]
        fn any_json_has_a_row(json in any_json()) {
            for kind in kinds::ALL {
                for object in [json.clone(), json!({"metadata": json, "spec": json, "status": json, "data": json})] {
                    prop_assert_eq!(row(kind, &object, NOW).len(), columns(kind).len());
                }
            }
        }
    }
}
