//! Deployments to ReplicaSets to Pods: what should be written, given what is there. Pure.
//!
//! A rollout makes the new pods before it takes the old ones away (`RollingUpdate`), or after (`Recreate`); the finer
//! settings of a rollout (surge, pauses) are not followed. An old set is kept at zero, as `kubectl rollout undo` expects.

use std::collections::BTreeMap;

use k8s_openapi::{
    Metadata,
    api::{
        apps::v1::{Deployment, ReplicaSet},
        core::v1::{Pod, PodTemplateSpec},
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use serde_json::{Value, json};

use super::{api::Target, pods::is_ready};

const HASH_LABEL: &str = "pod-template-hash";
const REVISION: &str = "deployment.kubernetes.io/revision";

/// What is to be written.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// An object is to be so.
    Ensure(Target, Value),
    /// A pod is to be made, for the ReplicaSet of this uid.
    Create { of: String, namespace: String, pod: Value },
    /// A pod is to go.
    Delete {
        namespace: String,
        name: String,
        uid: String,
    },
}

fn apps(kind: &'static str, plural: &'static str, metadata: &ObjectMeta) -> Target {
    Target {
        api_version: "apps/v1",
        ..Target::core(kind, plural, namespace(metadata), name(metadata))
    }
}

pub(super) fn namespace(metadata: &ObjectMeta) -> &str {
    metadata.namespace.as_deref().unwrap_or_default()
}

pub(super) fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or_default()
}

fn owner<T: Metadata<Ty = ObjectMeta>>(api_version: &str, kind: &str, object: &T) -> Value {
    let metadata = object.metadata();
    json!([{
        "apiVersion": api_version, "kind": kind, "name": metadata.name, "uid": metadata.uid,
        "controller": true, "blockOwnerDeletion": true,
    }])
}

/// Short, without vowels, and the same for the same template.
fn template_hash(template: &PodTemplateSpec) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let text = serde_json::to_string(template).unwrap_or_default();
    // FNV-1a.
    let mut hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut name = String::new();
    for _ in 0..10 {
        name.push(char::from(LETTERS[(hash % LETTERS.len() as u64) as usize]));
        hash /= LETTERS.len() as u64;
    }
    name
}

/// What a Deployment needs, given the ReplicaSets that are its own.
pub(super) fn deployment(deployment: &Deployment, sets: &[&ReplicaSet]) -> Vec<Step> {
    let (metadata, spec) = (&deployment.metadata, &deployment.spec);
    if metadata.deletion_timestamp.is_some() {
        return Vec::new();
    }
    let wanted = spec.replicas.unwrap_or(1);
    let hash = template_hash(&spec.template);
    let is_current = |set: &&&ReplicaSet| {
        let labels = set.metadata.labels.as_ref();
        labels.and_then(|labels| labels.get(HASH_LABEL)) == Some(&hash)
    };
    let revision = |set: &ReplicaSet| -> u64 {
        let annotations = set.metadata.annotations.as_ref();
        let written = annotations.and_then(|all| all.get(REVISION)?.parse().ok());
        written.unwrap_or(0)
    };
    let newest = sets.iter().map(|set| revision(set)).max().unwrap_or(0);
    let current = sets.iter().find(is_current).copied();
    let is_recreate = spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref()) == Some("Recreate");
    let others: Vec<_> = sets.iter().filter(|set| !is_current(set)).copied().collect();
    let pods_of = |set: &ReplicaSet| set.status.as_ref().map_or(0, |status| status.replicas);
    let old_are_gone = others.iter().all(|set| pods_of(set) == 0);
    let ready = current.and_then(|set| set.status.as_ref()?.ready_replicas).unwrap_or(0);
    let of_current = if is_recreate && !old_are_gone { 0 } else { wanted };
    let number = match current {
        Some(set) if revision(set) == newest => newest,
        _ => newest + 1,
    };
    let mut steps = vec![replica_set(deployment, &hash, of_current, number)];
    for set in others {
        let asked = set.spec.replicas.unwrap_or(1);
        if asked > 0 && (is_recreate || ready >= wanted) {
            steps.push(emptied(set));
        }
    }
    steps.push(deployment_status(deployment, sets, current, wanted));
    steps
}

/// The same set without pods: whole, since what is applied is all that is to be.
fn emptied(set: &ReplicaSet) -> Step {
    let metadata = &set.metadata;
    let mut spec = serde_json::to_value(&set.spec).unwrap_or_default();
    spec["replicas"] = 0.into();
    let value = json!({
        "metadata": {
            "labels": metadata.labels, "annotations": metadata.annotations, "ownerReferences": metadata.owner_references,
        },
        "spec": spec,
    });
    Step::Ensure(apps("ReplicaSet", "replicasets", metadata), value)
}

