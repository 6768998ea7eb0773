//! Pods: how many containers are ready, and the one word for what is going on.

use serde_json::Value;
use time::OffsetDateTime;

use super::{AGE, Column, NAME, Table, age, at, condition, created, list, name, number, or, text};

pub(super) const TABLE: Table = Table {
    columns: &[
        NAME,
        Column::text(
            "Ready",
            "The aggregate readiness state of this pod for accepting traffic.",
        ),
        Column::text("Status", "The aggregate status of the containers in this pod."),
        Column::text(
            "Restarts",
            "The number of times the containers in this pod have been restarted and when the last container in this pod has restarted.",
        ),
        AGE,
        Column::text("IP", "IP address allocated to the pod.").wide(),
        Column::text("Node", "The node that the pod is scheduled to.").wide(),
        Column::text("Nominated Node", "Set while this pod preempts other pods on that node.").wide(),
        Column::text(
            "Readiness Gates",
            "Readiness gates that are passed, of those that there are.",
        )
        .wide(),
    ],
    cells,
};

fn cells(pod: &Value, now: OffsetDateTime) -> Vec<Value> {
    let state = State::of(pod);
    let restarts = match state.last_restart {
        Some(then) if state.restarts != 0 => format!("{} ({} ago)", state.restarts, age::human(now - then)),
        _ => state.restarts.to_string(),
    };
    let ip = list(pod, "status.podIPs")
        .first()
        .map_or(text(pod, "status.podIP"), |ip| text(ip, "ip"));
    vec![
        name(pod),
        Value::from(format!("{}/{}", state.ready, state.total)),
        Value::from(state.reason),
        Value::from(restarts),
        created(pod, now),
        Value::from(or(ip, "<none>")),
        Value::from(or(text(pod, "spec.nodeName"), "<none>")),
        Value::from(or(text(pod, "status.nominatedNodeName"), "<none>")),
        Value::from(readiness_gates(pod)),
    ]
}

fn readiness_gates(pod: &Value) -> String {
    let gates = list(pod, "spec.readinessGates");
    if gates.is_empty() {
        return "<none>".to_owned();
    }
    let passed = gates
        .iter()
        .filter(|gate| condition(pod, text(gate, "conditionType")) == "True");
    format!("{}/{}", passed.count(), gates.len())
}

/// What the containers come to.
#[derive(Default)]
struct State {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: Option<OffsetDateTime>,
}

impl State {
    fn of(pod: &Value) -> Self {
        let mut state = Self {
            reason: or(text(pod, "status.reason"), text(pod, "status.phase")).to_owned(),
            total: list(pod, "spec.containers").len(),
            ..Self::default()
        };
        let scheduled = list(pod, "status.conditions")
            .iter()
            .find(|found| text(found, "type") == "PodScheduled");
        if scheduled.is_some_and(|found| text(found, "reason") == "SchedulingGated") {
            state.reason = "SchedulingGated".to_owned();
        }
        let sidecars = list(pod, "spec.initContainers")
            .iter()
            .filter(|container| is_sidecar(container));
        state.total += sidecars.count();
        if !state.initialize(pod) || condition(pod, "Initialized") == "True" {
            state.run(pod);
        }
        if at(pod, "metadata.deletionTimestamp").is_some_and(|at| !at.is_null()) {
            let phase = text(pod, "status.phase");
            if text(pod, "status.reason") == "NodeLost" {
                state.reason = "Unknown".to_owned();
            } else if phase != "Succeeded" && phase != "Failed" {
                state.reason = "Terminating".to_owned();
            }
        }
        state
    }

    /// Whether an init container is still at it, or failed.
    fn initialize(&mut self, pod: &Value) -> bool {
        let specs = list(pod, "spec.initContainers");
        for (position, status) in list(pod, "status.initContainerStatuses").iter().enumerate() {
            self.count_restarts(status);
            let spec = specs.iter().find(|spec| text(spec, "name") == text(status, "name"));
            let terminated = at(status, "state.terminated").filter(|state| state.is_object());
            let waiting = text(status, "state.waiting.reason");
            if terminated.is_some_and(|state| number(state, "exitCode") == 0) {
                continue;
            }
            if spec.is_some_and(is_sidecar) && is_true(status, "started") {
                self.ready += usize::from(is_true(status, "ready"));
                continue;
            }
            self.reason = match terminated {
                Some(state) => format!("Init:{}", end(state)),
                None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
                None => format!("Init:{position}/{}", specs.len()),
            };
            return true;
        }
        false
    }

