//! Where pods may go that are REGISTRY_ONLY, and those that are not.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use mesh::{Exit, Snapshot, static_file};
use model::{OriginalDst, OutboundMode, OutboundTrafficPolicy, Workload};

const FILE: &str = r#"
settings: {outboundTrafficPolicy: {mode: REGISTRY_ONLY, namespaces: {free: ALLOW_ANY}}}
workloads:
- {uid: c//v1/Pod/shop/a, name: a, namespace: shop, workloadIps: ["10.0.0.1"], protocol: HBONE,
   services: {"shop/web": {80: 8080}, "shop/own": {80: 8080}, "shop/headless": {80: 8080}}}
- {uid: c/networking.istio.io/ServiceEntry/shop/db/198.51.100.20, name: db, namespace: shop, workloadIps: [198.51.100.20],
   services: {"shop/db": {5432: 5433}, "shop/own": {80: 8080}}}
services:
- {name: db, namespace: shop, hostname: db, vips: [240.240.0.2], ports: {5432: 5433}}
- {name: web, namespace: shop, hostname: web, vips: [10.96.0.1], ports: {80: 8080}}
- {name: own, namespace: shop, hostname: own, vips: [10.96.0.2], ports: {80: 8080}, visibility: Namespace}
- {name: headless, namespace: shop, hostname: headless, ports: {80: 8080}}
- {name: wide, namespace: shop, hostname: wide, vips: [/203.0.0.0/16, "/2001:db8::/32"], ports: {443: 443}, loadBalancing: {mode: Passthrough}}
- {name: narrow, namespace: shop, hostname: narrow, vips: [/203.0.113.0/24], ports: {5432: 5432}, loadBalancing: {mode: Passthrough}}
- {name: mine, namespace: shop, hostname: mine, vips: [198.51.100.9], ports: {443: 443}, loadBalancing: {mode: Passthrough}, visibility: Namespace}
- {name: api, namespace: shop, hostname: api.example.com, vips: [240.240.0.1], ports: {443: 443}}
- {name: wild, namespace: shop, hostname: "*.example.org", ports: {443: 443}, loadBalancing: {mode: Passthrough}}
"#;

fn snapshot() -> Arc<Snapshot> {
    let (contents, rejected) = static_file::parse(FILE).unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    let (mut writer, knowledge) = mesh::new();
    assert!(writer.replace(contents, &[]).is_empty());
    knowledge.snapshot()
}

fn pod(namespace: &str) -> Workload {
    Workload {
        namespace: namespace.into(),
        ..Workload::default()
    }
}

fn exit(namespace: &str, dialled: &str, names: &[&str]) -> Exit {
    let (snapshot, source, dialled) = (snapshot(), pod(namespace), dialled.parse().unwrap());
    let route = snapshot.resolve(&source, OriginalDst(dialled), 0, &[]);
    let names: Vec<Arc<str>> = names.iter().map(|name| (*name).into()).collect();
    snapshot.exit(&source, dialled, &route, &names)
}

fn may(namespace: &str, dialled: &str, names: &[&str]) -> bool {
    matches!(exit(namespace, dialled, names), Exit::Open(_))
}

#[test]
fn only_what_the_registry_names_is_reached() {
    for (dialled, expected) in [
        ("10.0.0.1:9999", true),
        ("10.96.0.1:80", true),
        ("10.96.0.2:80", true),
        ("203.0.113.1:443", true),
        ("203.0.113.1:5432", true),
        ("203.0.114.1:5432", false),
        ("203.0.113.1:80", false),
        ("[::ffff:203.0.113.1]:443", true),
        ("[::ffff:203.0.113.1]:80", false),
        ("[2001:db8::1]:443", true),
        ("[2001:db9::1]:443", false),
        ("198.51.100.9:443", true),
        ("198.51.100.10:443", false),
        ("198.51.100.20:5433", true),
        ("198.51.100.20:5432", false),
        ("198.51.100.20:22", false),
        ("240.240.0.2:5432", true),
        ("169.254.169.254:80", false),
        ("127.0.0.1:443", false),
    ] {
        assert_eq!(may("shop", dialled, &[]), expected, "{dialled}");
        assert!(may("free", dialled, &[]), "{dialled}");
    }
    let Exit::Open(Some(service)) = exit("shop", "203.0.113.1:443", &[]) else {
        panic!("no service")
    };
    assert_eq!(&*service.hostname, "wide", "the narrower one has another port");
}

#[test]
fn what_is_exported_to_its_own_namespace_opens_nothing_for_others() {
    for dialled in ["10.96.0.2:80", "198.51.100.9:443", "198.51.100.20:8080"] {
        assert!(may("shop", dialled, &[]) && !may("other", dialled, &[]), "{dialled}");
    }
    assert!(may("shop", "192.0.2.1:443", &["mine"]) && !may("other", "192.0.2.1:443", &["mine"]));
}

