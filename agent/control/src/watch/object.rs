//! An object of any kind as the API's JSON, for `kube`'s watcher; what nobody here needs of it is dropped at the door.

use std::borrow::Cow;

use kube::{Resource, api::ObjectMeta, core::DynamicResourceScope, discovery::ApiResource};
use serde::{Deserialize, Deserializer, de::Error};
use serde_json::Value;

/// JSON without `managedFields`, which is often the larger part.
#[derive(Clone, Debug)]
pub struct Raw {
    /// The object.
    pub value: Value,
    /// Name, namespace, uid and version of it.
    meta: ObjectMeta,
}

impl Raw {
    /// Its namespace; empty if it has none.
    pub fn namespace(&self) -> &str {
        self.meta.namespace.as_deref().unwrap_or_default()
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.meta.name.as_deref().unwrap_or_default()
    }

    /// Its `resourceVersion` as a number, which it is wherever etcd or the embedded store is behind the API; else 0.
    pub fn revision(&self) -> u64 {
        let text = self.meta.resource_version.as_deref();
        text.and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Tells this state of it from every other.
    pub fn version(&self) -> (Box<str>, Box<str>) {
        let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
        (text(&self.meta.uid), text(&self.meta.resource_version))
    }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut value = Value::deserialize(deserializer)?;
        let metadata = value.get_mut("metadata").and_then(Value::as_object_mut);
        let metadata = metadata.ok_or_else(|| D::Error::custom("an object without metadata"))?;
        metadata.remove("managedFields");
        let text = |key: &str| metadata.get(key).and_then(Value::as_str).map(str::to_owned);
        let meta = ObjectMeta {
            name: text("name"),
            namespace: text("namespace"),
            uid: text("uid"),
            resource_version: text("resourceVersion"),
            ..ObjectMeta::default()
        };
        Ok(Self { value, meta })
    }
}

impl Resource for Raw {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn managed_fields_are_dropped_at_the_door() {
        let text = r#"{"metadata": {"name": "a", "uid": "u", "resourceVersion": "7", "managedFields": [{}]}, "x": 1}"#;
        let raw: Raw = serde_json::from_str(text).unwrap();
        assert_eq!((raw.namespace(), raw.name()), ("", "a"));
        assert!(raw.value["metadata"].get("managedFields").is_none());
        assert_eq!(raw.value["x"], 1);
        assert!(serde_json::from_str::<Raw>(r#"{"x": 1}"#).is_err());
    }
}
