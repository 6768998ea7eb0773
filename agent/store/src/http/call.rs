//! One request, read: who asks, for what, in which form, with which body.
//!
//! The body is bounded in size and in time; nothing of it is looked at before the user is known to be allowed
//! (`dispatch`). JSON, YAML and protobuf are read, CBOR is refused with 415, which says what is read.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde_json::Value;

use super::{accept::Accepted, protobuf, query::Query, route::Resource};
use crate::{auth::rules::User, engine::ApiError, patch::default_manager};

/// The largest body, as in Kubernetes.
pub const MAX_BODY: usize = 3 << 20;
/// Brackets that may be open at once in YAML; text may have some, too.
const MOST_OPEN: usize = 256;

/// A request for resources.
pub struct Call {
    /// Who asks.
    pub user: User,
    /// How.
    pub method: Method,
    /// For what.
    pub resource: Resource,
    /// With which parameters.
    pub query: Query,
    /// What the client can read.
    pub accepted: Accepted,
    /// The body's media type, without parameters; "" if nothing is said.
    pub media_type: String,
    /// The client's name.
    pub user_agent: String,
    /// The body.
    pub body: Bytes,
}

impl Call {
    /// Who owns the fields that this request sets.
    pub fn manager(&self) -> &str {
        if self.query.manager.is_empty() {
            default_manager(&self.user_agent)
        } else {
            &self.query.manager
        }
    }

    /// The body as an object.
    pub fn object(&self) -> Result<Value, ApiError> {
        read_body(&self.media_type, &self.body)
    }
}

/// An object, as its media type says it is written.
///
/// # Errors
///
/// 415 for a form that is not read here, 400 for what is no object in that form.
pub fn read_body(media_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    match media_type {
        "" | "application/json" | "text/plain" => read(body, true),
        "application/yaml" => read(body, false),
        "application/vnd.kubernetes.protobuf" => protobuf::read(body),
        _ => Err(ApiError::unsupported_media_type(
            "application/json, application/yaml, application/vnd.kubernetes.protobuf",
        )),
    }
}

/// A map, from JSON, or from YAML if it is none.
pub fn read(body: &[u8], only_json: bool) -> Result<Value, ApiError> {
    let value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(error) if only_json => {
            let what = format!("the object provided is unrecognized: it is not JSON: {error}");
            return Err(ApiError::bad_request(what));
        }
        Err(_) if opens_too_much(body) => return Err(ApiError::bad_request("the body is nested too deeply")),
        Err(_) => serde_yaml_ng::from_slice(body)
            .map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?,
    };
    match value {
        Value::Object(_) => Ok(value),
        _ => Err(ApiError::bad_request(
            "the object provided is unrecognized: it is not a map",
        )),
    }
}

/// Whether there are more brackets open at once than any object has. The reader of YAML looks at all of them at each
/// further word, and only at the end finds that there are too many.
fn opens_too_much(yaml: &[u8]) -> bool {
    let mut open = 0usize;
    yaml.iter().any(|byte| {
        match byte {
            b'[' | b'{' => open += 1,
            b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        open > MOST_OPEN
    })
}

/// Reads a body to its end, which has to come in time.
pub async fn body(incoming: Incoming, within: Duration) -> Result<Bytes, ApiError> {
    let reading = Limited::new(incoming, MAX_BODY).collect();
    match tokio::time::timeout(within, reading).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::too_large(MAX_BODY)),
        Ok(Err(error)) => Err(ApiError::bad_request(format!("the body could not be read: {error}"))),
        Err(_) => Err(ApiError {
            code: 408,
            reason: "Timeout",
            message: format!("the body did not arrive within {within:?}"),
            details: None,
        }),
    }
}

/// A header's text; "" if it is not there or no text.
pub fn text(headers: &HeaderMap, name: header::HeaderName) -> &str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn yaml_is_read_where_it_may_be_and_json_always() {
        assert_eq!(read(b"{\"a\": 1}", true).unwrap()["a"], 1);
        assert_eq!(read(b"a: 1\n", false).unwrap()["a"], 1);
        assert!(read(b"a: 1\n", true).unwrap_err().message.contains("not JSON"));
        let deep = "[".repeat(1_000_000);
        assert!(read(deep.as_bytes(), false).unwrap_err().message.contains("too deeply"));
        for bad in [&b""[..], b"[]", b"\"x\"", b"a: [", b"\xff", b"{\"a\":"] {
            assert_eq!(read(bad, false).unwrap_err().code, 400, "{bad:?}");
        }
    }
}
