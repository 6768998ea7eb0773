//! What makes pods: Deployment, ReplicaSet, DaemonSet, StatefulSet, Job.

use serde_json::{Map, Value, json};

use super::{
    LabelSelector, Request,
    fields::{default, object},
    pod,
};
use crate::engine::{Cause, check_labels, text};

const IMMUTABLE: &str = "field is immutable";
/// Fields of a StatefulSet that may change.
const STATEFUL: &str = "updates to statefulset spec for fields other than 'replicas', 'ordinals', 'template', \
    'updateStrategy', 'revisionHistoryLimit', 'persistentVolumeClaimRetentionPolicy' and 'minReadySeconds' are forbidden";

pub(super) fn admit(request: &mut Request<'_, '_>, value: &mut Value) {
    if let Some(spec) = object(value, &["spec"]) {
        match request.key.kind.plural {
            "deployments" => deployment(spec),
            "replicasets" => default(spec, "replicas", 1),
            "daemonsets" => daemon_set(spec),
            "statefulsets" => stateful_set(spec),
            _ => {}
        }
    }
    if request.key.kind.plural == "jobs" {
        job(request, value);
    }
    if let Some(spec) = value.get_mut("spec")
        && object(spec, &["template"]).is_some()
        && let Some(template) = spec.get_mut("template")
    {
        pod::default_template(template);
    }
    check(request, value);
}

fn deployment(spec: &mut Map<String, Value>) {
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    default(spec, "strategy", json!({}));
    rolling(
        spec,
        "strategy",
        &[("maxUnavailable", "25%".into()), ("maxSurge", "25%".into())],
    );
}

fn daemon_set(spec: &mut Map<String, Value>) {
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "updateStrategy", json!({}));
    rolling(
        spec,
        "updateStrategy",
        &[("maxUnavailable", 1.into()), ("maxSurge", 0.into())],
    );
}

fn stateful_set(spec: &mut Map<String, Value>) {
    default(spec, "replicas", 1);
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "podManagementPolicy", "OrderedReady");
    default(spec, "updateStrategy", json!({}));
    rolling(spec, "updateStrategy", &[("partition", 0.into())]);
    let retain = json!({"whenDeleted": "Retain", "whenScaled": "Retain"});
    default(spec, "persistentVolumeClaimRetentionPolicy", retain);
}

fn rolling(spec: &mut Map<String, Value>, field: &str, defaults: &[(&str, Value)]) {
    let Some(strategy) = spec.get_mut(field).and_then(Value::as_object_mut) else {
        return;
    };
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] != "RollingUpdate" {
        return;
    }
    default(strategy, "rollingUpdate", json!({}));
    if let Some(update) = strategy.get_mut("rollingUpdate").and_then(Value::as_object_mut) {
        defaults
            .iter()
            .for_each(|(name, value)| default(update, name, value.clone()));
    }
}

/// A Job selects its pods by its own uid, unless told otherwise.
fn job(request: &Request<'_, '_>, value: &mut Value) {
    let uid = text(value, &["metadata", "uid"]).to_owned();
    let Some(spec) = object(value, &["spec"]) else {
        return;
    };
    if !spec.contains_key("completions") && !spec.contains_key("parallelism") {
        default(spec, "completions", 1);
    }
    default(spec, "parallelism", 1);
    default(spec, "backoffLimit", 6);
    default(spec, "completionMode", "NonIndexed");
    default(spec, "suspend", false);
    default(spec, "manualSelector", false);
    default(spec, "podReplacementPolicy", "TerminatingOrFailed");
    if spec["manualSelector"] == true {
        return;
    }
    default(
        spec,
        "selector",
        json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}),
    );
    if let Some(labels) = object(value, &["spec", "template", "metadata", "labels"]) {
        for prefix in ["", "batch.kubernetes.io/"] {
            labels.insert(format!("{prefix}controller-uid"), uid.as_str().into());
            labels.insert(format!("{prefix}job-name"), (*request.key.name).into());
        }
    }
}

fn check(request: &mut Request<'_, '_>, value: &Value) {
    let plural = request.key.kind.plural;
    let spec = &value["spec"];
    for field in [
        "replicas",
        "minReadySeconds",
        "revisionHistoryLimit",
        "parallelism",
        "completions",
        "backoffLimit",
    ] {
        let number = &spec[field];
        let path = format!("spec.{field}");
        match number.as_i64() {
            Some(negative) if negative < 0 => {
                request
                    .causes
                    .push(Cause::invalid(path, negative, "must be greater than or equal to 0"));
            }
            None if !number.is_null() => {
                request
                    .causes
                    .push(Cause::type_invalid(path, number.clone(), "must be an integer"));
            }
            _ => {}
        }
    }
    check_selector(request, value);
    let template = &spec["template"];
    check_labels(
        &template["metadata"]["labels"],
        "spec.template.metadata.labels",
        &mut request.causes,
    );
    pod::check_spec(&template["spec"], "spec.template.spec", &mut request.causes);
    let restart = text(template, &["spec", "restartPolicy"]);
    let path = "spec.template.spec.restartPolicy";
    if plural == "jobs" && restart == "Always" {
        request
            .causes
            .push(Cause::required(path, r#"valid values: "OnFailure", "Never""#));
    } else if plural != "jobs" && restart != "Always" {
        request.causes.push(Cause::not_supported(path, restart, &["Always"]));
    }
    if let Some(live) = request.live {
        check_immutable(request, live, value);
    }
}

fn check_selector(request: &mut Request<'_, '_>, value: &Value) {
    let spec = &value["spec"];
    if spec["selector"].is_null() {
        return request.causes.push(Cause::required("spec.selector", ""));
    }
    let labels = &spec["template"]["metadata"]["labels"];
    let cause = match LabelSelector::parse(&spec["selector"]) {
        Err(why) => Cause::invalid("spec.selector", spec["selector"].clone(), why),
        Ok(selector) if selector.is_empty() => {
            let why = format!("empty selector is invalid for {}", request.key.kind.singular);
            Cause::invalid("spec.selector", spec["selector"].clone(), why)
        }
        Ok(selector) if !selector.matches(labels) => {
            let why = "`selector` does not match template `labels`";
            Cause::invalid("spec.template.metadata.labels", labels.clone(), why)
        }
        Ok(_) => return,
    };
    request.causes.push(cause);
}

fn check_immutable(request: &mut Request<'_, '_>, live: &Value, value: &Value) {
    let (was, is) = (&live["spec"], &value["spec"]);
    let mut fixed = vec!["selector"];
    match request.key.kind.plural {
        "jobs" => fixed.extend(["template", "completions", "completionMode"]),
        "statefulsets" => {
            let others = ["selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates"];
            if others.iter().any(|field| was[*field] != is[*field]) {
                request.causes.push(Cause::forbidden("spec", STATEFUL));
            }
            return;
        }
        _ => {}
    }
    for field in fixed.into_iter().filter(|field| was[*field] != is[*field]) {
        request
            .causes
            .push(Cause::invalid(format!("spec.{field}"), is[field].clone(), IMMUTABLE));
    }
}
