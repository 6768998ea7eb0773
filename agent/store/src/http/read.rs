//! `get` and `list`.
//!
//! A list is one moment, whole or in pages (`pages`); selectors are asked once per object. Objects are shown as they
//! are kept, byte for byte, unless another version, a table or only metadata is asked for.

use std::sync::Arc;

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::{Value, json};

use super::{
    accept::{Format, Shape},
    answer::{self, Answer, shown, shown_value},
    call::Call,
    dispatch::Api,
    pages::{Snapshot, Token},
    query::Match,
    shape,
};
use crate::engine::{ApiError, Cause, Details, Key, Object};

/// One object.
pub fn get(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    not_in_the_future(api, call.query.revision)?;
    let resource = &call.resource;
    let object = api
        .engine
        .get(&Key::new(resource.kind, &resource.namespace, &resource.name));
    let object = object.ok_or_else(|| ApiError::not_found(resource.kind, &resource.name))?;
    one(call, 200, &object)
}

/// An object as an answer, in the shape and format that was asked for.
pub fn one(call: &Call, code: u16, object: &Object) -> Result<Answer, ApiError> {
    let (kind, version) = (call.resource.kind, call.resource.version);
    Ok(match (call.accepted.shape, call.accepted.format) {
        (Shape::Whole, Format::Json) => answer::json_text(code, shown(object, kind, version)),
        (Shape::Whole, format) => answer::value(code, format, &shown_value(object, kind, version)),
        (Shape::Table, format) => {
            let rows = vec![shown_value(object, kind, version)];
            answer::value(
                code,
                format,
                &shape::table(kind, rows, call.query.include, Some(object.revision)),
            )
        }
        (Shape::Metadata, format) => {
            let partial = shape::metadata(shown_value(object, kind, version));
            answer::value(code, format, &partial)
        }
        (Shape::MetadataList | Shape::AggregatedDiscovery, _) => return Err(ApiError::not_acceptable(ACCEPTABLE)),
    })
}

/// What an object or a list can be written as.
const ACCEPTABLE: &str = "application/json, application/yaml, application/json;as=Table;g=meta.k8s.io;v=v1, \
                          application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1, \
                          application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";

/// All objects that are selected, or a page of them.
pub fn list(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let page = page(api, call)?;
    let kind = call.resource.kind;
    let values = || -> Vec<Value> {
        let objects = page.objects.iter();
        objects
            .map(|object| shown_value(object, kind, call.resource.version))
            .collect()
    };
    let format = call.accepted.format;
    let list = match call.accepted.shape {
        Shape::Whole if format == Format::Json => return Ok(answer::json_text(200, page.json(call))),
        Shape::Whole => {
            let api_version = kind.api_version(call.resource.version);
            json!({"kind": format!("{}List", kind.kind), "apiVersion": api_version, "items": values()})
        }
        Shape::Table => shape::table(kind, values(), call.query.include, None),
        Shape::Metadata | Shape::MetadataList => json!({
            "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1",
            "items": values().into_iter().map(shape::metadata).collect::<Vec<_>>(),
        }),
        Shape::AggregatedDiscovery => return Err(ApiError::not_acceptable(ACCEPTABLE)),
    };
    let mut list = list;
    list["metadata"] = page.metadata();
    Ok(answer::value(200, format, &list))
}

/// What one answer shows.
struct Page {
    revision: u64,
    objects: Vec<Arc<Object>>,
    next: Option<Token>,
    remaining: Option<usize>,
}

