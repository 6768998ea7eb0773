//! Pods and pod templates: the defaults that users see, and what may change of a pod that is there.

use serde_json::{Map, Value, json};

use super::{
    Request,
    fields::{default, existing, items, keep, object},
};
use crate::engine::{Cause, label, text};

const CONTAINERS: &[&str] = &["initContainers", "containers", "ephemeralContainers"];
const ONLY_THESE: &str = "pod updates may not change fields other than `spec.containers[*].image`,\
    `spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,`spec.tolerations` (only additions to existing \
    tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

pub(super) fn create(request: &mut Request<'_, '_>, value: &mut Value) {
    default_template(value);
    if let Some(spec) = object(value, &["spec"]) {
        // A replaced name that a newer client leaves out.
        if let Some(account) = spec.get("serviceAccount").cloned() {
            default(spec, "serviceAccountName", account);
        }
        default(spec, "serviceAccountName", "default");
        let account = spec["serviceAccountName"].clone();
        spec.insert("serviceAccount".to_owned(), account);
        default(spec, "priority", 0);
        default(spec, "preemptionPolicy", "PreemptLowerPriority");
        tolerations(spec);
    }
    check_spec(&value["spec"], "spec", &mut request.causes);
    let class = quality(&value["spec"]);
    if let Some(status) = object(value, &["status"]) {
        status.insert("phase".to_owned(), "Pending".into());
        status.insert("qosClass".to_owned(), class.into());
    }
}

pub(super) fn update(request: &mut Request<'_, '_>, value: &mut Value) {
    let Some(live) = request.live else {
        return;
    };
    default_template(value);
    if let Some(spec) = object(value, &["spec"]) {
        let given = [
            "serviceAccountName",
            "serviceAccount",
            "priority",
            "preemptionPolicy",
            "tolerations",
            "nodeName",
        ];
        given.iter().for_each(|field| keep(spec, field, &live["spec"][field]));
    }
    check_spec(&value["spec"], "spec", &mut request.causes);
    let mut comparable = value["spec"].clone();
    let was = &live["spec"];
    for list in ["containers", "initContainers"] {
        for (index, container) in items(&mut comparable, &[list]).enumerate() {
            let image = was[list][index]["image"].clone();
            if let Some(container) = container.as_object_mut().filter(|_| image.is_string()) {
                container.insert("image".to_owned(), image);
            }
        }
    }
    if let Some(spec) = comparable.as_object_mut() {
        let mut free = vec!["activeDeadlineSeconds", "tolerations"];
        // A pod without a node may be given one: that is what a binding is.
        free.extend(text(was, &["nodeName"]).is_empty().then_some("nodeName"));
        for field in free {
            match &was[field] {
                Value::Null => spec.remove(field),
                before => spec.insert(field.to_owned(), before.clone()),
            };
        }
    }
    if comparable != *was {
        request.causes.push(Cause::forbidden("spec", ONLY_THESE));
    }
    let tolerations = value["spec"]["tolerations"].as_array();
    let kept = |before: &Value| tolerations.is_some_and(|now| now.contains(before));
    if !was["tolerations"].as_array().into_iter().flatten().all(kept) {
        let why = "existing toleration can not be modified except its tolerationSeconds";
        request.causes.push(Cause::forbidden("spec.tolerations", why));
    }
}

/// The defaults of what has a `spec` of a pod: a pod, or a template.
pub(super) fn default_template(value: &mut Value) {
    let Some(spec) = object(value, &["spec"]) else {
        return;
    };
    default(spec, "restartPolicy", "Always");
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "schedulerName", "default-scheduler");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "securityContext", json!({}));
    default(spec, "enableServiceLinks", true);
    let on_host = spec.get("hostNetwork") == Some(&Value::Bool(true));
    let Some(spec) = value.get_mut("spec") else {
        return;
    };
    for list in CONTAINERS {
        for container in items(spec, &[list]) {
            default_container(container, on_host);
        }
    }
    items(spec, &["volumes"]).for_each(default_volume);
}

