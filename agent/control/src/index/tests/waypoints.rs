//! Waypoints: who goes through which, and what happens when it is not there.

use k8s::live::Kind;
use proto::workload::gateway_address::Destination;
use serde_json::{Value, json};

use super::{Mesh, merged, namespace, object, pod, service};

/// Of class `istio-waypoint`; without a word of what it is for, without the label.
fn gateway(namespace: &str, used_for: &str, more: Value) -> Value {
    let labels = match used_for {
        "" => json!({}),
        used_for => json!({"istio.io/waypoint-for": used_for}),
    };
    let gateway = json!({"metadata": {"labels": labels},
        "spec": {"gatewayClassName": "istio-waypoint", "listeners": [{"name": "mesh", "port": 15008, "protocol": "HBONE"}]},
        "status": {"addresses": [{"type": "IPAddress", "value": "10.96.1.1"}],
            "conditions": [{"type": "Programmed", "status": "True"}]}});
    merged(object("Gateway", namespace, "wp", gateway), more)
}

fn uses(name: &str) -> Value {
    json!({"istio.io/use-waypoint": name})
}

/// The waypoints of the service and of the pod.
fn waypoints(mesh: &Mesh) -> [String; 2] {
    let of =
        |address: Option<proto::workload::GatewayAddress>| match address.map(|address| address.destination.unwrap()) {
            None => "-".to_owned(),
            Some(Destination::Address(address)) => format!("{:?}", &address.address[..]),
            Some(Destination::Hostname(name)) => name.hostname,
        };
    let service = mesh.service("shop/web.shop.svc.cluster.local").waypoint;
    [of(service), of(mesh.pod("shop", "web").waypoint)]
}

fn shop(labels: Value) -> Vec<Value> {
    vec![
        namespace("shop", labels),
        service("shop", "web", "10.96.0.1", json!({})),
        pod("shop", "web", "10.0.0.1", json!({})),
    ]
}

const THERE: &str = "[10, 96, 1, 1]";
const CLOSED: &str = "not-there.wp.shop.waypoint.invalid";

#[test]
fn a_waypoint_is_for_services_or_workloads() {
    for (used_for, expected) in [
        ("service", [THERE, "-"]),
        ("workload", ["-", THERE]),
        ("all", [THERE, THERE]),
        ("none", ["-", "-"]),
    ] {
        let mut mesh = Mesh::with(shop(uses("wp")));
        mesh.put(gateway("shop", used_for, json!({})));
        assert_eq!(waypoints(&mesh), expected, "{used_for}");
        assert!(mesh.findings.is_empty());
    }
}

#[test]
fn a_gateway_without_the_label_is_for_what_its_class_says() {
    let class = |labels: Value| {
        let spec = json!({"metadata": {"labels": labels}, "spec": {"controllerName": "istio.io/mesh-controller"}});
        object("GatewayClass", "", "istio-waypoint", spec)
    };
    let unlabelled = gateway("shop", "", json!({}));
    let mut mesh = Mesh::with(shop(uses("wp")));
    mesh.put(unlabelled.clone());
    assert_eq!(waypoints(&mesh), [THERE, "-"], "without a class it is for services");
    for (labels, expected) in [
        (json!({"istio.io/waypoint-for": "workload"}), ["-", THERE]),
        (json!({"istio.io/waypoint-for": "all"}), [THERE, THERE]),
        (json!({"istio.io/waypoint-for": "none"}), ["-", "-"]),
        (json!({}), [THERE, "-"]),
    ] {
        mesh.put(class(labels.clone()));
        assert_eq!(waypoints(&mesh), expected, "{labels}");
    }
    mesh.put(class(json!({"istio.io/waypoint-for": "workload"})));
    mesh.put(gateway("shop", "service", json!({})));
    assert_eq!(
        waypoints(&mesh),
        [THERE, "-"],
        "the Gateway's label is over its class's"
    );
    mesh.put(gateway("shop", "services", json!({})));
    let closed = "wrong-purpose.wp.shop.waypoint.invalid";
    assert_eq!(waypoints(&mesh), [closed, closed]);
    assert!(mesh.found(Kind::Namespace, "", "shop")[0].contains("istio.io/waypoint-for"));
    mesh.put(unlabelled);
    mesh.delete(Kind::GatewayClass, "", "istio-waypoint");
    assert_eq!(waypoints(&mesh), [THERE, "-"]);
}

#[test]
fn entries_have_waypoints_as_services_and_pods_do() {
    let mut mesh = Mesh::with([namespace("shop", json!({})), gateway("shop", "all", json!({}))]);
    let labels = json!({"metadata": {"labels": uses("wp")}});
    let spec = json!({"spec": {"hosts": ["db.example"], "addresses": ["10.9.0.1"], "resolution": "STATIC",
        "ports": [{"number": 80, "name": "http"}], "endpoints": [{"address": "10.8.0.1"}]}});
    mesh.put(merged(object("ServiceEntry", "shop", "db", spec), labels.clone()));
    let workload = object("WorkloadEntry", "shop", "vm", json!({"spec": {"address": "10.8.0.2"}}));
    mesh.put(merged(workload, labels));
    let is_there = |address: Option<proto::workload::GatewayAddress>| {
        assert!(matches!(address.unwrap().destination, Some(Destination::Address(_))));
    };
    is_there(mesh.service("shop/db.example").waypoint);
    let waypoint_of = |name: &str| mesh.workload(name).waypoint;
    is_there(waypoint_of("c/networking.istio.io/WorkloadEntry/shop/vm"));
    is_there(waypoint_of("c/networking.istio.io/ServiceEntry/shop/db/10.8.0.1"));
}

