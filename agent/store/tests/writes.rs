//! The rules of writes and deletions that every client of Kubernetes relies on.
#![allow(clippy::unwrap_used)]

use serde_json::{Value, json};
use store::{ApiError, DeleteOptions, Deleted, Engine, Key, Kind, Part, Written, kinds};

fn kind(group: &str, plural: &str) -> &'static Kind {
    kinds::by_plural(group, plural).unwrap()
}

struct World {
    engine: Engine,
    _directory: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::open(directory.path()).unwrap();
        engine
            .create(kind("", "namespaces"), "", json!({"metadata": {"name": "a"}}), false)
            .await
            .unwrap();
        Self {
            engine,
            _directory: directory,
        }
    }

    async fn create(&self, kind: &'static Kind, value: Value) -> Result<Value, ApiError> {
        self.engine
            .create(kind, "a", value, false)
            .await
            .map(|written| written.object.value())
    }

    async fn write(&self, key: &Key, part: Part, edit: impl Fn(&mut Value) + Send + Sync) -> Result<Written, ApiError> {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            edit(&mut new);
            Ok(new)
        };
        self.engine.change(key, part, false, &mut change).await
    }

    async fn edit(&self, key: &Key, edit: impl Fn(&mut Value) + Send + Sync) -> Result<Value, ApiError> {
        self.write(key, Part::Main, edit)
            .await
            .map(|written| written.object.value())
    }
}

fn deployment() -> Value {
    json!({"metadata": {"name": "d"}, "spec": {
        "selector": {"matchLabels": {"app": "d"}},
        "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "c", "image": "x:1"}]}},
    }})
}

fn pod(name: &str, node: Option<&str>) -> Value {
    json!({"metadata": {"name": name}, "spec": {"nodeName": node, "containers": [{"name": "c", "image": "x"}]}})
}

