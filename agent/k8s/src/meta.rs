//! What every object has: names, labels, and the selectors over them.

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};

/// An object's name, labels and annotations.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Metadata {
    /// Unique for its kind in its namespace.
    #[serde(default)]
    pub name: String,
    /// Empty for what has no namespace; `default` where a manifest leaves it out.
    #[serde(default)]
    pub namespace: String,
    /// What selectors match.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Everything else.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub annotations: BTreeMap<String, String>,
    /// Of two objects that contend, the older wins (RFC 3339, which sorts as text).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_timestamp: Option<String>,
    /// Unique for all time; empty for what was never stored.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// Since when it is on its way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deletion_timestamp: Option<String>,
    /// What it goes with.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub owner_references: Vec<OwnerReference>,
}

/// What an object goes with, such as the ReplicaSet that made a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct OwnerReference {
    /// Such as `ReplicaSet`.
    #[serde(default)]
    pub kind: String,
    /// Its name, in the same namespace.
    #[serde(default)]
    pub name: String,
    /// Whether it is the one that decides.
    #[serde(default)]
    pub controller: bool,
}

impl Metadata {
    /// A label's value; an empty one is as good as none.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    /// Older first; then by name. An object without a time was never stored, and is the youngest.
    pub fn age(&self) -> (bool, Option<&str>, &str, &str) {
        let time = self.creation_timestamp.as_deref();
        (time.is_none(), time, &self.namespace, &self.name)
    }
}

/// `labels:` with nothing after it is null in YAML, and means nothing.
pub(crate) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Labels that must all be there (Istio's `WorkloadSelector`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Selector {
    /// Of which each must be there with this value.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub match_labels: BTreeMap<String, String>,
}

impl Selector {
    /// Whether these labels are selected. An empty selector selects all.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        selects(&self.match_labels, labels)
    }
}

/// Whether all of `selector` is in `labels`.
pub(crate) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// A port by number or by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a port number (0 to 65535) or name")]
pub enum IntOrString {
    /// The number.
    Number(u16),
    /// The name that a container gives one of its ports.
    Name(String),
}

impl fmt::Display for IntOrString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(number) => number.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

/// RFC 1123: lower-case letters, digits and `-`, and for a subdomain `.`, beginning and ending with a letter or digit.
/// Names become paths, namespaces and interface names, so nothing else gets in.
pub(crate) fn check_name(name: &str, dots: bool) -> Result<(), String> {
    let limit = if dots { 253 } else { 63 };
    let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-' || (dots && c == b'.');
    let outer = |c: Option<&u8>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    let bytes = name.as_bytes();
    let labels = name
        .split('.')
        .all(|label| outer(label.as_bytes().first()) && outer(label.as_bytes().last()));
    if bytes.len() > limit || !bytes.iter().all(|c| inner(*c)) || !labels {
        let form = if dots { "DNS subdomain" } else { "DNS label" };
        let shown: String = name.chars().take(80).collect();
        return Err(format!("{shown:?} is not a {form} of at most {limit} characters"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a/b",
            "A",
            "-a",
            "a-",
            "a..b",
            "a b",
            "ü",
            &"a".repeat(254),
        ] {
            assert!(check_name(bad, true).is_err(), "{bad}");
        }
        assert!(check_name("a.b-1", true).is_ok());
        assert!(check_name("a.b", false).is_err());
    }
}
