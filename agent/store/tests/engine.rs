//! The engine against a simple model, and its watch against its list.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, sync::Arc};

use proptest::prelude::*;
use serde_json::{Value, json};
use store::{ApiError, DeleteOptions, Deleted, Engine, Event, Key, Kind, Object, Part, Settings, kinds};

fn kind(group: &str, plural: &str) -> &'static Kind {
    kinds::by_plural(group, plural).unwrap()
}

fn config_maps() -> &'static Kind {
    kind("", "configmaps")
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(future)
}

async fn with_namespaces(engine: &Engine, names: &[&str]) {
    for name in names {
        let namespace = json!({"metadata": {"name": name}});
        engine
            .create(kind("", "namespaces"), "", namespace, false)
            .await
            .unwrap();
    }
}

async fn set(engine: &Engine, key: &Key, change: impl Fn(&mut Value) + Send + Sync) -> Result<Arc<Object>, ApiError> {
    let mut apply = |live: &Value| {
        let mut new = live.clone();
        change(&mut new);
        Ok(new)
    };
    engine
        .change(key, Part::Main, false, &mut apply)
        .await
        .map(|written| written.object)
}

#[derive(Clone, Debug)]
enum Operation {
    Create(u8, u8),
    Change(u8, u8),
    Delete(u8),
    Finalizer(u8, bool),
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (0..6u8, 0..3u8).prop_map(|(name, value)| Operation::Create(name, value)),
        4 => (0..6u8, 0..3u8).prop_map(|(name, value)| Operation::Change(name, value)),
        3 => (0..6u8).prop_map(Operation::Delete),
        2 => (0..6u8, any::<bool>()).prop_map(|(name, on)| Operation::Finalizer(name, on)),
        1 => Just(Operation::Reopen),
    ]
}

/// What the engine should hold: value, whether a finalizer is on, whether it is being deleted.
type Model = BTreeMap<(String, String), (u8, bool, bool)>;

/// Six names in two namespaces.
fn place(name: u8) -> (String, String) {
    (format!("ns{}", name % 2), format!("o{name}"))
}

fn key(name: u8) -> Key {
    let (namespace, name) = place(name);
    Key::new(config_maps(), &namespace, &name)
}

async fn apply(engine: &Engine, model: &mut Model, operation: &Operation) {
    match *operation {
        Operation::Create(name, value) => {
            let (namespace, own) = place(name);
            let object = json!({"metadata": {"name": own}, "data": {"v": value.to_string()}});
            let created = engine.create(config_maps(), &namespace, object, false).await;
            assert_eq!(created.is_ok(), !model.contains_key(&place(name)));
            model.entry(place(name)).or_insert((value, false, false));
        }
        Operation::Change(name, value) => {
            let before = engine.get(&key(name));
            let changed = set(engine, &key(name), |new| new["data"]["v"] = value.to_string().into()).await;
            assert_eq!(changed.is_ok(), model.contains_key(&place(name)));
            if let (Some(state), Some(before)) = (model.get_mut(&place(name)), before) {
                let is_same = changed.unwrap().revision == before.revision;
                assert_eq!(is_same, state.0 == value, "a write that says nothing new is none");
                state.0 = value;
            }
        }
        Operation::Delete(name) => {
            let deleted = engine.delete(&key(name), DeleteOptions::default()).await;
            match model.get_mut(&place(name)) {
                None => assert_eq!(deleted.unwrap_err().code, 404),
                Some(state) if state.1 => {
                    assert!(matches!(deleted.unwrap(), Deleted::Pending(_)));
                    state.2 = true;
                }
                Some(_) => {
                    assert!(matches!(deleted.unwrap(), Deleted::Gone(_)));
                    model.remove(&place(name));
                }
            }
        }
        Operation::Finalizer(name, on) => {
            let list = if on { json!(["test/held"]) } else { Value::Null };
            let changed = set(engine, &key(name), |new| new["metadata"]["finalizers"] = list.clone()).await;
            let Some(state) = model.get_mut(&place(name)) else {
                return assert_eq!(changed.unwrap_err().code, 404);
            };
            state.1 = on;
            if state.2 && !on {
                model.remove(&place(name));
            }
        }
        Operation::Reopen => {}
    }
}

