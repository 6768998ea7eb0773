//! Defaults and checks of the kinds.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use serde_json::{Value, json};
use store::{ApiError, Engine, Key, Kind, Part, Written, kinds};

fn kind(group: &str, plural: &str) -> &'static Kind {
    kinds::by_plural(group, plural).unwrap()
}

async fn world() -> (Engine, tempfile::TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let engine = Engine::open(directory.path()).unwrap();
    engine
        .create(kind("", "namespaces"), "", json!({"metadata": {"name": "a"}}), false)
        .await
        .unwrap();
    (engine, directory)
}

async fn create(engine: &Engine, kind: &'static Kind, value: Value) -> Result<Written, ApiError> {
    engine.create(kind, "a", value, false).await
}

fn template(restart: &str) -> Value {
    json!({"metadata": {"labels": {"app": "x"}}, "spec": {
        "restartPolicy": restart, "containers": [{"name": "c", "image": "r:5000/x", "ports": [{"containerPort": 80}],
            "readinessProbe": {"httpGet": {"port": 80}}, "env": [{"name": "N", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]}],
        "volumes": [{"name": "v"}, {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "t"}}]}}]}})
}

/// A valid object of every kind that has rules of its own.
fn samples() -> Vec<(&'static Kind, Value)> {
    let selector = json!({"matchLabels": {"app": "x"}});
    let workload = |group: &str, plural: &str| {
        let spec = json!({"selector": selector, "template": template("Always"), "serviceName": "x"});
        (kind(group, plural), json!({"metadata": {"name": "x"}, "spec": spec}))
    };
    let policy = json!({"metadata": {"name": "x"}, "spec": {"action": "ALLOW", "rules": [
        {"from": [{"source": {"principals": ["cluster.local/ns/a/sa/b"]}}], "to": [{"operation": {"ports": ["80"]}}]}]}});
    vec![
        (
            kind("", "pods"),
            json!({"metadata": {"name": "x"}, "spec": template("Always")["spec"]}),
        ),
        (
            kind("", "services"),
            json!({"metadata": {"name": "x"}, "spec": {"ports": [{"port": 80}], "ipFamilies": ["IPv4"]}}),
        ),
        (kind("", "namespaces"), json!({"metadata": {"name": "x"}})),
        (
            kind("", "secrets"),
            json!({"metadata": {"name": "x"}, "data": {"a": "YQ=="}, "stringData": {"b": "b"}}),
        ),
        (
            kind("", "configmaps"),
            json!({"metadata": {"name": "x", "annotations": {"a": "b"}}, "data": {"a": "b"}}),
        ),
        (
            kind("", "events"),
            json!({"metadata": {"name": "x"}, "involvedObject": {"namespace": "a"}}),
        ),
        workload("apps", "deployments"),
        workload("apps", "replicasets"),
        workload("apps", "daemonsets"),
        workload("apps", "statefulsets"),
        (
            kind("batch", "jobs"),
            json!({"metadata": {"name": "x"}, "spec": {"template": template("Never")}}),
        ),
        (
            kind("discovery.k8s.io", "endpointslices"),
            json!({"metadata": {"name": "x"}, "addressType": "IPv4", "ports": [{"port": 1}], "endpoints": []}),
        ),
        (kind("security.istio.io", "authorizationpolicies"), policy),
        (
            kind("security.istio.io", "peerauthentications"),
            json!({"metadata": {"name": "x"}, "spec": {"mtls": {"mode": "STRICT"}}}),
        ),
    ]
}

#[tokio::test]
async fn defaults_are_stable() {
    let (engine, _directory) = world().await;
    for (kind, sample) in samples() {
        let made = create(&engine, kind, sample.clone())
            .await
            .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(made.warnings, Vec::<String>::new(), "{kind}");
        // What is written again, with the defaults or without, is no change; `stringData` says the same each time.
        let key = &made.object.key;
        let mut again = |live: &Value| Ok(live.clone());
        let same = engine.change(key, Part::Main, false, &mut again).await.unwrap();
        assert_eq!(same.object.revision, made.object.revision, "{kind}");
        if kind.plural != "jobs" {
            let mut bare = |_: &Value| Ok(sample.clone());
            let same = engine.change(key, Part::Main, false, &mut bare).await.unwrap();
            assert_eq!(same.object.revision, made.object.revision, "{kind}");
        }
    }
}

