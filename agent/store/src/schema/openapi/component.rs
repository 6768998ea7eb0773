//! Component schemas from the descriptions of types.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::{
    kinds::Kind,
    schema::{Field, ListKind, Shape, Type, defaults::default, document},
};

/// The form of a document.
pub(super) struct Form {
    prefix: &'static str,
    /// A reference is wrapped in `allOf`, since nothing may stand beside it.
    wrapped: bool,
}

/// OpenAPI 3.0.
pub(super) const V3: Form = Form {
    prefix: "#/components/schemas/",
    wrapped: true,
};

/// Swagger 2.0.
pub(super) const V2: Form = Form {
    prefix: "#/definitions/",
    wrapped: false,
};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1";

/// The schemas of a document, with all that they refer to.
pub(super) struct Components {
    form: &'static Form,
    served: Option<(String, String)>,
    schemas: Map<String, Value>,
    /// Places in `document().types` that are referred to and not written yet.
    waiting: BTreeSet<usize>,
}

impl Components {
    /// None yet; of kinds that are served in several versions, only this one is named.
    pub fn new(form: &'static Form, served: Option<(&str, &str)>) -> Self {
        Self {
            form,
            served: served.map(|(group, version)| (group.to_owned(), version.to_owned())),
            schemas: Map::new(),
            waiting: BTreeSet::new(),
        }
    }

    /// A kind and its list. Returns the reference to the kind.
    pub fn kind(&mut self, kind: &Kind, version: &str) -> Value {
        let position = document().types.iter().position(|type_| {
            type_.name == kind.kind
                && type_
                    .served
                    .iter()
                    .any(|(group, v)| *group == kind.group && *v == version)
        });
        let Some(position) = position else {
            return json!({"type": "object"});
        };
        let object = self.reference(position);
        if kind.is_stored()
            && let Some(type_) = document().types.get(position)
        {
            let list = self.list(kind, version, &object);
            self.schemas.insert(format!("{}List", full_name(type_)), list);
        }
        object
    }

    /// A type of meta/v1.
    pub fn meta(&mut self, name: &str) -> Value {
        let is_it = |type_: &Type| type_.package == META && type_.name == name;
        match document().types.iter().position(is_it) {
            Some(position) => self.reference(position),
            None => json!({"type": "object"}),
        }
    }

    /// All schemas.
    pub fn finish(mut self) -> Map<String, Value> {
        while let Some(position) = self.waiting.pop_first() {
            let Some(type_) = document().types.get(position) else {
                continue;
            };
            let name = full_name(type_);
            if !self.schemas.contains_key(&name) {
                let schema = self.type_(type_);
                self.schemas.insert(name, schema);
            }
        }
        self.schemas
    }

    fn list(&mut self, kind: &Kind, version: &str, object: &Value) -> Value {
        let mut properties = Map::new();
        for (name, what) in [
            ("apiVersion", "The version of this form of the list."),
            ("kind", "What the list is."),
        ] {
            properties.insert(name.to_owned(), json!({"type": "string", "description": what}));
        }
        let items = json!({"type": "array", "items": self.beside(object.clone()), "description": "The objects."});
        properties.insert("items".to_owned(), items);
        let metadata = self.meta("ListMeta");
        properties.insert("metadata".to_owned(), self.beside(metadata));
        json!({
            "description": format!("{0}List is a list of {0} objects.", kind.kind),
            "type": "object",
            "required": ["items"],
            "properties": properties,
            "x-kubernetes-group-version-kind": [
                {"group": kind.group, "version": version, "kind": format!("{}List", kind.kind)},
            ],
        })
    }

    fn type_(&mut self, type_: &'static Type) -> Value {
        let mut properties = Map::new();
        for (name, field) in &type_.fields {
            properties.insert((*name).to_owned(), self.field(field));
        }
        let required: Vec<&str> = type_
            .fields
            .iter()
            .filter(|(_, field)| field.required)
            .map(|(name, _)| *name)
            .collect();
        let mut schema = json!({"type": "object"});
        if !type_.description.is_empty() {
            schema["description"] = Value::from(type_.description);
        }
        if !properties.is_empty() {
            schema["properties"] = Value::Object(properties);
        }
        if !required.is_empty() {
            schema["required"] = json!(required);
        }
        if type_.atomic {
            schema["x-kubernetes-map-type"] = Value::from("atomic");
        }
        let here = self.served.as_ref();
        let served = type_
            .served
            .iter()
            .filter(|(g, v)| here.is_none_or(|(group, version)| g == group && v == version));
        let gvks: Vec<Value> = served
            .map(|(group, version)| json!({"group": group, "version": version, "kind": type_.name}))
            .collect();
        if !gvks.is_empty() {
            schema["x-kubernetes-group-version-kind"] = Value::Array(gvks);
        }
        schema
    }

