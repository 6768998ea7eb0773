//! Services and ServiceEntries, as agents see them.

use k8s::live::Kind;
use proto::workload::{
    AppProtocol, IpFamilies, Visibility,
    load_balancing::{HealthPolicy, Mode, Scope},
};
use serde_json::{Value, json};

use super::{Mesh, merged, namespace, object, pod, service, slice};

const WEB: &str = "shop/web.shop.svc.cluster.local";

#[test]
fn a_service_in_full() {
    let spec = json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00:96::1"], "ipFamilies": ["IPv4", "IPv6"],
        "ports": [{"name": "http-a", "port": 80, "targetPort": "web"}, {"name": "dns", "port": 53, "protocol": "UDP"},
                  {"name": "x", "port": 81, "appProtocol": "kubernetes.io/h2c", "targetPort": 9}]}});
    let mesh = Mesh::with([service("shop", "web", "10.96.0.1", spec)]);
    let found = mesh.service(WEB);
    assert_eq!(found.hostname, "web.shop.svc.cluster.local");
    assert_eq!(mesh.aliases(WEB), ["/10.96.0.1", "/fd00:96::1"]);
    assert_eq!((found.ip_families(), found.canonical), (IpFamilies::Dual, true));
    let ports: Vec<_> = found
        .ports
        .iter()
        .map(|port| (port.service_port, port.target_port))
        .collect();
    assert_eq!(ports, [(80, 0), (81, 9)], "a named target is each endpoint's own");
    assert_eq!(found.ports[0].app_protocol(), AppProtocol::Http11);
    assert_eq!(found.ports[1].app_protocol(), AppProtocol::Http2);
    assert!(found.load_balancing.is_none());
    // What a load balancer does is its own: what is sent to it goes there, as from a sidecar.
    let status = json!({"spec": {"type": "LoadBalancer"},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.10", "ipMode": "VIP"}, {"hostname": "lb.example.com"}]}}});
    let mesh = Mesh::with([service("shop", "web", "10.96.0.1", status)]);
    assert_eq!(mesh.aliases(WEB), ["/10.96.0.1"]);
}

#[test]
fn load_balancing() {
    let of = |more: Value| {
        let ns = namespace("shop", json!({}));
        let by_namespace =
            json!({"metadata": {"annotations": {"networking.istio.io/traffic-distribution": "PreferClose"}}});
        let with = more.get("ns").is_some();
        let ns = if with { merged(ns, by_namespace) } else { ns };
        let mesh = Mesh::with([ns, service("shop", "web", "10.96.0.1", more)]);
        let found = mesh.service(WEB).load_balancing;
        found.map(|found| {
            (
                found.mode(),
                found.routing_preference().next_back(),
                found.health_policy(),
            )
        })
    };
    use HealthPolicy::{AllowAll, OnlyHealthy};
    let close = Some((Mode::Failover, Some(Scope::Zone), OnlyHealthy));
    assert_eq!(of(json!({})), None);
    assert_eq!(of(json!({"spec": {"trafficDistribution": "PreferClose"}})), close);
    assert_eq!(of(json!({"spec": {"trafficDistribution": "PreferSameZone"}})), close);
    assert_eq!(of(json!({"ns": true})), close);
    let any = json!({"ns": true, "metadata": {"annotations": {"networking.istio.io/traffic-distribution": "Any"}}});
    assert_eq!(of(any), None);
    let node = of(json!({"spec": {"trafficDistribution": "PreferSameNode"}}));
    assert_eq!(node, Some((Mode::Failover, Some(Scope::Node), OnlyHealthy)));
    let local = of(json!({"spec": {"internalTrafficPolicy": "Local", "trafficDistribution": "PreferClose"}}));
    assert_eq!(local, Some((Mode::Strict, Some(Scope::Node), OnlyHealthy)));
    let not_ready = of(json!({"spec": {"publishNotReadyAddresses": true}}));
    assert_eq!(not_ready, Some((Mode::UnspecifiedMode, None, AllowAll)));
}

#[test]
fn headless_and_external_services() {
    let mesh = Mesh::with([
        service("shop", "web", "None", json!({})),
        service(
            "shop",
            "out",
            "",
            json!({"spec": {"type": "ExternalName", "externalName": "example.com"}}),
        ),
    ]);
    assert!(mesh.service(WEB).addresses.is_empty());
    assert_eq!(mesh.resources.len(), 1);
    assert_eq!(mesh.found(Kind::Service, "shop", "out").len(), 1);
}

#[test]
fn named_ports_are_each_endpoints_own() {
    let mut mesh = Mesh::with([
        service(
            "shop",
            "web",
            "10.96.0.1",
            json!({"spec": {"ports": [{"name": "http", "port": 80, "targetPort": "h"}]}}),
        ),
        pod("shop", "web", "10.0.0.1", json!({})),
        slice("shop", "web", 3000, &["web"]),
    ]);
    let target = |mesh: &Mesh| {
        mesh.pod("shop", "web").services[WEB]
            .ports
            .first()
            .map(|port| port.target_port)
    };
    assert_eq!(target(&mesh), Some(3000));
    mesh.put(slice("shop", "web", 3001, &["web"]));
    assert_eq!(target(&mesh), Some(3001));
    mesh.put(slice("shop", "web", 3001, &[]));
    assert!(mesh.pod("shop", "web").services.is_empty());
}

fn entry(name: &str, year: u16, spec: Value) -> Value {
    let time = format!("{year}-01-01T00:00:00Z");
    let more = json!({"metadata": {"creationTimestamp": time}, "spec": spec});
    object("ServiceEntry", "shop", name, more)
}

#[test]
fn a_service_entry_in_full() {
    let spec = json!({"hosts": ["db.example.com"], "addresses": ["240.0.0.1", "10.9.0.0/16"], "resolution": "STATIC",
        "location": "MESH_INTERNAL", "ports": [{"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}],
        "endpoints": [{"address": "172.16.0.1"}, {"address": "172.16.0.2", "ports": {"http": 81}}],
        "subjectAltNames": ["spiffe://td/ns/a/sa/b"], "exportTo": ["."]});
    let mesh = Mesh::with([entry("se", 2026, spec)]);
    let found = mesh.service("shop/db.example.com");
    assert_eq!(found.addresses[1].length, Some(16));
    assert_eq!(
        mesh.aliases("shop/db.example.com"),
        ["/240.0.0.1"],
        "a range can't be asked for"
    );
    assert_eq!(found.subject_alt_names, ["spiffe://td/ns/a/sa/b"]);
    assert_eq!((found.visibility(), found.canonical), (Visibility::Namespace, true));
    let port = |ip: &str| {
        let uid = format!("c/networking.istio.io/ServiceEntry/shop/se/{ip}");
        mesh.workload(&uid).services["shop/db.example.com"].ports[0].target_port
    };
    assert_eq!((port("172.16.0.1"), port("172.16.0.2")), (8080, 81));
    assert!(mesh.found(Kind::ServiceEntry, "shop", "se").is_empty());
}

#[test]
fn resolution() {
    let of = |resolution: &str| {
        let ports = json!([{"number": 443, "name": "tls", "protocol": "TLS"}]);
        let spec = json!({"hosts": ["a.com", "A.com", "b.com", "*.c.com"], "resolution": resolution, "ports": ports});
        Mesh::with([entry("se", 2026, spec)])
    };
    let mesh = of("DNS");
    let found = mesh.workload("c/networking.istio.io/ServiceEntry/shop/se/b.com");
    assert_eq!(found.hostname, "b.com");
    assert_eq!(
        found.services.keys().collect::<Vec<_>>(),
        ["shop/b.com"],
        "each is its own"
    );
    assert_eq!(mesh.workloads().count(), 2, "a wildcard is no name");
    let mesh = of("NONE");
    let balancing = mesh.service("shop/a.com").load_balancing.unwrap();
    assert_eq!((balancing.mode(), mesh.workloads().count()), (Mode::Passthrough, 0));
    assert_eq!(of("DYNAMIC_DNS").found(Kind::ServiceEntry, "shop", "se").len(), 1);
}

#[test]
fn a_service_entry_selects_pods_and_entries() {
    let spec = json!({"hosts": ["a.com"], "resolution": "STATIC", "workloadSelector": {"labels": {"app": "web"}},
        "ports": [{"number": 80, "name": "http", "targetPort": 8080}]});
    let mut mesh = Mesh::with([
        entry("se", 2026, spec.clone()),
        pod("shop", "web", "10.0.0.1", json!({})),
        pod("other", "web", "10.0.0.2", json!({})),
        object(
            "WorkloadEntry",
            "shop",
            "vm",
            json!({"spec": {"address": "10.0.0.3", "labels": {"app": "web"}, "ports": {"http": 5}}}),
        ),
    ]);
    let vm = "c/networking.istio.io/WorkloadEntry/shop/vm";
    assert_eq!(
        mesh.pod("shop", "web").services["shop/a.com"].ports[0].target_port,
        8080
    );
    assert_eq!(mesh.workload(vm).services["shop/a.com"].ports[0].target_port, 5);
    assert!(mesh.pod("other", "web").services.is_empty());
    mesh.put(entry(
        "se",
        2026,
        merged(spec, json!({"workloadSelector": {"labels": {"app": "no"}}})),
    ));
    assert!(mesh.pod("shop", "web").services.is_empty());
    assert!(mesh.workload(vm).services.is_empty());
}

#[test]
fn a_host_name_has_one_owner() {
    let spec = |host: &str, ip: &str| {
        json!({"hosts": [host], "resolution": "STATIC", "ports": [{"number": 80}], "endpoints": [{"address": ip}],
            "subjectAltNames": [format!("spiffe://{ip}")]})
    };
    let mut mesh = Mesh::with([
        entry("old", 2025, spec("a.com", "172.16.0.1")),
        entry("new", 2026, spec("a.com", "172.16.0.2")),
        entry("deco", 2025, spec("web.shop.svc.cluster.local", "172.16.0.3")),
        merged(
            entry("far", 2020, spec("web.shop.svc.cluster.local", "172.16.0.4")),
            json!({"metadata": {"namespace": "far"}}),
        ),
    ]);
    let services = |mesh: &Mesh, name: &str, ip: &str| {
        mesh.workload(&format!("c/networking.istio.io/ServiceEntry/shop/{name}/{ip}"))
            .services
            .len()
    };
    assert_eq!(
        (
            services(&mesh, "old", "172.16.0.1"),
            services(&mesh, "new", "172.16.0.2")
        ),
        (1, 0)
    );
    assert_eq!(mesh.service("shop/a.com").name, "old");
    assert_eq!(mesh.found(Kind::ServiceEntry, "shop", "new").len(), 1);
    assert!(
        mesh.service("far/web.shop.svc.cluster.local").canonical,
        "the oldest of the name"
    );

    mesh.put(service("shop", "web", "10.96.0.1", json!({})));
    assert_eq!(services(&mesh, "deco", "172.16.0.3"), 0);
    let found = mesh.service(WEB);
    assert_eq!((found.name.as_str(), found.canonical), ("web", true));
    assert_eq!(
        found.subject_alt_names,
        ["spiffe://172.16.0.3"],
        "of its own namespace alone"
    );
    assert!(!mesh.service("far/web.shop.svc.cluster.local").canonical);
    mesh.delete(Kind::ServiceEntry, "shop", "old");
    assert_eq!(
        (
            mesh.service("shop/a.com").name.as_str(),
            services(&mesh, "new", "172.16.0.2")
        ),
        ("new", 1)
    );
    // A Service's address is not to be had by an entry.
    mesh.put(entry(
        "vip",
        2020,
        merged(spec("v.com", "172.16.0.9"), json!({"addresses": ["10.96.0.1"]})),
    ));
    assert!(mesh.service("shop/v.com").addresses.is_empty());
    mesh.check();
}

#[test]
fn namespaces_may_keep_entries_of_one_address_to_themselves() {
    let entry = |namespace: &str, year: u16, export_to: Value| {
        let spec = json!({"hosts": [format!("{namespace}.com")], "addresses": ["10.9.0.1"], "ports": [{"number": 80}],
            "resolution": "NONE", "exportTo": export_to});
        let time = format!("{year}-01-01T00:00:00Z");
        object(
            "ServiceEntry",
            namespace,
            "db",
            json!({"metadata": {"creationTimestamp": time}, "spec": spec}),
        )
    };
    let own = json!(["."]);
    let mut mesh = Mesh::with([entry("a", 2024, own.clone()), entry("b", 2025, own.clone())]);
    for name in ["a/a.com", "b/b.com"] {
        assert_eq!(mesh.aliases(name), ["/10.9.0.1"]);
    }
    // Of those that are everybody's one has it; what one namespace has for itself does not matter.
    mesh.put(entry("c", 2026, json!(["*"])));
    mesh.put(entry("d", 2027, json!(["*"])));
    assert_eq!((mesh.aliases("c/c.com").len(), mesh.aliases("d/d.com").len()), (1, 0));
    assert!(mesh.aliases("a/a.com").len() == 1 && mesh.findings.len() == 1);
    // Who stops keeping it to itself contends.
    mesh.put(entry("a", 2024, json!(["*"])));
    assert_eq!((mesh.aliases("a/a.com").len(), mesh.aliases("c/c.com").len()), (1, 0));
    // A pod's address is nobody else's, kept or not.
    mesh.put(pod("x", "web", "10.9.0.1", json!({})));
    assert!(mesh.aliases("b/b.com").is_empty() && mesh.pod("x", "web").addresses.len() == 1);
    mesh.check();
}

/// A ServiceEntry of the address 1.2.3.4.
fn of_the_address(namespace: &str, name: &str, year: u16, spec: Value) -> Value {
    let time = format!("{year}-01-01T00:00:00Z");
    let common = json!({"hosts": [format!("{name}.com")], "addresses": ["1.2.3.4/32"],
        "ports": [{"number": 80, "name": "http", "targetPort": 8080}]});
    let more = json!({"metadata": {"creationTimestamp": time}, "spec": merged(common, spec)});
    object("ServiceEntry", namespace, name, more)
}

/// A WorkloadEntry at 1.2.3.4, of the year 2025.
fn machine(namespace: &str, labels: Value) -> Value {
    let more = json!({"metadata": {"creationTimestamp": "2025-01-01T00:00:00Z", "labels": labels},
        "spec": {"address": "1.2.3.4"}});
    object("WorkloadEntry", namespace, "vm", more)
}

#[test]
fn an_entrys_endpoints_may_have_its_address() {
    let own = json!({"resolution": "STATIC", "endpoints": [{"address": "1.2.3.4"}]});
    let selecting = json!({"resolution": "STATIC", "workloadSelector": {"labels": {"app": "web"}}});
    let inline = "c/networking.istio.io/ServiceEntry/shop/se/1.2.3.4";
    let vm = "c/networking.istio.io/WorkloadEntry/shop/vm";
    let web = pod("shop", "web", "1.2.3.4", json!({}));
    for (year, spec, endpoint, uid) in [
        (2026, own, None, inline),
        (
            2020,
            selecting.clone(),
            Some(machine("shop", json!({"app": "web"}))),
            vm,
        ),
        (
            2026,
            selecting.clone(),
            Some(machine("shop", json!({"app": "web"}))),
            vm,
        ),
        (2020, selecting.clone(), Some(web), "c//v1/Pod/shop/web"),
    ] {
        let mut mesh = Mesh::new();
        mesh.put(of_the_address("shop", "se", year, spec));
        endpoint.map(|endpoint| mesh.put(endpoint));
        mesh.check();
        let found = mesh.workload(uid);
        assert_eq!(found.addresses, [vec![1, 2, 3, 4]], "{uid}");
        assert_eq!(found.services["shop/se.com"].ports[0].target_port, 8080, "{uid}");
        assert_eq!(mesh.aliases("shop/se.com"), ["/1.2.3.4"], "{uid}");
        assert!(mesh.findings.is_empty(), "{uid}");
        // Whom it no longer selects contends again.
        mesh.put(of_the_address("shop", "se", year, json!({"resolution": "STATIC"})));
        mesh.check();
        assert_eq!(
            mesh.aliases("shop/se.com").is_empty(),
            mesh.find_workload(uid).is_some(),
            "{uid}"
        );
    }
    // Somebody else's endpoint is there for nobody at the address of an older entry.
    let mesh = Mesh::with([
        of_the_address("shop", "se", 2020, selecting),
        machine("far", json!({"app": "web"})),
    ]);
    assert_eq!((mesh.workloads().count(), mesh.aliases("shop/se.com").len()), (0, 1));
}

#[test]
fn nobody_passes_in_plaintext_around_who_takes_hbone() {
    let none = |year| of_the_address("shop", "se", year, json!({"resolution": "NONE"}));
    let tunnel = json!({"networking.istio.io/tunnel": "http"});
    let who = |objects: Vec<Value>| {
        let mesh = Mesh::with(objects);
        mesh.check();
        let workloads: Vec<_> = mesh.workloads().map(|workload| workload.namespace).collect();
        (
            workloads.join(" "),
            mesh.aliases("shop/se.com").len(),
            mesh.findings.len(),
        )
    };
    // The older one has the address, but not to pass what has to be encrypted.
    assert_eq!(
        who(vec![none(2020), machine("far", tunnel.clone())]),
        ("far".into(), 0, 1)
    );
    assert_eq!(who(vec![none(2020), machine("far", json!({}))]), (String::new(), 1, 1));
    // What is sent to endpoints of its own is not passed.
    let fixed = of_the_address("shop", "se", 2020, json!({"resolution": "STATIC"}));
    assert_eq!(who(vec![fixed, machine("far", tunnel.clone())]), (String::new(), 1, 1));
    // Nobody is pushed aside by who has not got the address in the end.
    let older = object(
        "WorkloadEntry",
        "old",
        "vm",
        json!({"metadata": {"creationTimestamp": "2024-01-01T00:00:00Z"}, "spec": {"address": "1.2.3.4"}}),
    );
    let all = vec![none(2020), machine("far", tunnel), older];
    assert_eq!(who(all), (String::new(), 1, 2));
}
