//! What the API does by itself: garbage, namespaces, accounts.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use serde_json::{Value, json};
use store::{
    DeleteOptions, Deleted, Engine, Key, Kind, Object, Part, Preconditions, Propagation,
    controllers::{Controllers, bootstrap},
    kinds,
};

fn kind(group: &str, plural: &str) -> &'static Kind {
    kinds::by_plural(group, plural).unwrap()
}

/// An engine with its controllers, in a directory that goes with it.
struct World {
    engine: Engine,
    _controllers: Controllers,
    _directory: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let engine = Engine::open(directory.path()).unwrap();
        bootstrap(&engine, &["10.0.0.1:6443".parse().unwrap()]).await.unwrap();
        Self {
            _controllers: Controllers::start(&engine, "the authority".to_owned()),
            engine,
            _directory: directory,
        }
    }

    async fn create(&self, kind: &'static Kind, namespace: &str, value: Value) -> Arc<Object> {
        self.engine.create(kind, namespace, value, false).await.unwrap().object
    }

    async fn config_map(&self, name: &str, owners: &[(&Arc<Object>, bool)]) -> Arc<Object> {
        let owner = |(owner, blocks): &(&Arc<Object>, bool)| {
            json!({"apiVersion": "v1", "kind": "ConfigMap", "name": &*owner.key.name, "uid": owner.value()["metadata"]["uid"],
                "blockOwnerDeletion": blocks})
        };
        let owners: Vec<Value> = owners.iter().map(owner).collect();
        let metadata = json!({"name": name, "ownerReferences": owners});
        self.create(kind("", "configmaps"), "default", json!({"metadata": metadata}))
            .await
    }

    async fn delete(&self, object: &Arc<Object>, policy: Propagation) -> Deleted {
        let options = DeleteOptions {
            propagation_policy: Some(policy),
            ..DeleteOptions::default()
        };
        self.engine.delete(&object.key, options).await.unwrap()
    }

    /// Waits until something holds: looks again after each change.
    async fn until(&self, what: &str, holds: impl Fn(&Engine) -> bool) {
        let mut revisions = self.engine.revisions();
        let wait = async {
            while !holds(&self.engine) {
                revisions.changed().await.unwrap();
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), wait)
            .await
            .expect(what);
    }

    async fn until_gone(&self, object: &Arc<Object>) {
        let what = format!("{} to go", object.key);
        self.until(&what, |engine| engine.get(&object.key).is_none()).await;
    }

    async fn edit(&self, key: &Key, edit: impl Fn(&mut Value) + Send + Sync) {
        let mut change = |live: &Value| {
            let mut new = live.clone();
            edit(&mut new);
            Ok(new)
        };
        self.engine.change(key, Part::Main, false, &mut change).await.unwrap();
    }
}

#[tokio::test]
async fn what_is_owned_goes_after_its_last_owner() {
    let world = World::new().await;
    let (one, other) = (world.config_map("one", &[]).await, world.config_map("other", &[]).await);
    let both = world.config_map("both", &[(&one, false), (&other, false)]).await;
    let below = world.config_map("below", &[(&both, false)]).await;
    world.delete(&one, Propagation::Background).await;
    let owners = |engine: &Engine| {
        let value = engine.get(&both.key).unwrap().value();
        value["metadata"]["ownerReferences"].as_array().map_or(0, Vec::len)
    };
    world.until("the reference to go", |engine| owners(engine) == 1).await;
    assert!(world.engine.get(&below.key).is_some());
    world.delete(&other, Propagation::Background).await;
    world.until_gone(&both).await;
    world.until_gone(&below).await;
}

#[tokio::test]
async fn an_object_of_an_owner_that_never_was_goes() {
    let world = World::new().await;
    let ghost = world.config_map("ghost", &[]).await;
    world.delete(&ghost, Propagation::Background).await;
    // Its successor has the name, and another uid.
    world.config_map("ghost", &[]).await;
    let orphan = world.config_map("orphan", &[(&ghost, false)]).await;
    world.until_gone(&orphan).await;
}

#[tokio::test]
async fn in_the_foreground_the_owner_waits_for_what_blocks_it() {
    let world = World::new().await;
    let owner = world.config_map("owner", &[]).await;
    let blocking = world.config_map("blocking", &[(&owner, true)]).await;
    world
        .edit(&blocking.key, |new| {
            new["metadata"]["finalizers"] = json!(["test/held"])
        })
        .await;
    assert!(matches!(
        world.delete(&owner, Propagation::Foreground).await,
        Deleted::Pending(_)
    ));
    world
        .until("the dependent to be deleted", |engine| {
            engine.get(&blocking.key).unwrap().value()["metadata"]["deletionTimestamp"].is_string()
        })
        .await;
    assert!(world.engine.get(&owner.key).is_some());
    world
        .edit(&blocking.key, |new| new["metadata"]["finalizers"] = Value::Null)
        .await;
    world.until_gone(&blocking).await;
    world.until_gone(&owner).await;
}