impl Page {
    fn metadata(&self) -> Value {
        let mut metadata = json!({"resourceVersion": self.revision.to_string()});
        if let Some(next) = &self.next {
            metadata["continue"] = next.encode().into();
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        metadata
    }

    /// The list as text, without parsing what is text already.
    fn json(&self, call: &Call) -> Bytes {
        let (kind, version) = (call.resource.kind, call.resource.version);
        let size: usize = self.objects.iter().map(|object| object.json.len() + 1).sum();
        let mut text = BytesMut::with_capacity(size + 256);
        let head = format!(
            r#"{{"kind":"{}List","apiVersion":"{}","metadata":{},"items":["#,
            kind.kind,
            kind.api_version(version),
            self.metadata()
        );
        text.put(head.as_bytes());
        for (at, object) in self.objects.iter().enumerate() {
            if at > 0 {
                text.put_u8(b',');
            }
            text.put(shown(object, kind, version));
        }
        text.put(&b"]}"[..]);
        text.freeze()
    }
}

/// Whether a request's selectors select an object.
pub fn selected(call: &Call, object: &Object) -> bool {
    let (kind, version) = (call.resource.kind, call.resource.version);
    call.query.labels.matches(&object.labels)
        && call.query.fields.matches(&object.key.namespace, &object.key.name, || {
            shown_value(object, kind, version)
        })
}

/// The namespace to look in; `None` for all.
pub fn namespace(call: &Call) -> Option<&str> {
    Some(call.resource.namespace.as_str()).filter(|namespace| !namespace.is_empty())
}

fn page(api: &Api, call: &Call) -> Result<Page, ApiError> {
    let (snapshot, after) = snapshot(api, call)?;
    let start = after.map_or(0, |after| {
        let key = (after.namespace.as_str(), after.name.as_str());
        snapshot
            .objects
            .partition_point(|object| (&*object.key.namespace, &*object.key.name) <= key)
    });
    let limit = if call.query.limit == 0 {
        usize::MAX
    } else {
        call.query.limit
    };
    let mut objects = Vec::new();
    let mut rest = snapshot.objects[start..].iter().enumerate();
    let mut seen = 0;
    for (at, object) in rest.by_ref() {
        seen = at + 1;
        if selected(call, object) {
            objects.push(object.clone());
            if objects.len() == limit {
                break;
            }
        }
    }
    let left = snapshot.objects.len() - start - seen;
    let more = rest.any(|(_, object)| selected(call, object));
    let next = objects.last().filter(|_| more).map(|last| Token {
        revision: snapshot.revision,
        namespace: last.key.namespace.to_string(),
        name: last.key.name.to_string(),
    });
    if next.is_some() {
        api.pages.keep(call.resource.kind, &call.resource.namespace, &snapshot);
    }
    let unselected = call.query.labels.is_empty() && call.query.fields.is_empty();
    Ok(Page {
        revision: snapshot.revision,
        objects,
        remaining: next.as_ref().filter(|_| unselected).map(|_| left),
        next,
    })
}

/// The moment that a list shows, and where in it to go on.
fn snapshot(api: &Api, call: &Call) -> Result<(Snapshot, Option<Token>), ApiError> {
    let (kind, query) = (call.resource.kind, &call.query);
    if !query.next.is_empty() {
        let token = Token::decode(&query.next)?;
        let snapshot = api.pages.find(kind, &call.resource.namespace, token.revision)?;
        return Ok((snapshot, Some(token)));
    }
    not_in_the_future(api, query.revision)?;
    let (revision, objects) = api.engine.list(kind.stored(), namespace(call));
    if let (Some(wanted), Some(Match::Exact)) = (query.revision, query.revision_match)
        && wanted != revision
    {
        let why = "The resourceVersion for the provided list is too old: this server shows only the current one";
        return Err(ApiError::gone(format!(
            "{why} ({wanted} was asked for, {revision} is current)."
        )));
    }
    let objects = objects.into();
    Ok((Snapshot { revision, objects }, None))
}

/// A revision that was not yet, as after the loss of a data directory: clients know these words, and list anew.
pub fn not_in_the_future(api: &Api, wanted: Option<u64>) -> Result<(), ApiError> {
    let current = api.engine.revision();
    let Some(wanted) = wanted.filter(|wanted| *wanted > current) else {
        return Ok(());
    };
    let mut error = ApiError::timeout(format!("Too large resource version: {wanted}, current: {current}"));
    error.details = Some(Box::new(Details {
        causes: vec![Cause {
            reason: "ResourceVersionTooLarge",
            message: "Too large resource version".into(),
            field: String::new(),
        }],
        retry_after_seconds: Some(1),
        ..Details::default()
    }));
    Err(error)
}
