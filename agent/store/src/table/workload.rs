//! What makes pods: Deployments, ReplicaSets, DaemonSets, StatefulSets, Jobs.

use serde_json::Value;
use time::OffsetDateTime;

use super::{
    AGE, CONTAINERS, Column, IMAGES, NAME, SELECTOR, Table, age, at, condition, created, list, name, number, or, text,
};

pub(super) const DEPLOYMENT: Table = Table {
    columns: &[
        NAME,
        Column::text("Ready", "Number of the pod with ready state"),
        Column::text("Up-to-date", "Number of pods of the current template."),
        Column::text(
            "Available",
            "Number of pods that are ready for at least minReadySeconds.",
        ),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |object, now| {
        let mut cells = vec![name(object), of_desired(object)];
        cells.extend(numbers(object, &["status.updatedReplicas", "status.availableReplicas"]));
        cells.push(created(object, now));
        cells.extend(containers(object));
        cells.push(selector(object));
        cells
    },
};

pub(super) const REPLICA_SET: Table = Table {
    columns: &[
        NAME,
        Column::number("Desired", "Number of desired pods."),
        Column::number("Current", "Number of pods that were made."),
        Column::number("Ready", "Number of pods that are ready."),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |object, now| {
        let mut cells = vec![name(object)];
        cells.extend(numbers(
            object,
            &["spec.replicas", "status.replicas", "status.readyReplicas"],
        ));
        cells.push(created(object, now));
        cells.extend(containers(object));
        cells.push(selector(object));
        cells
    },
};

pub(super) const DAEMON_SET: Table = Table {
    columns: &[
        NAME,
        Column::number("Desired", "Nodes that should run the pod."),
        Column::number("Current", "Nodes that run the pod and should."),
        Column::number("Ready", "Nodes whose pod is ready."),
        Column::number("Up-to-date", "Nodes whose pod is of the current template."),
        Column::number("Available", "Nodes whose pod is ready for at least minReadySeconds."),
        Column::text("Node Selector", "Labels of the nodes that run the pod."),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |object, now| {
        let mut cells = vec![name(object)];
        cells.extend(numbers(
            object,
            &[
                "status.desiredNumberScheduled",
                "status.currentNumberScheduled",
                "status.numberReady",
                "status.updatedNumberScheduled",
                "status.numberAvailable",
            ],
        ));
        cells.push(Value::from(super::labels(object, "spec.template.spec.nodeSelector")));
        cells.push(created(object, now));
        cells.extend(containers(object));
        cells.push(selector(object));
        cells
    },
};

pub(super) const STATEFUL_SET: Table = Table {
    columns: &[
        NAME,
        Column::text("Ready", "Number of the pod with ready state"),
        AGE,
        CONTAINERS,
        IMAGES,
    ],
    cells: |object, now| {
        let mut cells = vec![name(object), of_desired(object), created(object, now)];
        cells.extend(containers(object));
        cells
    },
};

pub(super) const JOB: Table = Table {
    columns: &[
        NAME,
        Column::text("Status", "Status of the job."),
        Column::text("Completions", "Pods that succeeded, of those that have to."),
        Column::text("Duration", "Time required to complete the job."),
        AGE,
        CONTAINERS,
        IMAGES,
        SELECTOR,
    ],
    cells: |object, now| {
        let mut cells = vec![
            name(object),
            Value::from(job_status(object)),
            Value::from(completions(object)),
            Value::from(job_duration(object, now)),
            created(object, now),
        ];
        cells.extend(containers(object));
        cells.push(selector(object));
        cells
    },
};

fn numbers(object: &Value, paths: &[&str]) -> Vec<Value> {
    paths.iter().map(|path| Value::from(number(object, path))).collect()
}

/// Ready ones of those desired; one is, where nothing is said.
fn of_desired(object: &Value) -> Value {
    let desired = at(object, "spec.replicas").and_then(Value::as_i64).unwrap_or(1);
    Value::from(format!("{}/{desired}", number(object, "status.readyReplicas")))
}

/// Names and images of the template's containers.
fn containers(object: &Value) -> [Value; 2] {
    let all = list(object, "spec.template.spec.containers");
    let of = |field: &str| {
        let values: Vec<&str> = all.iter().map(|container| text(container, field)).collect();
        Value::from(values.join(","))
    };
    [of("name"), of("image")]
}

/// `a=b,c in (d,e)`.
fn selector(object: &Value) -> Value {
    let labels = at(object, "spec.selector.matchLabels").and_then(Value::as_object);
    let labels = labels.into_iter().flatten();
    let mut terms: Vec<String> = labels
        .map(|(name, value)| format!("{name}={}", value.as_str().unwrap_or_default()))
        .collect();
    for expression in list(object, "spec.selector.matchExpressions") {
        let key = text(expression, "key");
        let values: Vec<&str> = list(expression, "values").iter().filter_map(Value::as_str).collect();
        terms.push(match text(expression, "operator") {
            "Exists" => key.to_owned(),
            "DoesNotExist" => format!("!{key}"),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            _ => format!("{key} in ({})", values.join(",")),
        });
    }
    terms.sort();
    Value::from(or(&terms.join(","), "<none>"))
}

fn job_status(job: &Value) -> &'static str {
    let is = |type_: &str| condition(job, type_) == "True";
    let gone = at(job, "metadata.deletionTimestamp").is_some_and(|at| !at.is_null());
    match () {
        () if is("Complete") => "Complete",
        () if is("Failed") => "Failed",
        () if gone => "Terminating",
        () if is("Suspended") => "Suspended",
        () if is("FailureTarget") => "FailureTarget",
        () if is("SuccessCriteriaMet") => "SuccessCriteriaMet",
        () => "Running",
    }
}

fn completions(job: &Value) -> String {
    let succeeded = number(job, "status.succeeded");
    let wanted = at(job, "spec.completions").and_then(Value::as_i64);
    match (wanted, number(job, "spec.parallelism")) {
        (Some(wanted), _) => format!("{succeeded}/{wanted}"),
        (None, parallelism) if parallelism > 1 => format!("{succeeded}/1 of {parallelism}"),
        _ => format!("{succeeded}/1"),
    }
}

fn job_duration(job: &Value, now: OffsetDateTime) -> String {
    let Some(start) = age::read(text(job, "status.startTime")) else {
        return String::new();
    };
    let end = age::read(text(job, "status.completionTime")).unwrap_or(now);
    age::human(end - start)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::line;

    #[test]
    fn workloads_show_their_replicas_and_images() {
        let template = json!({"spec": {"containers": [{"name": "a", "image": "x:1"}, {"name": "b", "image": "y"}]}});
        let object = |spec: serde_json::Value, status: serde_json::Value| {
            let mut object = json!({"metadata": {"name": "w"}, "spec": spec, "status": status});
            object["spec"]["template"] = template.clone();
            object["spec"]["selector"] = json!({
                "matchLabels": {"app": "w"}, "matchExpressions": [{"key": "t", "operator": "In", "values": ["1", "2"]}],
            });
            object
        };
        let status = json!({"replicas": 3, "readyReplicas": 2, "updatedReplicas": 3, "availableReplicas": 1});
        let of = object(json!({"replicas": 3}), status);
        let rest = "5m | a,b | x:1,y | app=w,t in (1,2)";
        assert_eq!(
            line("apps", "deployments", of.clone()),
            format!("w | 2/3 | 3 | 1 | {rest}")
        );
        assert_eq!(
            line("apps", "replicasets", of.clone()),
            format!("w | 3 | 3 | 2 | {rest}")
        );
        assert_eq!(line("apps", "statefulsets", of), "w | 2/3 | 5m | a,b | x:1,y");
        let status = json!({
            "desiredNumberScheduled": 2, "currentNumberScheduled": 2, "numberReady": 1, "updatedNumberScheduled": 2,
        });
        let daemon = object(json!({}), status);
        assert_eq!(
            line("apps", "daemonsets", daemon),
            format!("w | 2 | 2 | 1 | 2 | 0 | <none> | {rest}")
        );
        let status = json!({"startTime": "2026-11-22T03:04:00Z", "succeeded": 1});
        let job = object(json!({"completions": 2}), status);
        assert_eq!(line("batch", "jobs", job), format!("w | Running | 1/2 | 60s | {rest}"));
        let status = json!({"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1});
        let job = object(json!({"parallelism": 2}), status);
        assert_eq!(
            line("batch", "jobs", job),
            format!("w | Complete | 1/1 of 2 |  | {rest}")
        );
    }
}
