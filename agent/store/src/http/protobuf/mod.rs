//! Reads bodies that typed clients send as protobuf: kubectl does for `create namespace`, `create token` and `auth`.
//!
//! ```text
//! "k8s\0" ─► Unknown { apiVersion, kind, raw } ─► schema's type of that kind + numbers.txt ─► JSON
//! ```
//! Answers are JSON always: every client that sends protobuf takes both. Only numbers are known here; names and shapes
//! are `schema`'s. A field without a number is passed over, as protobuf has it.
//!
//! Protobuf does not tell "not set" from zero for fields that are no pointers in Go, so empty texts and empty times are
//! left out, and zeros where the field is not known to mean something when it is zero ([`MEANT_ZEROS`]).
//!
//! No bytes make it panic (`any_bytes_are_read_or_refused`); nesting is bounded.
//!
//! <https://kubernetes.io/docs/reference/using-api/api-concepts/#protobuf-encoding>

mod wire;

use std::{collections::BTreeMap, sync::LazyLock};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::{Map, Value};
use time::OffsetDateTime;

use crate::{
    engine::ApiError,
    schema::{Shape, Type, document},
};
use wire::{Malformed, Reader, Wire};

/// What a body begins with.
const MAGIC: &[u8] = b"k8s\0";
/// How deeply messages may be nested.
const DEEPEST: usize = 64;
const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// Pointers in Go: a zero was written by somebody.
const MEANT_ZEROS: &[&str] = &[
    "activeDeadlineSeconds",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "automountServiceAccountToken",
    "backoffLimit",
    "backoffLimitPerIndex",
    "blockOwnerDeletion",
    "completions",
    "controller",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "expirationSeconds",
    "fsGroup",
    "gracePeriodSeconds",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "maxFailedIndexes",
    "maxSurge",
    "maxUnavailable",
    "mode",
    "optional",
    "orphanDependents",
    "parallelism",
    "partition",
    "priority",
    "privileged",
    "progressDeadlineSeconds",
    "readOnlyRootFilesystem",
    "ready",
    "replicas",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "successfulJobsHistoryLimit",
    "suspend",
    "terminating",
    "terminationGracePeriodSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "weight",
];

