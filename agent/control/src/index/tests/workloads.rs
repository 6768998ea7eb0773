//! Pods, WorkloadEntries and endpoints, as agents see them.

use k8s::live::Kind;
use proto::workload::{NetworkMode, TunnelProtocol, WorkloadStatus, WorkloadType};
use serde_json::{Value, json};

use super::{Mesh, merged, object, pod, service, slice};

fn web() -> Vec<Value> {
    vec![
        service("shop", "web", "10.96.0.1", json!({})),
        slice("shop", "web", 8080, &["web"]),
        pod("shop", "web", "10.0.0.1", json!({})),
    ]
}

#[test]
fn a_pod_in_full() {
    let mut mesh = Mesh::with(web());
    mesh.put(
        json!({"kind": "Node", "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/region": "r",
        "topology.kubernetes.io/zone": "z", "topology.istio.io/subzone": "s"}}}),
    );
    let owner = json!({"metadata": {"labels": {"version": "v2", "pod-template-hash": "5d"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": "front-5d", "controller": true}]}});
    mesh.put(pod("shop", "web", "10.0.0.1", owner));
    let found = mesh.pod("shop", "web");
    assert_eq!(found.addresses, [vec![10, 0, 0, 1]]);
    assert_eq!(found.tunnel_protocol(), TunnelProtocol::Hbone);
    assert_eq!((found.node.as_str(), found.service_account.as_str()), ("n1", "sa"));
    assert_eq!(
        (found.workload_name.as_str(), found.workload_type()),
        ("front", WorkloadType::Deployment)
    );
    assert_eq!(
        (found.canonical_name.as_str(), found.canonical_revision.as_str()),
        ("web", "v2")
    );
    assert_eq!(found.trust_domain, "", "cluster.local");
    let locality = found.locality.unwrap();
    assert_eq!(
        (&*locality.region, &*locality.zone, &*locality.subzone),
        ("r", "z", "s")
    );
    let ports = &found.services["shop/web.shop.svc.cluster.local"].ports;
    assert_eq!((ports[0].service_port, ports[0].target_port), (80, 8080));
    assert_eq!(mesh.aliases("c//v1/Pod/shop/web"), ["/10.0.0.1"]);
}

#[test]
fn a_pod_comes_with_its_address_and_goes_with_its_end() {
    let mut mesh = Mesh::new();
    let phase = |phase: &str| json!({"status": {"phase": phase}});
    let bare = json!({"status": {"podIP": null, "podIPs": null, "phase": "Pending", "conditions": null}});
    for (change, there) in [
        (bare, false),
        (phase("Running"), true),
        (phase("Succeeded"), false),
        (phase("Unknown"), true),
        (phase("Failed"), false),
    ] {
        mesh.put(pod("shop", "web", "10.0.0.1", change));
        assert_eq!(mesh.find_workload("c//v1/Pod/shop/web").is_some(), there);
    }
}

#[test]
fn readiness() {
    let mut mesh = Mesh::new();
    for (change, expected) in [
        (json!({}), WorkloadStatus::Healthy),
        (
            json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}),
            WorkloadStatus::Unhealthy,
        ),
        (json!({"status": {"conditions": []}}), WorkloadStatus::Unhealthy),
        (
            json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
            WorkloadStatus::Unhealthy,
        ),
    ] {
        mesh.put(pod("shop", "web", "10.0.0.1", change));
        assert_eq!(mesh.pod("shop", "web").status(), expected);
    }
}

#[test]
fn nobody_is_hbone_without_redirection() {
    let redirection = |value: &str| json!({"metadata": {"annotations": {"ambient.istio.io/redirection": value}}});
    let cases = [
        (redirection("enabled"), true, false),
        (redirection("pending"), false, false),
        (
            json!({"metadata": {"annotations": null, "labels": {"istio.io/dataplane-mode": "ambient"}}}),
            false,
            false,
        ),
        (
            json!({"metadata": {"annotations": {"sidecar.istio.io/status": "{}"}}}),
            false,
            false,
        ),
        (json!({"spec": {"hostNetwork": true}}), false, false),
        (
            json!({"metadata": {"annotations": null, "labels": {"networking.istio.io/tunnel": "http"}}}),
            true,
            true,
        ),
    ];
    for (change, hbone, native) in cases {
        let mesh = Mesh::with([pod("shop", "web", "10.0.0.1", change.clone())]);
        let found = mesh.pod("shop", "web");
        assert_eq!(found.tunnel_protocol() == TunnelProtocol::Hbone, hbone, "{change}");
        assert_eq!(found.native_tunnel, native, "{change}");
    }
}

#[test]
fn a_workload_entry_has_the_ports_that_its_service_names() {
    let ports = |endpoint: Value, of: Value| {
        let ports = json!({"address": "172.16.0.1", "labels": {"app": "vm"}, "ports": endpoint});
        let mesh = Mesh::with([of, object("WorkloadEntry", "shop", "vm", json!({"spec": ports}))]);
        let found = mesh.workload("c/networking.istio.io/WorkloadEntry/shop/vm");
        let services = found.services.into_values().next();
        services.map(|ports| ports.ports.iter().map(|port| port.target_port).collect::<Vec<_>>())
    };
    let selector = json!({"app": "vm"});
    let of_service = |target: Value| {
        let ports = json!([{"name": "http", "port": 80, "targetPort": target}]);
        service(
            "shop",
            "vm",
            "10.96.0.1",
            json!({"spec": {"selector": selector, "ports": ports}}),
        )
    };
    // A Service names its target port, or numbers it; what its own port is called means nothing there.
    let both = json!({"http": 81, "web": 82});
    assert_eq!(ports(both.clone(), of_service(json!("web"))), Some(vec![82]));
    assert_eq!(ports(both.clone(), of_service(json!(8080))), Some(vec![8080]));
    assert_eq!(ports(both.clone(), of_service(Value::Null)), Some(vec![80]));
    assert_eq!(ports(json!({"http": 81}), of_service(json!("web"))), Some(Vec::new()));
    // A ServiceEntry has numbers only, and names are the ports' own.
    let of_entry = |target: Value| {
        let spec = json!({"hosts": ["vm.com"], "resolution": "STATIC", "workloadSelector": {"labels": selector},
            "ports": [{"number": 80, "name": "http", "targetPort": target}]});
        object("ServiceEntry", "shop", "vm", json!({"spec": spec}))
    };
    assert_eq!(ports(both, of_entry(json!(8080))), Some(vec![81]));
    assert_eq!(ports(json!({"web": 82}), of_entry(json!(8080))), Some(vec![8080]));
    assert_eq!(ports(json!({}), of_entry(Value::Null)), Some(vec![80]));
}

#[test]
fn a_host_network_pod_has_no_alias() {
    let host = json!({"spec": {"hostNetwork": true}});
    let mesh = Mesh::with([
        pod("shop", "one", "192.168.0.1", host.clone()),
        pod("shop", "two", "192.168.0.1", host),
    ]);
    mesh.check();
    for name in ["one", "two"] {
        assert_eq!(mesh.pod("shop", name).network_mode(), NetworkMode::HostNetwork);
        assert_eq!(mesh.pod("shop", name).addresses.len(), 1);
        assert!(mesh.aliases(&format!("c//v1/Pod/shop/{name}")).is_empty());
    }
    // It serves its services all the same.
    let mut mesh = mesh;
    mesh.put(service("shop", "one", "10.96.0.1", json!({})));
    mesh.put(slice("shop", "one", 8080, &["one"]));
    let found = mesh.pod("shop", "one");
    assert_eq!(
        found.services["shop/one.shop.svc.cluster.local"].ports[0].target_port,
        8080
    );
    assert_eq!(found.tunnel_protocol(), TunnelProtocol::None);
    assert!(mesh.findings.is_empty());
}

#[test]
fn dual_stack_and_mapped_addresses() {
    let ips = json!({"status": {"podIPs": [{"ip": "::ffff:10.0.0.1"}, {"ip": "fd00::1"}, {"ip": "10.0.0.1"}]}});
    let mesh = Mesh::with([pod("shop", "web", "10.0.0.1", ips)]);
    let lengths: Vec<_> = mesh.pod("shop", "web").addresses.iter().map(|ip| ip.len()).collect();
    assert_eq!(lengths, [4, 16]);
    assert_eq!(mesh.aliases("c//v1/Pod/shop/web"), ["/10.0.0.1", "/fd00::1"]);
}

#[test]
fn an_address_has_one_owner() {
    let aged = |name: &str, year: u16| {
        let time = format!("{year}-01-01T00:00:00Z");
        pod(
            "shop",
            name,
            "10.0.0.1",
            json!({"metadata": {"creationTimestamp": time}}),
        )
    };
    let mut mesh = Mesh::with([aged("a", 2026), aged("b", 2025)]);
    mesh.check();
    assert!(mesh.find_workload("c//v1/Pod/shop/a").is_none());
    let expected = "narrowed: Pod shop/a: status.podIPs: 10.0.0.1 is Pod shop/b's";
    assert_eq!(mesh.found(Kind::Pod, "shop", "a"), [expected]);
    // What is on its way out yields.
    mesh.put(merged(
        aged("b", 2025),
        json!({"metadata": {"deletionTimestamp": "2026-02-01T00:00:00Z"}}),
    ));
    assert!(mesh.find_workload("c//v1/Pod/shop/b").is_none());
    mesh.delete(Kind::Pod, "shop", "b");
    assert_eq!(mesh.pod("shop", "a").addresses.len(), 1);
    assert!(mesh.findings.is_empty());
    // An entry is anybody's to write: a pod's address is not to be had by it, however old it is.
    let entry = json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"}, "spec": {"address": "10.0.0.1"}});
    mesh.put(object("WorkloadEntry", "evil", "we", entry));
    assert_eq!(mesh.found(Kind::WorkloadEntry, "evil", "we").len(), 1);
    assert_eq!(mesh.pod("shop", "a").addresses.len(), 1);
}

#[test]
fn who_has_an_address_is_the_endpoint_for_all() {
    let entry = |namespace: &str, name: &str, ip: &str| {
        let spec = json!({"hosts": [format!("{name}.com")], "resolution": "STATIC", "ports": [{"number": 80}],
            "endpoints": [{"address": ip}]});
        object("ServiceEntry", namespace, name, json!({"spec": spec}))
    };
    let mut mesh = Mesh::with([
        entry("shop", "a", "172.16.0.1"),
        entry("shop", "b", "172.16.0.1"),
        entry("far", "c", "10.0.0.1"),
        pod("shop", "web", "10.0.0.1", json!({})),
    ]);
    let services = |mesh: &Mesh, uid: &str| mesh.workload(uid).services.into_keys().collect::<Vec<_>>();
    let first = "c/networking.istio.io/ServiceEntry/shop/a/172.16.0.1";
    assert_eq!(services(&mesh, first), ["shop/a.com", "shop/b.com"]);
    assert_eq!(services(&mesh, "c//v1/Pod/shop/web"), ["far/c.com"]);
    let expected = "note: ServiceEntry far/c: spec.endpoints: 10.0.0.1 is Pod shop/web's";
    assert_eq!(mesh.found(Kind::ServiceEntry, "far", "c"), [expected]);
    assert_eq!(mesh.workloads().count(), 2);
    mesh.delete(Kind::ServiceEntry, "shop", "b");
    assert_eq!(services(&mesh, first), ["shop/a.com"]);
    // The one that stands in has to hear of what is nobody's change but the other's.
    mesh.put(merged(
        entry("far", "older", "172.16.0.9"),
        json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z"},
        "spec": {"hosts": ["c.com"]}}),
    ));
    assert!(
        services(&mesh, "c//v1/Pod/shop/web").is_empty(),
        "the name is another's now"
    );
}

