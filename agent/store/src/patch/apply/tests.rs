//! The cases of the Kubernetes documentation on server-side apply.
//!
//! <https://kubernetes.io/docs/reference/using-api/server-side-apply/>

use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::*;
use crate::kinds::by_plural;

pub(super) fn deployments() -> &'static Kind {
    by_plural("apps", "deployments").unwrap()
}

pub(super) fn config_maps() -> &'static Kind {
    by_plural("", "configmaps").unwrap()
}

pub(super) fn by(name: &str) -> Manager<'_> {
    Manager {
        name,
        api_version: "apps/v1",
        subresource: "",
        now: OffsetDateTime::UNIX_EPOCH,
    }
}

/// As above, later.
pub(super) fn later(name: &str) -> Manager<'_> {
    Manager {
        now: OffsetDateTime::UNIX_EPOCH + Duration::hours(1),
        ..by(name)
    }
}

pub(super) fn deployment(spec: Value) -> Value {
    json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "default"}, "spec": spec})
}

pub(super) fn config_map(data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "namespace": "default"}, "data": data})
}

fn applied(live: Option<&Value>, spec: Value, manager: &Manager<'_>) -> Value {
    apply(deployments(), live, &deployment(spec), manager, false).unwrap()
}

/// What a manager owns, as FieldsV1.
pub(super) fn owned(object: &Value, name: &str) -> Value {
    let managers = Managers::read(object);
    managers
        .0
        .iter()
        .find(|entry| entry.name == name)
        .map_or(Value::Null, |entry| entry.fields.to_json())
}

#[test]
fn an_apply_creates_and_owns() {
    let object = applied(None, json!({"replicas": 3}), &by("kubectl"));
    assert_eq!(
        object["metadata"]["managedFields"],
        json!([{
            "manager": "kubectl",
            "operation": "Apply",
            "apiVersion": "apps/v1",
            "time": "1970-01-01T00:00:00Z",
            "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {"f:replicas": {}}},
        }])
    );
    assert_eq!(object["spec"], json!({"replicas": 3}));
}

/// "ConfigMap" of the documentation: labels and data.
#[test]
fn the_fields_are_written_as_documented() {
    let object = json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "test-cm", "namespace": "default", "labels": {"test-label": "test"}},
        "data": {"key": "some value"},
    });
    let expected = json!({"f:metadata": {"f:labels": {"f:test-label": {}}}, "f:data": {"f:key": {}}});
    assert_eq!(
        owned(
            &apply(config_maps(), None, &object, &by("kubectl"), false).unwrap(),
            "kubectl"
        ),
        expected
    );
    // A plain create owns the maps, too.
    let created = update_managed(config_maps(), None, &object, &by("kubectl-create"));
    let expected = json!({
        "f:metadata": {"f:labels": {".": {}, "f:test-label": {}}},
        "f:data": {".": {}, "f:key": {}},
    });
    assert_eq!(owned(&created, "kubectl-create"), expected);
}

#[test]
fn a_changed_field_of_another_manager_is_a_conflict() {
    let live = update_managed(
        deployments(),
        None,
        &deployment(json!({"replicas": 3})),
        &by("kubectl-client-side-apply"),
    );
    let wanted = deployment(json!({"replicas": 4}));
    let refused = apply(deployments(), Some(&live), &wanted, &by("kubectl"), false).unwrap_err();
    let message =
        r#"Apply failed with 1 conflict: conflict with "kubectl-client-side-apply" using apps/v1: .spec.replicas"#;
    assert_eq!(
        (refused.code, refused.reason, refused.message.as_str()),
        (409, "Conflict", message)
    );
    let cause = &refused.status()["details"]["causes"][0];
    let expected = json!({
        "reason": "FieldManagerConflict",
        "message": r#"conflict with "kubectl-client-side-apply" using apps/v1"#,
        "field": ".spec.replicas",
    });
    assert_eq!(*cause, expected);
    // The same value is no conflict: both own it.
    let shared = applied(Some(&live), json!({"replicas": 3}), &by("kubectl"));
    assert_eq!(owned(&shared, "kubectl"), json!({"f:spec": {"f:replicas": {}}}));
    assert_eq!(
        owned(&shared, "kubectl-client-side-apply")["f:spec"]["f:replicas"],
        json!({})
    );
    // Forced, it is taken.
    let forced = apply(deployments(), Some(&live), &wanted, &by("kubectl"), true).unwrap();
    assert_eq!(forced["spec"]["replicas"], 4);
    assert_eq!(
        owned(&forced, "kubectl-client-side-apply")["f:spec"].get("f:replicas"),
        None
    );
}

