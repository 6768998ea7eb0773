//! Label and field selectors: `app=web,tier in (a,b),!old`, `metadata.name=x,status.phase!=Running`.
//!
//! Pure. Parsed once per request, asked once per object. What can't be understood is an error that says where
//! (`what_cannot_be_understood_is_refused`): a selector that silently selected everything would be worse than none.
//!
//! <https://kubernetes.io/docs/concepts/overview/working-with-objects/labels/#label-selectors>

use std::collections::BTreeMap;

use serde_json::Value;

/// Why a selector can't be used; words for a `BadRequest`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(pub String);

/// One condition on labels.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In(Vec<String>),
    /// Also those without the label.
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    GreaterThan(i64),
    LessThan(i64),
}

/// Conditions on labels that all must hold; none by default.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Labels(Vec<Requirement>);

impl Labels {
    /// Reads the text of a `labelSelector`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let refuse = |what: String| SelectorError(format!("unable to parse requirement: {what} in {text:?}"));
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    break;
                }
                return Err(refuse("an empty requirement".into()));
            }
            requirements.push(requirement(part).map_err(refuse)?);
        }
        Ok(Self(requirements))
    }

    /// Whether there is no condition.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether these labels fulfil all.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0
            .iter()
            .all(|one| one.matches(labels.get(&one.key).map(String::as_str)))
    }
}

impl Requirement {
    fn matches(&self, value: Option<&str>) -> bool {
        let number = || value.and_then(|value| value.parse::<i64>().ok());
        match &self.operator {
            Operator::In(values) => value.is_some_and(|value| values.iter().any(|one| one == value)),
            Operator::NotIn(values) => value.is_none_or(|value| values.iter().all(|one| one != value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
            Operator::GreaterThan(least) => number().is_some_and(|number| number > *least),
            Operator::LessThan(most) => number().is_some_and(|number| number < *most),
        }
    }
}

/// Splits at commas that are in no parentheses.
fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0u32, 0, Vec::new());
    for (at, character) in text.char_indices() {
        match character {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(text: &str) -> Result<Requirement, String> {
    if let Some(key) = text.strip_prefix('!') {
        return build(key, Operator::DoesNotExist);
    }
    for (sign, negated) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = text.split_once(sign) {
            let values = vec![label_value(value)?];
            let operator = if negated {
                Operator::NotIn(values)
            } else {
                Operator::In(values)
            };
            return build(key, operator);
        }
    }
    for sign in ['>', '<'] {
        if let Some((key, value)) = text.split_once(sign) {
            let number = value
                .trim()
                .parse()
                .map_err(|_| format!("{value:?} is not a whole number"))?;
            let operator = if sign == '>' {
                Operator::GreaterThan(number)
            } else {
                Operator::LessThan(number)
            };
            return build(key, operator);
        }
    }
    let Some((key, rest)) = text.split_once(char::is_whitespace) else {
        return build(text, Operator::Exists);
    };
    let rest = rest.trim();
    let (negated, list) = if let Some(list) = rest.strip_prefix("notin") {
        (true, list)
    } else if let Some(list) = rest.strip_prefix("in") {
        (false, list)
    } else {
        return Err(format!("found {rest:?}, expected: in, notin, =, ==, !=, >, <"));
    };
    let list = list.trim();
    let values = list
        .strip_prefix('(')
        .and_then(|list| list.strip_suffix(')'))
        .ok_or_else(|| format!("found {list:?}, expected values in parentheses"))?;
    let values = values.split(',').map(label_value).collect::<Result<_, _>>()?;
    build(
        key,
        if negated {
            Operator::NotIn(values)
        } else {
            Operator::In(values)
        },
    )
}

fn build(key: &str, operator: Operator) -> Result<Requirement, String> {
    let key = key.trim();
    let (prefix, name) = key.rsplit_once('/').unwrap_or(("", key));
    let good = |text: &str, most: usize| {
        text.len() <= most
            && text
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
    };
    if name.is_empty() || !good(name, 63) || !good(prefix, 253) {
        return Err(format!("{key:?} can't be a label's key"));
    }
    Ok(Requirement {
        key: key.to_owned(),
        operator,
    })
}

fn label_value(text: &str) -> Result<String, String> {
    let text = text.trim();
    let good = text
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if text.len() > 63 || !good {
        return Err(format!("{text:?} can't be a label's value"));
    }
    Ok(text.to_owned())
}

/// Conditions on fields that all must hold; none by default.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Fields(Vec<(String, bool, String)>);

/// Fields that every kind can be selected by.
const COMMON_FIELDS: &[&str] = &["metadata.name", "metadata.namespace"];

/// Further fields that this kind can be selected by.
fn fields_of(group: &str, plural: &str) -> &'static [&'static str] {
    match (group, plural) {
        ("", "pods") => &[
            "spec.nodeName",
            "spec.restartPolicy",
            "spec.serviceAccountName",
            "spec.hostNetwork",
            "status.phase",
            "status.podIP",
            "status.nominatedNodeName",
        ],
        ("", "namespaces") => &["status.phase"],
        ("", "nodes") => &["spec.unschedulable"],
        ("", "secrets") => &["type"],
        ("", "services") => &["spec.clusterIP", "spec.type"],
        ("", "events") => &[
            "involvedObject.kind",
            "involvedObject.namespace",
            "involvedObject.name",
            "involvedObject.uid",
            "involvedObject.apiVersion",
            "involvedObject.resourceVersion",
            "involvedObject.fieldPath",
            "reason",
            "reportingComponent",
            "source",
            "type",
        ],
        ("events.k8s.io", "events") => &[
            "regarding.kind",
            "regarding.namespace",
            "regarding.name",
            "regarding.uid",
            "reason",
            "reportingController",
            "type",
        ],
        ("apps", "replicasets") => &["status.replicas"],
        ("batch", "jobs") => &["status.successful"],
        _ => &[],
    }
}

impl Fields {
    /// Reads the text of a `fieldSelector` for objects of this kind.
    pub fn parse(text: &str, group: &str, plural: &str) -> Result<Self, SelectorError> {
        let mut conditions = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (field, equal, value) = if let Some((field, value)) = part.split_once("!=") {
                (field, false, value)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, true, value)
            } else {
                return Err(SelectorError(format!(
                    "invalid selector: '{text}'; can't understand '{part}'"
                )));
            };
            let further = fields_of(group, plural);
            if !COMMON_FIELDS.contains(&field) && !further.contains(&field) {
                let known = [COMMON_FIELDS, further].concat().join(", ");
                return Err(SelectorError(format!(
                    "field label not supported: {field} (for {plural} there are: {known})"
                )));
            }
            conditions.push((field.to_owned(), equal, value.to_owned()));
        }
        Ok(Self(conditions))
    }

    /// Whether there is no condition.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the name and namespace alone decide, so that nobody has to parse the object.
    pub fn need_only_the_key(&self) -> bool {
        self.0
            .iter()
            .all(|(field, _, _)| COMMON_FIELDS.contains(&field.as_str()))
    }

    /// Whether an object fulfils all. `object` is only asked for when more than its key is needed.
    pub fn matches(&self, namespace: &str, name: &str, object: impl FnOnce() -> Value) -> bool {
        let object = if self.need_only_the_key() {
            Value::Null
        } else {
            object()
        };
        self.0.iter().all(|(field, equal, wanted)| {
            let found = match field.as_str() {
                "metadata.name" => name.to_owned(),
                "metadata.namespace" => namespace.to_owned(),
                "source" => value_at(&object, "source.component"),
                field => value_at(&object, field),
            };
            (found == *wanted) == *equal
        })
    }
}

