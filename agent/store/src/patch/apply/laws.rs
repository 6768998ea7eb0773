//! The laws of server-side apply, on arbitrary objects and long histories.

use proptest::prelude::*;
use serde_json::json;
use time::{Duration, OffsetDateTime};

use super::{
    tests::{by, config_map, config_maps, deployment, deployments, later, owned},
    *,
};
use crate::{kinds::by_plural, patch::tests::any_json};

#[test]
fn the_oldest_updaters_become_one() {
    let mut object = config_map(json!({}));
    for at in 0..30 {
        let mut after = object.clone();
        after["data"][format!("k{at}")] = json!("v");
        let name = format!("m{at}");
        let manager = Manager {
            now: OffsetDateTime::UNIX_EPOCH + Duration::seconds(at),
            ..by(&name)
        };
        object = update_managed(config_maps(), Some(&object), &after, &manager);
    }
    assert_eq!(Managers::read(&object).0.len(), 10);
    let ancient = owned(&object, "ancient-changes");
    assert_eq!(ancient["f:data"].as_object().unwrap().len(), 21);
}

/// Data of a ConfigMap, keys from a small set.
fn data(keys: &'static str) -> impl Strategy<Value = Value> {
    prop::collection::btree_map(keys, "[xyz]", 0..4).prop_map(|map| json!(map))
}

proptest! {
    #[test]
    fn applying_twice_is_applying_once(live in any_json(), object in any_json()) {
        for (kind, object) in [(deployments(), deployment(object.clone())), (config_maps(), config_map(object))] {
            let live = deployment(live.clone());
            if let Ok(once) = apply(kind, Some(&live), &object, &by("me"), true) {
                let again = apply(kind, Some(&once), &object, &later("me"), false);
                prop_assert_eq!(again, Ok(once));
            }
        }
    }

    #[test]
    fn a_manager_owns_what_it_applied(first in data("[a-e]"), second in data("[a-e]"), third in data("[a-e]")) {
        let live = apply(config_maps(), None, &config_map(first.clone()), &by("one"), true).unwrap();
        let live = apply(config_maps(), Some(&live), &config_map(second.clone()), &by("two"), true).unwrap();
        let live = apply(config_maps(), Some(&live), &config_map(third.clone()), &by("one"), true).unwrap();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        let mine = owned(&live, "one");
        let mine: Vec<String> = mine.get("f:data").and_then(Value::as_object).into_iter().flatten()
            .map(|(key, _)| key.clone()).filter(|key| key != ".").map(|key| key[2..].to_owned()).collect();
        prop_assert_eq!(mine, keys(&third));
        // Everything applied is there, and nothing that nobody applied last.
        for (key, value) in third.as_object().unwrap() {
            prop_assert_eq!(&live["data"][key], value);
        }
        for key in live["data"].as_object().into_iter().flatten().map(|(key, _)| key) {
            prop_assert!(third.get(key).is_some() || second.get(key).is_some());
        }
    }

    #[test]
    fn disjoint_appliers_commute(first in data("[a-c]"), second in data("[d-f]")) {
        let start = apply(config_maps(), None, &config_map(json!({"z": "z"})), &by("zero"), false).unwrap();
        let run = |order: [(&Value, &str); 2]| order.iter().fold(start.clone(), |live, (data, name)| {
            apply(config_maps(), Some(&live), &config_map((*data).clone()), &by(name), false).unwrap()
        });
        prop_assert_eq!(run([(&first, "one"), (&second, "two")]), run([(&second, "two"), (&first, "one")]));
    }

    #[test]
    fn any_json_is_applied_or_refused(live in any_json(), object in any_json()) {
        for kind in [deployments(), config_maps(), by_plural("security.istio.io", "authorizationpolicies").unwrap()] {
            for (live, object) in [
                (live.clone(), object.clone()),
                (json!({"metadata": live, "spec": live}), json!({"metadata": object, "spec": object})),
            ] {
                for force in [false, true] {
                    let _ = apply(kind, Some(&live), &object, &by("me"), force);
                }
                let _ = update_managed(kind, Some(&live), &object, &by("me"));
                let _ = update_managed(kind, None, &object, &by("me"));
            }
        }
    }
}
