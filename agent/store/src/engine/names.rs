//! Names that Kubernetes takes, and its words for those it does not (`k8s.io/apimachinery/pkg/util/validation`).

use serde_json::Value;

use super::Cause;
use crate::kinds::Kind;

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must \
    start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const LABEL_1035: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an \
    alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for \
    validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or \
    '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
    '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const QUALIFIED: &str = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end \
    with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
    '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or \
    '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex \
    used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

/// What is wrong with an object's name; nothing for a good one.
pub(super) fn check_name(kind: &Kind, name: &str) -> Option<Cause> {
    let why = match (kind.group, kind.plural) {
        ("", "namespaces") => label(name),
        ("", "services") => label_1035(name),
        _ => subdomain(name),
    };
    why.map(|why| Cause::invalid("metadata.name", name, why))
}

fn too_long(text: &str, most: usize) -> Option<String> {
    (text.len() > most).then(|| format!("must be no more than {most} bytes"))
}

fn lower(byte: u8) -> bool {
    byte.is_ascii_lowercase() || byte.is_ascii_digit()
}

fn is_label(text: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(|byte| lower(*byte));
    let bytes = text.as_bytes();
    ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(|byte| lower(*byte) || *byte == b'-')
}

/// RFC 1123, one label.
pub(crate) fn label(name: &str) -> Option<String> {
    too_long(name, 63).or_else(|| (!is_label(name)).then(|| LABEL.to_owned()))
}

/// RFC 1035: a label that begins with a letter.
fn label_1035(name: &str) -> Option<String> {
    let is_good = is_label(name) && name.as_bytes().first().is_some_and(u8::is_ascii_lowercase);
    too_long(name, 63).or_else(|| (!is_good).then(|| LABEL_1035.to_owned()))
}

/// RFC 1123, labels and dots.
pub(crate) fn subdomain(name: &str) -> Option<String> {
    too_long(name, 253).or_else(|| (!name.split('.').all(is_label)).then(|| SUBDOMAIN.to_owned()))
}

fn is_word(text: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    let inner = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    ends(bytes.first()) && ends(bytes.last()) && bytes.iter().all(inner)
}

/// `prefix/name`, as label keys, annotation keys and finalizers are.
pub(super) fn qualified(name: &str) -> Option<String> {
    let (prefix, part) = match name.split_once('/') {
        Some((prefix, part)) => (Some(prefix), part),
        None => (None, name),
    };
    if let Some(prefix) = prefix {
        if prefix.is_empty() {
            return Some("prefix part must be non-empty".to_owned());
        }
        if let Some(why) = subdomain(prefix) {
            return Some(format!("prefix part {why}"));
        }
    }
    if part.is_empty() {
        return Some("name part must be non-empty".to_owned());
    }
    let long = too_long(part, 63).map(|why| format!("name part {why}"));
    long.or_else(|| (!is_word(part)).then(|| QUALIFIED.to_owned()))
}

/// A label's value.
pub(super) fn label_value(value: &str) -> Option<String> {
    too_long(value, 63).or_else(|| (!value.is_empty() && !is_word(value)).then(|| LABEL_VALUE.to_owned()))
}

/// What is wrong with a map of labels at a path.
pub(crate) fn check_labels(labels: &Value, path: &str, causes: &mut Vec<Cause>) {
    for (name, value) in labels.as_object().into_iter().flatten() {
        if let Some(why) = qualified(name) {
            causes.push(Cause::invalid(path, name.as_str(), why));
        }
        if let Some(why) = value.as_str().and_then(label_value) {
            causes.push(Cause::invalid(path, value.clone(), why));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_kubernetes_takes() {
        let cases = [
            ("a", true, true, true),
            ("a-b", true, true, true),
            ("1a", true, false, true),
            ("a.b", false, false, true),
            ("A", false, false, false),
            ("-a", false, false, false),
            ("a..b", false, false, false),
            ("", false, false, false),
        ];
        for (name, is_label, is_1035, is_subdomain) in cases {
            assert_eq!(label(name).is_none(), is_label, "{name}");
            assert_eq!(label_1035(name).is_none(), is_1035, "{name}");
            assert_eq!(subdomain(name).is_none(), is_subdomain, "{name}");
        }
        assert!(label(&"a".repeat(64)).is_some());
        for (name, good) in [
            ("app", true),
            ("a.b/C_d", true),
            ("/a", false),
            ("a/", false),
            ("a/b/c", false),
        ] {
            assert_eq!(qualified(name).is_none(), good, "{name}");
        }
        assert!(label_value("").is_none() && label_value("v1_x").is_none() && label_value("a b").is_some());
    }
}
