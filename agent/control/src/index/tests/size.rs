//! What a change costs in a mesh of thousands, and what a pod takes.

use std::collections::BTreeMap;

use serde_json::json;

use super::{Mesh, namespace, pod, put, service, slice};

const SERVICES: usize = 50;
const PODS: usize = 60;

fn thousands() -> Mesh {
    let mut mesh = Mesh::new();
    mesh.put(namespace("shop", json!({})));
    for of in 0..SERVICES {
        let name = format!("s{of}");
        let pods: Vec<_> = (0..PODS).map(|pod| format!("s{of}-{pod}")).collect();
        let names: Vec<_> = pods.iter().map(String::as_str).collect();
        let mut changes = vec![
            put(&service("shop", &name, &format!("10.96.0.{of}"), json!({}))),
            put(&slice("shop", &name, 8080, &names)),
        ];
        let pod = |(index, name): (usize, &String)| put(&pod("shop", name, &format!("10.{of}.0.{index}"), json!({})));
        changes.extend(pods.iter().enumerate().map(pod));
        mesh.apply(changes);
    }
    assert_eq!(mesh.resources.len(), SERVICES * (PODS + 1));
    mesh
}

#[test]
fn one_endpoint_is_one_workload() {
    let mut mesh = thousands();
    let mut costs = BTreeMap::new();
    let mut cost = |what: &'static str, mesh: &mut Mesh, object: serde_json::Value| {
        let outcome = mesh.put(object);
        costs.insert(what, (outcome.recomputed, outcome.changes.len()));
    };
    let unready = json!({"status": {"conditions": []}});
    cost("a pod's readiness", &mut mesh, pod("shop", "s1-1", "10.1.0.1", unready));
    cost("a new pod", &mut mesh, pod("shop", "s1-new", "10.1.0.200", json!({})));
    let names: Vec<_> = (0..PODS).map(|pod| format!("s1-{pod}")).collect();
    let mut names: Vec<_> = names.iter().map(String::as_str).collect();
    names.push("s1-new");
    cost("an endpoint more", &mut mesh, slice("shop", "s1", 8080, &names));
    cost("the same again", &mut mesh, slice("shop", "s1", 8080, &names));
    let labels = json!({"istio.io/dataplane-mode": "ambient"});
    cost("a label that means nothing here", &mut mesh, namespace("shop", labels));
    let balanced = json!({"spec": {"trafficDistribution": "PreferClose"}});
    cost(
        "a service's balancing",
        &mut mesh,
        service("shop", "s1", "10.96.0.1", balanced),
    );
    let expected = [
        ("a pod's readiness", (1, 1)),
        ("a new pod", (1, 1)),
        ("an endpoint more", (1, 1)),
        ("the same again", (0, 0)),
        ("a label that means nothing here", (0, 0)),
        ("a service's balancing", (1, 1)),
    ];
    assert_eq!(costs, BTreeMap::from(expected));
    let moved = mesh.put(service(
        "shop",
        "s1",
        "10.96.0.1",
        json!({"spec": {"ports": [{"name": "http", "port": 81}]}}),
    ));
    assert_eq!(moved.changes.len(), PODS + 2, "its own endpoints and itself");
}
