//! `/openapi/v2` and `/openapi/v3`: the documents of `schema`, as JSON.

use serde_json::Value;

use super::{
    accept::Format,
    answer::{self, Answer},
};
use crate::{engine::ApiError, schema};

/// The answer, if the path is one of these documents'.
pub fn answer(path: &str, accept: &str) -> Option<Answer> {
    let place = path.strip_prefix("/openapi/")?.trim_end_matches('/');
    let document = match place.split('/').collect::<Vec<_>>().as_slice() {
        ["v2"] => schema::openapi_v2(),
        ["v3"] => schema::openapi_v3_index(),
        ["v3", "api", version] => found(schema::openapi_v3("", version)),
        ["v3", "apis", group, version] => found(schema::openapi_v3(group, version)),
        _ => Value::Null,
    };
    if document.is_null() {
        return Some(answer::refusal(&ApiError::no_such_resource()));
    }
    // The protobuf forms are not made: who takes only those has to do without.
    if !accept.is_empty()
        && !["json", "*/*", "application/*"]
            .iter()
            .any(|known| accept.contains(known))
    {
        return Some(answer::refusal(&ApiError::not_acceptable("application/json")));
    }
    Some(answer::value(200, Format::Json, &document))
}

fn found(document: Option<Value>) -> Value {
    document.unwrap_or_default()
}
