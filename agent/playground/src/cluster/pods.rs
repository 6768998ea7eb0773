//! Pods: from what a kubelet tells to the status that the API shows. Pure.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::places::PodSlot;
use crate::{
    desired::{ContainerStatus, Phase, PodStatus},
    layout::node_addresses,
};

/// Whether the API says that it is ready.
pub(crate) fn is_ready(pod: &Pod) -> bool {
    let mut conditions = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.any(|condition| condition.type_ == "Ready" && condition.status == "True")
}

/// Its addresses, as the API has them.
pub(crate) fn addresses(pod: &Pod) -> Vec<IpAddr> {
    let given = pod.status.iter().flat_map(|status| status.pod_ips.iter().flatten());
    given.filter_map(|ip| ip.ip.parse().ok()).collect()
}

/// The status of a pod that runs in this place; `now` is for what changes with it.
pub(super) fn status(pod: &Pod, slot: PodSlot, told: &PodStatus, now: &str) -> Value {
    let started = |running: bool| running.then(|| json!({"running": {"startedAt": now}}));
    let is_init = |container: &&ContainerStatus| {
        let inits = pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten());
        inits.clone().any(|init| init.name == container.name)
    };
    let container = |container: &ContainerStatus| {
        let kept = state_of(pod, &container.name);
        let is_kept = |key: &str| kept.as_ref().is_some_and(|state| state.get(key).is_some());
        let state = match (container.running, container.exit_code) {
            (true, _) if is_kept("running") => kept.clone(),
            (true, _) => started(true),
            (false, Some(code)) if container.message.ends_with("starts again") => Some(
                json!({"waiting": {"reason": "CrashLoopBackOff", "message": format!("{} ({code})", container.message)}}),
            ),
            (false, Some(_)) if is_kept("terminated") => kept.clone(),
            (false, Some(code)) => {
                let reason = if code == 0 { "Completed" } else { "Error" };
                Some(
                    json!({"terminated": {"exitCode": code, "reason": reason, "message": container.message, "finishedAt": now}}),
                )
            }
            (false, None) => Some(json!({"waiting": {"reason": "ContainerCreating", "message": container.message}})),
        };
        json!({
            "name": container.name, "ready": container.ready, "started": container.running,
            "restartCount": container.restarts, "image": image(pod, &container.name), "imageID": "", "state": state,
        })
    };
    let (inits, containers): (Vec<_>, Vec<_>) = told.containers.iter().partition(is_init);
    let all_ready = told.phase == Phase::Running && !containers.is_empty() && containers.iter().all(|one| one.ready);
    let is_started = told.phase != Phase::Pending;
    let reason = if told.phase == Phase::Succeeded {
        "PodCompleted"
    } else {
        "ContainersNotReady"
    };
    let conditions = [
        ("PodScheduled", true, ""),
        ("Initialized", is_started, "ContainersNotInitialized"),
        ("ContainersReady", all_ready, reason),
        ("Ready", all_ready, reason),
    ];
    let conditions = conditions.map(|(kind, holds, reason)| condition(pod, kind, holds, reason, &told.message, now));
    let ips: Vec<_> = slot
        .addresses()
        .iter()
        .map(|ip| json!({"ip": ip.to_string()}))
        .collect();
    let [host, host_v6] = node_addresses(slot.node);
    let start = pod.status.as_ref().and_then(|status| status.start_time.as_ref());
    let mut status = json!({
        "phase": format!("{:?}", told.phase),
        "conditions": conditions,
        "hostIP": host.to_string(),
        "hostIPs": [{"ip": host.to_string()}, {"ip": host_v6.to_string()}],
        "startTime": start.map_or_else(|| json!(now), |start| json!(start)),
        "containerStatuses": containers.into_iter().map(container).collect::<Vec<_>>(),
        "initContainerStatuses": inits.into_iter().map(container).collect::<Vec<_>>(),
        "qosClass": "BestEffort",
    });
    // Its address is shown once its network stands.
    if told.pause.is_some() {
        status["podIP"] = slot.addresses()[0].to_string().into();
        status["podIPs"] = ips.into();
    }
    // A null takes the one before away.
    status["message"] = match told.message.as_str() {
        "" => Value::Null,
        message => message.into(),
    };
    status
}