fn check(engine: &Engine, model: &Model) {
    let (revision, objects) = engine.list(config_maps(), None);
    assert_eq!(revision, engine.revision());
    let found: Model = objects
        .iter()
        .map(|object| {
            let value = object.value();
            assert_eq!(value["metadata"]["resourceVersion"], object.revision.to_string());
            let place = (object.key.namespace.to_string(), object.key.name.to_string());
            let number = value["data"]["v"].as_str().unwrap().parse().unwrap();
            let metadata = &value["metadata"];
            (
                place,
                (
                    number,
                    metadata["finalizers"].is_array(),
                    metadata["deletionTimestamp"].is_string(),
                ),
            )
        })
        .collect();
    assert_eq!(&found, model);
    assert!(objects.iter().map(|object| &object.key).is_sorted());
    let in_one = engine.list(config_maps(), Some("ns1")).1;
    assert_eq!(
        in_one.len(),
        model.keys().filter(|(namespace, _)| namespace == "ns1").count()
    );
}

fn replay(state: &mut BTreeMap<Key, Arc<Object>>, event: Event) {
    match event {
        Event::Added(object) => assert_eq!(state.insert(object.key.clone(), object), None),
        Event::Modified { object, before } => {
            assert_eq!(state.insert(object.key.clone(), object), Some(before));
        }
        Event::Deleted(object) => assert!(state.remove(&object.key).is_some()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn operations_agree_with_a_model(operations in prop::collection::vec(operation(), 1..40)) {
        let directory = tempfile::tempdir().unwrap();
        block_on(async {
            let mut engine = Engine::open(directory.path()).unwrap();
            with_namespaces(&engine, &["ns0", "ns1"]).await;
            let mut model = Model::new();
            for operation in &operations {
                let before = engine.revision();
                if matches!(operation, Operation::Reopen) {
                    drop(engine);
                    engine = Engine::open(directory.path()).unwrap();
                    assert_eq!(engine.revision(), before, "revisions go on over a restart");
                }
                apply(&engine, &mut model, operation).await;
                assert!(engine.revision() >= before);
                check(&engine, &model);
            }
        });
    }

    #[test]
    fn a_watch_replays_to_the_list(operations in prop::collection::vec(operation(), 1..40), from in 0..20usize) {
        let directory = tempfile::tempdir().unwrap();
        block_on(async {
            let engine = Engine::open(directory.path()).unwrap();
            with_namespaces(&engine, &["ns0", "ns1"]).await;
            let mut model = Model::new();
            let from = from.min(operations.len());
            for operation in &operations[..from] {
                apply(&engine, &mut model, operation).await;
            }
            let (revision, listed) = engine.list(config_maps(), None);
            let mut state: BTreeMap<Key, Arc<Object>> =
                listed.into_iter().map(|object| (object.key.clone(), object)).collect();
            for operation in &operations[from..] {
                apply(&engine, &mut model, operation).await;
            }
            let mut watch = engine.watch(config_maps(), None, revision).unwrap();
            let mut last = revision;
            while let Some(event) = watch.try_next().unwrap() {
                assert!(event.revision() > last, "in order");
                last = event.revision();
                replay(&mut state, event);
            }
            assert_eq!(watch.bookmark(), Some(engine.revision()));
            let now: Vec<_> = engine.list(config_maps(), None).1;
            assert_eq!(state.into_values().collect::<Vec<_>>(), now);
        });
    }
}

#[test]
fn of_many_writers_on_one_revision_one_wins() {
    let directory = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .build()
        .unwrap();
    runtime.block_on(async {
        let engine = Engine::open(directory.path()).unwrap();
        with_namespaces(&engine, &["a"]).await;
        let object = json!({"metadata": {"name": "o"}, "data": {"n": "0"}});
        let made = engine.create(config_maps(), "a", object, false).await.unwrap().object;
        let mut tasks = tokio::task::JoinSet::new();
        for writer in 0..32 {
            let (engine, stale) = (engine.clone(), made.value());
            tasks.spawn(async move {
                let key = Key::new(config_maps(), "a", "o");
                let mut write = |_: &Value| {
                    let mut new = stale.clone();
                    new["data"]["n"] = (writer + 1).to_string().into();
                    Ok(new)
                };
                engine.change(&key, Part::Main, false, &mut write).await
            });
        }
        let results = tasks.join_all().await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
        let mut refused = results.into_iter().filter_map(Result::err);
        assert!(refused.all(|error| error.reason == "Conflict" && error.code == 409));
    });
}

#[test]
fn a_watcher_that_lags_is_told() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let settings = Settings {
            history: 5,
            ..Settings::default()
        };
        let engine = Engine::open_with(directory.path(), settings).unwrap();
        with_namespaces(&engine, &["a"]).await;
        let since = engine.revision();
        let mut slow = engine.watch(config_maps(), None, since).unwrap();
        for index in 0..10 {
            let object = json!({"metadata": {"name": format!("o{index}")}});
            engine.create(config_maps(), "a", object, false).await.unwrap();
        }
        assert!(slow.next().await.is_err());
        assert!(slow.next().await.is_err(), "and stays told");
        let expired = engine.watch(config_maps(), None, since).err().unwrap();
        assert_eq!(ApiError::from(expired).code, 410);
        let mut recent = engine.watch(config_maps(), None, engine.revision() - 5).unwrap();
        for _ in 0..5 {
            recent.next().await.unwrap();
        }
        assert_eq!(recent.try_next(), Ok(None));
        // What was never: a revision of another store.
        assert!(engine.watch(config_maps(), None, engine.revision() + 1).is_err());
        // Of another kind nothing happened, so nothing is missed.
        assert!(engine.watch(kind("", "secrets"), None, since).is_ok());
    });
}