#[tokio::test]
async fn a_pod_gets_what_users_expect_to_see() {
    let (engine, _directory) = world().await;
    let pod = json!({"metadata": {"name": "x"}, "spec": template("Always")["spec"]});
    let pod = create(&engine, kind("", "pods"), pod).await.unwrap().object.value();
    let spec = &pod["spec"];
    for (field, expected) in [
        ("restartPolicy", json!("Always")),
        ("terminationGracePeriodSeconds", json!(30)),
        ("dnsPolicy", json!("ClusterFirst")),
        ("serviceAccountName", json!("default")),
    ] {
        assert_eq!(spec[field], expected, "{field}");
    }
    let container = &spec["containers"][0];
    assert_eq!(
        (&container["imagePullPolicy"], &container["ports"][0]["protocol"]),
        (&json!("Always"), &json!("TCP"))
    );
    let probe = json!({"httpGet": {"port": 80, "path": "/", "scheme": "HTTP"}, "timeoutSeconds": 1, "periodSeconds": 10,
        "successThreshold": 1, "failureThreshold": 3});
    assert_eq!(container["readinessProbe"], probe);
    assert_eq!(spec["volumes"][0]["emptyDir"], json!({}));
    assert_eq!(
        spec["volumes"][1]["projected"]["sources"][0]["serviceAccountToken"]["expirationSeconds"],
        3600
    );
    assert_eq!(pod["status"], json!({"phase": "Pending", "qosClass": "BestEffort"}));
}

#[tokio::test]
async fn workloads_get_what_users_expect_to_see() {
    let (engine, _directory) = world().await;
    let expected = [
        (
            "deployments",
            "strategy",
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}}),
        ),
        ("deployments", "revisionHistoryLimit", json!(10)),
        ("deployments", "replicas", json!(1)),
        ("replicasets", "replicas", json!(1)),
        (
            "daemonsets",
            "updateStrategy",
            json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}),
        ),
        ("statefulsets", "podManagementPolicy", json!("OrderedReady")),
        ("jobs", "backoffLimit", json!(6)),
    ];
    for (kind, sample) in samples() {
        let made = create(&engine, kind, sample).await.unwrap().object.value();
        for (_, field, value) in expected.iter().filter(|(plural, ..)| *plural == kind.plural) {
            assert_eq!(&made["spec"][field], value, "{kind}");
        }
        if kind.plural == "jobs" {
            let uid = &made["metadata"]["uid"];
            assert_eq!(
                &made["spec"]["selector"]["matchLabels"]["batch.kubernetes.io/controller-uid"],
                uid
            );
            assert_eq!(made["spec"]["template"]["metadata"]["labels"]["job-name"], "x");
        }
        if kind.plural == "namespaces" {
            assert_eq!(made["metadata"]["labels"]["kubernetes.io/metadata.name"], "x");
            assert_eq!(
                (&made["status"]["phase"], &made["spec"]["finalizers"]),
                (&json!("Active"), &json!(["kubernetes"]))
            );
        }
        if kind.plural == "secrets" {
            assert_eq!(
                (&made["type"], &made["data"]),
                (&json!("Opaque"), &json!({"a": "YQ==", "b": "Yg=="}))
            );
            assert_eq!(made["stringData"], Value::Null);
        }
    }
}

