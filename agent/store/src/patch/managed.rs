//! `metadata.managedFields`: who owns which fields.
//!
//! Managers are told apart by name, operation and subresource, those that update also by the version they wrote in.
//! At most [`MOST_UPDATERS`] that update are kept by name: the oldest become one, `ancient-changes`, as in Kubernetes.
//!
//! Failure: an entry that can't be read is as good as none.

use serde_json::{Map, Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Manager, fields::FieldSet};

/// Managers with operation Update that are kept apart.
const MOST_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";

/// How a manager came to own its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Operation {
    /// By server-side apply: what it applied.
    Apply,
    /// By any other write: what it changed.
    Update,
}

/// One entry.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub name: String,
    pub operation: Operation,
    pub api_version: String,
    pub subresource: String,
    pub time: String,
    pub fields: FieldSet,
}

impl Entry {
    pub fn new(manager: &Manager<'_>, operation: Operation) -> Self {
        Self {
            name: manager.name.to_owned(),
            operation,
            api_version: manager.api_version.to_owned(),
            subresource: manager.subresource.to_owned(),
            time: stamp(manager.now),
            fields: FieldSet::default(),
        }
    }

    /// Whether both are of one manager.
    pub fn is_same(&self, other: &Entry) -> bool {
        self.name == other.name
            && self.operation == other.operation
            && self.subresource == other.subresource
            && (self.operation == Operation::Apply || self.api_version == other.api_version)
    }

    fn read(json: &Value) -> Option<Self> {
        let text = |name: &str| json.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let operation = match json.get("operation")?.as_str()? {
            "Apply" => Operation::Apply,
            "Update" => Operation::Update,
            _ => return None,
        };
        Some(Self {
            name: text("manager"),
            operation,
            api_version: text("apiVersion"),
            subresource: text("subresource"),
            time: text("time"),
            fields: FieldSet::from_json(json.get("fieldsV1")?)?,
        })
    }

    fn write(&self) -> Value {
        let operation = match self.operation {
            Operation::Apply => "Apply",
            Operation::Update => "Update",
        };
        let mut entry = json!({
            "manager": self.name,
            "operation": operation,
            "apiVersion": self.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.fields.to_json(),
        });
        for (name, value) in [("time", &self.time), ("subresource", &self.subresource)] {
            if !value.is_empty() {
                entry[name] = Value::from(value.as_str());
            }
        }
        entry
    }

    /// As messages name the manager.
    pub fn spoken(&self) -> String {
        let mut text = format!("{:?}", self.name);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if self.operation == Operation::Update {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }
}

/// All managers of an object.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Managers(pub Vec<Entry>);

impl Managers {
    /// Those that an object names.
    pub fn read(object: &Value) -> Self {
        let entries = object.pointer("/metadata/managedFields").and_then(Value::as_array);
        Self(entries.into_iter().flatten().filter_map(Entry::read).collect())
    }

    /// The same manager's entry.
    pub fn find(&self, like: &Entry) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.is_same(like))
    }

    /// Everybody else.
    pub fn others<'a>(&'a mut self, than: &'a Entry) -> impl Iterator<Item = &'a mut Entry> {
        self.0.iter_mut().filter(|entry| !entry.is_same(than))
    }

    /// Replaces the same manager's entry.
    pub fn set(&mut self, entry: Entry) {
        self.0.retain(|known| !known.is_same(&entry));
        self.0.push(entry);
    }

    /// Those that own something, the oldest that update as one, in the order that Kubernetes writes them.
    pub fn settle(&mut self) {
        self.0.retain(|entry| !entry.fields.is_empty());
        self.0.sort_by(|a, b| {
            let key = |e: &Entry| {
                (
                    e.operation,
                    e.time.clone(),
                    e.name.clone(),
                    e.api_version.clone(),
                    e.subresource.clone(),
                )
            };
            key(a).cmp(&key(b))
        });
        let updaters = self
            .0
            .iter()
            .filter(|entry| entry.operation == Operation::Update)
            .count();
        for _ in MOST_UPDATERS..updaters {
            self.merge_oldest();
        }
    }

    /// The two oldest that update become one.
    fn merge_oldest(&mut self) {
        let Some(at) = self.0.iter().position(|entry| entry.operation == Operation::Update) else {
            return;
        };
        let oldest = self.0.remove(at);
        if let Some(next) = self.0.get_mut(at) {
            next.fields.unite(&oldest.fields);
            next.name = ANCIENT.to_owned();
            next.subresource.clear();
        }
    }

    /// Puts them into an object.
    pub fn write(&self, object: &mut Value) {
        let Some(object) = object.as_object_mut() else { return };
        if self.0.is_empty() {
            if let Some(Value::Object(metadata)) = object.get_mut("metadata") {
                metadata.remove("managedFields");
            }
            return;
        }
        let metadata = object.entry("metadata").or_insert_with(|| Value::Object(Map::new()));
        if let Value::Object(metadata) = metadata {
            let entries = self.0.iter().map(Entry::write).collect();
            metadata.insert("managedFields".to_owned(), Value::Array(entries));
        }
    }
}

/// `2026-11-22T03:45:00Z`: Kubernetes keeps whole seconds.
fn stamp(now: OffsetDateTime) -> String {
    let now = now.replace_nanosecond(0).unwrap_or(now);
    now.to_offset(time::UtcOffset::UTC).format(&Rfc3339).unwrap_or_default()
}