#[test]
fn a_waypoint_opens_nothing_that_is_not_exported() {
    const BEHIND: &str = r#"
settings: {outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
workloads:
- {uid: c//v1/Pod/shop/waypoint, name: waypoint, namespace: shop, workloadIps: ["10.0.0.9"], protocol: HBONE}
- {uid: c//v1/Pod/shop/pod, name: pod, namespace: shop, workloadIps: ["10.0.0.1"], protocol: HBONE,
   waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}}
- {uid: c/networking.istio.io/ServiceEntry/shop/own/198.51.100.20, name: own, namespace: shop, workloadIps: [198.51.100.20],
   services: {"shop/own": {80: 8080}}, waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}}
services:
- {name: all, namespace: shop, hostname: all, vips: [240.240.0.1], ports: {80: 80}, waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}}
- {name: own, namespace: shop, hostname: own, ports: {80: 8080}, visibility: Namespace}
- {name: kept, namespace: shop, hostname: kept.shop.svc.cluster.local, vips: [10.96.0.3], ports: {80: 80},
   waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15008}, visibility: Namespace}
"#;
    let (mut writer, knowledge) = mesh::new();
    let (contents, rejected) = static_file::parse(BEHIND).unwrap();
    assert!(
        rejected.is_empty() && writer.replace(contents, &[]).is_empty(),
        "{rejected:?}"
    );
    let may = |namespace: &str, dialled: &str| {
        let (snapshot, source, dialled) = (knowledge.snapshot(), pod(namespace), dialled.parse().unwrap());
        let route = snapshot.resolve(&source, OriginalDst(dialled), 0, &[]);
        assert!(matches!(route, mesh::Route::Waypoint { .. }), "{dialled}: {route:?}");
        matches!(snapshot.exit(&source, dialled, &route, &[]), Exit::Open(_))
    };
    for dialled in ["240.240.0.1:80", "10.0.0.1:9999"] {
        assert!(may("shop", dialled) && may("other", dialled), "{dialled}");
    }
    // A Service that is not exported, by its address; and an endpoint of such an entry, by its own.
    for dialled in ["10.96.0.3:80", "198.51.100.20:8080"] {
        assert!(may("shop", dialled) && !may("other", dialled), "{dialled}");
    }
}

#[test]
fn an_address_that_was_learned_by_a_registered_name_is_reached_on_its_ports() {
    let ip = |port: u16| format!("192.0.2.7:{port}");
    assert!(may("other", &ip(443), &["api.example.com"]));
    assert!(may("other", &ip(443), &["elsewhere.example", "a.b.example.org"]));
    assert!(may("other", &ip(8080), &["headless"]), "the address is a pod's own");
    for (port, name) in [
        (80, "api.example.com"),
        (443, "example.org"),
        (443, "api.example.com.evil.example"),
        (443, "xapi.example.com"),
        (8080, "web"),
    ] {
        assert!(!may("other", &ip(port), &[name]), "{port} {name}");
    }
}

#[test]
fn a_refusal_says_why_and_what_is_near() {
    let reason = |dialled: &str| match exit("shop", dialled, &[]) {
        Exit::Closed(reason) => reason.to_string(),
        other => panic!("not closed: {other:?}"),
    };
    let text = reason("192.0.2.1:80");
    assert!(
        text.starts_with("192.0.2.1:80 is not in the registry") && text.contains("REGISTRY_ONLY"),
        "{text}"
    );
    assert!(text.contains("ServiceEntry"), "{text}");
    assert!(reason("203.0.113.1:80").contains("shop/narrow has that address"));
}

#[test]
fn nothing_leaves_before_it_is_known() {
    let (mut writer, knowledge) = mesh::new();
    let outbound = writer.outbound();
    writer.replace(static_file::parse(FILE).unwrap().0, &[]);
    let exit = |dialled: &str| {
        let dialled = dialled.parse().unwrap();
        let (snapshot, source) = (knowledge.snapshot(), pod("free"));
        let route = snapshot.resolve(&source, OriginalDst(dialled), 0, &[]);
        snapshot.exit(&source, dialled, &route, &[])
    };
    assert_eq!(
        exit("192.0.2.1:80"),
        Exit::NotKnown,
        "the settings' own counts for nothing"
    );
    assert_eq!(exit("10.0.0.1:80"), Exit::Open(None));
    outbound.set(OutboundTrafficPolicy::default());
    assert_eq!(exit("192.0.2.1:80"), Exit::Open(None));
    outbound.set(OutboundTrafficPolicy {
        mode: OutboundMode::RegistryOnly,
        ..OutboundTrafficPolicy::default()
    });
    assert!(matches!(exit("192.0.2.1:80"), Exit::Closed(_)));
    let before = knowledge.snapshot().generation();
    outbound.set(knowledge.snapshot().outbound().unwrap().clone());
    assert_eq!(knowledge.snapshot().generation(), before, "nothing new wakes nobody");
}
