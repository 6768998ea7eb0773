//! Text to objects: documents, lists, kinds; each object on its own, so that a bad one spoils no other.

use std::collections::BTreeMap;

use serde::{Deserialize, de::DeserializeOwned};
use serde_yaml_ng::Value;

use crate::{
    AuthorizationPolicy, Effect, Finding, Metadata, Namespace, ObjectRef, PeerAuthentication, Place, Pod, Problem,
    Selector, Service, ServiceAccount, meta::check_name,
};

/// The objects that can be used, each with the place it came from, in the order of the manifests.
#[derive(Clone, Debug, Default)]
pub struct Objects {
    /// Namespaces.
    pub namespaces: Vec<(Place, Namespace)>,
    /// Service accounts.
    pub service_accounts: Vec<(Place, ServiceAccount)>,
    /// Pods.
    pub pods: Vec<(Place, Pod)>,
    /// Services.
    pub services: Vec<(Place, Service)>,
    /// `security.istio.io` PeerAuthentications.
    pub peer_authentications: Vec<(Place, PeerAuthentication)>,
    /// `security.istio.io` AuthorizationPolicies.
    pub authorization_policies: Vec<(Place, AuthorizationPolicy)>,
    /// Security policies that could not be read: what they may have selected is closed.
    pub unreadable_policies: Vec<(ObjectRef, Selector)>,
    /// What was not taken, and why.
    pub findings: Vec<Finding>,
}

impl Objects {
    /// A namespace's labels and annotations; none where the manifests do not define it.
    pub fn namespace(&self, name: &str) -> Option<&Metadata> {
        let found = self
            .namespaces
            .iter()
            .find(|(_, namespace)| namespace.metadata.name == name);
        found.map(|(_, namespace)| &namespace.metadata)
    }
}

/// Reads manifests: pairs of file name and text.
pub fn parse<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Objects {
    let mut reader = Reader::default();
    for (file, text) in files {
        for (index, document) in documents(text).into_iter().enumerate() {
            let place = Place {
                file: file.to_owned(),
                document: index + 1,
                item: None,
            };
            reader.document(place, document);
        }
    }
    reader.objects
}

/// The documents of a YAML stream, cut at `---` lines before they are parsed: the parser gives up at the first error.
pub fn documents(text: &str) -> Vec<&str> {
    let mut documents = Vec::new();
    let (mut start, mut at) = (0, 0);
    for line in text.split_inclusive('\n') {
        let bare = line.trim_end();
        if bare == "---" || bare.starts_with("--- ") {
            documents.push(&text[start..at]);
            // What stands after `--- ` belongs to the new document.
            start = at + 3;
        }
        at += line.len();
    }
    documents.push(&text[start..]);
    // A stream that begins with `---` has no document before it; comments alone are none either.
    documents.retain(|document| {
        let is_blank = |line: &str| line.trim().is_empty() || line.trim_start().starts_with(['#', '%']);
        !document.lines().all(is_blank)
    });
    documents
}

#[derive(Default)]
struct Reader {
    objects: Objects,
    seen: BTreeMap<(String, String, String), Place>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    #[serde(default)]
    api_version: String,
    kind: String,
}

impl Reader {
    fn document(&mut self, place: Place, text: &str) {
        let value = match serde_yaml_ng::from_str::<Value>(text) {
            Ok(Value::Null) => return,
            Ok(value) => value,
            Err(error) => {
                let problem = Problem::Syntax(error.to_string());
                return self.find(place, ObjectRef::default(), "", problem, Effect::Refused);
            }
        };
        let is_list = |kind: &str| kind.ends_with("List");
        if value.get("kind").and_then(Value::as_str).is_some_and(is_list)
            && let Some(items) = value.get("items").and_then(Value::as_sequence)
        {
            for (index, item) in items.iter().enumerate() {
                let item_place = Place {
                    item: Some(index + 1),
                    ..place.clone()
                };
                self.object(item_place, item.clone());
            }
            return;
        }
        self.object(place, value);
    }

