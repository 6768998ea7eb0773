//! Objects of the API, one by one.
#![allow(missing_docs, clippy::unwrap_used)]

use k8s::{
    Effect,
    live::{Kind, Object, read},
    validate,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn object(spec: Value) -> Value {
    json!({"apiVersion": "v1", "metadata": {"name": "x", "namespace": "ns"}, "spec": spec})
}

fn findings(kind: Kind, spec: Value) -> Vec<String> {
    validate(kind, &object(spec)).iter().map(ToString::to_string).collect()
}

#[test]
fn a_kind_is_found_by_its_group() {
    for kind in Kind::ALL {
        assert_eq!(Kind::find(kind.group(), kind.name()), Some(kind));
    }
    assert_eq!(Kind::find("v1", "Pod"), Some(Kind::Pod));
    assert_eq!(
        Kind::find("gateway.networking.k8s.io/v1", "Gateway"),
        Some(Kind::Gateway)
    );
    assert_eq!(Kind::find("networking.istio.io/v1", "Gateway"), None);
    assert_eq!(Kind::find("apps/v1", "Pod"), None);
}

#[test]
fn a_pod_of_a_real_cluster() {
    let pod = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z",
            "managedFields": [{"manager": "kubelet"}], "finalizers": null, "labels": {"a": "b"}},
        "spec": {"nodeName": "n", "containers": [{"name": "c", "image": "nginx", "command": null,
            "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
            "livenessProbe": {"grpc": {"port": 1}}, "securityContext": {"runAsUser": 4294967296u64}}], "tolerations": [{}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "True"}]}});
    let read = read(Kind::Pod, &pod);
    assert!(read.findings.is_empty());
    let Object::Pod(pod) = read.object else {
        panic!("no pod");
    };
    assert!(pod.is_ready() && !pod.has_ended());
    assert_eq!(pod.addresses().collect::<Vec<_>>(), ["10.0.0.1", "fd00::1"]);
    assert_eq!(pod.named_ports().collect::<Vec<_>>(), [("http", 8080)]);
    assert_eq!((pod.service_account(), pod.metadata.uid.as_str()), ("default", "u"));
}

#[test]
fn an_unknown_field_closes_a_policy() {
    let value = object(json!({"selector": {"matchLabels": {"app": "web"}}, "rules": [{"form": []}]}));
    let read = read(Kind::AuthorizationPolicy, &value);
    let Object::Unreadable(unreadable) = &read.object else {
        panic!("it was read");
    };
    assert_eq!(unreadable.selector.match_labels["app"], "web");
    assert_eq!(read.findings[0].effect, Effect::Closed);
    let expected = "closed: AuthorizationPolicy ns/x: spec.rules[0].form: no such field";
    assert_eq!(findings(Kind::AuthorizationPolicy, value["spec"].clone()), [expected]);
}

#[test]
fn admission() {
    let of = |kind, spec| findings(kind, spec).len();
    assert_eq!(of(Kind::AuthorizationPolicy, json!({"rules": [{}]})), 0);
    assert_eq!(of(Kind::AuthorizationPolicy, json!({"rules": [{"from": []}]})), 1);
    assert_eq!(
        of(
            Kind::PeerAuthentication,
            json!({"portLevelMtls": {"80": {"mode": "STRICT"}}})
        ),
        0
    );
    assert_eq!(
        of(
            Kind::PeerAuthentication,
            json!({"portLevelMtls": {"x": {"mode": "STRICT"}}})
        ),
        1
    );
    assert_eq!(of(Kind::Service, json!({"ports": [{"port": 80}]})), 0);
    assert_eq!(of(Kind::Service, json!({"ports": [{"port": 0}]})), 1);
    let unknown = json!({"hosts": ["a.com"], "host": "a.com"});
    assert_eq!(
        findings(Kind::ServiceEntry, unknown),
        ["note: ServiceEntry ns/x: spec.host: not acted upon"]
    );
    let port = json!({"hosts": ["a.com"], "ports": [{"number": 70000}]});
    assert!(findings(Kind::ServiceEntry, port)[0].contains("spec.ports[0].number"));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "[a-z*/:.]{0,8}".prop_map(Value::from),
        prop::sample::select(vec!["STRICT", "80", "10.0.0.1", "*", "None", "trustDomain: ["]).prop_map(Value::from),
    ];
    let key = prop::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "name",
        "namespace",
        "labels",
        "annotations",
        "selector",
        "matchLabels",
        "rules",
        "from",
        "source",
        "principals",
        "ipBlocks",
        "mtls",
        "mode",
        "portLevelMtls",
        "80",
        "ports",
        "port",
        "endpoints",
        "addresses",
        "hosts",
        "data",
        "mesh",
        "podIPs",
        "ip",
        "conditions",
        "type",
        "listeners",
        "targetRef",
        "clusterIPs",
    ]);
    leaf.prop_recursive(6, 48, 6, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone(), inner, 0..5)
                .prop_map(|map| Value::Object(map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())),
        ]
    })
}

proptest! {
    #[test]
    fn arbitrary_json_never_panics(value in json()) {
        for kind in Kind::ALL {
            validate(kind, &value);
        }
    }
}