#[test]
fn endpoints_that_are_no_pods() {
    let mut mesh = Mesh::with([
        service("shop", "db", "10.96.0.9", json!({"spec": {"selector": null}})),
        merged(
            slice("shop", "db", 5432, &[]),
            json!({"endpoints": [{"addresses": ["172.16.0.1"], "conditions": {"ready": false}}]}),
        ),
    ]);
    let found = mesh.workload("c/discovery.k8s.io/EndpointSlice/shop/db-1/172.16.0.1");
    assert_eq!(found.status(), WorkloadStatus::Unhealthy);
    assert_eq!(
        found.services["shop/db.shop.svc.cluster.local"].ports[0].target_port,
        5432
    );
    for (conditions, expected) in [
        (json!({}), WorkloadStatus::Healthy),
        (json!({"ready": null}), WorkloadStatus::Healthy),
        (json!({"serving": true, "terminating": true}), WorkloadStatus::Unhealthy),
        (
            json!({"ready": false, "serving": true, "terminating": true}),
            WorkloadStatus::Unhealthy,
        ),
    ] {
        mesh.put(merged(
            slice("shop", "db", 5432, &[]),
            json!({"endpoints": [{"addresses": ["172.16.0.1"], "conditions": conditions}]}),
        ));
        let found = mesh.workload("c/discovery.k8s.io/EndpointSlice/shop/db-1/172.16.0.1");
        assert_eq!(found.status(), expected, "{conditions}");
    }
    mesh.delete(Kind::Service, "shop", "db");
    assert!(mesh.resources.is_empty());
}

