//! Questions that are POSTed and answered, and kept nowhere: who is this, and may they.

use serde_json::{Map, Value, json};

use super::{answer, answer::Answer, call::Call, dispatch::Api, form};
use crate::{
    auth::{
        rules::{Attributes, User, authorize, rules},
        tokens::ISSUER,
    },
    engine::ApiError,
};

/// Answers a question.
pub fn answer(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let kind = call.resource.kind;
    if call.method != "POST" || !call.resource.name.is_empty() {
        return Err(ApiError::method_not_allowed(
            kind,
            &call.method.as_str().to_ascii_lowercase(),
        ));
    }
    let mut question = call.object()?;
    form::check(call, &mut question)?;
    let status = match kind.plural {
        "tokenreviews" => token(api, &question["spec"]),
        "selfsubjectreviews" => json!({"userInfo": user_info(&call.user)}),
        "selfsubjectaccessreviews" => access(&call.user, &question["spec"]),
        "selfsubjectrulesreviews" => rules(&call.user),
        "subjectaccessreviews" => access(&user_of(&question["spec"]), &question["spec"]),
        _ => return Err(ApiError::no_such_resource()),
    };
    question["status"] = status;
    Ok(answer::value(201, call.accepted.format, &question))
}

fn token(api: &Api, spec: &Value) -> Value {
    let mut audiences = strings(&spec["audiences"]);
    if audiences.is_empty() {
        audiences.push(ISSUER.to_owned());
    }
    match api
        .accounts
        .bearer(spec["token"].as_str().unwrap_or_default(), &audiences)
    {
        Ok((user, audiences)) => {
            json!({"authenticated": true, "user": user_info(&user), "audiences": audiences})
        }
        Err(why) => json!({"authenticated": false, "user": {}, "error": why}),
    }
}

fn user_info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = user.uid.as_str().into();
    }
    if !user.extra.is_empty() {
        let extra: Map<String, Value> = user
            .extra
            .iter()
            .map(|(key, value)| ((*key).to_owned(), json!([value])))
            .collect();
        info["extra"] = extra.into();
    }
    info
}

/// The user that a `SubjectAccessReview` asks about.
fn user_of(spec: &Value) -> User {
    User {
        name: spec["user"].as_str().unwrap_or_default().to_owned(),
        uid: spec["uid"].as_str().unwrap_or_default().to_owned(),
        groups: strings(&spec["groups"]),
        extra: Vec::new(),
    }
}

fn strings(list: &Value) -> Vec<String> {
    let list = list.as_array().into_iter().flatten();
    list.filter_map(|one| one.as_str().map(str::to_owned)).collect()
}

fn access(user: &User, spec: &Value) -> Value {
    let text = |part: &str, field: &str| spec[part][field].as_str().unwrap_or_default();
    let wanted = if spec["resourceAttributes"].is_object() {
        let of = |field| text("resourceAttributes", field);
        let resource = match of("subresource") {
            "" => of("resource").to_owned(),
            subresource => format!("{}/{subresource}", of("resource")),
        };
        Attributes::Resource {
            verb: of("verb"),
            group: of("group"),
            resource,
            namespace: of("namespace"),
            name: of("name"),
        }
    } else {
        Attributes::Path {
            verb: text("nonResourceAttributes", "verb"),
            path: text("nonResourceAttributes", "path"),
        }
    };
    let verdict = authorize(user, &wanted);
    let mut status = json!({"allowed": verdict.allowed});
    if !verdict.reason.is_empty() {
        status["reason"] = verdict.reason.into();
    }
    status
}
