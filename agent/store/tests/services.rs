//! Services and their addresses.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeSet, path::Path, sync::Arc};

use proptest::prelude::*;
use serde_json::{Value, json};
use store::{ApiError, DeleteOptions, Engine, Key, Kind, Object, Part, Settings, kinds};

fn kind(plural: &str) -> &'static Kind {
    kinds::by_plural("", plural).unwrap()
}

fn key(name: &str) -> Key {
    Key::new(kind("services"), "a", name)
}

async fn open(directory: &Path, ranges: &[&str]) -> Engine {
    let settings = Settings {
        service_cidrs: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..Settings::default()
    };
    let engine = Engine::open_with(directory, settings).unwrap();
    // There already, where the directory is opened again.
    let _ = engine
        .create(kind("namespaces"), "", json!({"metadata": {"name": "a"}}), false)
        .await;
    engine
}

async fn create(engine: &Engine, name: &str, mut spec: Value) -> Result<Value, ApiError> {
    if spec["ports"].is_null() {
        spec["ports"] = json!([{"port": 80}]);
    }
    let object = json!({"metadata": {"name": name}, "spec": spec});
    engine
        .create(kind("services"), "a", object, false)
        .await
        .map(|written| written.object.value())
}

async fn edit(engine: &Engine, name: &str, edit: impl Fn(&mut Value) + Send + Sync) -> Result<Arc<Object>, ApiError> {
    let mut change = |live: &Value| {
        let mut new = live.clone();
        edit(&mut new);
        Ok(new)
    };
    engine
        .change(&key(name), Part::Main, false, &mut change)
        .await
        .map(|written| written.object)
}

const BOTH: &[&str] = &["10.1.0.0/24", "fd00:1::/112"];

#[tokio::test]
async fn a_service_gets_what_users_expect_to_see() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path(), BOTH).await;
    let spec = create(&engine, "s", json!({"ports": [{"port": 80}]})).await.unwrap()["spec"].clone();
    let address = spec["clusterIP"].as_str().unwrap().to_owned();
    let expected = json!({
        "type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
        "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"],
        "clusterIP": address, "clusterIPs": [address],
        "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}],
    });
    assert_eq!(spec, expected);
    assert!(address.starts_with("10.1.0."));
    let headless = create(&engine, "headless", json!({"clusterIP": "None"})).await.unwrap();
    assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    let external = create(
        &engine,
        "x",
        json!({"type": "ExternalName", "externalName": "example.com"}),
    )
    .await
    .unwrap();
    assert_eq!(external["spec"]["clusterIP"], Value::Null);
}

#[tokio::test]
async fn families_are_given_as_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path(), BOTH).await;
    let six = create(&engine, "six", json!({"ipFamilies": ["IPv6"]})).await.unwrap();
    assert!(six["spec"]["clusterIP"].as_str().unwrap().starts_with("fd00:1::"));
    let both = create(&engine, "both", json!({"ipFamilyPolicy": "PreferDualStack"}))
        .await
        .unwrap();
    assert_eq!(both["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    assert_eq!(both["spec"]["clusterIPs"].as_array().unwrap().len(), 2);
    // From one family to two and back: the first address stays.
    let before = create(&engine, "one", json!({})).await.unwrap()["spec"]["clusterIP"].clone();
    let two = edit(&engine, "one", |new| {
        new["spec"]["ipFamilyPolicy"] = "RequireDualStack".into()
    })
    .await
    .unwrap();
    assert_eq!(
        (
            &two.value()["spec"]["clusterIPs"][0],
            two.value()["spec"]["clusterIPs"].as_array().unwrap().len()
        ),
        (&before, 2)
    );
    let one = edit(&engine, "one", |new| {
        new["spec"]["ipFamilyPolicy"] = "SingleStack".into()
    })
    .await
    .unwrap();
    assert_eq!(one.value()["spec"]["clusterIPs"], json!([before]));
    let single = tempfile::tempdir().unwrap();
    let engine = open(single.path(), &BOTH[..1]).await;
    let refused = create(&engine, "s", json!({"ipFamilyPolicy": "RequireDualStack"}))
        .await
        .unwrap_err();
    assert!(refused.message.contains("not configured for dual-stack"), "{refused}");
    let refused = create(&engine, "s", json!({"ipFamilies": ["IPv6"]})).await.unwrap_err();
    assert_eq!(refused.details.unwrap().causes[0].field, "spec.ipFamilies[0]");
}

#[tokio::test]
async fn an_address_asked_for_is_given_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path(), BOTH).await;
    let made = create(&engine, "s", json!({"clusterIP": "10.1.0.9"})).await.unwrap();
    assert_eq!(made["spec"]["clusterIPs"], json!(["10.1.0.9"]));
    for (address, why) in [
        ("10.1.0.9", "provided IP is already allocated"),
        (
            "10.2.0.1",
            "is not in the valid range. The range of valid IPs is 10.1.0.0/24",
        ),
        ("nonsense", "must be a valid IP address"),
    ] {
        let refused = create(&engine, "t", json!({"clusterIP": address})).await.unwrap_err();
        assert_eq!(refused.code, 422);
        assert!(refused.message.contains(why), "{refused}");
    }
    let refused = edit(&engine, "s", |new| {
        new["spec"]["clusterIP"] = "10.1.0.10".into();
        new["spec"]["clusterIPs"] = json!(["10.1.0.10"]);
    });
    assert!(refused.await.unwrap_err().message.contains("may not change once set"));
    // An update that does not speak of it keeps it, as kubectl's does.
    let kept = edit(&engine, "s", |new| new["spec"] = json!({"ports": [{"port": 81}]}))
        .await
        .unwrap();
    assert_eq!(kept.value()["spec"]["clusterIP"], "10.1.0.9");
    engine.delete(&key("s"), DeleteOptions::default()).await.unwrap();
    create(&engine, "t", json!({"clusterIP": "10.1.0.9"})).await.unwrap();
}

