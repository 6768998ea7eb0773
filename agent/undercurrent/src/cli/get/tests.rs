//! The tables, as a person sees them.

use super::*;

fn table_of(kind: Kind, items: Value) -> String {
    let items = items.as_array().unwrap().clone();
    let mut text = shown(kind, &items, false, false);
    text.push_str("---\n");
    text.push_str(&shown(kind, &items, true, false));
    text
}

#[test]
fn workloads() {
    insta::assert_snapshot!(table_of(
        Kind::Workloads,
        json!([
            {"uid": "Kubernetes//v1/Pod/shop/web-0", "name": "web-0", "namespace": "shop", "workloadIps": ["10.244.1.3"],
             "node": "node-1", "protocol": "HBONE", "status": "Healthy", "serviceAccount": "web",
             "authorizationPolicies": ["shop/only-client"],
             "waypoint": {"destination": "shop/way.shop.svc.cluster.local", "hboneMtlsPort": 15008}},
            {"uid": "Kubernetes//v1/Pod/old/db", "name": "db", "namespace": "old", "workloadIps": [], "node": "",
             "protocol": "TCP", "status": "Unhealthy", "serviceAccount": "default"},
        ])
    ));
}

#[test]
fn services() {
    insta::assert_snapshot!(table_of(
        Kind::Services,
        json!([
            {"name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["/10.96.0.10"],
             "ports": {"80": 8080, "9090": 9090}, "loadBalancing": {"mode": "Failover", "routingPreference": ["Zone"]},
             "endpoints": {"a": {"status": "Healthy"}, "b": {"status": "Unhealthy"}}},
            {"name": "none", "namespace": "shop", "hostname": "none.shop.svc.cluster.local", "vips": [],
             "ports": {"80": 0}, "endpoints": {}},
        ])
    ));
}

#[test]
fn policies() {
    insta::assert_snapshot!(table_of(
        Kind::Policies,
        json!([
            {"name": "istio_converted_static_strict", "namespace": "istio-system", "action": "Deny",
             "scope": "WorkloadSelector", "rules": [[[{"notPrincipals": ["Presence"]}]]],
             "origin": "PeerAuthentication shop/default"},
            {"name": "nothing", "namespace": "shop", "action": "Allow", "scope": "Namespace", "rules": []},
            {"name": "try", "namespace": "shop", "action": "Deny", "scope": "Namespace", "rules": [[]], "dryRun": true},
        ])
    ));
}

#[test]
fn certificates() {
    insta::assert_snapshot!(table_of(
        Kind::Certificates,
        json!([
            {"identity": "spiffe://cluster.local/ns/shop/sa/web", "state": "Available", "agent": "node-1",
             "certChain": [{"serialNumber": "3f2a", "expirationTime": "2026-11-23T06:20:08.123Z"}]},
            {"identity": "spiffe://cluster.local/ns/shop/sa/new", "state": "Unavailable", "certChain": [],
             "lastError": "the authority can't be reached"},
        ])
    ));
}

#[test]
fn connections() {
    insta::assert_snapshot!(table_of(
        Kind::Connections,
        json!([
            {"pod": "Kubernetes//v1/Pod/shop/client", "direction": "outbound", "source": "10.244.1.2:40000",
             "destination": "10.244.2.3:15008", "hboneTarget": "10.244.2.3:8080", "peer": "spiffe://x/ns/shop/sa/web",
             "destinationWorkload": "Kubernetes//v1/Pod/shop/web-0", "ageSeconds": 75, "bytesSent": 1536,
             "bytesReceived": 3145728, "traceId": "ec50774d1b7461a33d83204b87ab2156"},
            {"pod": "Kubernetes//v1/Pod/shop/web-0", "direction": "inbound", "source": "10.0.0.9:5",
             "destination": "10.244.2.3:8080", "ageSeconds": 1, "bytesSent": 0, "bytesReceived": 12,
             "rule": "allowed: no policy forbids it"},
        ])
    ));
}