fn default_container(container: &mut Value, on_host: bool) {
    for port in items(container, &["ports"]).filter_map(Value::as_object_mut) {
        default(port, "protocol", "TCP");
        if let Some(own) = port.get("containerPort").cloned().filter(|_| on_host) {
            default(port, "hostPort", own);
        }
    }
    for variable in items(container, &["env"]) {
        if let Some(field) = existing(variable, &["valueFrom", "fieldRef"]) {
            default(field, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = existing(container, &[probe]) {
            default_probe(probe);
        }
    }
    if let Some(container) = container.as_object_mut() {
        default(container, "terminationMessagePath", "/dev/termination-log");
        default(container, "terminationMessagePolicy", "File");
        default(container, "resources", json!({}));
        if let Some(image) = container.get("image").and_then(Value::as_str) {
            // The tag is behind the last slash: a registry may have a port.
            let name = image.rsplit('/').next().unwrap_or_default();
            let is_latest = !name.contains('@') && name.split_once(':').is_none_or(|(_, tag)| tag == "latest");
            default(
                container,
                "imagePullPolicy",
                if is_latest { "Always" } else { "IfNotPresent" },
            );
        }
    }
}

fn default_probe(probe: &mut Map<String, Value>) {
    for (name, value) in [
        ("timeoutSeconds", 1),
        ("periodSeconds", 10),
        ("successThreshold", 1),
        ("failureThreshold", 3),
    ] {
        default(probe, name, value);
    }
    if let Some(request) = probe.get_mut("httpGet").and_then(Value::as_object_mut) {
        default(request, "path", "/");
        default(request, "scheme", "HTTP");
    }
    if let Some(call) = probe.get_mut("grpc").and_then(Value::as_object_mut) {
        call.entry("service").or_insert_with(|| "".into());
    }
}

fn default_volume(volume: &mut Value) {
    const MODE: i64 = 0o644;
    let Some(fields) = volume.as_object_mut() else {
        return;
    };
    if fields.keys().all(|name| name == "name") {
        fields.insert("emptyDir".to_owned(), json!({}));
    }
    for source in ["configMap", "secret", "projected", "downwardAPI"] {
        if let Some(source) = fields.get_mut(source).and_then(Value::as_object_mut) {
            default(source, "defaultMode", MODE);
        }
    }
    if let Some(path) = fields.get_mut("hostPath").and_then(Value::as_object_mut) {
        path.entry("type").or_insert_with(|| "".into());
    }
    for source in items(volume, &["projected", "sources"]) {
        if let Some(token) = existing(source, &["serviceAccountToken"]) {
            default(token, "expirationSeconds", 3600);
        }
    }
}

/// A node that does not answer keeps its pods for five minutes, as in Kubernetes.
fn tolerations(spec: &mut Map<String, Value>) {
    default(spec, "tolerations", json!([]));
    let Some(list) = spec.get_mut("tolerations").and_then(Value::as_array_mut) else {
        return;
    };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let has = |toleration: &Value| {
            let about = text(toleration, &["key"]);
            (about == key || about.is_empty()) && ["", "NoExecute"].contains(&text(toleration, &["effect"]))
        };
        if !list.iter().any(has) {
            list.push(json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}));
        }
    }
}

/// What every pod needs.
pub(super) fn check_spec(spec: &Value, path: &str, causes: &mut Vec<Cause>) {
    let empty = Vec::new();
    let containers = spec["containers"].as_array().unwrap_or(&empty);
    if containers.is_empty() {
        causes.push(Cause::required(format!("{path}.containers"), ""));
    }
    let mut names = Vec::new();
    for list in CONTAINERS {
        for (index, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            let name = text(container, &["name"]);
            let field = format!("{path}.{list}[{index}].name");
            if name.is_empty() {
                causes.push(Cause::required(field, ""));
            } else if let Some(why) = label(name) {
                causes.push(Cause::invalid(field, name, why));
            } else if names.contains(&name) {
                causes.push(Cause::duplicate(field, name));
            }
            names.push(name);
            check_ports(container, &format!("{path}.{list}[{index}].ports"), causes);
        }
    }
    let restart = text(spec, &["restartPolicy"]);
    let known = ["Always", "OnFailure", "Never"];
    if !known.contains(&restart) {
        causes.push(Cause::not_supported(format!("{path}.restartPolicy"), restart, &known));
    }
    if spec["terminationGracePeriodSeconds"].as_i64().is_none() {
        let field = format!("{path}.terminationGracePeriodSeconds");
        causes.push(Cause::type_invalid(
            field,
            spec["terminationGracePeriodSeconds"].clone(),
            "must be an integer",
        ));
    }
}

fn check_ports(container: &Value, path: &str, causes: &mut Vec<Cause>) {
    for (index, port) in container["ports"].as_array().into_iter().flatten().enumerate() {
        let number = &port["containerPort"];
        if !number.as_i64().is_some_and(|number| (1..=65535).contains(&number)) {
            let field = format!("{path}[{index}].containerPort");
            causes.push(Cause::invalid(
                field,
                number.clone(),
                "must be between 1 and 65535, inclusive",
            ));
        }
    }
}

/// The quality of service that `kubectl describe` shows: by which resources are asked for and limited.
fn quality(spec: &Value) -> &'static str {
    let lists = ["initContainers", "containers"];
    let containers = || {
        lists
            .iter()
            .flat_map(|list| spec[list].as_array().into_iter().flatten())
    };
    let set = |container: &Value, part: &str, name: &str| {
        let value = &container["resources"][part][name];
        (!value.is_null() && *value != 0 && *value != "0").then(|| value.clone())
    };
    let any = |container: &Value| {
        let has = |part: &str| {
            ["cpu", "memory"]
                .iter()
                .any(|name| set(container, part, name).is_some())
        };
        has("requests") || has("limits")
    };
    let full = |container: &Value| {
        ["cpu", "memory"].iter().all(|name| {
            let limit = set(container, "limits", name);
            let request = set(container, "requests", name).or_else(|| limit.clone());
            limit.is_some() && limit == request
        })
    };
    if !containers().any(any) {
        "BestEffort"
    } else if containers().all(full) {
        "Guaranteed"
    } else {
        "Burstable"
    }
}
