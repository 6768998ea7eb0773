//! Random objects of a small cluster, in which much depends on much.

use control::index::ObjectChange;
use k8s::live::{Kind, read};
use proptest::prelude::*;
use serde_json::{Value, json};

/// An object that comes or changes, or the one of its name goes.
#[derive(Clone, Debug)]
pub struct Step {
    object: Value,
    delete: bool,
}

impl Step {
    pub fn change(&self) -> ObjectChange {
        let object = &self.object;
        let kind = Kind::ALL
            .into_iter()
            .find(|kind| kind.name() == object["kind"])
            .unwrap();
        let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
        match self.delete {
            true => ObjectChange::Delete {
                kind,
                namespace: text("namespace"),
                name: text("name"),
            },
            false => ObjectChange::Put(read(kind, object)),
        }
    }
}

fn one<T: Clone + std::fmt::Debug + 'static>(values: &[T]) -> impl Strategy<Value = T> + use<T> {
    prop::sample::select(values.to_vec())
}

fn place() -> impl Strategy<Value = (&'static str, &'static str, &'static str)> {
    (
        one(&["a", "b", "istio-system"]),
        one(&["x", "y", "z"]),
        one(&["x", "y"]),
    )
}

fn ip() -> impl Strategy<Value = String> {
    (1..8u8).prop_map(|last| format!("10.0.0.{last}"))
}

fn pod() -> impl Strategy<Value = Value> {
    let captured = one(&[json!({"ambient.istio.io/redirection": "enabled"}), json!({})]);
    (place(), ip(), captured, any::<bool>(), any::<bool>()).prop_map(
        |((ns, name, app), ip, annotations, ready, host)| {
            json!({
                "kind": "Pod",
                "metadata": {"name": name, "namespace": ns, "labels": {"app": app}, "annotations": annotations},
                "spec": {"nodeName": "n1", "serviceAccountName": "sa", "hostNetwork": host && ready},
                "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
                    "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
            })
        },
    )
}

fn service() -> impl Strategy<Value = Value> {
    (place(), 1..8u8, one(&[80, 81])).prop_map(|((ns, name, app), last, port)| {
        let ip = format!("10.9.0.{last}");
        json!({"kind": "Service", "metadata": {"name": name, "namespace": ns},
            "spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": app},
                "ports": [{"name": "http", "port": port, "targetPort": 8080, "protocol": "TCP"}]}})
    })
}

fn slice() -> impl Strategy<Value = Value> {
    let pods = prop::collection::vec(one(&["x", "y", "z"]), 0..3);
    (place(), pods, 8080..8083u16).prop_map(|((ns, name, of), pods, port)| {
        let endpoint = |pod: &&str| json!({"addresses": ["10.0.0.1"], "targetRef": {"kind": "Pod", "name": pod}});
        let endpoints: Vec<_> = pods.iter().map(endpoint).collect();
        json!({"kind": "EndpointSlice", "addressType": "IPv4", "endpoints": endpoints,
            "metadata": {"name": name, "namespace": ns, "labels": {"kubernetes.io/service-name": of}},
            "ports": [{"name": "http", "port": port, "protocol": "TCP"}]})
    })
}

fn service_entry() -> impl Strategy<Value = Value> {
    (place(), ip(), any::<bool>()).prop_map(|((ns, name, host), ip, range)| {
        let addresses = if range {
            json!(["10.8.0.0/16"])
        } else {
            json!(["10.8.0.1"])
        };
        json!({"kind": "ServiceEntry", "metadata": {"name": name, "namespace": ns},
            "spec": {"hosts": [format!("{host}.example")], "addresses": addresses, "resolution": "STATIC",
                "ports": [{"number": 80, "name": "http"}], "endpoints": [{"address": ip}]}})
    })
}

fn policy() -> impl Strategy<Value = Value> {
    let of = one(&[
        ("AuthorizationPolicy", json!({"action": "DENY", "rules": [{}]})),
        ("AuthorizationPolicy", json!({})),
        ("AuthorizationPolicy", json!({"rules": 1})),
        ("PeerAuthentication", json!({"mtls": {"mode": "STRICT"}})),
        (
            "PeerAuthentication",
            json!({"portLevelMtls": {"80": {"mode": "STRICT"}}}),
        ),
    ]);
    (place(), of, any::<bool>()).prop_map(|((ns, name, app), (kind, mut spec), selects)| {
        if selects {
            spec["selector"] = json!({"matchLabels": {"app": app}});
        }
        json!({"kind": kind, "metadata": {"name": name, "namespace": ns}, "spec": spec})
    })
}

fn step() -> impl Strategy<Value = Step> {
    let object = prop_oneof![4 => pod(), 2 => service(), 3 => slice(), 1 => service_entry(), 3 => policy()];
    (object, prop::bool::weighted(0.25)).prop_map(|(object, delete)| Step { object, delete })
}

/// Steps in batches, each with what the test does after it.
pub fn sequence() -> impl Strategy<Value = Vec<(Vec<Step>, u8)>> {
    prop::collection::vec((prop::collection::vec(step(), 1..5), 0..8u8), 4..30)
}