fn replica_set(deployment: &Deployment, hash: &str, replicas: i32, revision: u64) -> Step {
    let metadata = &deployment.metadata;
    let spec = serde_json::to_value(&deployment.spec).unwrap_or_default();
    let mut template = spec["template"].clone();
    template["metadata"]["labels"][HASH_LABEL] = hash.into();
    let mut selector = spec["selector"].clone();
    selector["matchLabels"][HASH_LABEL] = hash.into();
    let value = json!({
        "metadata": {
            "labels": template["metadata"]["labels"],
            "annotations": {REVISION: revision.to_string()},
            "ownerReferences": owner("apps/v1", "Deployment", deployment),
        },
        "spec": {"replicas": replicas, "selector": selector, "template": template},
    });
    let named = ObjectMeta {
        name: Some(format!("{}-{hash}", name(metadata))),
        namespace: metadata.namespace.clone(),
        ..ObjectMeta::default()
    };
    Step::Ensure(apps("ReplicaSet", "replicasets", &named), value)
}

fn deployment_status(deployment: &Deployment, sets: &[&ReplicaSet], current: Option<&ReplicaSet>, wanted: i32) -> Step {
    let statuses = || sets.iter().filter_map(|set| set.status.as_ref());
    let all: i32 = statuses().map(|status| status.replicas).sum();
    let ready: i32 = statuses().map(|status| status.ready_replicas.unwrap_or(0)).sum();
    let updated = current.and_then(|set| set.status.as_ref());
    let (updated, updated_ready) =
        updated.map_or((0, 0), |status| (status.replicas, status.ready_replicas.unwrap_or(0)));
    let done = updated >= wanted && updated_ready >= wanted && all == updated;
    let is_available = ready >= wanted;
    let condition = |kind: &str, holds: bool, reason: &str, message: String| json!({"type": kind, "status": if holds { "True" } else { "False" }, "reason": reason, "message": message});
    let available = match is_available {
        true => condition(
            "Available",
            true,
            "MinimumReplicasAvailable",
            "Deployment has minimum availability.".into(),
        ),
        false => condition(
            "Available",
            false,
            "MinimumReplicasUnavailable",
            format!("{ready} of {wanted} are ready"),
        ),
    };
    let progressing = match done {
        true => condition(
            "Progressing",
            true,
            "NewReplicaSetAvailable",
            "the rollout is complete".into(),
        ),
        false => condition(
            "Progressing",
            true,
            "ReplicaSetUpdated",
            format!("{updated_ready} of {wanted} new ones are ready"),
        ),
    };
    let mut status = json!({
        "observedGeneration": deployment.metadata.generation,
        "replicas": all, "updatedReplicas": updated, "readyReplicas": ready, "availableReplicas": ready,
        "conditions": [available, progressing],
    });
    if ready < wanted {
        status["unavailableReplicas"] = (wanted - ready).into();
    }
    let target = apps("Deployment", "deployments", &deployment.metadata).status();
    Step::Ensure(target, json!({"status": status}))
}

/// What a ReplicaSet needs, given the pods that are its own; `expected` counts those that were made and are not seen yet.
pub(super) fn replicas(set: &ReplicaSet, pods: &[&Pod], expected: usize) -> Vec<Step> {
    let (metadata, spec) = (&set.metadata, &set.spec);
    if metadata.deletion_timestamp.is_some() {
        return Vec::new();
    }
    let is_over = |pod: &Pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        pod.metadata.deletion_timestamp.is_some() || matches!(phase, Some("Succeeded" | "Failed"))
    };
    let mut live: Vec<_> = pods.iter().filter(|pod| !is_over(pod)).collect();
    let wanted = usize::try_from(spec.replicas.unwrap_or(1)).unwrap_or(0);
    let mut steps = Vec::new();
    for _ in live.len() + expected..wanted {
        steps.push(Step::Create {
            of: metadata.uid.clone().unwrap_or_default(),
            namespace: namespace(metadata).to_owned(),
            pod: new_pod(set),
        });
    }
    // Those that are not ready go first, and then the youngest.
    live.sort_by_key(|pod| {
        (
            is_ready(pod),
            std::cmp::Reverse(pod.metadata.creation_timestamp.clone()),
        )
    });
    for pod in live.iter().take(live.len().saturating_sub(wanted)) {
        steps.push(Step::Delete {
            namespace: namespace(&pod.metadata).to_owned(),
            name: name(&pod.metadata).to_owned(),
            uid: pod.metadata.uid.clone().unwrap_or_default(),
        });
    }
    let ready = live.iter().filter(|pod| is_ready(pod)).count();
    let status = json!({
        "observedGeneration": metadata.generation, "replicas": live.len(), "fullyLabeledReplicas": live.len(),
        "readyReplicas": ready, "availableReplicas": ready,
    });
    steps.push(Step::Ensure(
        apps("ReplicaSet", "replicasets", metadata).status(),
        json!({"status": status}),
    ));
    steps
}

fn new_pod(set: &ReplicaSet) -> Value {
    let mut pod = serde_json::to_value(&set.spec.template).unwrap_or_default();
    pod["apiVersion"] = "v1".into();
    pod["kind"] = "Pod".into();
    pod["metadata"]["generateName"] = format!("{}-", name(&set.metadata)).into();
    pod["metadata"]["ownerReferences"] = owner("apps/v1", "ReplicaSet", set);
    pod
}