    fn field(&mut self, field: &'static Field) -> Value {
        let shape = self.shape(&field.shape);
        let mut schema = self.beside(shape);
        if !field.description.is_empty() {
            schema["description"] = Value::from(field.description);
        }
        if let Some(default) = default(field) {
            schema["default"] = default;
        }
        if let Shape::List(_) = field.shape {
            schema["x-kubernetes-list-type"] = Value::from(match &field.list {
                ListKind::Atomic => "atomic",
                ListKind::Set => "set",
                ListKind::Map(_) => "map",
            });
        }
        if let ListKind::Map(keys) = &field.list {
            schema["x-kubernetes-list-map-keys"] = json!(keys);
        }
        if field.atomic {
            schema["x-kubernetes-map-type"] = Value::from("atomic");
        }
        let strategy = match (field.merge, field.retain_keys) {
            (true, true) => "merge,retainKeys",
            (true, false) => "merge",
            (false, true) => "retainKeys",
            (false, false) => return schema,
        };
        schema["x-kubernetes-patch-strategy"] = Value::from(strategy);
        if let Some(key) = field.merge_key {
            schema["x-kubernetes-patch-merge-key"] = Value::from(key);
        }
        schema
    }

    fn shape(&mut self, shape: &'static Shape) -> Value {
        match shape {
            Shape::Any => json!({"type": "object", "x-kubernetes-preserve-unknown-fields": true}),
            Shape::Scalar(name) => self.scalar(name),
            Shape::List(element) => {
                let element = self.shape(element);
                json!({"type": "array", "items": self.beside(element)})
            }
            Shape::Map(element) => {
                let element = self.shape(element);
                json!({"type": "object", "additionalProperties": self.beside(element)})
            }
            Shape::Struct(position) => self.reference(*position),
        }
    }

    fn scalar(&mut self, name: &str) -> Value {
        let (full, description, schema) = match name {
            "bytes" => return json!({"type": "string", "format": "byte"}),
            "int" => return json!({"type": "integer", "format": "int32"}),
            "int64" => return json!({"type": "integer", "format": "int64"}),
            "number" => return json!({"type": "number", "format": "double"}),
            "bool" => return json!({"type": "boolean"}),
            "time" => (
                "io.k8s.apimachinery.pkg.apis.meta.v1.Time",
                "A time in RFC 3339 form, in whole seconds.",
                json!({"type": "string", "format": "date-time"}),
            ),
            "micro-time" => (
                "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime",
                "A time in RFC 3339 form, with microseconds.",
                json!({"type": "string", "format": "date-time"}),
            ),
            "quantity" => (
                "io.k8s.apimachinery.pkg.api.resource.Quantity",
                "A number with a unit, such as 100m, 1.5, 2Gi or 1e3.",
                json!({"oneOf": [{"type": "string"}, {"type": "number"}]}),
            ),
            "int-or-string" => (
                "io.k8s.apimachinery.pkg.util.intstr.IntOrString",
                "A number, or a name or percentage.",
                json!({"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]}),
            ),
            _ => return json!({"type": "string"}),
        };
        let mut schema = schema;
        if !self.form.wrapped && schema.get("oneOf").is_some() {
            // Swagger 2.0 knows no alternatives.
            schema = json!({"type": "string"});
        }
        schema["description"] = Value::from(description);
        self.schemas.insert(full.to_owned(), schema);
        json!({"$ref": format!("{}{full}", self.form.prefix)})
    }

    fn reference(&mut self, position: usize) -> Value {
        let Some(type_) = document().types.get(position) else {
            return json!({"type": "object"});
        };
        self.waiting.insert(position);
        if self.schemas.contains_key(&full_name(type_)) {
            self.waiting.remove(&position);
        }
        json!({"$ref": format!("{}{}", self.form.prefix, full_name(type_))})
    }

    /// A schema that something may be added to.
    fn beside(&self, schema: Value) -> Value {
        if self.form.wrapped && schema.get("$ref").is_some() {
            return json!({"allOf": [schema]});
        }
        schema
    }
}

fn full_name(type_: &Type) -> String {
    format!("{}.{}", type_.package, type_.name)
}
