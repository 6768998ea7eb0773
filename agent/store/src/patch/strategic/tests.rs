//! The documented cases, a round trip by a simple differ, and any JSON.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::{kinds::by_plural, patch::tests::any_json};

fn deployments() -> &'static Kind {
    by_plural("apps", "deployments").unwrap()
}

fn pods() -> &'static Kind {
    by_plural("", "pods").unwrap()
}

/// A pod's spec patched.
fn check(live: Value, patch: Value, expected: Value) {
    let wrapped = |spec: Value| json!({"spec": spec});
    let patched = strategic(pods(), &wrapped(live), &wrapped(patch)).unwrap();
    assert_eq!(patched, wrapped(expected));
}

fn refused(kind: &Kind, patch: Value) -> ApiError {
    strategic(kind, &json!({"spec": {"containers": [{"name": "a"}]}}), &patch).unwrap_err()
}

/// <https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/>
#[test]
fn a_container_is_added_and_tolerations_are_replaced() {
    let live = json!({"spec": {"replicas": 2, "template": {"spec": {
        "containers": [{"name": "patch-demo-ctr", "image": "nginx"}],
        "tolerations": [{"effect": "NoSchedule", "key": "dedicated", "value": "test-team"}],
    }}}});
    let patch = json!({"spec": {"template": {"spec": {
        "containers": [{"name": "patch-demo-ctr-2", "image": "redis"}],
        "tolerations": [{"effect": "NoSchedule", "key": "disktype", "value": "ssd"}],
    }}}});
    let expected = json!({"spec": {"replicas": 2, "template": {"spec": {
        "containers": [{"name": "patch-demo-ctr-2", "image": "redis"}, {"name": "patch-demo-ctr", "image": "nginx"}],
        "tolerations": [{"effect": "NoSchedule", "key": "disktype", "value": "ssd"}],
    }}}});
    assert_eq!(strategic(deployments(), &live, &patch).unwrap(), expected);
}

