//! Between the versions in which an object is served and the one in which it is kept.
//!
//! All versions of a kind here have the same fields, so that only `apiVersion` changes; but for Events, which
//! `events.k8s.io/v1` writes with other names than the core (as in Kubernetes' own conversion).

use serde_json::{Map, Value};

use super::{Keeping, Kind};

/// Names in `events.k8s.io/v1` and in the core.
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("regarding", "involvedObject"),
    ("note", "message"),
    ("reportingController", "reportingComponent"),
    ("deprecatedSource", "source"),
    ("deprecatedFirstTimestamp", "firstTimestamp"),
    ("deprecatedLastTimestamp", "lastTimestamp"),
    ("deprecatedCount", "count"),
];

/// An object as a client wrote it, to the form in which it is kept.
pub fn to_storage(kind: &'static Kind, value: &mut Value) {
    let Some(object) = value.as_object_mut() else {
        return;
    };
    if kind.keeping != Keeping::Stored {
        rename(object, |(served, kept)| (served, kept));
    }
    object.insert("apiVersion".to_owned(), kind.stored().storage_api_version().into());
    object.insert("kind".to_owned(), kind.stored().kind.into());
}

/// An object as it is kept, to the version that a client asked for.
pub fn from_storage(kind: &'static Kind, version: &str, value: &mut Value) {
    let Some(object) = value.as_object_mut() else {
        return;
    };
    if kind.keeping != Keeping::Stored {
        rename(object, |(served, kept)| (kept, served));
    }
    object.insert("apiVersion".to_owned(), kind.api_version(version).into());
    object.insert("kind".to_owned(), kind.kind.into());
}

fn rename(
    object: &mut Map<String, Value>,
    direction: impl Fn((&'static str, &'static str)) -> (&'static str, &'static str),
) {
    for pair in EVENT_FIELDS {
        let (from, to) = direction(*pair);
        if let Some(value) = object.remove(from) {
            object.insert(to.to_owned(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_convert_back_and_forth() {
        let kind = super::super::find("events.k8s.io", "v1", "events").unwrap();
        let written = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "a"},
            "note": "text", "regarding": {"kind": "Pod", "name": "p"}, "reportingController": "kubelet",
            "eventTime": "2026-01-01T00:00:00.000000Z"});
        let mut value = written.clone();
        to_storage(kind, &mut value);
        assert_eq!(value["apiVersion"], "v1");
        assert_eq!(value["message"], "text");
        assert_eq!(value["involvedObject"]["name"], "p");
        from_storage(kind, "v1", &mut value);
        assert_eq!(value, written);
    }
}