/// What a number stands for.
enum Numbered {
    Field(&'static str),
    /// A message whose fields JSON has in its parent.
    Inline(&'static str),
}

/// By package and name of the type.
type Numbers = BTreeMap<(&'static str, &'static str), BTreeMap<u32, Numbered>>;

static NUMBERS: LazyLock<Numbers> = LazyLock::new(|| {
    let mut numbers = Numbers::new();
    let mut package = "";
    for line in include_str!("numbers.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let mut words = line.split(' ');
        match (words.next(), words.next()) {
            (Some("@"), Some(name)) => package = name,
            (Some(name), Some(first)) => {
                let fields = std::iter::once(first).chain(words).filter_map(|word| {
                    let (name, number) = word.split_once('=')?;
                    let what = match name.strip_prefix('+') {
                        Some(inline) => Numbered::Inline(inline),
                        None => Numbered::Field(name),
                    };
                    Some((number.parse().ok()?, what))
                });
                numbers.insert((package, name), fields.collect());
            }
            _ => {}
        }
    }
    numbers
});

/// A body as the JSON that it stands for.
pub fn read(body: &[u8]) -> Result<Value, ApiError> {
    let malformed = |Malformed(what)| ApiError::bad_request(format!("error decoding protobuf: {what}"));
    let envelope = body
        .strip_prefix(MAGIC)
        .ok_or_else(|| malformed(Malformed("it does not begin with k8s\\0")))?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for field in Reader::new(envelope) {
        match field.map_err(malformed)? {
            (1, Wire::Bytes(type_meta)) => {
                for field in Reader::new(type_meta) {
                    match field.map_err(malformed)? {
                        (1, Wire::Bytes(text)) => api_version = String::from_utf8_lossy(text).into_owned(),
                        (2, Wire::Bytes(text)) => kind = String::from_utf8_lossy(text).into_owned(),
                        _ => {}
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            _ => {}
        }
    }
    let group = api_version.split_once('/').map_or("", |(group, _)| group);
    let type_ = document()
        .root(group, &kind)
        .or_else(|| find(META, &kind))
        .ok_or_else(|| {
            let kinds = "application/json, application/yaml";
            ApiError::unsupported_media_type(&format!("{kinds} (protobuf of {api_version} {kind} is not read)"))
        })?;
    let mut object = message(type_, type_.name, raw, DEEPEST).map_err(malformed)?;
    object.insert("apiVersion".to_owned(), api_version.into());
    object.insert("kind".to_owned(), kind.into());
    Ok(Value::Object(object))
}

fn find(package: &str, name: &str) -> Option<&'static Type> {
    document()
        .types
        .iter()
        .find(|type_| type_.package == package && type_.name == name)
}

/// A message: its numbers are those of `name`, its fields those of the type (which differ for inlined messages).
fn message(type_: &'static Type, name: &str, bytes: &[u8], depth: usize) -> Result<Map<String, Value>, Malformed> {
    let below = depth.checked_sub(1).ok_or(Malformed("it is nested too deeply"))?;
    let mut object = Map::new();
    let Some(numbers) = NUMBERS.get(&(type_.package, name)) else {
        return Ok(object);
    };
    let metadata = find(META, "ObjectMeta");
    for field in Reader::new(bytes) {
        let (number, wire) = field?;
        match (numbers.get(&number), wire) {
            (Some(Numbered::Inline(name)), Wire::Bytes(bytes)) => object.extend(message(type_, name, bytes, below)?),
            (Some(Numbered::Field(name)), wire) => match (type_.fields.get(name), metadata, &wire) {
                (Some(field), ..) => put(&mut object, name, &field.shape, &wire, below)?,
                // That of a kind is not among its own fields.
                (None, Some(metadata), Wire::Bytes(bytes)) if *name == "metadata" => {
                    object.insert(
                        (*name).to_owned(),
                        message(metadata, metadata.name, bytes, below)?.into(),
                    );
                }
                _ => {}
            },
            _ => {}
        }
    }
    Ok(object)
}

/// Puts one occurrence of a field into its object.
fn put(
    object: &mut Map<String, Value>,
    name: &str,
    shape: &'static Shape,
    wire: &Wire<'_>,
    depth: usize,
) -> Result<(), Malformed> {
    match (shape, wire) {
        (Shape::List(element), _) => {
            let list = object.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            if let (Some(list), Some(value)) = (list.as_array_mut(), value(element, wire, depth)?) {
                list.push(value);
            }
        }
        (Shape::Map(element), Wire::Bytes(entry)) => {
            let map = object.entry(name).or_insert_with(|| Value::Object(Map::new()));
            let (key, value) = map_entry(element, entry, depth)?;
            if let Some(map) = map.as_object_mut() {
                map.insert(key, value);
            }
        }
        _ => {
            if let Some(value) = value(shape, wire, depth)?.filter(|value| is_said(name, value)) {
                object.insert(name.to_owned(), value);
            }
        }
    }
    Ok(())
}

/// Whether a value of a field says something.
fn is_said(name: &str, value: &Value) -> bool {
    match value {
        Value::String(text) => !text.is_empty(),
        Value::Bool(flag) => *flag || MEANT_ZEROS.contains(&name),
        Value::Number(number) => number.as_f64() != Some(0.0) || MEANT_ZEROS.contains(&name),
        _ => true,
    }
}

fn map_entry(element: &'static Shape, entry: &[u8], depth: usize) -> Result<(String, Value), Malformed> {
    let below = depth.checked_sub(1).ok_or(Malformed("it is nested too deeply"))?;
    let (mut key, mut found) = (String::new(), None);
    for field in Reader::new(entry) {
        match field? {
            (1, Wire::Bytes(text)) => key = String::from_utf8_lossy(text).into_owned(),
            // Lists in maps are messages of their own there: `items = 1`.
            (2, Wire::Bytes(items)) if matches!(element, Shape::List(_)) => {
                let mut list = Map::new();
                for item in Reader::new(items) {
                    put(&mut list, "items", element, &item?.1, below)?;
                }
                found = list.remove("items");
            }
            (2, wire) => found = value(element, &wire, below)?,
            _ => {}
        }
    }
    let empty = if matches!(element, Shape::Scalar(_)) {
        Value::String(String::new())
    } else {
        Value::Null
    };
    Ok((key, found.unwrap_or(empty)))
}

/// One value; none where it is of another wire type than it should be, or an empty time.
fn value(shape: &'static Shape, wire: &Wire<'_>, depth: usize) -> Result<Option<Value>, Malformed> {
    let text = |bytes: &[u8]| match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Some(Value::from(text))),
        Err(_) => Err(Malformed("a text is not UTF-8")),
    };
    match (shape, wire) {
        (Shape::Struct(at), Wire::Bytes(bytes)) => match document().types.get(*at) {
            Some(type_) => Ok(Some(message(type_, type_.name, bytes, depth)?.into())),
            None => Ok(None),
        },
        (Shape::Scalar("string"), Wire::Bytes(bytes)) => text(bytes),
        (Shape::Scalar("bytes"), Wire::Bytes(bytes)) => Ok(Some(STANDARD.encode(bytes).into())),
        (Shape::Scalar("bool"), Wire::Varint(number)) => Ok(Some((*number != 0).into())),
        (Shape::Scalar("number"), Wire::Fixed64(bits)) => Ok(Some(f64::from_bits(*bits).into())),
        (Shape::Scalar(_), Wire::Varint(number)) => Ok(Some(number.cast_signed().into())),
        (Shape::Scalar("time" | "micro-time"), Wire::Bytes(bytes)) => moment(bytes),
        (Shape::Scalar("quantity"), Wire::Bytes(bytes)) => text(single(bytes, 1)?),
        (Shape::Scalar("int-or-string"), Wire::Bytes(bytes)) => int_or_string(bytes),
        // Raw JSON, as in managedFields.
        (Shape::Any, Wire::Bytes(bytes)) => Ok(serde_json::from_slice(single(bytes, 1)?).ok()),
        _ => Ok(None),
    }
}

/// The bytes of the one field that matters.
fn single(bytes: &[u8], wanted: u32) -> Result<&[u8], Malformed> {
    let mut found = &[][..];
    for field in Reader::new(bytes) {
        if let (number, Wire::Bytes(bytes)) = field?
            && number == wanted
        {
            found = bytes;
        }
    }
    Ok(found)
}

fn moment(bytes: &[u8]) -> Result<Option<Value>, Malformed> {
    let (mut seconds, mut nanos) = (None, 0);
    for field in Reader::new(bytes) {
        match field? {
            (1, Wire::Varint(number)) => seconds = Some(number.cast_signed()),
            (2, Wire::Varint(number)) => nanos = number.cast_signed(),
            _ => {}
        }
    }
    let Some(seconds) = seconds else { return Ok(None) };
    let moment = OffsetDateTime::from_unix_timestamp(seconds).ok();
    let moment = moment.and_then(|moment| moment.checked_add(time::Duration::nanoseconds(nanos)));
    let moment = moment.ok_or(Malformed("a time is out of range"))?;
    let text = moment.format(&time::format_description::well_known::Rfc3339);
    text.map(|text| Some(text.into()))
        .map_err(|_| Malformed("a time is out of range"))
}

fn int_or_string(bytes: &[u8]) -> Result<Option<Value>, Malformed> {
    let (mut is_text, mut number, mut text) = (false, 0, "");
    for field in Reader::new(bytes) {
        match field? {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value.cast_signed(),
            (3, Wire::Bytes(bytes)) => {
                text = std::str::from_utf8(bytes).map_err(|_| Malformed("a text is not UTF-8"))?;
            }
            _ => {}
        }
    }
    Ok(Some(if is_text { text.into() } else { number.into() }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// A field of length-delimited bytes.
    fn bytes(number: u8, content: &[u8]) -> Vec<u8> {
        let mut field = vec![number << 3 | 2, u8::try_from(content.len()).unwrap()];
        field.extend_from_slice(content);
        field
    }

    fn body(api_version: &str, kind: &str, raw: &[u8]) -> Vec<u8> {
        let type_meta = [bytes(1, api_version.as_bytes()), bytes(2, kind.as_bytes())].concat();
        [
            MAGIC.to_vec(),
            bytes(1, &type_meta),
            bytes(2, raw),
            bytes(3, b""),
            bytes(4, b""),
        ]
        .concat()
    }

    #[test]
    fn a_config_map_is_read() {
        let metadata = [bytes(1, b"a"), bytes(2, b""), bytes(8, b"")].concat();
        let entry = [bytes(1, b"k"), bytes(2, b"v")].concat();
        let raw = [bytes(1, &metadata), bytes(2, &entry)].concat();
        let expected = json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"k": "v"}});
        assert_eq!(read(&body("v1", "ConfigMap", &raw)).unwrap(), expected);
    }

    #[test]
    fn zeros_that_were_written_stay() {
        // spec { replicas: 0, minReadySeconds: 0, selector: {} }
        let spec = [vec![1 << 3, 0], vec![5 << 3, 0], bytes(2, b"")].concat();
        let object = read(&body("apps/v1", "Deployment", &bytes(2, &spec))).unwrap();
        assert_eq!(object["spec"], json!({"replicas": 0, "selector": {}}));
    }

    #[test]
    fn numbers_or_texts_and_inlined_messages_are_read() {
        // spec { ports { name: "", port: 80, targetPort: "http" } }
        let target = [vec![8, 1, 16, 0], bytes(3, b"http")].concat();
        let port = [bytes(1, b""), vec![3 << 3, 80], bytes(4, &target), vec![5 << 3, 0]].concat();
        let object = read(&body("v1", "Service", &bytes(2, &bytes(1, &port)))).unwrap();
        assert_eq!(object["spec"]["ports"], json!([{"port": 80, "targetPort": "http"}]));
        // spec { volumes { name: "v", volumeSource { emptyDir {} } } }
        let volume = [bytes(1, b"v"), bytes(2, &bytes(2, b""))].concat();
        let object = read(&body("v1", "Pod", &bytes(2, &bytes(1, &volume)))).unwrap();
        assert_eq!(object["spec"]["volumes"], json!([{"name": "v", "emptyDir": {}}]));
    }

    #[test]
    fn every_number_stands_for_a_field_that_there_is() {
        for ((package, name), numbers) in &*NUMBERS {
            let type_ = find(package, name);
            for numbered in numbers.values() {
                match (numbered, type_) {
                    (Numbered::Inline(inline), _) => assert!(NUMBERS.contains_key(&(*package, *inline)), "{inline}"),
                    (Numbered::Field("metadata"), _) => {}
                    (Numbered::Field(field), Some(type_)) => {
                        assert!(type_.fields.contains_key(field), "{name} {field}")
                    }
                    // Only inlined: its fields are those of whom it is inlined in.
                    (_, None) => assert!(["VolumeSource", "EphemeralContainerCommon", "ProbeHandler"].contains(name)),
                }
            }
        }
    }

    #[test]
    fn what_is_not_described_is_unsupported() {
        assert_eq!(read(&body("policy/v1", "Nothing", b"")).unwrap_err().code, 415);
        assert_eq!(read(b"{}").unwrap_err().code, 400);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(raw in prop::collection::vec(any::<u8>(), 0..120)) {
            for (api_version, kind) in [("v1", "Pod"), ("apps/v1", "Deployment"), ("authentication.k8s.io/v1", "TokenReview")] {
                let _ = read(&body(api_version, kind, &raw));
            }
            let _ = read(&[MAGIC, &raw].concat());
        }
    }
}