/// The same page: a strategy changed together with the fields that it may have.
#[test]
fn retain_keys_drops_what_is_not_listed() {
    let live = json!({"spec": {"strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1}}}});
    let patch = json!({"spec": {"strategy": {"$retainKeys": ["type"], "type": "Recreate"}}});
    let expected = json!({"spec": {"strategy": {"type": "Recreate"}}});
    assert_eq!(strategic(deployments(), &live, &patch).unwrap(), expected);
    let bad = json!({"spec": {"strategy": {"$retainKeys": ["rollingUpdate"], "type": "Recreate"}}});
    assert_eq!(refused(deployments(), bad).code, 400);
}

#[test]
fn elements_merge_by_key_and_nulls_remove() {
    let live = json!({"containers": [
        {"name": "a", "image": "x", "env": [{"name": "K", "value": "1"}, {"name": "L", "value": "2"}], "tty": true},
        {"name": "b"},
    ]});
    let patch = json!({"containers": [{
        "name": "a", "image": "y", "tty": null, "env": [{"name": "L", "$patch": "delete"}, {"name": "M", "value": "3"}],
    }], "nodeName": null});
    let expected = json!({"containers": [
        {"name": "a", "image": "y", "env": [{"name": "M", "value": "3"}, {"name": "K", "value": "1"}]},
        {"name": "b"},
    ]});
    check(live, patch, expected);
}

#[test]
fn directives_delete_and_replace_elements_and_maps() {
    let live = json!({"containers": [{"name": "a"}, {"name": "b"}], "nodeSelector": {"x": "1"}});
    let delete = json!({"containers": [{"name": "a", "$patch": "delete"}], "nodeSelector": {"$patch": "delete"}});
    check(
        live.clone(),
        delete,
        json!({"containers": [{"name": "b"}], "nodeSelector": {}}),
    );
    let replace = json!({
        "containers": [{"name": "c"}, {"$patch": "replace"}], "nodeSelector": {"$patch": "replace", "y": "2"},
    });
    check(
        live,
        replace,
        json!({"containers": [{"name": "c"}], "nodeSelector": {"y": "2"}}),
    );
}

#[test]
fn ports_merge_by_their_number_and_mounts_by_their_path() {
    let live = json!({"containers": [{"name": "a",
        "ports": [{"containerPort": 80, "protocol": "TCP"}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/w"}],
    }]});
    let patch = json!({"containers": [{"name": "a",
        "ports": [{"containerPort": 80, "name": "http"}, {"containerPort": 90}],
        "volumeMounts": [{"mountPath": "/w", "readOnly": true}],
    }]});
    let expected = json!({"containers": [{"name": "a",
        "ports": [{"containerPort": 80, "protocol": "TCP", "name": "http"}, {"containerPort": 90}],
        "volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "v", "mountPath": "/w", "readOnly": true}],
    }]});
    check(live, patch, expected);
    let services = by_plural("", "services").unwrap();
    let live = json!({"spec": {"ports": [{"port": 80, "targetPort": 8080}]}});
    let patched = strategic(
        services,
        &live,
        &json!({"spec": {"ports": [{"port": 80, "name": "http"}]}}),
    )
    .unwrap();
    assert_eq!(
        patched["spec"]["ports"],
        json!([{"port": 80, "targetPort": 8080, "name": "http"}])
    );
}

#[test]
fn finalizers_are_a_set() {
    let live = json!({"metadata": {"finalizers": ["a", "b", "c"]}});
    let patched =
        |patch: Value| strategic(pods(), &live, &json!({"metadata": patch})).unwrap()["metadata"]["finalizers"].clone();
    assert_eq!(patched(json!({"finalizers": ["d", "a"]})), json!(["d", "a", "b", "c"]));
    assert_eq!(
        patched(json!({"$deleteFromPrimitiveList/finalizers": ["b"]})),
        json!(["a", "c"])
    );
    let both = json!({
        "finalizers": ["d"],
        "$deleteFromPrimitiveList/finalizers": ["a"],
        "$setElementOrder/finalizers": ["c", "d", "b"],
    });
    assert_eq!(patched(both), json!(["c", "d", "b"]));
    assert_eq!(patched(json!({"finalizers": null})), Value::Null);
}

/// The order of the patch holds, and what only the server has keeps its neighbours.
#[test]
fn set_element_order_orders() {
    let names = |names: &[&str]| Value::Array(names.iter().map(|name| json!({"name": name})).collect());
    let live = json!({"containers": names(&["a", "x", "b", "c"])});
    let patch = json!({"containers": names(&["new"]), "$setElementOrder/containers": names(&["c", "new", "a", "b"])});
    check(
        live.clone(),
        patch,
        json!({"containers": names(&["x", "c", "new", "a", "b"])}),
    );
    let only_order = json!({"$setElementOrder/containers": names(&["b", "a"])});
    check(live, only_order, json!({"containers": names(&["x", "b", "a", "c"])}));
    let bad = json!({"spec": {
        "containers": names(&["a", "b"]), "$setElementOrder/containers": names(&["b", "a"]),
    }});
    let bad = refused(pods(), bad);
    assert_eq!(bad.code, 400);
    assert!(
        bad.message.contains("doesn't match $setElementOrder list"),
        "{}",
        bad.message
    );
}

#[test]
fn what_makes_no_sense_is_refused() {
    assert_eq!(refused(pods(), json!([])).code, 400);
    assert_eq!(refused(pods(), json!({"$patch": "smash"})).code, 400);
    assert_eq!(refused(pods(), json!({"spec": {"containers": ["a"]}})).code, 400);
    let no_key = refused(pods(), json!({"spec": {"containers": [{"image": "a"}]}}));
    assert_eq!(no_key.code, 422);
    let why = r#"map: {"image":"a"} does not contain declared merge key: name"#;
    assert!(no_key.message.ends_with(why), "{}", no_key.message);
    let policies = by_plural("security.istio.io", "authorizationpolicies").unwrap();
    assert_eq!(refused(policies, json!({})).code, 415);
}

/// The patch that turns one list of containers into another.
fn difference(from: &[(String, u8)], to: &[(String, u8)]) -> Value {
    let gone = from.iter().filter(|(name, _)| to.iter().all(|(kept, _)| kept != name));
    let mut list: Vec<Value> = Vec::new();
    for (name, image) in to.iter().filter(|container| !from.contains(container)) {
        list.push(json!({"name": name, "image": image}));
    }
    list.extend(gone.map(|(name, _)| json!({"name": name, "$patch": "delete"})));
    let order: Vec<Value> = to.iter().map(|(name, _)| json!({"name": name})).collect();
    json!({"spec": {"containers": list, "$setElementOrder/containers": order}})
}

fn containers() -> impl Strategy<Value = Vec<(String, u8)>> {
    let unique = |mut list: Vec<(String, u8)>| {
        let mut seen = std::collections::BTreeSet::new();
        list.retain(|(name, _)| seen.insert(name.clone()));
        list
    };
    prop::collection::vec(("[a-f]", 0..3_u8), 0..6).prop_map(unique)
}

proptest! {
    #[test]
    fn a_difference_is_applied(from in containers(), to in containers()) {
        let pod = |list: &[(String, u8)]| {
            let list: Vec<Value> = list.iter().map(|(name, image)| json!({"name": name, "image": image})).collect();
            json!({"spec": {"containers": list}})
        };
        let patched = strategic(pods(), &pod(&from), &difference(&from, &to)).unwrap();
        prop_assert_eq!(patched, pod(&to));
    }

    #[test]
    fn any_json_is_merged_or_refused(live in any_json(), patch in any_json()) {
        for kind in [pods(), deployments()] {
            let _ = strategic(kind, &live, &patch);
            let _ = strategic(kind, &json!({"metadata": live, "spec": live}), &json!({"metadata": patch, "spec": patch}));
        }
    }
}