#[test]
fn each_service_has_its_own_readiness_of_an_endpoint_that_is_no_pod() {
    const HOST: &str = "c/discovery.k8s.io/EndpointSlice/shop/a-1/172.16.0.1";
    let of = |name: &str, ready: bool, published: bool| {
        let endpoint = json!({"addresses": ["172.16.0.1"], "conditions": {"ready": ready}});
        let spec = json!({"spec": {"selector": null, "publishNotReadyAddresses": published}});
        let (year, ip) = if name == "a" {
            (2024, "10.96.0.1")
        } else {
            (2025, "10.96.0.2")
        };
        let more =
            json!({"metadata": {"creationTimestamp": format!("{year}-01-01T00:00:00Z")}, "endpoints": [endpoint]});
        [
            service("shop", name, ip, spec),
            merged(slice("shop", name, 9100, &[]), more),
        ]
    };
    let found = |mesh: &Mesh| {
        let found = mesh.workload(HOST);
        let names = found
            .services
            .keys()
            .map(|name| name["shop/".len()..].split('.').next().unwrap());
        (
            names.collect::<Vec<_>>().join(" "),
            found.status() == WorkloadStatus::Healthy,
        )
    };
    let mut mesh = Mesh::new();
    for (a, b, published, services, healthy) in [
        (true, true, false, "a b", true),
        (true, false, false, "a", true),
        (false, true, false, "b", true),
        (false, false, false, "a b", false),
        // Who wants those, too, that are not ready has them either way.
        (false, true, true, "a b", true),
        (false, false, true, "a b", false),
    ] {
        mesh.apply(
            [of("a", a, published), of("b", b, published)]
                .iter()
                .flatten()
                .map(super::put)
                .collect(),
        );
        mesh.check();
        assert_eq!(found(&mesh), (services.to_owned(), healthy), "{a} {b} {published}");
    }
    // Whoever has the address stands in for those alone that have it ready; it is ready for an entry that lists it.
    mesh.apply(of("b", false, false).iter().map(super::put).collect());
    let spec = json!({"hosts": ["c.com"], "resolution": "STATIC", "ports": [{"number": 80}],
        "endpoints": [{"address": "172.16.0.1"}]});
    mesh.put(object("ServiceEntry", "shop", "c", json!({"spec": spec})));
    assert_eq!(found(&mesh), ("a c".to_owned(), true));
    mesh.put(of("a", false, false)[0].clone());
    assert_eq!(found(&mesh), ("c".to_owned(), true), "the Service alone has changed");
    mesh.put(of("a", true, false)[1].clone());
    mesh.put(pod("shop", "web", "172.16.0.1", json!({})));
    let names = |mesh: &Mesh| mesh.pod("shop", "web").services.into_keys().collect::<Vec<_>>();
    assert_eq!(names(&mesh), ["shop/a.shop.svc.cluster.local", "shop/c.com"]);
    mesh.put(of("b", true, false)[1].clone());
    assert_eq!(names(&mesh).len(), 3);
}