#[tokio::test]
async fn a_workload_that_could_not_work_is_refused() {
    let (engine, _directory) = world().await;
    let (deployments, sample) = samples()
        .into_iter()
        .find(|(kind, _)| kind.plural == "deployments")
        .unwrap();
    for (edit, field) in [
        (
            (|new: &mut Value| new["spec"]["selector"] = json!({"matchLabels": {"app": "y"}})) as fn(&mut Value),
            "spec.template.metadata.labels",
        ),
        (|new| new["spec"]["selector"] = Value::Null, "spec.selector"),
        (|new| new["spec"]["selector"] = json!({}), "spec.selector"),
        (|new| new["spec"]["replicas"] = json!(-1), "spec.replicas"),
        (
            |new| new["spec"]["template"]["spec"]["containers"] = json!([]),
            "spec.template.spec.containers",
        ),
        (
            |new| new["spec"]["template"]["spec"]["restartPolicy"] = json!("Never"),
            "spec.template.spec.restartPolicy",
        ),
    ] {
        let mut wrong = sample.clone();
        edit(&mut wrong);
        let refused = create(&engine, deployments, wrong).await.unwrap_err();
        assert_eq!((refused.code, &*refused.details.unwrap().causes[0].field), (422, field));
    }
}

#[tokio::test]
async fn a_policy_that_can_not_be_is_refused_with_its_field() {
    let (engine, _directory) = world().await;
    let policies = kind("security.istio.io", "authorizationpolicies");
    let wrong = json!({"metadata": {"name": "x"}, "spec": {"action": "PERHAPS"}});
    let refused = create(&engine, policies, wrong).await.unwrap_err();
    assert_eq!(refused.code, 422);
    assert!(
        refused
            .message
            .starts_with(r#"AuthorizationPolicy.security.istio.io "x" is invalid: spec.action"#),
        "{refused}"
    );
    let modes = kind("security.istio.io", "peerauthentications");
    let wrong = json!({"metadata": {"name": "x"}, "spec": {"mtls": {"mode": "SOMETIMES"}}});
    assert_eq!(create(&engine, modes, wrong).await.unwrap_err().code, 422);
}

#[tokio::test]
async fn what_says_of_itself_that_it_does_not_change_does_not() {
    let (engine, _directory) = world().await;
    let maps = kind("", "configmaps");
    create(
        &engine,
        maps,
        json!({"metadata": {"name": "x"}, "immutable": true, "data": {"a": "b"}}),
    )
    .await
    .unwrap();
    let key = Key::new(maps, "a", "x");
    for edit in [
        (|new: &mut Value| new["data"]["a"] = json!("c")) as fn(&mut Value),
        |new| new["immutable"] = json!(false),
    ] {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            edit(&mut new);
            Ok(new)
        };
        let refused = engine.change(&key, Part::Main, false, &mut change).await.unwrap_err();
        assert!(
            refused.message.contains("field is immutable when `immutable` is set"),
            "{refused}"
        );
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z./-]{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,6}", inner, 0..3).prop_map(|map| json!(map)),
        ]
    })
}

/// Puts something else at one place in an object: the `at`th of all its values.
fn replace(value: &mut Value, at: &mut usize, other: &Value) {
    if *at == 0 {
        *value = other.clone();
    }
    *at = at.wrapping_sub(1);
    match value {
        Value::Array(items) => items.iter_mut().for_each(|item| replace(item, at, other)),
        Value::Object(fields) => fields.values_mut().for_each(|field| replace(field, at, other)),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_shape_is_refused_or_kept(sample in 0..14usize, at in 1..40usize, other in any_json(), again in any_json()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (engine, _directory) = world().await;
            let (kind, good) = samples().swap_remove(sample);
            let mut odd = good.clone();
            replace(&mut odd, &mut at.clone(), &other);
            // A dry run decides as any other, and does not wait for the disk.
            for value in [odd.clone(), other] {
                if let Err(error) = engine.create(kind, "a", value, true).await {
                    assert!((400..500).contains(&error.code), "{error}");
                }
            }
            let made = create(&engine, kind, good).await.unwrap();
            let key = made.object.key.clone();
            for part in [Part::Main, Part::Status] {
                let status = json!({"status": again.clone()});
                for value in [odd.clone(), again.clone(), status] {
                    let mut change = |_: &Value| Ok(value.clone());
                    if let Err(error) = engine.change(&key, part, true, &mut change).await {
                        assert!((400..500).contains(&error.code), "{error}");
                    }
                }
            }
        });
    }
}
