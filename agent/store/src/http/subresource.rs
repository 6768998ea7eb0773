//! Subresources with a form of their own: `token`, `binding`, `eviction`, `scale`, `finalize`.

use serde_json::{Value, json};

use super::{
    accept::Shape,
    answer::{self, Answer},
    call::{Call, read},
    dispatch::Api,
    form,
    write::{self, key, manager},
};
use crate::{
    engine::{ApiError, Cause, Part, text},
    patch,
};

/// Answers a request for a subresource.
pub async fn answer(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    match (call.resource.subresource.as_str(), call.method.as_str()) {
        ("token", "POST") => token(api, call),
        ("binding", "POST") => bind(api, call).await,
        ("eviction", "POST") => evict(api, call).await,
        ("scale", "GET") => scale(api, call),
        ("scale", "PUT" | "PATCH") => rescale(api, call).await,
        ("finalize", "PUT") => finalize(api, call).await,
        (subresource, method) => Err(ApiError::method_not_allowed(
            call.resource.kind,
            &format!("{} of {subresource}", method.to_ascii_lowercase()),
        )),
    }
}

/// What was done, and left no object of its own.
fn done(call: &Call) -> Answer {
    answer::value(
        201,
        call.accepted.format,
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}),
    )
}

fn token(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let mut request = call.object()?;
    let status = api
        .accounts
        .request(&call.resource.namespace, &call.resource.name, &request["spec"])?;
    request["kind"] = "TokenRequest".into();
    request["apiVersion"] = "authentication.k8s.io/v1".into();
    request["metadata"] = json!({"name": call.resource.name, "namespace": call.resource.namespace});
    request["status"] = status;
    Ok(answer::value(201, call.accepted.format, &request))
}

async fn bind(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let binding = call.object()?;
    let kind = call.resource.kind;
    let node = binding["target"]["name"].as_str().unwrap_or_default().to_owned();
    if node.is_empty() {
        let cause = Cause::required("target.name", "");
        return Err(ApiError::invalid(kind, &call.resource.name, vec![cause]));
    }
    let mut change = |pod: &Value| {
        let placed = pod["spec"]["nodeName"].as_str().unwrap_or_default();
        if !placed.is_empty() {
            let why = format!("pod {} is already assigned to node {placed:?}", call.resource.name);
            return Err(ApiError::conflict(kind, &call.resource.name, why));
        }
        let mut pod = pod.clone();
        pod["spec"]["nodeName"] = node.as_str().into();
        Ok(pod)
    };
    api.engine
        .change(&key(call), Part::Main, call.query.dry_run, &mut change)
        .await?;
    Ok(done(call))
}

async fn evict(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let eviction = call.object()?;
    let mut options = match &eviction["deleteOptions"] {
        Value::Null => Default::default(),
        options => serde_json::from_value(options.clone())
            .map_err(|error| ApiError::bad_request(format!("error decoding deleteOptions: {error}")))?,
    };
    if call.query.dry_run {
        let crate::engine::DeleteOptions { dry_run, .. } = &mut options;
        *dry_run = vec!["All".to_owned()];
    }
    api.engine.delete(&key(call), options).await?;
    Ok(done(call))
}

/// `autoscaling/v1 Scale` of an object.
fn scale_of(object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut scale = json!({
        "kind": "Scale", "apiVersion": "autoscaling/v1",
        "metadata": {
            "name": metadata["name"], "namespace": metadata["namespace"], "uid": metadata["uid"],
            "resourceVersion": metadata["resourceVersion"], "creationTimestamp": metadata["creationTimestamp"],
        },
        "spec": {"replicas": object["spec"]["replicas"].as_i64().unwrap_or(1)},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0)},
    });
    let selector = selector_text(&object["spec"]["selector"]);
    if !selector.is_empty() {
        scale["status"]["selector"] = selector.into();
    }
    scale
}

/// A `LabelSelector` as text.
fn selector_text(selector: &Value) -> String {
    let mut parts = Vec::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        parts.push(format!("{key}={}", value.as_str().unwrap_or_default()));
    }
    for one in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = one["key"].as_str().unwrap_or_default();
        let values = one["values"].as_array().into_iter().flatten();
        let values: Vec<&str> = values.filter_map(Value::as_str).collect();
        let values = values.join(",");
        match one["operator"].as_str() {
            Some("In") => parts.push(format!("{key} in ({values})")),
            Some("NotIn") => parts.push(format!("{key} notin ({values})")),
            Some("Exists") => parts.push(key.to_owned()),
            Some("DoesNotExist") => parts.push(format!("!{key}")),
            _ => {}
        }
    }
    parts.join(",")
}

