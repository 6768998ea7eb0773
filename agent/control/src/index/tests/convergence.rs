//! Any sequence of changes gives what a fresh index has.

use std::collections::BTreeMap;

use k8s::live::Kind;
use proptest::prelude::*;
use proto::workload::TunnelProtocol;
use serde_json::{Value, json};

use super::{Mesh, kind, merged, namespace, object, pod, put, service, slice};
use crate::index::ObjectChange;

const NAMESPACES: [&str; 3] = ["a", "b", "istio-system"];
const NAMES: [&str; 3] = ["x", "y", "z"];

fn one<T: Clone + std::fmt::Debug + 'static>(values: &[T]) -> impl Strategy<Value = T> + use<T> {
    prop::sample::select(values.to_vec())
}

fn a_namespace() -> impl Strategy<Value = &'static str> {
    one(&NAMESPACES)
}

fn a_name() -> impl Strategy<Value = &'static str> {
    one(&NAMES)
}

/// One of a few addresses, so that they are contended for.
fn an_ip() -> impl Strategy<Value = String> {
    (1..6u8).prop_map(|last| format!("10.0.0.{last}"))
}

fn labels() -> impl Strategy<Value = Value> {
    one(&[
        json!({}),
        json!({"app": "x"}),
        json!({"app": "y", "istio.io/use-waypoint": "x"}),
        json!({"app": "x", "istio.io/use-waypoint": "none"}),
        json!({"app": "x", "istio.io/use-waypoint": "y", "istio.io/use-waypoint-namespace": "b"}),
        json!({"app": "y", "networking.istio.io/tunnel": "http"}),
        json!({"app": "x", "gateway.networking.k8s.io/gateway-name": "x"}),
        json!({"istio.io/use-waypoint": "x", "gateway.istio.io/managed": "istio.io-mesh-controller"}),
    ])
}

fn age() -> impl Strategy<Value = Value> {
    one(&[
        json!({}),
        json!({"creationTimestamp": "2025-01-01T00:00:00Z"}),
        json!({"creationTimestamp": "2026-01-01T00:00:00Z"}),
    ])
}

/// Namespace, name, and the metadata of anything.
fn metadata() -> impl Strategy<Value = (&'static str, &'static str, Value)> {
    let metadata =
        (labels(), age()).prop_map(|(labels, age)| json!({"metadata": merged(age, json!({"labels": labels}))}));
    (a_namespace(), a_name(), metadata)
}

fn selector() -> impl Strategy<Value = Value> {
    one(&[
        json!(null),
        json!({"matchLabels": {"app": "x"}}),
        json!({"matchLabels": {"app": "y"}}),
        json!({"matchLabels": {"istio.io/use-waypoint": "x"}}),
    ])
}