#[test]
fn where_endpoints_are_that_are_no_pods() {
    let node = |name: &str, region: &str, zone: &str| {
        let labels = json!({"topology.kubernetes.io/region": region, "topology.kubernetes.io/zone": zone});
        json!({"kind": "Node", "metadata": {"name": name, "labels": labels}})
    };
    let mut mesh = Mesh::with([
        service("shop", "db", "10.96.0.9", json!({"spec": {"selector": null}})),
        node("n1", "r", "z"),
        node("n2", "r", "y"),
    ]);
    let put = |mesh: &mut Mesh, place: Value| {
        let endpoint = merged(json!({"addresses": ["172.16.0.1"]}), place);
        mesh.put(merged(slice("shop", "db", 5432, &[]), json!({"endpoints": [endpoint]})));
    };
    let found = |mesh: &Mesh| {
        let found = mesh.workload("c/discovery.k8s.io/EndpointSlice/shop/db-1/172.16.0.1");
        let at = found.locality.unwrap_or_default();
        (found.node, format!("{}/{}", at.region, at.zone))
    };
    for (place, node, at) in [
        (json!({}), "", "/"),
        (json!({"nodeName": "n1", "zone": "z"}), "n1", "r/z"),
        (json!({"nodeName": "n2"}), "n2", "r/y"),
        (json!({"nodeName": "n3", "zone": "x"}), "n3", "/x"),
        // A zone is one only within its region: that of its nodes.
        (json!({"zone": "y"}), "", "r/y"),
        (json!({"zone": "x"}), "", "/x"),
    ] {
        put(&mut mesh, place.clone());
        assert_eq!(found(&mesh), (node.to_owned(), at.to_owned()), "{place}");
    }
    mesh.put(node("n3", "q", "x"));
    assert_eq!(found(&mesh).1, "q/x");
    put(&mut mesh, json!({"nodeName": "n3"}));
    mesh.delete(Kind::Node, "", "n3");
    assert_eq!(found(&mesh), ("n3".to_owned(), "/".to_owned()));
}