fn scale(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let kind = call.resource.kind;
    let object = api
        .engine
        .get(&key(call))
        .ok_or_else(|| ApiError::not_found(kind, &call.resource.name))?;
    shown(call, &object.value())
}

fn shown(call: &Call, object: &Value) -> Result<Answer, ApiError> {
    // kubectl asks for tables of whatever it shows, and takes the whole object where there is none.
    match call.accepted.shape {
        Shape::Whole | Shape::Table => Ok(answer::value(200, call.accepted.format, &scale_of(object))),
        _ => Err(ApiError::not_acceptable("application/json, application/yaml")),
    }
}

async fn rescale(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let kind = call.resource.kind;
    let name = &call.resource.name;
    let sent = if call.method == "PUT" {
        call.object()?
    } else {
        patch_of(call)?
    };
    let mut change = |live: &Value| {
        let before = scale_of(live);
        let after = match (call.method.as_str(), call.media_type.as_str()) {
            ("PUT", _) => sent.clone(),
            (_, "application/json-patch+json") => patch::json(&before, &sent)?,
            _ => patch::merge(&before, &sent)?,
        };
        let replicas = match &after["spec"]["replicas"] {
            Value::Null => 0,
            replicas => replicas.as_i64().unwrap_or(-1),
        };
        if !(0..=i64::from(i32::MAX)).contains(&replicas) {
            let why = "must be greater than or equal to 0";
            let given = after["spec"]["replicas"].clone();
            return Err(ApiError::invalid(
                kind,
                name,
                vec![Cause::invalid("spec.replicas", given, why)],
            ));
        }
        let mut changed = live.clone();
        // Of whom the scale was read, if it says so.
        changed["metadata"]["resourceVersion"] = after["metadata"]["resourceVersion"].clone();
        changed["spec"]["replicas"] = replicas.into();
        let api_version = kind.api_version(call.resource.version);
        let manager = patch::Manager {
            subresource: "scale",
            ..manager(call, &api_version)
        };
        Ok(patch::update_managed(kind, Some(live), &changed, &manager))
    };
    let written = api
        .engine
        .change(&key(call), Part::Main, call.query.dry_run, &mut change)
        .await?;
    shown(call, &written.object.value())
}

fn patch_of(call: &Call) -> Result<Value, ApiError> {
    match call.media_type.as_str() {
        "application/json-patch+json" => serde_json::from_slice(&call.body)
            .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}"))),
        "application/merge-patch+json" | "application/strategic-merge-patch+json" => read(&call.body, true),
        _ => Err(ApiError::unsupported_media_type(
            "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json",
        )),
    }
}

/// Other finalizers in a namespace's `spec`: how one that hangs is let go by force.
async fn finalize(api: &Api, call: &Call) -> Result<Answer, ApiError> {
    let mut value = call.object()?;
    let warnings = form::check(call, &mut value)?;
    let wrong = || ApiError::bad_request("spec.finalizers must be a list of strings");
    let finalizers = match &value["spec"]["finalizers"] {
        Value::Null => Vec::new(),
        Value::Array(list) => list
            .iter()
            .map(|one| one.as_str().map(str::to_owned).ok_or_else(wrong))
            .collect::<Result<_, _>>()?,
        _ => return Err(wrong()),
    };
    let revision = text(&value, &["metadata", "resourceVersion"]);
    let written = api
        .engine
        .finalize(&key(call), revision, &finalizers, call.query.dry_run)
        .await?;
    write::written(call, 200, written, warnings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_says_what_the_object_says() {
        let object = json!({
            "metadata": {"name": "web", "namespace": "shop", "resourceVersion": "7"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"app": "web"}, "matchExpressions": [
                {"key": "tier", "operator": "In", "values": ["a", "b"]}, {"key": "old", "operator": "DoesNotExist"},
            ]}},
            "status": {"replicas": 2},
        });
        let scale = scale_of(&object);
        assert_eq!(
            (&scale["spec"]["replicas"], &scale["status"]["replicas"]),
            (&json!(3), &json!(2))
        );
        assert_eq!(scale["status"]["selector"], "app=web,tier in (a,b),!old");
        assert_eq!(scale_of(&json!({}))["spec"]["replicas"], 1);
    }
}
