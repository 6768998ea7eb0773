//! Kinds with a default or two: Secret, ConfigMap, Event, EndpointSlice, Endpoints.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;

use super::{
    Request,
    fields::{default, items, object},
};
use crate::engine::{Cause, text};

pub(super) fn admit(request: &mut Request<'_, '_>, value: &mut Value) {
    match (request.key.kind.group, request.key.kind.plural) {
        ("", "secrets") => secret(request, value),
        ("", "configmaps") => immutable(request, value, &["data", "binaryData"]),
        ("", "events") => event(request, value),
        ("", "endpoints") => {
            for subset in items(value, &["subsets"]) {
                items(subset, &["ports"]).for_each(protocol);
            }
        }
        ("discovery.k8s.io", "endpointslices") => endpoint_slice(request, value),
        _ => {}
    }
}

fn protocol(port: &mut Value) {
    if let Some(port) = port.as_object_mut() {
        default(port, "protocol", "TCP");
    }
}

/// Objects that say of themselves that they do not change.
fn immutable(request: &mut Request<'_, '_>, value: &Value, fields: &[&str]) {
    let Some(live) = request.live.filter(|live| live["immutable"] == true) else {
        return;
    };
    if value["immutable"] != true {
        let why = "field is immutable when `immutable` is set";
        request.causes.push(Cause::forbidden("immutable", why));
    }
    for field in fields.iter().filter(|field| live[**field] != value[**field]) {
        request
            .causes
            .push(Cause::forbidden(*field, "field is immutable when `immutable` is set"));
    }
}

fn secret(request: &mut Request<'_, '_>, value: &mut Value) {
    let Some(fields) = value.as_object_mut() else {
        return;
    };
    default(fields, "type", "Opaque");
    // `stringData` is only a way to write `data`.
    let plain = fields.remove("stringData");
    if let Some(plain) = plain
        .as_ref()
        .and_then(Value::as_object)
        .filter(|plain| !plain.is_empty())
        && let Some(data) = object(value, &["data"])
    {
        for (name, text) in plain {
            let encoded = STANDARD.encode(text.as_str().unwrap_or_default());
            data.insert(name.clone(), encoded.into());
        }
    }
    for (name, data) in value["data"].as_object().into_iter().flatten() {
        if data.as_str().is_none_or(|data| STANDARD.decode(data).is_err()) {
            let field = format!("data[{name}]");
            request
                .causes
                .push(Cause::invalid(field, "<secret contents redacted>", "must be base64"));
        }
    }
    if let Some(live) = request.live.filter(|live| live["type"] != value["type"]) {
        let cause = Cause::invalid("type", value["type"].clone(), "field is immutable");
        if live["type"].is_string() {
            request.causes.push(cause);
        }
    }
    immutable(request, value, &["data"]);
}

fn event(request: &mut Request<'_, '_>, value: &Value) {
    let about = text(value, &["involvedObject", "namespace"]);
    // Events about what has no namespace are in `default`.
    if about != &*request.key.namespace && !(about.is_empty() && &*request.key.namespace == "default") {
        let why = "does not match event.namespace";
        request
            .causes
            .push(Cause::invalid("involvedObject.namespace", about, why));
    }
}

fn endpoint_slice(request: &mut Request<'_, '_>, value: &mut Value) {
    items(value, &["ports"]).for_each(|port| {
        protocol(port);
        if let Some(port) = port.as_object_mut() {
            port.entry("name").or_insert_with(|| "".into());
        }
    });
    let given = text(value, &["addressType"]);
    if !["IPv4", "IPv6", "FQDN"].contains(&given) {
        let known = &["IPv4", "IPv6", "FQDN"];
        request.causes.push(Cause::not_supported("addressType", given, known));
    } else if request.live.is_some_and(|live| live["addressType"] != given) {
        request
            .causes
            .push(Cause::invalid("addressType", given, "field is immutable"));
    }
}