    /// What the containers proper are at.
    fn run(&mut self, pod: &Value) {
        (self.restarts, self.last_restart) = (0, None);
        for status in list(pod, "status.initContainerStatuses") {
            let specs = list(pod, "spec.initContainers").iter();
            if specs
                .clone()
                .any(|spec| is_sidecar(spec) && text(spec, "name") == text(status, "name"))
            {
                self.count_restarts(status);
            }
        }
        let mut running = false;
        for status in list(pod, "status.containerStatuses").iter().rev() {
            self.count_restarts(status);
            let waiting = text(status, "state.waiting.reason");
            let terminated = at(status, "state.terminated").filter(|state| state.is_object());
            if !waiting.is_empty() {
                self.reason = waiting.to_owned();
            } else if let Some(state) = terminated {
                self.reason = end(state);
            } else if is_true(status, "ready") && at(status, "state.running").is_some() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && running {
            let is_ready = condition(pod, "Ready") == "True";
            self.reason = if is_ready { "Running" } else { "NotReady" }.to_owned();
        }
    }

    fn count_restarts(&mut self, status: &Value) {
        self.restarts = self.restarts.saturating_add(number(status, "restartCount"));
        let finished = age::read(text(status, "lastState.terminated.finishedAt"));
        self.last_restart = self.last_restart.max(finished);
    }
}

fn is_true(value: &Value, path: &str) -> bool {
    at(value, path).and_then(Value::as_bool).unwrap_or(false)
}

fn is_sidecar(container: &Value) -> bool {
    text(container, "restartPolicy") == "Always"
}

/// How a container ended.
fn end(terminated: &Value) -> String {
    let reason = text(terminated, "reason");
    let signal = number(terminated, "signal");
    match reason {
        "" if signal != 0 => format!("Signal:{signal}"),
        "" => format!("ExitCode:{}", number(terminated, "exitCode")),
        reason => reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::{super::tests::line, *};

    /// Ready, status and restarts of a pod with two containers (and one init container, if it has a state).
    fn check(status: Value, expected: &str) {
        let mut spec = json!({"containers": [{"name": "a"}, {"name": "b"}]});
        if status.get("initContainerStatuses").is_some() {
            spec["initContainers"] = json!([{"name": "i"}, {"name": "s", "restartPolicy": "Always"}]);
        }
        let pod = json!({"metadata": {"name": "p"}, "spec": spec, "status": status});
        let cells = line("", "pods", pod);
        let shown: Vec<&str> = cells.split(" | ").skip(1).take(3).collect();
        assert_eq!(shown.join(" "), expected);
    }

    fn running(ready: bool) -> Value {
        json!({"state": {"running": {}}, "ready": ready, "restartCount": 0})
    }

    fn waiting(reason: &str) -> Value {
        json!({"state": {"waiting": {"reason": reason}}, "restartCount": 3})
    }

    #[test]
    fn a_running_pod_shows_all_of_its_columns() {
        let pod = json!({
            "metadata": {"name": "web"},
            "spec": {"containers": [{"name": "a"}], "nodeName": "n1", "readinessGates": [{"conditionType": "G"}]},
            "status": {
                "phase": "Running", "podIP": "10.1.0.2", "containerStatuses": [running(true)],
                "conditions": [{"type": "G", "status": "True"}],
            },
        });
        let expected = "web | 1/1 | Running | 0 | 5m | 10.1.0.2 | n1 | <none> | 1/1";
        assert_eq!(line("", "pods", pod), expected);
        let bare = json!({"metadata": {"name": "web"}, "status": {"phase": "Pending"}});
        let expected = "web | 0/0 | Pending | 0 | 5m | <none> | <none> | <none> | <none>";
        assert_eq!(line("", "pods", bare), expected);
    }

    #[test]
    fn the_containers_make_the_status() {
        let of = |containers: [Value; 2]| json!({"phase": "Running", "containerStatuses": containers});
        check(of([running(true), running(false)]), "1/2 Running 0");
        check(
            of([running(true), waiting("CrashLoopBackOff")]),
            "1/2 CrashLoopBackOff 3",
        );
        check(
            of([waiting("ImagePullBackOff"), running(true)]),
            "1/2 ImagePullBackOff 3",
        );
        let ended = |state: Value| json!({"state": {"terminated": state}, "restartCount": 0});
        check(
            of([ended(json!({"reason": "Error", "exitCode": 1})), running(true)]),
            "1/2 Error 0",
        );
        check(
            of([ended(json!({"exitCode": 137})), running(true)]),
            "1/2 ExitCode:137 0",
        );
        check(of([ended(json!({"signal": 9})), running(true)]), "1/2 Signal:9 0");
        let done = || ended(json!({"reason": "Completed", "exitCode": 0}));
        check(of([done(), done()]), "0/2 Completed 0");
        check(of([done(), running(true)]), "1/2 NotReady 0");
        let restarted = json!({
            "state": {"running": {}}, "ready": true, "restartCount": 2,
            "lastState": {"terminated": {"finishedAt": "2026-11-22T03:04:00Z"}},
        });
        check(of([restarted, running(true)]), "2/2 Running 2 (60s ago)");
    }

    #[test]
    fn init_containers_come_first() {
        let of = |state: Value| json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": state}]});
        check(of(json!({"running": {}})), "0/3 Init:0/2 0");
        check(of(json!({"waiting": {"reason": "PodInitializing"}})), "0/3 Init:0/2 0");
        check(
            of(json!({"waiting": {"reason": "CrashLoopBackOff"}})),
            "0/3 Init:CrashLoopBackOff 0",
        );
        check(of(json!({"terminated": {"exitCode": 3}})), "0/3 Init:ExitCode:3 0");
        check(
            of(json!({"terminated": {"exitCode": 1, "reason": "Error"}})),
            "0/3 Init:Error 0",
        );
        let sidecar = json!({"name": "s", "started": true, "ready": true, "state": {"running": {}}, "restartCount": 1});
        let started = json!({
            "phase": "Running",
            "initContainerStatuses": [{"name": "i", "state": {"terminated": {"exitCode": 0}}, "restartCount": 5}, sidecar],
            "containerStatuses": [running(true), running(true)],
        });
        check(started, "3/3 Running 1");
    }

    #[test]
    fn a_pod_that_goes_says_so() {
        let pod = |phase: &str| json!({"metadata": {"name": "p", "deletionTimestamp": "2026-11-22T03:04:00Z"}, "status": {"phase": phase}});
        assert!(line("", "pods", pod("Running")).contains("| Terminating |"));
        assert!(line("", "pods", pod("Succeeded")).contains("| Succeeded |"));
        let gated = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "reason": "SchedulingGated"}]});
        check(gated, "0/2 SchedulingGated 0");
        check(json!({"phase": "Failed", "reason": "Evicted"}), "0/2 Evicted 0");
    }
}