#[tokio::test]
async fn a_new_object_is_stamped() {
    let world = World::new().await;
    let mut object = deployment();
    object["status"] = json!({"replicas": 3});
    object["metadata"]["uid"] = "mine".into();
    object["metadata"]["deletionTimestamp"] = "2020-01-01T00:00:00Z".into();
    let made = world.create(kind("apps", "deployments"), object).await.unwrap();
    let metadata = &made["metadata"];
    assert_eq!(
        (&metadata["generation"], &metadata["namespace"], &made["status"]),
        (&json!(1), &json!("a"), &Value::Null)
    );
    assert_eq!(
        (&made["apiVersion"], &made["kind"]),
        (&json!("apps/v1"), &json!("Deployment"))
    );
    assert_eq!(metadata["uid"].as_str().unwrap().len(), 36);
    assert_eq!(
        metadata["creationTimestamp"].as_str().unwrap().len(),
        "2026-01-01T00:00:00Z".len()
    );
    assert_eq!(metadata["deletionTimestamp"], Value::Null);
    let named = world
        .create(kind("", "configmaps"), json!({"metadata": {"generateName": "n-"}}))
        .await
        .unwrap();
    let name = named["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("n-") && name.len() == 7, "{name}");
}

#[tokio::test]
async fn what_cannot_be_made_is_refused_in_the_words_of_kubernetes() {
    let world = World::new().await;
    let maps = kind("", "configmaps");
    let refused = |value: Value| async { world.create(maps, value).await.unwrap_err() };
    assert_eq!(refused(json!({"metadata": {"name": "A"}})).await.code, 422);
    assert!(
        refused(json!({}))
            .await
            .message
            .contains("name or generateName is required")
    );
    assert_eq!(
        refused(json!({"metadata": {"name": "x", "resourceVersion": "1"}}))
            .await
            .code,
        400
    );
    assert_eq!(
        refused(json!({"metadata": {"name": "x", "namespace": "b"}})).await.code,
        400
    );
    let labels = json!({"metadata": {"name": "x", "labels": {"-": "b"}}});
    assert_eq!(
        refused(labels).await.details.unwrap().causes[0].field,
        "metadata.labels"
    );
    let elsewhere = world
        .engine
        .create(maps, "nowhere", json!({"metadata": {"name": "x"}}), false)
        .await;
    assert_eq!(elsewhere.unwrap_err().message, r#"namespaces "nowhere" not found"#);
    world.create(maps, json!({"metadata": {"name": "x"}})).await.unwrap();
    let twice = refused(json!({"metadata": {"name": "x"}})).await;
    assert_eq!((twice.code, &*twice.message), (409, r#"configmaps "x" already exists"#));
}

#[tokio::test]
async fn the_generation_counts_changes_of_what_is_wanted() {
    let world = World::new().await;
    world.create(kind("apps", "deployments"), deployment()).await.unwrap();
    let key = Key::new(kind("apps", "deployments"), "a", "d");
    let generation = |value: &Value| value["metadata"]["generation"].as_i64().unwrap();
    let labelled = world
        .edit(&key, |new| new["metadata"]["labels"] = json!({"a": "b"}))
        .await
        .unwrap();
    assert_eq!(generation(&labelled), 1);
    let scaled = world
        .edit(&key, |new| new["spec"]["replicas"] = 3.into())
        .await
        .unwrap();
    assert_eq!(generation(&scaled), 2);
    let status = world.write(&key, Part::Status, |new| {
        new["status"] = json!({"replicas": 3});
        new["spec"]["replicas"] = 9.into();
        new["metadata"]["labels"] = Value::Null;
    });
    let status = status.await.unwrap().object.value();
    assert_eq!(generation(&status), 2);
    assert_eq!(
        (&status["status"]["replicas"], &status["spec"]["replicas"]),
        (&json!(3), &json!(3))
    );
    assert_eq!(status["metadata"]["labels"]["a"], "b");
    let main = world
        .edit(&key, |new| new["status"] = json!({"replicas": 7}))
        .await
        .unwrap();
    assert_eq!(
        main, status,
        "a write that says nothing new, for the status is not its business"
    );
}

#[tokio::test]
async fn what_is_immutable_stays() {
    let world = World::new().await;
    let made = world.create(kind("apps", "deployments"), deployment()).await.unwrap();
    let key = Key::new(kind("apps", "deployments"), "a", "d");
    let refused = world.edit(&key, |new| {
        new["spec"]["selector"]["matchLabels"] = json!({"app": "e"});
        new["spec"]["template"]["metadata"]["labels"] = json!({"app": "e"});
    });
    let refused = refused.await.unwrap_err();
    assert_eq!(
        (refused.code, &*refused.details.unwrap().causes[0].field),
        (422, "spec.selector")
    );
    let refused = world
        .edit(&key, |new| new["metadata"]["uid"] = "other".into())
        .await
        .unwrap_err();
    assert_eq!((refused.code, refused.reason), (409, "Conflict"));
    let refused = world
        .edit(&key, |new| new["metadata"]["resourceVersion"] = "1".into())
        .await
        .unwrap_err();
    assert_eq!((refused.code, refused.reason), (409, "Conflict"));
    let kept = world.edit(&key, |new| {
        new["metadata"]["creationTimestamp"] = "2001-01-01T00:00:00Z".into();
        new["metadata"]["generation"] = 99.into();
    });
    assert_eq!(kept.await.unwrap(), made);
}

#[tokio::test]
async fn a_deletion_waits_for_finalizers_and_takes_no_new_ones() {
    let world = World::new().await;
    let object = json!({"metadata": {"name": "x", "finalizers": ["test/held"]}});
    world.create(kind("", "configmaps"), object).await.unwrap();
    let key = Key::new(kind("", "configmaps"), "a", "x");
    let Deleted::Pending(pending) = world.engine.delete(&key, DeleteOptions::default()).await.unwrap() else {
        panic!("it has a finalizer");
    };
    let again = world.engine.delete(&key, DeleteOptions::default()).await.unwrap();
    assert_eq!(again.object().revision, pending.revision, "once is enough");
    let refused = world
        .edit(&key, |new| {
            new["metadata"]["finalizers"] = json!(["test/held", "test/more"])
        })
        .await;
    assert!(refused.unwrap_err().message.contains("no new finalizers can be added"));
    world
        .edit(&key, |new| new["metadata"]["finalizers"] = json!([]))
        .await
        .unwrap();
    assert_eq!(world.engine.get(&key), None);
}

#[tokio::test]
async fn a_pod_on_a_node_ends_when_its_kubelet_says_so() {
    let world = World::new().await;
    let pods = kind("", "pods");
    for (name, node) in [("free", None), ("bound", Some("n"))] {
        world.create(pods, pod(name, node)).await.unwrap();
    }
    let delete = |name: &str, grace: Option<i64>| {
        let options = DeleteOptions {
            grace_period_seconds: grace,
            ..DeleteOptions::default()
        };
        let (engine, key) = (world.engine.clone(), Key::new(pods, "a", name));
        async move { engine.delete(&key, options).await.unwrap() }
    };
    assert!(matches!(delete("free", None).await, Deleted::Gone(_)));
    let grace = |deleted: &Deleted| deleted.object().value()["metadata"]["deletionGracePeriodSeconds"].as_i64();
    let first = delete("bound", None).await;
    assert!(matches!(first, Deleted::Pending(_)));
    assert_eq!(grace(&first), Some(30));
    assert_eq!(grace(&delete("bound", Some(5)).await), Some(5), "sooner");
    assert_eq!(grace(&delete("bound", Some(60)).await), Some(5), "but not later");
    assert!(matches!(delete("bound", Some(0)).await, Deleted::Gone(_)));
}

#[tokio::test]
async fn of_a_pod_only_a_little_may_change() {
    let world = World::new().await;
    let key = Key::new(kind("", "pods"), "a", "p");
    world.create(key.kind, pod("p", None)).await.unwrap();
    let bound = world
        .edit(&key, |new| new["spec"]["nodeName"] = "n".into())
        .await
        .unwrap();
    assert_eq!(bound["spec"]["nodeName"], "n");
    let image = world
        .edit(&key, |new| new["spec"]["containers"][0]["image"] = "y".into())
        .await
        .unwrap();
    assert_eq!(image["spec"]["containers"][0]["image"], "y");
    for edit in [
        (|new: &mut Value| new["spec"]["nodeName"] = "m".into()) as fn(&mut Value),
        |new| new["spec"]["restartPolicy"] = "Never".into(),
        |new| new["spec"]["containers"][0]["name"] = "other".into(),
    ] {
        let refused = world.edit(&key, edit).await.unwrap_err();
        assert!(
            refused.message.contains("pod updates may not change fields other than"),
            "{refused}"
        );
    }
    // What kubectl applies again, without what was given to it.
    let same = world.edit(&key, |new| {
        new["spec"] = json!({"containers": [{"name": "c", "image": "y"}]});
    });
    assert_eq!(same.await.unwrap(), image);
}

#[tokio::test]
async fn an_event_is_one_in_both_groups() {
    let world = World::new().await;
    let written = json!({"apiVersion": "events.k8s.io/v1", "kind": "Event", "metadata": {"name": "e"},
        "regarding": {"kind": "Pod", "namespace": "a", "name": "p"}, "note": "text"});
    world.create(kind("events.k8s.io", "events"), written).await.unwrap();
    let kept = world
        .engine
        .get(&Key::new(kind("", "events"), "a", "e"))
        .unwrap()
        .value();
    assert_eq!((&kept["apiVersion"], &kept["message"]), (&json!("v1"), &json!("text")));
    assert_eq!(world.engine.list(kind("events.k8s.io", "events"), Some("a")).1.len(), 1);
}

#[tokio::test]
async fn annotations_go_through_the_status_of_built_in_kinds_only() {
    let world = World::new().await;
    world.create(kind("", "pods"), pod("p", Some("n"))).await.unwrap();
    let pod = Key::new(kind("", "pods"), "a", "p");
    let written = world
        .write(&pod, Part::Status, |pod| {
            pod["metadata"]["annotations"]["ambient.istio.io/redirection"] = "enabled".into();
            pod["spec"]["nodeName"] = "other".into();
        })
        .await
        .unwrap();
    let value = written.object.value();
    assert_eq!(
        value["metadata"]["annotations"]["ambient.istio.io/redirection"],
        "enabled"
    );
    assert_eq!(value["spec"]["nodeName"], "n", "the specification stays");
    let policies = kind("security.istio.io", "peerauthentications");
    world
        .create(policies, json!({"metadata": {"name": "p"}, "spec": {}}))
        .await
        .unwrap();
    let written = world
        .write(&Key::new(policies, "a", "p"), Part::Status, |policy| {
            policy["metadata"]["annotations"]["x"] = "y".into();
            policy["status"]["conditions"] = json!([]);
        })
        .await
        .unwrap();
    assert_eq!(written.object.value()["metadata"]["annotations"], Value::Null);
}
