//! What a request was refused for, as `metav1.Status`: kubectl prints the message as it stands here.
//!
//! The words are those of Kubernetes (`k8s.io/apimachinery/pkg/api/errors`, `.../util/validation/field`), since people
//! and programs know them (`messages_are_those_of_kubernetes`).

use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};

use crate::kinds::Kind;

/// A refusal.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// The HTTP status.
    pub code: u16,
    /// `NotFound`, `Conflict`, …: what programs look at.
    pub reason: &'static str,
    /// What people read.
    pub message: String,
    /// Of which object, and which fields.
    pub details: Option<Box<Details>>,
}

/// `StatusDetails`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Details {
    /// The object's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// The API group.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    /// The resource (`pods`); of an invalid object its kind (`Pod`).
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// The uid, where a precondition was about it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The fields.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    /// When to try again.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

/// One field that is wrong.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cause {
    /// `FieldValueInvalid`, …
    pub reason: &'static str,
    /// Why, without the field.
    pub message: String,
    /// Its path: `spec.ports[0].port`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub field: String,
}

impl Cause {
    fn new(reason: &'static str, field: impl Into<String>, message: String) -> Self {
        Self {
            reason,
            message,
            field: field.into(),
        }
    }

    /// The field has to be there.
    pub fn required(field: impl Into<String>, why: &str) -> Self {
        let message = if why.is_empty() {
            "Required value".to_owned()
        } else {
            format!("Required value: {why}")
        };
        Self::new("FieldValueRequired", field, message)
    }

    /// The value can't be.
    pub fn invalid(field: impl Into<String>, value: impl Into<Value>, why: impl fmt::Display) -> Self {
        Self::new(
            "FieldValueInvalid",
            field,
            format!("Invalid value: {}: {why}", value.into()),
        )
    }

    /// The value is of the wrong type.
    pub fn type_invalid(field: impl Into<String>, value: impl Into<Value>, why: impl fmt::Display) -> Self {
        Self::new(
            "FieldValueTypeInvalid",
            field,
            format!("Invalid value: {}: {why}", value.into()),
        )
    }

    /// The value is none of the known ones.
    pub fn not_supported(field: impl Into<String>, value: impl Into<Value>, known: &[&str]) -> Self {
        let known: Vec<String> = known.iter().map(|known| format!("{known:?}")).collect();
        let message = format!(
            "Unsupported value: {}: supported values: {}",
            value.into(),
            known.join(", ")
        );
        Self::new("FieldValueNotSupported", field, message)
    }

    /// The value is there twice.
    pub fn duplicate(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new(
            "FieldValueDuplicate",
            field,
            format!("Duplicate value: {}", value.into()),
        )
    }

    /// The field may not be set, or not be changed.
    pub fn forbidden(field: impl Into<String>, why: impl fmt::Display) -> Self {
        Self::new("FieldValueForbidden", field, format!("Forbidden: {why}"))
    }

    /// Something referred to is not there.
    pub fn not_found(field: impl Into<String>, value: impl Into<Value>) -> Self {
        Self::new("FieldValueNotFound", field, format!("Not found: {}", value.into()))
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.field.is_empty() {
            return f.write_str(&self.message);
        }
        write!(f, "{}: {}", self.field, self.message)
    }
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    fn of(mut self, kind: &Kind, name: &str) -> Self {
        self.details = Some(Box::new(Details {
            name: name.to_owned(),
            group: kind.group.to_owned(),
            kind: kind.plural.to_owned(),
            ..Details::default()
        }));
        self
    }

    /// 404: no such object.
    pub fn not_found(kind: &Kind, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{kind} {name:?} not found")).of(kind, name)
    }

    /// 404: nothing is served at that URL.
    pub fn no_such_resource() -> Self {
        let mut error = Self::new(404, "NotFound", "the server could not find the requested resource");
        error.details = Some(Box::default());
        error
    }

    /// 409: there is one of that name.
    pub fn already_exists(kind: &Kind, name: &str) -> Self {
        Self::new(409, "AlreadyExists", format!("{kind} {name:?} already exists")).of(kind, name)
    }

    /// 409: the object is another than the one that the request is about.
    pub fn conflict(kind: &Kind, name: &str, why: impl fmt::Display) -> Self {
        let message = format!("Operation cannot be fulfilled on {kind} {name:?}: {why}");
        Self::new(409, "Conflict", message).of(kind, name)
    }

    /// 409: written by somebody else since it was read.
    pub fn modified(kind: &Kind, name: &str) -> Self {
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        Self::conflict(kind, name, why)
    }

    /// 409: fields that other managers own (server-side apply).
    pub fn apply_conflict(message: impl Into<String>, causes: Vec<Cause>) -> Self {
        let mut error = Self::new(409, "Conflict", message);
        error.details = Some(Box::new(Details {
            causes,
            ..Details::default()
        }));
        error
    }