#[test]
fn a_restart_keeps_the_last_revision_and_no_older_history() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let engine = Engine::open(directory.path()).unwrap();
        with_namespaces(&engine, &["a", "b"]).await;
        engine
            .create(config_maps(), "a", json!({"metadata": {"name": "gone"}}), false)
            .await
            .unwrap();
        // The last change is a deletion: it has a revision of its own.
        engine
            .delete(&Key::new(config_maps(), "a", "gone"), DeleteOptions::default())
            .await
            .unwrap();
        let last = engine.revision();
        drop(engine);
        let engine = Engine::open(directory.path()).unwrap();
        assert_eq!(engine.revision(), last);
        assert!(engine.watch(config_maps(), None, last - 1).is_err());
        let mut watch = engine.watch(config_maps(), Some("a"), last).unwrap();
        for namespace in ["b", "a"] {
            let object = json!({"metadata": {"name": "o", "labels": {"x": "y"}}});
            engine.create(config_maps(), namespace, object, false).await.unwrap();
        }
        let Event::Added(object) = watch.next().await.unwrap() else {
            panic!("the creation");
        };
        assert_eq!(
            (&*object.key.namespace, object.revision, &*object.labels["x"]),
            ("a", last + 2, "y")
        );
    });
}

#[test]
fn a_dry_run_decides_and_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    block_on(async {
        let engine = Engine::open(directory.path()).unwrap();
        with_namespaces(&engine, &["a"]).await;
        let before = engine.revision();
        let object = json!({"metadata": {"generateName": "o-"}, "spec": {"ports": [{"port": 80}]}});
        let written = engine.create(kind("", "services"), "a", object, true).await.unwrap();
        assert!(written.object.value()["spec"]["clusterIP"].is_string());
        assert_eq!(
            (engine.revision(), engine.list(kind("", "services"), None).1.len()),
            (before, 0)
        );
    });
}