#[test]
fn a_missing_waypoint_closes() {
    let mut mesh = Mesh::with(shop(uses("wp")));
    assert_eq!(waypoints(&mesh), [CLOSED, CLOSED]);
    let found = mesh.found(Kind::Namespace, "", "shop");
    assert!(found[0].contains("waypoint shop/wp: it is not there"), "{found:?}");
    assert!(
        mesh.found(Kind::Pod, "shop", "web").is_empty(),
        "it is the namespace's author's to mend"
    );
    for (not_ready, why) in [
        (
            json!({"status": {"conditions": [{"type": "Programmed", "status": "False"}]}}),
            "not-programmed",
        ),
        (json!({"status": {"addresses": []}}), "no-address"),
        (json!({"spec": {"listeners": []}}), "no-hbone-listener"),
    ] {
        mesh.put(gateway("shop", "service", not_ready));
        assert_eq!(waypoints(&mesh), [&*format!("{why}.wp.shop.waypoint.invalid"), "-"]);
        assert_eq!(mesh.found(Kind::Namespace, "", "shop").len(), 1);
    }
    mesh.put(gateway("shop", "service", json!({})));
    assert_eq!(waypoints(&mesh), [THERE, "-"]);
    assert!(mesh.findings.is_empty());
    mesh.delete(Kind::Gateway, "shop", "wp");
    assert_eq!(waypoints(&mesh), [CLOSED, CLOSED]);
}

#[test]
fn the_objects_label_is_over_its_namespaces() {
    let mut mesh = Mesh::with(shop(uses("wp")));
    mesh.put(gateway("shop", "all", json!({})));
    mesh.put(service(
        "shop",
        "web",
        "10.96.0.1",
        json!({"metadata": {"labels": uses("none")}}),
    ));
    assert_eq!(waypoints(&mesh), ["-", THERE]);
    mesh.put(pod(
        "shop",
        "web",
        "10.0.0.1",
        json!({"metadata": {"labels": uses("other")}}),
    ));
    assert_eq!(waypoints(&mesh), ["-", "not-there.other.shop.waypoint.invalid"]);
    assert_eq!(mesh.found(Kind::Pod, "shop", "web").len(), 1);
    mesh.put(namespace("shop", uses("none")));
    mesh.put(pod("shop", "web", "10.0.0.1", json!({})));
    assert_eq!(waypoints(&mesh), ["-", "-"]);
}

