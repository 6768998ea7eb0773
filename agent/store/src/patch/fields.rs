//! Sets of fields, and their form in `managedFields` (FieldsV1).
//!
//! ```text
//! {"f:spec": {"f:containers": {"k:{\"name\":\"a\"}": {".": {}, "f:image": {}}}}}
//!   f: a field   k: an element of a list, by its keys   v: an element of a set   . the place itself
//! ```
//! A set is a tree whose members are the nodes that are `own`; what a path means is the caller's business.
//!
//! Invariants: what is written reads back the same, and anything at all is read without a panic
//! (`a_set_reads_back_as_written`); no node of the tree is empty (`a_difference_leaves_nothing_empty`).

use std::{collections::BTreeMap, fmt::Write as _};

use serde_json::{Map, Value};

/// A set of fields. See <https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management>.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct FieldSet {
    /// The place itself is a member.
    pub own: bool,
    /// Members below, by path element as FieldsV1 writes it.
    pub children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    /// Only the place itself.
    pub fn leaf() -> Self {
        Self {
            own: true,
            children: BTreeMap::new(),
        }
    }

    /// Only the place below these elements.
    pub fn path(elements: &[&str]) -> Self {
        elements.iter().rev().fold(Self::leaf(), |below, element| Self {
            own: false,
            children: BTreeMap::from([((*element).to_owned(), below)]),
        })
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        !self.own && self.children.is_empty()
    }

    /// Puts a subtree under an element, unless it is empty.
    pub fn attach(&mut self, element: String, below: FieldSet) {
        if !below.is_empty() {
            self.children.insert(element, below);
        }
    }

    /// What is below an element.
    pub fn below(&self, element: &str) -> Option<&FieldSet> {
        self.children.get(element)
    }

    /// Adds another set.
    pub fn unite(&mut self, other: &FieldSet) {
        self.own |= other.own;
        for (element, below) in &other.children {
            self.children.entry(element.clone()).or_default().unite(below);
        }
    }

    /// Members of this set that are not in the other.
    pub fn difference(&self, other: &FieldSet) -> FieldSet {
        let mut left = FieldSet {
            own: self.own && !other.own,
            children: BTreeMap::new(),
        };
        for (element, below) in &self.children {
            let below = match other.children.get(element) {
                Some(taken) => below.difference(taken),
                None => below.clone(),
            };
            left.attach(element.clone(), below);
        }
        left
    }

    /// Members of both.
    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let mut both = FieldSet {
            own: self.own && other.own,
            children: BTreeMap::new(),
        };
        for (element, below) in &self.children {
            if let Some(also) = other.children.get(element) {
                both.attach(element.clone(), below.intersection(also));
            }
        }
        both
    }

    /// Takes out a whole subtree.
    pub fn without(mut self, elements: &[&str]) -> FieldSet {
        match elements {
            [] => FieldSet::default(),
            [element, rest @ ..] => {
                if let Some(below) = self.children.remove(*element) {
                    self.attach((*element).to_owned(), below.without(rest));
                }
                self
            }
        }
    }

    /// Every member as people write it: `.spec.containers[name="a"].image`.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths("", &mut paths);
        paths
    }

    fn collect_paths(&self, prefix: &str, into: &mut Vec<String>) {
        if self.own {
            into.push(prefix.to_owned());
        }
        for (element, below) in &self.children {
            below.collect_paths(&format!("{prefix}{}", spoken(element)), into);
        }
    }

    /// As FieldsV1.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.own && !self.children.is_empty() {
            map.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (element, below) in &self.children {
            map.insert(element.clone(), below.to_json());
        }
        Value::Object(map)
    }

    /// From FieldsV1; `None` if it is none.
    pub fn from_json(json: &Value) -> Option<FieldSet> {
        let mut set = FieldSet::default();
        for (element, below) in json.as_object()? {
            match element.get(..2) {
                _ if element == "." => set.own = true,
                Some("f:" | "k:" | "v:" | "i:") => {
                    let mut below = Self::from_json(below)?;
                    if below.children.is_empty() {
                        below.own = true;
                    }
                    set.children.insert(element.clone(), below);
                }
                _ => return None,
            }
        }
        Some(set)
    }
}

/// The element for a field.
pub(crate) fn field(name: &str) -> String {
    format!("f:{name}")
}

/// The element for a list's element that has these keys.
pub(crate) fn key(keys: &BTreeMap<&str, Value>) -> String {
    format!("k:{}", serde_json::to_string(keys).unwrap_or_default())
}

/// The element for a set's scalar.
pub(crate) fn value(value: &Value) -> String {
    format!("v:{value}")
}

fn spoken(element: &str) -> String {
    let rest = element.get(2..).unwrap_or_default();
    match element.get(..2) {
        Some("f:") => format!(".{rest}"),
        Some("v:") => format!("[={rest}]"),
        Some("k:") => {
            let keys: BTreeMap<String, Value> = serde_json::from_str(rest).unwrap_or_default();
            let mut text = String::new();
            for (name, value) in keys {
                let comma = if text.is_empty() { "" } else { "," };
                // Writing to a string can't fail.
                let _ = write!(text, "{comma}{name}={value}");
            }
            format!("[{text}]")
        }
        _ => format!("[{rest}]"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::patch::tests::any_json;

    fn read(json: Value) -> FieldSet {
        FieldSet::from_json(&json).unwrap()
    }

    #[test]
    fn paths_read_as_kubernetes_prints_them() {
        let set = read(json!({"f:spec": {
            "f:replicas": {},
            "f:containers": {"k:{\"containerPort\":80,\"protocol\":\"TCP\"}": {".": {}, "f:image": {}}},
            "f:finalizers": {"v:\"a/b\"": {}},
        }}));
        let expected = [
            r#".spec.containers[containerPort=80,protocol="TCP"]"#,
            r#".spec.containers[containerPort=80,protocol="TCP"].image"#,
            r#".spec.finalizers[="a/b"]"#,
            ".spec.replicas",
        ];
        assert_eq!(set.paths(), expected);
    }

    #[test]
    fn a_difference_leaves_nothing_empty() {
        let set = read(json!({"f:a": {"f:b": {}, "f:c": {".": {}, "f:d": {}}}}));
        assert!(set.difference(&set).is_empty());
        let left = set.difference(&FieldSet::path(&["f:a", "f:c", "f:d"]));
        assert_eq!(left.to_json(), json!({"f:a": {"f:b": {}, "f:c": {}}}));
        assert_eq!(set.intersection(&set), set);
        assert_eq!(set.without(&["f:a", "f:c"]).to_json(), json!({"f:a": {"f:b": {}}}));
    }

    proptest! {
        #[test]
        fn a_set_reads_back_as_written(json in any_json()) {
            if let Some(set) = FieldSet::from_json(&json) {
                let _ = set.paths();
                if !set.is_empty() {
                    prop_assert_eq!(FieldSet::from_json(&set.to_json()).map(|s| s.children), Some(set.children));
                }
            }
        }
    }
}