/// The objects by the uid of who controls them.
pub(super) fn by_owner<T: Metadata<Ty = ObjectMeta>>(objects: &[std::sync::Arc<T>]) -> BTreeMap<&str, Vec<&T>> {
    let mut owned: BTreeMap<&str, Vec<&T>> = BTreeMap::new();
    for object in objects {
        let owners = object.metadata().owner_references.iter().flatten();
        for owner in owners.filter(|owner| owner.controller == Some(true)) {
            owned.entry(&owner.uid).or_default().push(object);
        }
    }
    owned
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment_of(replicas: i32, image: &str, strategy: &str) -> Deployment {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "d", "generation": 1},
            "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "strategy": {"type": strategy},
                "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": [{"name": "c", "image": image}]}}},
        }))
        .unwrap()
    }

    fn made(step: &Step, replicas: i32, ready: i32) -> ReplicaSet {
        let Step::Ensure(target, value) = step else {
            panic!("not a set: {step:?}")
        };
        let mut value = value.clone();
        value["metadata"]["name"] = target.name.as_str().into();
        value["metadata"]["namespace"] = target.namespace.as_str().into();
        value["metadata"]["uid"] = target.name.as_str().into();
        value["status"] = json!({"replicas": replicas, "readyReplicas": ready});
        serde_json::from_value(value).unwrap()
    }

    fn asked(steps: &[Step], of: &str) -> Option<i64> {
        steps.iter().find_map(|step| match step {
            Step::Ensure(target, value) if target.kind == "ReplicaSet" && !target.status && target.name == of => {
                value["spec"]["replicas"].as_i64()
            }
            _ => None,
        })
    }

    #[test]
    fn a_rollout_makes_the_new_before_it_takes_the_old_away() {
        let old = made(&deployment(&deployment_of(2, "a", "RollingUpdate"), &[])[0], 2, 2);
        let changed = deployment_of(2, "b", "RollingUpdate");
        let steps = deployment(&changed, &[&old]);
        let new = made(&steps[0], 2, 0);
        assert_ne!(new.metadata.name, old.metadata.name);
        assert_eq!(asked(&steps, name(&new.metadata)), Some(2));
        assert_eq!(asked(&steps, name(&old.metadata)), None, "nothing is ready yet");
        let ready = made(&steps[0], 2, 2);
        let steps = deployment(&changed, &[&old, &ready]);
        assert_eq!(asked(&steps, name(&old.metadata)), Some(0));
        let emptied = steps.iter().find_map(|step| match step {
            Step::Ensure(target, value) if !target.status && target.name == name(&old.metadata) => Some(value),
            _ => None,
        });
        let (mut before, mut after) = (json!(old.spec), emptied.unwrap()["spec"].clone());
        (before["replicas"], after["replicas"]) = (json!(0), json!(0));
        assert_eq!(after, before, "what is left out of an apply would be taken away");
    }

    #[test]
    fn recreate_waits_until_the_old_ones_are_gone() {
        let old = made(&deployment(&deployment_of(1, "a", "Recreate"), &[])[0], 1, 1);
        let steps = deployment(&deployment_of(1, "b", "Recreate"), &[&old]);
        let new = made(&steps[0], 0, 0);
        assert_eq!(asked(&steps, name(&new.metadata)), Some(0));
        assert_eq!(asked(&steps, name(&old.metadata)), Some(0));
        let gone = ReplicaSet { status: None, ..old };
        assert_eq!(
            asked(
                &deployment(&deployment_of(1, "b", "Recreate"), &[&gone]),
                name(&new.metadata)
            ),
            Some(1)
        );
    }

    #[test]
    fn pods_that_are_on_their_way_are_not_made_twice() {
        let set = made(&deployment(&deployment_of(3, "a", "RollingUpdate"), &[])[0], 0, 0);
        let creates = |expected| {
            let steps = replicas(&set, &[], expected);
            steps.iter().filter(|step| matches!(step, Step::Create { .. })).count()
        };
        assert_eq!(creates(0), 3);
        assert_eq!(creates(2), 1);
        assert_eq!(creates(3), 0);
    }

    #[test]
    fn of_too_many_the_ones_that_are_not_ready_go_first() {
        let set = made(&deployment(&deployment_of(1, "a", "RollingUpdate"), &[])[0], 2, 1);
        let pod = |name: &str, ready: &str| -> Pod {
            let conditions = json!([{"type": "Ready", "status": ready}]);
            serde_json::from_value(
                json!({"metadata": {"name": name, "uid": name}, "status": {"conditions": conditions}}),
            )
            .unwrap()
        };
        let (good, bad) = (pod("good", "True"), pod("bad", "False"));
        let steps = replicas(&set, &[&good, &bad], 0);
        assert!(
            matches!(&steps[0], Step::Delete { name, .. } if name == "bad"),
            "{steps:?}"
        );
    }
}