/// A condition, with the time of its last change kept if it did not change.
fn condition(pod: &Pod, kind: &str, holds: bool, reason: &str, message: &str, now: &str) -> Value {
    let status = if holds { "True" } else { "False" };
    let mut before = pod.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let same = before.find(|before| before.type_ == kind && before.status == status);
    let since = same.and_then(|before| before.last_transition_time.as_ref());
    let mut condition = json!({
        "type": kind, "status": status,
        "lastTransitionTime": since.map_or_else(|| json!(now), |since| json!(since)),
    });
    if !holds {
        condition["reason"] = reason.into();
        condition["message"] = message.into();
    }
    condition
}

fn image(pod: &Pod, name: &str) -> String {
    let spec = pod.spec.iter();
    let mut containers = spec.flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    let found = containers.find(|container| container.name == name);
    found.and_then(|container| container.image.clone()).unwrap_or_default()
}

/// The state of a container as the API has it.
fn state_of(pod: &Pod, name: &str) -> Option<Value> {
    let status = pod.status.as_ref()?;
    let mut all = status
        .container_statuses
        .iter()
        .chain(&status.init_container_statuses)
        .flatten();
    let found = all.find(|container| container.name == name)?;
    serde_json::to_value(found.state.as_ref()?).ok()
}

#[cfg(test)]
mod tests {
    use super::{super::places::IpFamily, *};

    fn pod(status: Value) -> Pod {
        let spec = json!({"initContainers": [{"name": "first"}], "containers": [{"name": "main", "image": "i"}]});
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": spec, "status": status})).unwrap()
    }

    fn told(phase: Phase, ready: bool) -> PodStatus {
        let main = ContainerStatus {
            name: "main".into(),
            ready,
            running: true,
            ..ContainerStatus::default()
        };
        PodStatus {
            phase,
            containers: vec![main],
            ..PodStatus::default()
        }
    }

    const SLOT: PodSlot = PodSlot {
        node: 1,
        host: Some(7),
        family: IpFamily::Dual,
    };

    #[test]
    fn times_stay_while_nothing_changes() {
        let first = status(
            &pod(json!({})),
            SLOT,
            &told(Phase::Running, true),
            "2026-01-01T00:00:00Z",
        );
        let second = status(
            &pod(first.clone()),
            SLOT,
            &told(Phase::Running, true),
            "2026-01-02T00:00:00Z",
        );
        assert_eq!(first, second);
        let third = status(
            &pod(first.clone()),
            SLOT,
            &told(Phase::Running, false),
            "2026-01-02T00:00:00Z",
        );
        assert_eq!(third["conditions"][3]["lastTransitionTime"], "2026-01-02T00:00:00Z");
        assert_eq!(third["conditions"][0], first["conditions"][0]);
    }

    #[test]
    fn a_pod_is_ready_when_all_of_its_containers_are() {
        let ready = status(
            &pod(json!({})),
            SLOT,
            &told(Phase::Running, true),
            "2026-01-01T00:00:00Z",
        );
        assert!(is_ready(&pod(ready)));
        let pending = status(&pod(json!({})), SLOT, &PodStatus::default(), "2026-01-01T00:00:00Z");
        assert!(!is_ready(&pod(pending.clone())));
        assert!(
            addresses(&pod(pending)).is_empty(),
            "no address before its network stands"
        );
    }

    #[test]
    fn what_crashes_again_and_again_says_so() {
        let mut crashed = told(Phase::Running, false);
        crashed.containers[0].running = false;
        crashed.containers[0].exit_code = Some(3);
        crashed.containers[0].message = "ended with 3; starts again".into();
        let status = status(&pod(json!({})), SLOT, &crashed, "2026-01-01T00:00:00Z");
        assert_eq!(
            status["containerStatuses"][0]["state"]["waiting"]["reason"],
            "CrashLoopBackOff"
        );
    }
}
