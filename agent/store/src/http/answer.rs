//! Answers: bodies, `metav1.Status`, warnings, JSON or YAML.

use std::convert::Infallible;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use serde_json::{Value, json};

use super::accept::Format;
use crate::{engine::ApiError, engine::Object, kinds::Kind};

/// What is sent: all at once, or as it happens.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;
/// An answer.
pub type Answer = Response<Body>;

/// The most warnings in one answer, and the longest, in bytes: headers are bounded.
const MAX_WARNINGS: usize = 32;
const MAX_WARNING: usize = 512;

/// A body that is all there.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// An answer of this media type.
pub fn plain(code: u16, media_type: &'static str, bytes: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(full(bytes));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    answer
}

/// JSON that is text already.
pub fn json_text(code: u16, text: impl Into<Bytes>) -> Answer {
    plain(code, "application/json", text)
}

/// A value, as the client can read it.
pub fn value(code: u16, format: Format, value: &Value) -> Answer {
    match format {
        Format::Json => json_text(code, value.to_string()),
        Format::Yaml => match serde_yaml_ng::to_string(value) {
            Ok(text) => plain(code, "application/yaml", text),
            Err(error) => refusal(&ApiError::internal(error)),
        },
    }
}

/// An answer that says no.
pub fn refusal(error: &ApiError) -> Answer {
    let mut answer = json_text(error.code, error.status().to_string());
    let after = error.details.as_ref().and_then(|details| details.retry_after_seconds);
    if let Some(seconds) = after {
        answer
            .headers_mut()
            .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    }
    answer
}

/// The `Status` of something that was done and left no object to show.
pub fn success(kind: &Kind, name: &str, uid: &str) -> Value {
    let mut details = json!({"name": name, "kind": kind.plural, "uid": uid});
    if !kind.group.is_empty() {
        details["group"] = kind.group.into();
    }
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details})
}

/// Adds `Warning` headers, which kubectl prints.
pub fn warn(answer: &mut Answer, warnings: &[String]) {
    for warning in warnings.iter().take(MAX_WARNINGS) {
        let text: String = warning
            .chars()
            .filter(|letter| !letter.is_control())
            .take(MAX_WARNING)
            .collect();
        let text = text.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_str(&format!("299 - \"{text}\"")) {
            answer.headers_mut().append(header::WARNING, value);
        }
    }
}

/// An object in the version that was asked for.
pub fn shown(object: &Object, kind: &'static Kind, version: &str) -> Bytes {
    if object.key.kind == kind && kind.storage == version {
        return object.json.clone();
    }
    shown_value(object, kind, version).to_string().into()
}

/// The same, parsed.
pub fn shown_value(object: &Object, kind: &'static Kind, version: &str) -> Value {
    let mut value = object.value();
    if object.key.kind != kind || kind.storage != version {
        crate::kinds::from_storage(kind, version, &mut value);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_quoted_and_bounded() {
        let mut answer = json_text(200, "{}");
        warn(&mut answer, &["unknown field \"a\"\n".to_owned(), "x".repeat(9999)]);
        let warnings: Vec<_> = answer.headers().get_all(header::WARNING).iter().collect();
        assert_eq!(warnings[0], r#"299 - "unknown field \"a\"""#);
        assert!(warnings[1].len() < 600);
    }
}