#[test]
fn a_slice_speaks_for_its_own_namespace() {
    let mut other = slice("evil", "web", 8080, &[]);
    other["endpoints"] =
        json!([{"addresses": ["1.1.1.1"], "targetRef": {"kind": "Pod", "name": "web", "namespace": "shop"}}]);
    let mut objects = web();
    objects.extend([service("evil", "web", "10.96.0.2", json!({})), other]);
    let mesh = Mesh::with(objects);
    assert_eq!(mesh.pod("shop", "web").services.len(), 1);
}

#[test]
fn workload_entries() {
    let entry = |spec: Value| object("WorkloadEntry", "shop", "vm", json!({"spec": spec}));
    let spec = json!({"address": "172.16.0.1", "labels": {"app": "web"}, "ports": {"http": 9090}, "locality": "r/z",
        "weight": 3, "serviceAccount": "vm"});
    let ports = json!({"spec": {"ports": [{"name": "x", "port": 80, "targetPort": "http"}]}});
    let mut mesh = Mesh::with([service("shop", "web", "10.96.0.1", ports), entry(spec)]);
    let uid = "c/networking.istio.io/WorkloadEntry/shop/vm";
    let found = mesh.workload(uid);
    assert_eq!(
        found.services["shop/web.shop.svc.cluster.local"].ports[0].target_port,
        9090
    );
    assert_eq!((found.capacity, found.service_account.as_str()), (Some(3), "vm"));
    assert_eq!(found.locality.as_ref().unwrap().zone, "z");
    assert_eq!(found.tunnel_protocol(), TunnelProtocol::None);
    mesh.put(entry(json!({"address": "db.example.com"})));
    let found = mesh.workload(uid);
    assert_eq!((found.hostname.as_str(), found.addresses.len()), ("db.example.com", 0));
    for bad in ["", "unix:///run/app.sock", "0.0.0.0"] {
        mesh.put(entry(json!({"address": bad})));
        assert!(mesh.find_workload(uid).is_none());
        assert_eq!(mesh.found(Kind::WorkloadEntry, "shop", "vm").len(), 1, "{bad}");
    }
}

#[test]
fn the_meshs_configuration() {
    let config = |text: &str| object("ConfigMap", "istio-system", "istio", json!({"data": {"mesh": text}}));
    let mut mesh = Mesh::with(web());
    mesh.put(config(
        "trustDomain: td\ntrustDomainAliases: [old]\nenableTracing: true",
    ));
    assert_eq!(mesh.pod("shop", "web").trust_domain, "td");
    assert_eq!(mesh.index.settings().trust_domain_aliases.len(), 1);
    let expected = "note: ConfigMap istio-system/istio: data.mesh.enableTracing: not acted upon";
    assert_eq!(mesh.found(Kind::ConfigMap, "istio-system", "istio"), [expected]);
    mesh.put(config("trustDomain: ["));
    assert_eq!(mesh.pod("shop", "web").trust_domain, "td", "the last good one holds");
    assert!(mesh.found(Kind::ConfigMap, "istio-system", "istio")[0].starts_with("refused: "));
    mesh.delete(Kind::ConfigMap, "istio-system", "istio");
    assert_eq!(mesh.pod("shop", "web").trust_domain, "");
    assert!(mesh.findings.is_empty());
}