fn pods() -> impl Strategy<Value = Value> {
    let more = one(&[
        json!({}),
        json!({"metadata": {"annotations": null}}),
        json!({"metadata": {"deletionTimestamp": "2026-02-01T00:00:00Z"}}),
        json!({"status": {"phase": "Succeeded"}}),
        json!({"status": {"conditions": []}}),
        json!({"spec": {"hostNetwork": true}}),
        json!({"spec": {"nodeName": "y"}}),
        json!({"status": {"podIP": null, "podIPs": null}}),
        json!({"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}}),
    ]);
    (metadata(), an_ip(), more).prop_map(|((ns, name, metadata), ip, more)| {
        let mut made = pod(ns, name, &ip, more);
        made["metadata"]["labels"] = json!({});
        merged(made, metadata)
    })
}

fn services() -> impl Strategy<Value = Value> {
    let more = one(&[
        json!({}),
        json!({"spec": {"ports": [{"name": "http", "port": 81}, {"name": "b", "port": 82}]}}),
        json!({"spec": {"type": "ExternalName"}}),
        json!({"spec": {"trafficDistribution": "Sideways"}}),
        json!({"spec": {"clusterIP": "None", "clusterIPs": ["None"]}}),
        json!({"spec": {"selector": {"app": "y"}}}),
        json!({"spec": {"publishNotReadyAddresses": true}}),
        json!({"spec": 1}),
    ]);
    let made = (metadata(), an_ip(), more);
    made.prop_map(|((ns, name, metadata), ip, more)| merged(merged(service(ns, name, &ip, json!({})), more), metadata))
}

fn slices() -> impl Strategy<Value = Value> {
    let pods = prop::collection::vec(a_name(), 0..3);
    let more = one(&[
        json!({}),
        json!({"nodeName": "y", "zone": "x"}),
        json!({"zone": "z"}),
        json!({"conditions": {"ready": false}}),
    ]);
    let bare = prop::collection::vec((an_ip(), more), 0..2);
    let made = (a_namespace(), a_name(), a_name(), 1..3u16, pods, bare);
    made.prop_map(|(ns, name, of, port, pods, bare)| {
        let mut made = slice(ns, of, port, &pods);
        made["metadata"]["name"] = json!(name);
        let bare = bare
            .iter()
            .map(|(ip, more)| merged(json!({"addresses": [ip]}), more.clone()));
        made["endpoints"].as_array_mut().unwrap().extend(bare);
        made
    })
}

fn entries() -> impl Strategy<Value = Value> {
    let address = prop_oneof![3 => an_ip(), 1 => one(&["", "host.example"]).prop_map(str::to_owned)];
    (metadata(), address).prop_map(|((ns, name, metadata), address)| {
        let spec = json!({"spec": {"address": address, "ports": {"http": 9}}});
        merged(object("WorkloadEntry", ns, name, metadata), spec)
    })
}

fn service_entries() -> impl Strategy<Value = Value> {
    let hosts = one(&[
        json!(["h.com"]),
        json!(["h.com", "i.com"]),
        json!(["x.a.svc.cluster.local", "h.com"]),
        json!(["*.h.com", "H.com"]),
    ]);
    let more = one(&[
        json!({"resolution": "DNS"}),
        json!({"resolution": "NONE", "addresses": ["10.0.0.2", "10.1.0.0/16"], "subjectAltNames": ["s"]}),
        json!({"resolution": "NONE", "addresses": ["10.0.0.2", "10.0.0.6"], "exportTo": ["."]}),
        json!({"resolution": "STATIC", "workloadSelector": {"labels": {"app": "x"}}}),
        json!({"resolution": "STATIC", "workloadSelector": {"labels": {"app": "x"}}, "addresses": ["10.0.0.2"]}),
        json!({"resolution": "STATIC", "endpoints": [{"address": "10.0.0.3"}], "addresses": ["10.0.0.3", "10.0.0.4"]}),
        json!({"resolution": "STATIC", "endpoints": [{"address": "10.0.0.3"}, {"address": "10.0.0.4", "labels": {"app": "x"}}]}),
        json!({"resolution": "STATIC", "endpoints": [{"address": "10.0.0.4"}, {"address": "10.0.0.4"}, {"address": "10.0.0.3"}]}),
    ]);
    (metadata(), hosts, more).prop_map(|((ns, name, metadata), hosts, more)| {
        let spec = merged(json!({"hosts": hosts, "ports": [{"number": 80, "name": "http"}]}), more);
        merged(object("ServiceEntry", ns, name, metadata), json!({"spec": spec}))
    })
}

fn policies() -> impl Strategy<Value = Value> {
    let authorization = one(&[
        json!({}),
        json!({"action": "DENY", "rules": [{}]}),
        json!({"action": "AUDIT"}),
        json!({"action": "CUSTOM"}),
        json!({"rules": 1}),
        json!({"targetRefs": [{"kind": "Service", "name": "x"}, {"kind": "Service", "name": "y"}]}),
        json!({"targetRefs": [{"group": "networking.istio.io", "kind": "ServiceEntry", "name": "x"}]}),
        json!({"targetRefs": [{"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": "x"}], "action": "AUDIT"}),
    ]);
    let authentication = one(&[
        json!({"mtls": {"mode": "STRICT"}}),
        json!({"mtls": {"mode": "PERMISSIVE"}}),
        json!({"portLevelMtls": {"80": {"mode": "STRICT"}, "81": {"mode": "PERMISSIVE"}}}),
        json!({"mtls": {"mode": "MAYBE"}}),
        json!({}),
    ]);
    let spec = prop_oneof![
        authorization.prop_map(|spec| ("AuthorizationPolicy", spec)),
        authentication.prop_map(|spec| ("PeerAuthentication", spec)),
    ];
    (metadata(), selector(), spec).prop_map(|((ns, name, metadata), selector, (kind, spec))| {
        let spec = merged(spec, json!({"selector": selector}));
        merged(object(kind, ns, name, metadata), json!({"spec": spec}))
    })
}

fn used_for_label(used_for: &str) -> Value {
    match used_for {
        "" => json!({}),
        used_for => json!({"istio.io/waypoint-for": used_for}),
    }
}

fn gateway_classes() -> impl Strategy<Value = Value> {
    one(&["workload", "all", ""]).prop_map(|used_for| {
        let labels = used_for_label(used_for);
        json!({"kind": "GatewayClass", "metadata": {"name": "class", "labels": labels}})
    })
}

fn gateways() -> impl Strategy<Value = Value> {
    let used_for = one(&["service", "workload", "all", "none", "typo", ""]);
    let from = one(&[
        json!({"from": "All"}),
        json!({"from": "Same"}),
        json!({"from": "Selector", "selector": {"matchLabels": {"app": "x"}}}),
    ]);
    let made = (a_namespace(), a_name(), used_for, from, any::<bool>(), any::<bool>());
    made.prop_map(|(ns, name, used_for, from, programmed, bound)| {
        let annotations = match bound {
            true => json!({"ambient.istio.io/waypoint-inbound-binding": "PROXY/15088"}),
            false => json!({}),
        };
        let labels = used_for_label(used_for);
        let more = json!({"metadata": {"labels": labels, "annotations": annotations},
            "spec": {"gatewayClassName": "class", "listeners": [{"port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": from}}]},
            "status": {"addresses": [{"value": "10.0.0.5"}],
                "conditions": [{"type": "Programmed", "status": if programmed { "True" } else { "False" }}]}});
        object("Gateway", ns, name, more)
    })
}

fn others() -> impl Strategy<Value = Value> {
    let of_namespace =
        (a_namespace(), labels(), one(&["PreferClose", "Any"])).prop_map(|(name, labels, distribution)| {
            let annotations = json!({"networking.istio.io/traffic-distribution": distribution});
            merged(
                namespace(name, labels),
                json!({"metadata": {"annotations": annotations}}),
            )
        });
    let node = (one(&["n1", "y"]), a_name(), a_name()).prop_map(|(name, region, zone)| {
        let labels = json!({"topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone});
        json!({"kind": "Node", "metadata": {"name": name, "labels": labels}})
    });
    let config = one(&["{}", "trustDomain: td", "rootNamespace: a", "rootNamespace: b"]);
    let config = config.prop_map(|text| object("ConfigMap", "istio-system", "istio", json!({"data": {"mesh": text}})));
    prop_oneof![4 => of_namespace, 2 => node, 1 => config]
}

fn objects() -> impl Strategy<Value = Value> {
    prop_oneof![
        4 => pods(),
        3 => services(),
        4 => slices(),
        2 => entries(),
        3 => service_entries(),
        4 => policies(),
        2 => gateways(),
        1 => gateway_classes(),
        3 => others(),
    ]
}

/// An object to put, and whether it is to be deleted instead; in batches.
fn sequence() -> impl Strategy<Value = Vec<Vec<(Value, bool)>>> {
    let change = (objects(), prop::bool::weighted(0.25));
    prop::collection::vec(prop::collection::vec(change, 1..4), 1..25)
}

type Key = (Kind, String, String);

fn key(object: &Value) -> Key {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    (kind(object), text("namespace"), text("name"))
}

/// A pod or entry is HBONE only where the object says so.
fn check_hbone(mesh: &Mesh, objects: &BTreeMap<Key, Value>) {
    for workload in mesh.workloads() {
        if workload.tunnel_protocol() == TunnelProtocol::None {
            continue;
        }
        let of = if workload.uid.contains("/Pod/") {
            Kind::Pod
        } else {
            Kind::WorkloadEntry
        };
        let object = &objects[&(of, workload.namespace.clone(), workload.name.clone())];
        let metadata = &object["metadata"];
        let native = metadata["labels"]["networking.istio.io/tunnel"] == "http";
        let redirected = metadata["annotations"]["ambient.istio.io/redirection"] == "enabled"
            && object["spec"]["hostNetwork"] != true;
        assert!(native || redirected, "{object}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_sequence_gives_what_a_fresh_index_has(sequence in sequence()) {
        let mut mesh = Mesh::new();
        let mut objects: BTreeMap<Key, Value> = BTreeMap::new();
        for batch in sequence {
            let mut changes = Vec::new();
            for (object, delete) in batch {
                let (kind, namespace, name) = key(&object);
                if delete {
                    objects.remove(&(kind, namespace.clone(), name.clone()));
                    changes.push(ObjectChange::Delete { kind, namespace, name });
                } else {
                    changes.push(put(&object));
                    objects.insert(key(&object), object);
                }
            }
            mesh.apply(changes);
            mesh.check();
            check_hbone(&mesh, &objects);
        }
        let fresh = Mesh::with(objects.values().cloned());
        prop_assert_eq!(&mesh.resources, &fresh.resources);
        prop_assert_eq!(&mesh.findings, &fresh.findings);
        // With every object gone, nothing is left.
        let gone = objects.into_keys().map(|(kind, namespace, name)| ObjectChange::Delete { kind, namespace, name });
        mesh.apply(gone.collect());
        prop_assert!(mesh.resources.is_empty() && mesh.findings.is_empty());
    }
}