#[test]
fn several_conflicts_are_listed_by_manager() {
    let live = applied(None, json!({"replicas": 3, "paused": true}), &by("first"));
    let live = applied(Some(&live), json!({"minReadySeconds": 1}), &by("second"));
    let wanted = deployment(json!({"replicas": 4, "paused": false, "minReadySeconds": 2}));
    let refused = apply(deployments(), Some(&live), &wanted, &by("third"), false).unwrap_err();
    let message = "Apply failed with 3 conflicts: conflicts with \"first\":\n- .spec.paused\n- .spec.replicas\n\
                   conflicts with \"second\":\n- .spec.minReadySeconds";
    assert_eq!(refused.message, message);
}

/// "Transferring ownership": an autoscaler takes the replicas, the user then leaves them out.
#[test]
fn a_field_given_up_stays_with_its_other_owner_or_goes() {
    let live = applied(None, json!({"replicas": 3, "paused": true}), &by("kubectl"));
    let shared = applied(Some(&live), json!({"replicas": 3}), &by("autoscaler"));
    let left = applied(Some(&shared), json!({"paused": true}), &by("kubectl"));
    assert_eq!(left["spec"], json!({"replicas": 3, "paused": true}));
    assert_eq!(owned(&left, "kubectl"), json!({"f:spec": {"f:paused": {}}}));
    let gone = applied(Some(&live), json!({"replicas": 3}), &by("kubectl"));
    assert_eq!(gone["spec"], json!({"replicas": 3}));
}