    fn object(&mut self, place: Place, value: Value) {
        let is_policy = |kind: &str| matches!(kind, "PeerAuthentication" | "AuthorizationPolicy");
        let text = |path: &[&str]| {
            let found = path.iter().try_fold(&value, |value, key| value.get(key));
            found.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let mut object = ObjectRef {
            kind: text(&["kind"]),
            namespace: text(&["metadata", "namespace"]),
            name: text(&["metadata", "name"]),
        };
        if !value.is_mapping() {
            let problem = Problem::NotAnObject("it is not a mapping");
            return self.find(place, object, "", problem, Effect::Refused);
        }
        let header = match serde_path_to_error::deserialize::<_, Header>(value.clone()) {
            Ok(header) => header,
            Err(error) => {
                let problem = Problem::Invalid(error.inner().to_string());
                return self.find(place, object, &error.path().to_string(), problem, Effect::Refused);
            }
        };
        if object.kind != "Namespace" && object.namespace.is_empty() {
            object.namespace = "default".to_owned();
        }
        if let Err((field, why)) = check_names(&header, &object) {
            let effect = if is_policy(&object.kind) && field == "metadata.name" {
                self.objects
                    .unreadable_policies
                    .push((object.clone(), selector(&value)));
                Effect::Closed
            } else {
                Effect::Refused
            };
            return self.find(place, object, field, Problem::Invalid(why), effect);
        }
        let key = (object.kind.clone(), object.namespace.clone(), object.name.clone());
        if let Some(first) = self.seen.get(&key) {
            let problem = Problem::Duplicate(first.clone());
            return self.find(place, object, "metadata.name", problem, Effect::Refused);
        }
        self.seen.insert(key, place.clone());
        self.typed(place, object, &header.api_version, value);
    }

    fn typed(&mut self, place: Place, object: ObjectRef, api_version: &str, value: Value) {
        let group = api_version.split_once('/').map_or("", |(group, _)| group);
        match (group, object.kind.as_str()) {
            ("", "Namespace") => {
                if let Some(mut namespace) = self.read::<Namespace>(&place, &object, value) {
                    namespace.metadata.namespace.clear();
                    self.objects.namespaces.push((place, namespace));
                }
            }
            ("", "ServiceAccount") => {
                if let Some(mut account) = self.read::<ServiceAccount>(&place, &object, value) {
                    account.metadata.namespace = object.namespace;
                    self.objects.service_accounts.push((place, account));
                }
            }
            ("", "Pod") => {
                let Some(mut pod) = self.read::<Pod>(&place, &object, value) else {
                    return;
                };
                pod.metadata.namespace = object.namespace.clone();
                match pod.check() {
                    Ok(()) => self.objects.pods.push((place, pod)),
                    Err((field, problem)) => self.find(place, object, &field, problem, Effect::Refused),
                }
            }
            ("", "Service") => {
                let Some(mut service) = self.read::<Service>(&place, &object, value) else {
                    return;
                };
                service.metadata.namespace = object.namespace.clone();
                match service.check() {
                    Ok(()) => self.objects.services.push((place, service)),
                    Err((field, problem)) => self.find(place, object, &field, problem, Effect::Refused),
                }
            }
            ("security.istio.io", "PeerAuthentication") => {
                let Some(mut policy) = self.read_policy::<PeerAuthentication>(&place, &object, value) else {
                    return;
                };
                policy.metadata.namespace = object.namespace;
                self.objects.peer_authentications.push((place, policy));
            }
            ("security.istio.io", "AuthorizationPolicy") => {
                let Some(mut policy) = self.read_policy::<AuthorizationPolicy>(&place, &object, value) else {
                    return;
                };
                policy.metadata.namespace = object.namespace;
                self.objects.authorization_policies.push((place, policy));
            }
            _ => {
                let problem = Problem::UnknownKind(format!("{api_version} {}", object.kind));
                self.find(place, object, "kind", problem, Effect::Refused);
            }
        }
    }

    /// An object whose unknown fields have no meaning here: each is noted.
    fn read<T: DeserializeOwned>(&mut self, place: &Place, object: &ObjectRef, value: Value) -> Option<T> {
        match deserialize(value) {
            Ok((read, unknown)) => {
                for field in unknown {
                    self.find(
                        place.clone(),
                        object.clone(),
                        &field,
                        Problem::NotActedUpon,
                        Effect::Note,
                    );
                }
                Some(read)
            }
            Err((field, why)) => {
                let problem = Problem::Invalid(why);
                self.find(place.clone(), object.clone(), &field, problem, Effect::Refused);
                None
            }
        }
    }

    /// A security policy: an unknown field may be what makes it strict, so it must be understood as a whole.
    fn read_policy<T: DeserializeOwned>(&mut self, place: &Place, object: &ObjectRef, value: Value) -> Option<T> {
        let selector = selector(&value);
        let (field, problem) = match deserialize(value) {
            Ok((read, unknown)) => match unknown.into_iter().next() {
                None => return Some(read),
                Some(field) => (field, Problem::Invalid("no such field".to_owned())),
            },
            Err((field, why)) => (field, Problem::Invalid(why)),
        };
        self.objects.unreadable_policies.push((object.clone(), selector));
        self.find(place.clone(), object.clone(), &field, problem, Effect::Closed);
        None
    }

    fn find(&mut self, place: Place, object: ObjectRef, field: &str, problem: Problem, effect: Effect) {
        let finding = Finding {
            place,
            object,
            field: if field == "." { String::new() } else { field.to_owned() },
            problem,
            effect,
        };
        self.objects.findings.push(finding);
    }
}

/// Whom an unreadable policy selects, if that much of it can be read; else everybody.
fn selector(value: &Value) -> Selector {
    let written = value.get("spec").and_then(|spec| spec.get("selector")).cloned();
    written
        .and_then(|selector| serde_yaml_ng::from_value(selector).ok())
        .unwrap_or_default()
}

fn check_names(header: &Header, object: &ObjectRef) -> Result<(), (&'static str, String)> {
    if header.kind.is_empty() || header.api_version.is_empty() {
        return Err(("apiVersion", "apiVersion and kind must be given".to_owned()));
    }
    let dots = !matches!(header.kind.as_str(), "Namespace" | "Service");
    check_name(&object.name, dots).map_err(|why| ("metadata.name", why))?;
    if header.kind != "Namespace" {
        check_name(&object.namespace, false).map_err(|why| ("metadata.namespace", why))?;
    }
    Ok(())
}

/// The value, and the paths that nothing read; or the path that could not be read, and why.
pub(crate) fn deserialize<'de, T, D>(value: D) -> Result<(T, Vec<String>), (String, String)>
where
    T: DeserializeOwned,
    D: serde::Deserializer<'de>,
    D::Error: std::fmt::Display,
{
    let mut unknown = Vec::new();
    let mut ignored = |path: serde_ignored::Path<'_>| {
        let path = field_path(&path);
        let of_api = |root: &str| path == root || path.starts_with(&format!("{root}."));
        if !["apiVersion", "kind", "metadata", "status"].into_iter().any(of_api) {
            unknown.push(path);
        }
    };
    let read = serde_path_to_error::deserialize(serde_ignored::Deserializer::new(value, &mut ignored))
        .map_err(|error| (error.path().to_string(), error.inner().to_string()))?;
    Ok((read, unknown))
}

/// The path as a person writes it: `spec.rules[0].from`.
fn field_path(path: &serde_ignored::Path<'_>) -> String {
    use serde_ignored::Path;
    match path {
        Path::Root => String::new(),
        Path::Seq { parent, index } => format!("{}[{index}]", field_path(parent)),
        Path::Map { parent, key } => match field_path(parent) {
            parent if parent.is_empty() => key.clone(),
            parent => format!("{parent}.{key}"),
        },
        Path::Some { parent } | Path::NewtypeStruct { parent } | Path::NewtypeVariant { parent } => field_path(parent),
    }
}