#[test]
fn a_waypoint_elsewhere_has_to_allow_it() {
    let labels = json!({"istio.io/use-waypoint": "wp", "istio.io/use-waypoint-namespace": "far", "team": "a"});
    let allows = |namespaces: Value| {
        let listener = json!([{"port": 15008, "protocol": "HBONE", "allowedRoutes": {"namespaces": namespaces}}]);
        gateway("far", "all", json!({"spec": {"listeners": listener}}))
    };
    let mut mesh = Mesh::with(shop(labels));
    let closed = "not-allowed.wp.far.waypoint.invalid";
    for (namespaces, expected) in [
        (json!({"from": "All"}), THERE),
        (json!({"from": "Same"}), closed),
        (
            json!({"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}),
            THERE,
        ),
        (
            json!({"from": "Selector", "selector": {"matchLabels": {"team": "b"}}}),
            closed,
        ),
        (
            json!({"from": "Selector", "selector": {"matchExpressions": [{"key": "a"}]}}),
            closed,
        ),
        (json!({}), closed),
    ] {
        mesh.put(allows(namespaces.clone()));
        assert_eq!(waypoints(&mesh), [expected, expected], "{namespaces}");
    }
    mesh.put(allows(
        json!({"from": "Selector", "selector": {"matchLabels": {"team": "a"}}}),
    ));
    let other = json!({"istio.io/use-waypoint": "wp", "istio.io/use-waypoint-namespace": "far", "team": "b"});
    mesh.put(namespace("shop", other));
    assert_eq!(waypoints(&mesh), [closed, closed], "the namespace's labels count");
}

#[test]
fn a_waypoint_does_not_use_itself() {
    let mut mesh = Mesh::with([
        namespace("shop", uses("wp")),
        gateway(
            "shop",
            "all",
            json!({"metadata": {"annotations": {"ambient.istio.io/waypoint-inbound-binding": "PROXY/15088"}}}),
        ),
    ]);
    let own = json!({"metadata": {"labels": {"gateway.networking.k8s.io/gateway-name": "wp"}}});
    mesh.put(pod("shop", "web", "10.0.0.1", own.clone()));
    let managed = json!({"metadata": {"labels": {"gateway.istio.io/managed": "istio.io-mesh-controller"}}});
    mesh.put(service("shop", "web", "10.96.0.1", managed));
    assert_eq!(waypoints(&mesh), ["-", "-"]);
    assert_eq!(mesh.pod("shop", "web").application_tunnel.unwrap().port, 15088);
    mesh.put(gateway("shop", "all", json!({})));
    assert!(mesh.pod("shop", "web").application_tunnel.is_none());
}

#[test]
fn a_host_name_for_an_address() {
    let mut mesh = Mesh::with(shop(uses("wp")));
    let addresses = json!([{"type": "Hostname", "value": "wp.shop.svc.cluster.local"}]);
    mesh.put(gateway("shop", "all", json!({"status": {"addresses": addresses}})));
    assert_eq!(
        waypoints(&mesh),
        ["wp.shop.svc.cluster.local", "wp.shop.svc.cluster.local"]
    );
}

#[test]
fn a_policy_for_a_waypoint_closes_a_target_without_one() {
    let mut mesh = Mesh::with(shop(json!({})));
    let policy = |action: &str, target: Value, more: Value| {
        let spec = json!({"spec": {"action": action, "rules": [{}], "targetRefs": [target]}});
        merged(object("AuthorizationPolicy", "shop", "p", spec), more)
    };
    let web = || json!({"kind": "Service", "name": "web"});
    let found = |mesh: &Mesh| mesh.found(Kind::AuthorizationPolicy, "shop", "p").join("\n");
    let orphaned = "policy-alone.p.shop.waypoint.invalid";
    mesh.put(policy("DENY", web(), json!({})));
    assert_eq!(waypoints(&mesh), [orphaned, "-"]);
    assert!(mesh.policy("shop/p").is_none(), "it is not for agents");
    assert!(found(&mesh).starts_with("closed: ") && found(&mesh).contains("Service shop/web has no waypoint"));
    let service_told = mesh.found(Kind::Service, "shop", "web");
    assert!(
        service_told[0].contains("AuthorizationPolicy shop/p is for its waypoint"),
        "{service_told:?}"
    );

    // One that is only to be looked at closes nothing.
    for (action, more) in [
        ("AUDIT", json!({})),
        (
            "DENY",
            json!({"metadata": {"annotations": {"istio.io/dry-run": "true"}}}),
        ),
    ] {
        mesh.put(policy(action, web(), more));
        assert_eq!(waypoints(&mesh), ["-", "-"]);
        assert!(found(&mesh).starts_with("refused: "), "{}", found(&mesh));
    }
    mesh.put(policy("DENY", web(), json!({})));
    assert_eq!(waypoints(&mesh)[0], orphaned);

    // With a waypoint it is that one's business, whether it is for services, and ready.
    mesh.put(namespace("shop", uses("wp")));
    assert_eq!(waypoints(&mesh)[0], CLOSED);
    mesh.put(gateway("shop", "service", json!({})));
    assert_eq!(waypoints(&mesh)[0], THERE);
    assert!(found(&mesh).contains("waypoint shop/wp, which Service shop/web goes through, has to enforce it"));
    mesh.put(gateway("shop", "workload", json!({})));
    assert_eq!(waypoints(&mesh)[0], orphaned);
    mesh.put(gateway("shop", "all", json!({})));
    assert_eq!(waypoints(&mesh)[0], THERE);

    let target = |group: &str, kind: &str, name: &str| json!({"group": group, "kind": kind, "name": name});
    let gateways = "gateway.networking.k8s.io";
    for (target, words) in [
        (
            target("", "Service", "gone"),
            "refused: AuthorizationPolicy shop/p: spec.targetRefs[0]: Service shop/gone is not there",
        ),
        (target(gateways, "Gateway", "wp"), "Gateway shop/wp has to enforce it"),
        (target(gateways, "Gateway", "gone"), "Gateway shop/gone is not there"),
        (
            target(gateways, "GatewayClass", "istio-waypoint"),
            "only in the root namespace istio-system",
        ),
        (target("apps", "Deployment", "web"), "can be a target"),
        (
            json!({"kind": "Service", "name": "web", "namespace": "far"}),
            "targets of its own namespace",
        ),
    ] {
        mesh.put(policy("DENY", target, json!({})));
        assert!(found(&mesh).contains(words), "{}", found(&mesh));
    }
    // A policy without its service is told when that comes, and the service is open when the policy goes.
    mesh.put(namespace("shop", json!({})));
    mesh.put(policy("DENY", json!({"kind": "Service", "name": "late"}), json!({})));
    mesh.put(service("shop", "late", "10.96.0.7", json!({})));
    assert!(found(&mesh).starts_with("closed: "), "{}", found(&mesh));
    mesh.delete(Kind::AuthorizationPolicy, "shop", "p");
    assert!(mesh.service("shop/late.shop.svc.cluster.local").waypoint.is_none());
    assert!(mesh.findings.is_empty());
    mesh.check();
}