#[tokio::test]
async fn a_service_of_an_earlier_range_can_still_be_changed() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path(), BOTH).await;
    let before = create(&engine, "s", json!({})).await.unwrap()["spec"]["clusterIP"].clone();
    drop(engine);
    let engine = open(directory.path(), &["10.3.0.0/24"]).await;
    let kept = edit(&engine, "s", |new| new["spec"]["ports"][0]["port"] = 81.into())
        .await
        .unwrap();
    assert_eq!(kept.value()["spec"]["clusterIP"], before);
}

#[tokio::test]
async fn wrong_ports_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let engine = open(directory.path(), BOTH).await;
    for (ports, field) in [
        (json!([]), "spec.ports"),
        (json!([{"port": 0}]), "spec.ports[0].port"),
        (json!([{"port": 80}, {"port": 81}]), "spec.ports[0].name"),
        (
            json!([{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]),
            "spec.ports[1].name",
        ),
        (json!([{"port": 80, "protocol": "ICMP"}]), "spec.ports[0].protocol"),
        (json!([{"port": 80, "targetPort": 70000}]), "spec.ports[0].targetPort"),
    ] {
        let refused = create(&engine, "s", json!({"ports": ports})).await.unwrap_err();
        assert_eq!(refused.details.unwrap().causes[0].field, field);
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Create(u8, Option<u8>, bool),
    Delete(u8),
    Family(u8, bool),
    Reopen,
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        4 => (0..12u8, prop::option::of(0..16u8), any::<bool>())
            .prop_map(|(name, asked, both)| Operation::Create(name, asked, both)),
        3 => (0..12u8).prop_map(Operation::Delete),
        2 => (0..12u8, any::<bool>()).prop_map(|(name, both)| Operation::Family(name, both)),
        1 => Just(Operation::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn no_two_services_share_an_address(operations in prop::collection::vec(operation(), 1..60)) {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let ranges = &["10.1.0.0/28", "fd00:1::/124"];
            let mut engine = open(directory.path(), ranges).await;
            for operation in operations {
                match operation {
                    Operation::Create(name, asked, both) => {
                        let policy = if both { "RequireDualStack" } else { "SingleStack" };
                        let mut spec = json!({"ipFamilyPolicy": policy});
                        if let Some(asked) = asked {
                            spec["clusterIP"] = format!("10.1.0.{asked}").into();
                        }
                        let _ = create(&engine, &format!("s{name}"), spec).await;
                    }
                    Operation::Delete(name) => {
                        let _ = engine.delete(&key(&format!("s{name}")), DeleteOptions::default()).await;
                    }
                    Operation::Family(name, both) => {
                        let policy = if both { "RequireDualStack" } else { "SingleStack" };
                        let _ = edit(&engine, &format!("s{name}"), |new| new["spec"]["ipFamilyPolicy"] = policy.into()).await;
                    }
                    Operation::Reopen => {
                        drop(engine);
                        engine = open(directory.path(), ranges).await;
                    }
                }
                let mut seen = BTreeSet::new();
                for service in engine.list(kind("services"), None).1 {
                    let spec = service.value()["spec"].clone();
                    for address in spec["clusterIPs"].as_array().unwrap() {
                        assert!(seen.insert(address.to_string()), "{address} twice");
                    }
                    assert_eq!(spec["clusterIPs"].as_array().unwrap().len(), spec["ipFamilies"].as_array().unwrap().len());
                }
            }
        });
    }
}