#[test]
fn elements_of_a_list_belong_to_who_applied_them() {
    let container = |name: &str, image: &str| json!({"name": name, "image": image});
    let with = |containers: Value| json!({"template": {"spec": {"containers": containers}}});
    let live = applied(
        None,
        with(json!([container("a", "1"), container("b", "1")])),
        &by("first"),
    );
    let live = applied(Some(&live), with(json!([container("c", "1")])), &by("second"));
    let names = |object: &Value| {
        let list = object
            .pointer("/spec/template/spec/containers")
            .unwrap()
            .as_array()
            .unwrap();
        list.iter()
            .map(|container| container["name"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&live), ["a", "b", "c"]);
    // A new order holds for those that are named; `a` is given up.
    let live = applied(
        Some(&live),
        with(json!([container("d", "1"), container("b", "2")])),
        &by("first"),
    );
    assert_eq!(names(&live), ["d", "b", "c"]);
    let fields = owned(&live, "second");
    let element = &fields["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"c\"}"];
    assert_eq!(*element, json!({".": {}, "f:name": {}, "f:image": {}}));
}

#[test]
fn ports_are_told_apart_by_number_and_protocol() {
    let with = |ports: Value| json!({"template": {"spec": {"containers": [{"name": "a", "ports": ports}]}}});
    let live = applied(
        None,
        with(json!([{"containerPort": 53}, {"containerPort": 53, "protocol": "UDP"}])),
        &by("a"),
    );
    let ports = &owned(&live, "a")["f:spec"]["f:template"]["f:spec"]["f:containers"]["k:{\"name\":\"a\"}"]["f:ports"];
    let keys: Vec<&String> = ports.as_object().unwrap().keys().collect();
    let expected = [
        r#"k:{"containerPort":53,"protocol":"TCP"}"#,
        r#"k:{"containerPort":53,"protocol":"UDP"}"#,
    ];
    assert_eq!(keys, expected);
    let twice = deployment(with(
        json!([{"containerPort": 53}, {"containerPort": 53, "protocol": "TCP"}]),
    ));
    let refused = apply(deployments(), None, &twice, &by("a"), false).unwrap_err();
    let message = "failed to create typed patch object (default/d; apps/v1, Kind=Deployment): \
                   .spec.template.spec.containers[name=\"a\"].ports: duplicate entries for key \
                   [containerPort=53,protocol=\"TCP\"]";
    assert_eq!(refused.message, message);
}

#[test]
fn sets_merge_and_atomic_lists_are_replaced() {
    let with = |finalizers: Value, tolerations: Value| {
        let mut object = deployment(json!({"template": {"spec": {"tolerations": tolerations}}}));
        object["metadata"]["finalizers"] = finalizers;
        object
    };
    let toleration = |key: &str| json!([{"key": key}]);
    let live = apply(
        deployments(),
        None,
        &with(json!(["a", "b"]), toleration("x")),
        &by("first"),
        false,
    )
    .unwrap();
    assert_eq!(
        owned(&live, "first")["f:metadata"],
        json!({"f:finalizers": {"v:\"a\"": {}, "v:\"b\"": {}}})
    );
    let second = apply(
        deployments(),
        Some(&live),
        &with(json!(["c"]), toleration("y")),
        &by("second"),
        false,
    );
    assert!(
        second
            .unwrap_err()
            .message
            .ends_with(r#""first": .spec.template.spec.tolerations"#)
    );
    let second = apply(
        deployments(),
        Some(&live),
        &with(json!(["c"]), toleration("y")),
        &by("second"),
        true,
    )
    .unwrap();
    assert_eq!(second["metadata"]["finalizers"], json!(["a", "b", "c"]));
    assert_eq!(second["spec"]["template"]["spec"]["tolerations"], toleration("y"));
    let first = apply(
        deployments(),
        Some(&second),
        &with(json!(["b"]), toleration("y")),
        &by("first"),
        false,
    )
    .unwrap();
    assert_eq!(first["metadata"]["finalizers"], json!(["b", "c"]));
}

#[test]
fn an_update_takes_what_it_changes() {
    let live = applied(None, json!({"replicas": 3, "paused": true}), &by("kubectl"));
    let mut after = live.clone();
    after["spec"]["replicas"] = json!(5);
    let after = update_managed(deployments(), Some(&live), &after, &later("edit"));
    assert_eq!(owned(&after, "kubectl"), json!({"f:spec": {"f:paused": {}}}));
    assert_eq!(owned(&after, "edit"), json!({"f:spec": {"f:replicas": {}}}));
    // Nothing changed: nothing is written, not even the time.
    assert_eq!(
        update_managed(deployments(), Some(&after), &after, &later("edit")),
        after
    );
    // Removed fields are nobody's.
    let mut removed = after.clone();
    removed["spec"].as_object_mut().unwrap().clear();
    let removed = update_managed(deployments(), Some(&after), &removed, &later("other"));
    assert_eq!(removed["metadata"].get("managedFields"), None);
}

#[test]
fn a_subresource_has_managers_of_its_own() {
    let live = applied(None, json!({"replicas": 3}), &by("kubectl"));
    let mut after = live.clone();
    after["status"] = json!({"replicas": 3});
    after["spec"]["replicas"] = json!(9);
    let status = Manager {
        subresource: "status",
        ..by("controller")
    };
    let after = update_managed(deployments(), Some(&live), &after, &status);
    assert_eq!(
        owned(&after, "controller"),
        json!({"f:status": {".": {}, "f:replicas": {}}})
    );
    let entry = &after["metadata"]["managedFields"][1];
    assert_eq!(
        (&entry["subresource"], &entry["operation"]),
        (&json!("status"), &json!("Update"))
    );
    let mut wanted = deployment(json!({"replicas": 1}));
    wanted["status"] = json!({"replicas": 4});
    let refused = apply(
        deployments(),
        Some(&after),
        &wanted,
        &Manager { name: "x", ..status },
        false,
    )
    .unwrap_err();
    assert!(
        refused
            .message
            .ends_with(r#"conflict with "controller" with subresource "status" using apps/v1: .status.replicas"#)
    );
}

#[test]
fn managed_fields_are_the_clients_to_drop_but_not_to_apply() {
    let live = applied(None, json!({"replicas": 3}), &by("kubectl"));
    let mut after = live.clone();
    after["metadata"]["managedFields"] = json!([{}]);
    let dropped = update_managed(deployments(), Some(&live), &after, &by("edit"));
    assert_eq!(dropped["metadata"].get("managedFields"), None);
    after["metadata"]["managedFields"] = json!([]);
    assert_eq!(update_managed(deployments(), Some(&live), &after, &by("edit")), live);
    assert_eq!(
        apply(deployments(), Some(&live), &live, &by("edit"), false)
            .unwrap_err()
            .code,
        400
    );
    // What was there before anybody applied is somebody's.
    let first = applied(Some(&dropped), json!({"paused": true}), &by("kubectl"));
    assert_eq!(
        owned(&first, "before-first-apply"),
        json!({"f:spec": {"f:replicas": {}}})
    );
    let refused = apply(
        deployments(),
        Some(&dropped),
        &deployment(json!({"replicas": 4})),
        &by("kubectl"),
        false,
    );
    assert!(refused.unwrap_err().message.contains("before-first-apply"));
}

/// `kubectl apply`, then `kubectl apply --server-side` with a change.
#[test]
fn kubectl_takes_over_what_it_applied_client_side() {
    let mut object = deployment(json!({"replicas": 3}));
    let text = object.to_string();
    object["metadata"]["annotations"] = json!({LAST_APPLIED: text});
    let live = update_managed(deployments(), None, &object, &by("kubectl-client-side-apply"));
    let after = applied(Some(&live), json!({"replicas": 4}), &by("kubectl"));
    assert_eq!(after["spec"]["replicas"], 4);
    assert!(
        after["metadata"]["annotations"][LAST_APPLIED]
            .as_str()
            .unwrap()
            .contains("\"replicas\":4")
    );
    assert!(
        apply(
            deployments(),
            Some(&live),
            &deployment(json!({"replicas": 4})),
            &by("other"),
            false
        )
        .is_err()
    );
}