#[tokio::test]
async fn a_circle_of_owners_goes_all_the_same() {
    let world = World::new().await;
    let one = world.config_map("one", &[]).await;
    let other = world.config_map("other", &[(&one, true)]).await;
    let back = json!([{"apiVersion": "v1", "kind": "ConfigMap", "name": "other",
        "uid": other.value()["metadata"]["uid"], "blockOwnerDeletion": true}]);
    world
        .edit(&one.key, |new| new["metadata"]["ownerReferences"] = back.clone())
        .await;
    world.delete(&one, Propagation::Foreground).await;
    world.until_gone(&other).await;
    world.until_gone(&one).await;
}

#[tokio::test]
async fn orphans_stay_without_their_owner() {
    let world = World::new().await;
    let owner = world.config_map("owner", &[]).await;
    let dependent = world.config_map("dependent", &[(&owner, true)]).await;
    world.delete(&owner, Propagation::Orphan).await;
    world.until_gone(&owner).await;
    let left = world.engine.get(&dependent.key).unwrap().value();
    assert_eq!(left["metadata"]["ownerReferences"], Value::Null);
}

#[tokio::test]
async fn a_namespace_goes_when_it_is_empty() {
    let world = World::new().await;
    let namespace = world
        .create(kind("", "namespaces"), "", json!({"metadata": {"name": "a"}}))
        .await;
    world
        .until("its account and root", |engine| {
            let account = Key::new(kind("", "serviceaccounts"), "a", "default");
            let root = Key::new(kind("", "configmaps"), "a", "kube-root-ca.crt");
            let root = engine.get(&root).map(|root| root.value()["data"]["ca.crt"].clone());
            engine.get(&account).is_some() && root == Some("the authority".into())
        })
        .await;
    let held = json!({"metadata": {"name": "held", "finalizers": ["test/held"]}});
    let held = world.create(kind("", "secrets"), "a", held).await;
    let free = world
        .create(
            kind("", "services"),
            "a",
            json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}}),
        )
        .await;
    assert!(matches!(
        world.delete(&namespace, Propagation::Background).await,
        Deleted::Pending(_)
    ));
    let refused = world
        .engine
        .create(kind("", "secrets"), "a", json!({"metadata": {"name": "x"}}), false)
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(
        (refused.code, refused.details.unwrap().causes[0].reason),
        (403, "NamespaceTerminating")
    );
    world.until_gone(&free).await;
    world
        .until("the reason to be told", |engine| {
            let status = engine.get(&namespace.key).unwrap().value()["status"].clone();
            status["phase"] == "Terminating" && status["conditions"].to_string().contains("test/held of secrets a/held")
        })
        .await;
    world
        .edit(&held.key, |new| new["metadata"]["finalizers"] = Value::Null)
        .await;
    world.until_gone(&namespace).await;
    assert_eq!(world.engine.list(kind("", "configmaps"), Some("a")).1.len(), 0);
}

#[tokio::test]
async fn the_first_objects_are_there_and_stay_over_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    for port in [6443, 6444] {
        let engine = Engine::open(directory.path()).unwrap();
        let addresses = [
            format!("127.0.0.1:{port}").parse().unwrap(),
            format!("10.0.0.1:{port}").parse().unwrap(),
        ];
        bootstrap(&engine, &addresses).await.unwrap();
        for name in ["default", "kube-system", "kube-public", "istio-system"] {
            assert!(
                engine
                    .get(&Key::new(kind("", "serviceaccounts"), name, "default"))
                    .is_some(),
                "{name}"
            );
        }
        let key = Key::new(kind("", "services"), "default", "kubernetes");
        let service = engine.get(&key).unwrap().value();
        assert_eq!(service["spec"]["clusterIP"], "10.96.0.1");
        assert_eq!(service["spec"]["ports"][0]["targetPort"], port);
        let slice = Key::new(kind("discovery.k8s.io", "endpointslices"), "default", "kubernetes");
        let slice = engine.get(&slice).unwrap().value();
        assert_eq!(
            (&slice["ports"][0]["port"], &slice["endpoints"][0]["addresses"][0]),
            (&json!(port), &json!("10.0.0.1"))
        );
    }
}

#[tokio::test]
async fn a_namespace_of_the_cluster_itself_stays() {
    let world = World::new().await;
    let key = Key::new(kind("", "namespaces"), "", "default");
    let refused = world.engine.delete(&key, DeleteOptions::default()).await.unwrap_err();
    assert_eq!(
        refused.message,
        r#"namespaces "default" is forbidden: this namespace may not be deleted"#
    );
    let wrong = DeleteOptions {
        preconditions: Some(Preconditions {
            uid: Some("other".to_owned()),
            resource_version: None,
        }),
        ..DeleteOptions::default()
    };
    assert_eq!(world.engine.delete(&key, wrong).await.unwrap_err().code, 409);
}