    /// 422: the object's fields are wrong.
    pub fn invalid(kind: &Kind, name: &str, causes: Vec<Cause>) -> Self {
        let suffix = if kind.group.is_empty() {
            String::new()
        } else {
            format!(".{}", kind.group)
        };
        let all: Vec<String> = causes.iter().map(Cause::to_string).collect();
        let all = match all.as_slice() {
            [one] => one.clone(),
            several => format!("[{}]", several.join(", ")),
        };
        let message = format!("{}{suffix} {name:?} is invalid: {all}", kind.kind);
        let mut error = Self::new(422, "Invalid", message).of(kind, name);
        if let Some(details) = &mut error.details {
            details.kind = kind.kind.to_owned();
            details.causes = causes;
        }
        error
    }

    /// 400: the request can't be understood.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 401: nobody known.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 403: somebody who may not, or something that may not be done to this object.
    pub fn forbidden(kind: &Kind, name: &str, why: impl fmt::Display) -> Self {
        let message = if name.is_empty() {
            format!("{kind} is forbidden: {why}")
        } else {
            format!("{kind} {name:?} is forbidden: {why}")
        };
        Self::new(403, "Forbidden", message).of(kind, name)
    }

    /// 403 for what is no object, such as a path.
    pub fn forbidden_request(why: impl fmt::Display) -> Self {
        let mut error = Self::new(403, "Forbidden", format!("forbidden: {why}"));
        error.details = Some(Box::default());
        error
    }

    /// 405: the kind has no such operation.
    pub fn method_not_allowed(kind: &Kind, verb: &str) -> Self {
        let message = format!("{verb} is not supported on resources of kind {:?}", kind.resource());
        Self::new(405, "MethodNotAllowed", message).of(kind, "")
    }

    /// 406: no representation that the client accepts.
    pub fn not_acceptable(accepted: &str) -> Self {
        let message = format!("only the following media types are accepted: {accepted}");
        Self::new(406, "NotAcceptable", message)
    }

    /// 410: the history does not reach back that far: list again.
    pub fn gone(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 413: more than the server takes.
    pub fn too_large(limit: usize) -> Self {
        let message = format!("Request entity too large: limit is {limit}");
        Self::new(413, "RequestEntityTooLarge", message)
    }

    /// 415: a body in a form that is not read here.
    pub fn unsupported_media_type(accepted: &str) -> Self {
        let message =
            format!("the body of the request was in an unknown format - accepted media types include: {accepted}");
        Self::new(415, "UnsupportedMediaType", message)
    }

    /// 429: later.
    pub fn too_many_requests(message: impl Into<String>, retry_after_seconds: u32) -> Self {
        let mut error = Self::new(429, "TooManyRequests", message);
        error.details = Some(Box::new(Details {
            retry_after_seconds: Some(retry_after_seconds),
            ..Details::default()
        }));
        error
    }

    /// 500: the store's own fault.
    pub fn internal(why: impl fmt::Display) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {why}"))
    }

    /// 503: not now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 504: it took too long.
    pub fn timeout(message: impl Into<String>) -> Self {
        Self::new(504, "Timeout", message)
    }

    /// The `metav1.Status` to send.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "reason": self.reason,
            "code": self.code,
        });
        if let Some(details) = &self.details {
            status["details"] = serde_json::to_value(details).unwrap_or_default();
        }
        status
    }
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ApiError {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::by_plural;

    #[test]
    fn messages_are_those_of_kubernetes() {
        let deployments = by_plural("apps", "deployments").unwrap();
        let pods = by_plural("", "pods").unwrap();
        let check = |error: ApiError, message: &str| assert_eq!(error.message, message);
        check(ApiError::not_found(pods, "a"), r#"pods "a" not found"#);
        check(
            ApiError::already_exists(deployments, "a"),
            r#"deployments.apps "a" already exists"#,
        );
        let why = "the object has been modified; please apply your changes to the latest version and try again";
        let message = format!(r#"Operation cannot be fulfilled on deployments.apps "a": {why}"#);
        check(ApiError::modified(deployments, "a"), &message);
        let cause = Cause::invalid("spec.replicas", -1, "must be greater than or equal to 0");
        let message =
            r#"Deployment.apps "a" is invalid: spec.replicas: Invalid value: -1: must be greater than or equal to 0"#;
        check(ApiError::invalid(deployments, "a", vec![cause.clone()]), message);
        let causes = vec![Cause::required("metadata.name", ""), Cause::duplicate("spec.x", "y")];
        let message = r#"Pod "a" is invalid: [metadata.name: Required value, spec.x: Duplicate value: "y"]"#;
        check(ApiError::invalid(pods, "a", causes), message);
        let status = ApiError::invalid(deployments, "a", vec![cause]).status();
        assert_eq!(status["details"]["kind"], "Deployment");
        assert_eq!(status["details"]["group"], "apps");
        assert_eq!(status["details"]["causes"][0]["field"], "spec.replicas");
        assert_eq!(status["code"], 422);
    }
}