/// The scalar at a dotted path; "" if there is none, as for a field that is not set. A flag that is not set is false.
fn value_at(object: &Value, path: &str) -> String {
    let found = path.split('.').try_fold(object, |value, step| value.get(step));
    match found {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Bool(flag)) => flag.to_string(),
        Some(Value::Number(number)) => number.to_string(),
        _ if matches!(path, "spec.unschedulable" | "spec.hostNetwork") => "false".to_owned(),
        _ => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn every_operator_selects_what_it_says() {
        let web = labels(&[("app", "web"), ("n", "7"), ("example.com/x", "")]);
        for (text, matches) in [
            ("", true),
            ("app=web", true),
            ("app==web", true),
            ("app = web", true),
            ("app=db", false),
            ("app!=db", true),
            ("app!=web", false),
            ("none!=x", true),
            ("app", true),
            ("!app", false),
            ("!none", true),
            ("app in (db,web)", true),
            ("app in (db, cache)", false),
            ("app notin (db)", true),
            ("app notin(web)", false),
            ("none notin (x)", true),
            ("n>6", true),
            ("n<7", false),
            ("app>6", false),
            ("example.com/x", true),
            ("example.com/x=", true),
            ("app=web,n,!none,n in (7,8)", true),
            ("app=web,n notin (7)", false),
        ] {
            assert_eq!(Labels::parse(text).unwrap().matches(&web), matches, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_understood_is_refused() {
        for text in [
            "a=b=c",
            "a b",
            "a in",
            "a in (x",
            "=x",
            "a>x",
            ",",
            "a=b,,c",
            "ä",
            "a=(",
            "!",
            "a in (b c)",
        ] {
            assert!(Labels::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn fields_of_a_pod_select_it() {
        let pod = json!({"spec": {"nodeName": "a"}, "status": {"phase": "Running"}});
        for (text, matches) in [
            ("", true),
            ("metadata.name=web-1", true),
            ("metadata.name==web-2", false),
            ("metadata.namespace!=shop", false),
            ("spec.nodeName=a,status.phase!=Pending", true),
            ("spec.nodeName=", false),
            ("spec.hostNetwork=false", true),
        ] {
            let fields = Fields::parse(text, "", "pods").unwrap();
            assert_eq!(fields.matches("shop", "web-1", || pod.clone()), matches, "{text}");
        }
    }

    #[test]
    fn a_field_that_is_not_indexed_is_refused_with_those_that_are() {
        let error = Fields::parse("spec.x=1", "", "pods").unwrap_err().0;
        assert!(
            error.starts_with("field label not supported: spec.x") && error.contains("spec.nodeName"),
            "{error}"
        );
        assert!(Fields::parse("nonsense", "", "pods").is_err());
    }
}
