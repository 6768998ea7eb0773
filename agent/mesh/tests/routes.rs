//! Where to? From what was dialled to the way there, or the reason why there is none.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use mesh::{Delta, RefuseReason, Route, Snapshot, Unreadable, static_file};
use model::{OriginalDst, Workload, WorkloadUid};

const FILE: &str = r#"
workloads:
- {uid: c//v1/Pod/shop/a, name: a, namespace: shop, workloadIps: ["10.0.0.1", "fd00::1"], protocol: HBONE, node: n1,
   services: {"shop/web.shop.svc.cluster.local": {80: 8080}}}
- {uid: c//v1/Pod/shop/b, name: b, namespace: shop, workloadIps: ["10.0.0.2"], protocol: HBONE, node: n2,
   services: {"shop/web.shop.svc.cluster.local": {80: 9090}}}
- {uid: c//v1/Pod/out/c, name: c, namespace: out, workloadIps: ["10.0.0.3"]}
- {uid: c//v1/Pod/shop/sick, name: sick, namespace: shop, workloadIps: ["10.0.0.4"], protocol: HBONE, status: Unhealthy,
   services: {"shop/web.shop.svc.cluster.local": {80: 8080}, "shop/sick.shop.svc.cluster.local": {80: 8080}}}
services:
- {name: web, namespace: shop, hostname: web.shop.svc.cluster.local, vips: ["/10.96.0.1", "/fd00:96::1"], ports: {80: 8080, 81: 8081}}
- {name: sick, namespace: shop, hostname: sick.shop.svc.cluster.local, vips: ["/10.96.0.2"], ports: {80: 8080}}
"#;

fn snapshot_of(file: &str) -> Arc<Snapshot> {
    let (contents, rejected) = static_file::parse(file).unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    let (mut writer, knowledge) = mesh::new();
    assert!(writer.replace(contents, &[]).is_empty());
    knowledge.snapshot()
}

fn route(dialled: &str, random: u64, tried: &[&str]) -> Route {
    let tried: Vec<_> = tried.iter().map(|uid| WorkloadUid((*uid).into())).collect();
    let dialled = OriginalDst(dialled.parse().unwrap());
    snapshot_of(FILE).resolve(&Workload::default(), dialled, random, &tried)
}

fn tunnel_target(route: Route) -> String {
    match route {
        Route::Tunnel { target, hbone, .. } => format!("{target} by {hbone}"),
        other => panic!("not a tunnel: {other:?}"),
    }
}

#[test]
fn a_pod_of_the_mesh_is_reached_by_tunnel() {
    assert_eq!(
        tunnel_target(route("10.0.0.2:1234", 0, &[])),
        "10.0.0.2:1234 by 10.0.0.2:15008"
    );
    assert_eq!(
        tunnel_target(route("[::ffff:10.0.0.2]:1234", 0, &[])),
        "10.0.0.2:1234 by 10.0.0.2:15008"
    );
}

#[test]
fn a_service_is_spread_over_its_healthy_endpoints_and_their_ports() {
    assert_eq!(
        tunnel_target(route("10.96.0.1:80", 0, &[])),
        "10.0.0.1:8080 by 10.0.0.1:15008"
    );
    assert_eq!(
        tunnel_target(route("10.96.0.1:80", 1, &[])),
        "10.0.0.2:9090 by 10.0.0.2:15008"
    );
    assert_eq!(
        tunnel_target(route("10.96.0.1:80", 2, &[])),
        "10.0.0.1:8080 by 10.0.0.1:15008"
    );
    assert_eq!(
        tunnel_target(route("10.96.0.1:80", 0, &["c//v1/Pod/shop/a"])),
        "10.0.0.2:9090 by 10.0.0.2:15008"
    );
    assert_eq!(
        tunnel_target(route("[fd00:96::1]:80", 0, &[])),
        "[fd00::1]:8080 by [fd00::1]:15008"
    );
}

#[test]
fn a_service_without_the_port_or_an_endpoint_is_refused() {
    let refused = |dialled, tried: &[&str]| match route(dialled, 0, tried) {
        Route::Refused { reason } => reason.to_string(),
        other => panic!("not refused: {other:?}"),
    };
    assert_eq!(
        refused("10.96.0.1:82", &[]),
        "service shop/web.shop.svc.cluster.local has no port 82"
    );
    assert_eq!(
        refused("10.96.0.2:80", &[]),
        "service shop/sick.shop.svc.cluster.local has no healthy endpoint"
    );
    assert!(refused("10.96.0.1:80", &["c//v1/Pod/shop/a", "c//v1/Pod/shop/b"]).contains("no healthy endpoint"));
}

#[test]
fn what_is_not_in_the_mesh_is_reached_as_it_is() {
    assert!(matches!(route("10.0.0.3:80", 0, &[]), Route::Plaintext { .. }));
    assert!(matches!(route("192.0.2.1:80", 0, &[]), Route::Passthrough { .. }));
}

fn refusal(file: &str, source: &str, dialled: &str) -> String {
    let source: Workload = serde_yaml_ng::from_str(source).unwrap();
    let dialled = OriginalDst(dialled.parse().unwrap());
    match snapshot_of(file).resolve(&source, dialled, 0, &[]) {
        Route::Refused { reason } => reason.to_string(),
        other => format!("not refused: {other:?}"),
    }
}

#[test]
fn what_can_not_be_done_yet_is_refused_by_name() {
    const SOURCE: &str = "{uid: source, name: s, namespace: n}";
    let service = |pod: &str, more: &str| {
        let file = format!(
            "workloads: [{{uid: u, name: a, namespace: n, services: {{n/h: {{80: 81}}}}, {pod}}}]\n\
                 services: [{{name: h, namespace: n, hostname: h, vips: [10.9.0.1], ports: {{80: 80}}, {more}}}]"
        );
        refusal(&file, SOURCE, "10.9.0.1:80")
    };
    let elsewhere = service("workloadIps: [10.0.0.1], network: far", "");
    assert!(
        elsewhere.starts_with("workload u is in network \"far\","),
        "{elsewhere}"
    );
    assert!(service("workloadIps: [10.0.0.1]", "").starts_with("not refused: Plaintext"));
}

#[test]
fn a_workload_with_a_name_alone_is_reached_by_it() {
    const FILE: &str = "workloads: [{uid: u, name: a, namespace: n, hostname: x.example, services: {n/h: {80: 81}}}]\n\
                            services: [{name: h, namespace: n, hostname: h, vips: [10.9.0.1, 'fd00::9'], ports: {80: 80}}]";
    for dialled in ["10.9.0.1:80", "[fd00::9]:80"] {
        let dialled = OriginalDst(dialled.parse().unwrap());
        let route = snapshot_of(FILE).resolve(&Workload::default(), dialled, 0, &[]);
        let Route::Named { host, port, .. } = &route else {
            panic!("{route:?}")
        };
        assert_eq!((&**host, *port), ("x.example", 81));
        let Route::Plaintext { target, service, .. } = route.at("192.0.2.7".parse().unwrap()) else {
            panic!("not a way")
        };
        assert_eq!(target.to_string(), "192.0.2.7:81");
        assert_eq!(&*service.unwrap().hostname, "h");
    }
}

#[test]
fn the_address_of_another_network_is_not_this_ones() {
    const FILE: &str = "workloads: [{uid: u, name: a, namespace: n, workloadIps: [10.0.0.1], network: far}]\n\
                            services: [{name: h, namespace: n, hostname: h, vips: [far/10.9.0.1], ports: {80: 80}}]";
    for dialled in ["10.0.0.1:80", "10.9.0.1:80"] {
        let dialled = OriginalDst(dialled.parse().unwrap());
        let route = snapshot_of(FILE).resolve(&Workload::default(), dialled, 0, &[]);
        assert!(matches!(route, Route::Passthrough { .. }), "{route:?}");
        let (mut writer, knowledge, _) = mesh::with("far", mesh::Scope::Everything);
        writer.replace(static_file::parse(FILE).unwrap().0, &[]);
        let far = knowledge.snapshot();
        assert!(!matches!(
            far.resolve(&Workload::default(), dialled, 0, &[]),
            Route::Passthrough { .. }
        ));
    }
}

#[test]
fn of_ranges_the_longest_counts() {
    const FILE: &str = "services:\n\
            - {name: a, namespace: n, hostname: wide, vips: [/10.0.0.0/8]}\n\
            - {name: b, namespace: n, hostname: narrow, vips: [/10.1.0.0/16, '/fd00::/64']}\n\
            - {name: c, namespace: n, hostname: one, vips: [/10.1.2.3, /10.1.2.4/32]}";
    let snapshot = snapshot_of(FILE);
    let found = |ip: &str| {
        snapshot
            .service_by_vip(ip.parse().unwrap())
            .map(|service| service.hostname.to_string())
    };
    for (ip, expected) in [
        ("10.200.0.1", Some("wide")),
        ("10.1.9.9", Some("narrow")),
        ("10.1.2.3", Some("one")),
        ("::ffff:10.1.2.4", Some("one")),
        ("fd00::1", Some("narrow")),
        ("fd01::1", None),
        ("11.0.0.1", None),
    ] {
        assert_eq!(found(ip).as_deref(), expected, "{ip}");
    }
}

#[test]
fn a_service_at_its_own_endpoints_address_goes_before_it() {
    let route = |service: &str, source: &str, dialled: &str| {
        let file = format!(
            "workloads:\n\
             - {{uid: w, name: w, namespace: shop, workloadIps: [10.0.0.9], protocol: HBONE, services: {{shop/way: {{}}}}}}\n\
             - {{uid: vm, name: vm, namespace: shop, workloadIps: [1.2.3.4], protocol: HBONE, services: {{shop/db: {{80: 8080}}}}}}\n\
             services:\n\
             - {{name: way, namespace: shop, hostname: way, vips: [10.96.0.9], ports: {{15008: 15008}}}}\n\
             - {{name: db, namespace: shop, hostname: db, vips: [1.2.3.4], ports: {{80: 8080}}, {service}}}\n\
             - {{name: wide, namespace: shop, hostname: wide, vips: [/1.2.3.0/24], ports: {{80: 1}}}}"
        );
        let snapshot = snapshot_of(&file);
        let source = match source {
            uid @ ("w" | "vm") => snapshot.workload(&WorkloadUid(uid.into())).unwrap().as_ref().clone(),
            namespace => Workload {
                namespace: namespace.into(),
                ..Workload::default()
            },
        };
        match snapshot.resolve(&source, OriginalDst(dialled.parse().unwrap()), 0, &[]) {
            Route::Tunnel { target, service, .. } => format!("{target} {}", service.is_some()),
            Route::Waypoint { target, hbone, .. } => format!("{target} by {hbone}"),
            Route::Refused { reason } => reason.to_string(),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(route("", "shop", "1.2.3.4:80"), "1.2.3.4:8080 true");
    assert_eq!(route("", "shop", "[::ffff:1.2.3.4]:80"), "1.2.3.4:8080 true");
    assert_eq!(route("", "shop", "1.2.3.4:22"), "service shop/db has no port 22");
    // One that this source does not see is not there.
    let kept = "visibility: Namespace";
    assert_eq!(route(kept, "far", "1.2.3.4:80"), "1.2.3.4:80 false");
    assert_eq!(route(kept, "shop", "1.2.3.4:80"), "1.2.3.4:8080 true");
    // Its waypoint is not passed around, and reaches what is behind it, whatever the port.
    let behind = "waypoint: {destination: shop/way, hboneMtlsPort: 15008}";
    assert_eq!(route(behind, "shop", "1.2.3.4:80"), "1.2.3.4:80 by 10.0.0.9:15008");
    assert_eq!(route(behind, "w", "1.2.3.4:8080"), "1.2.3.4:8080 false");
    assert_eq!(route(behind, "vm", "1.2.3.4:22"), "1.2.3.4:22 false", "itself");
    // What is passed on as it is goes to who is there, and by HBONE if it takes that.
    let passed_on = "loadBalancing: {mode: Passthrough}";
    assert_eq!(route(passed_on, "shop", "1.2.3.4:80"), "1.2.3.4:80 false");
}

#[test]
fn on_demand_what_is_unknown_is_to_be_asked_for_until_it_is_known_to_be_absent() {
    let (mut writer, knowledge, _) = mesh::with("", mesh::Scope::OnDemand);
    let dialled = OriginalDst("192.0.2.1:80".parse().unwrap());
    let route = || knowledge.snapshot().resolve(&Workload::default(), dialled, 0, &[]);
    let unknown = || Route::Unknown {
        wanted: mesh::Wanted::Address(model::NetworkAddress::new("", dialled.0.ip())),
    };
    writer.apply(mesh::Delta::default());
    assert_eq!(route(), unknown());
    let absent = || vec![dialled.0.ip()];
    writer.apply(mesh::Delta {
        absent: absent(),
        ..Default::default()
    });
    assert_eq!(route(), Route::Passthrough { target: dialled.0 });
    writer.apply(mesh::Delta {
        not_absent: absent(),
        ..Default::default()
    });
    assert_eq!(route(), unknown());
}

#[test]
fn what_can_not_be_read_is_refused_and_not_passed_through() {
    for scope in [mesh::Scope::Everything, mesh::Scope::OnDemand] {
        let (mut writer, knowledge, _) = mesh::with("", scope);
        let (contents, _) = static_file::parse(FILE).unwrap();
        writer.apply(Delta {
            workloads: contents.workloads.into_iter().map(Arc::new).collect(),
            services: contents.services.into_iter().map(Arc::new).collect(),
            unreadable: vec![Unreadable {
                name: "bad".into(),
                addresses: ["/10.0.0.0/24", "/10.96.0.9", "/10.0.0.2", "far/192.0.2.1"]
                    .map(|text| text.parse().unwrap())
                    .into(),
            }],
            absent: vec!["192.0.2.1".parse().unwrap()],
            ..Delta::default()
        });
        let route = |ip: &str| {
            let dialled = OriginalDst(format!("{ip}:80").parse().unwrap());
            knowledge.snapshot().resolve(&Workload::default(), dialled, 0, &[])
        };
        for closed in ["10.0.0.9", "10.96.0.9", "[::ffff:10.96.0.9]"] {
            let reason = RefuseReason::Unreadable("bad".into());
            assert_eq!(route(closed), Route::Refused { reason }, "{closed}");
        }
        // What is known goes before what is not; and other networks are none of ours.
        for open in ["10.0.0.2", "10.96.0.1"] {
            assert!(matches!(route(open), Route::Tunnel { .. }), "{open}");
        }
        assert!(matches!(route("192.0.2.1"), Route::Passthrough { .. }));
        writer.apply(Delta {
            removed_unreadable: vec!["bad".into()],
            ..Delta::default()
        });
        assert!(!matches!(route("10.96.0.9"), Route::Refused { .. }));
    }
}

#[test]
fn before_anything_is_known_nothing_goes_out() {
    let dialled = OriginalDst("192.0.2.1:80".parse().unwrap());
    let route = mesh::new().1.snapshot().resolve(&Workload::default(), dialled, 0, &[]);
    assert_eq!(
        route,
        Route::Refused {
            reason: RefuseReason::NoKnowledge
        }
    );
}

#[test]
fn what_only_its_own_namespace_sees_is_not_there_for_others() {
    const FILE: &str = "workloads: [{uid: u, name: u, namespace: n, workloadIps: [10.0.0.1], services: {n/web.n.svc.x: {}}}]\n\
            services:\n\
            - {name: a, namespace: n, hostname: db.example, vips: [/192.0.2.1, /198.51.100.0/24], visibility: Namespace, \
               ports: {80: 80}}\n\
            - {name: b, namespace: m, hostname: wide, vips: [/198.51.0.0/16], ports: {80: 80}}\n\
            - {name: web, namespace: n, hostname: web.n.svc.x, vips: [/10.96.0.1], visibility: Namespace, ports: {80: 80}}";
    let dialled = |namespace: &str, dialled: &str| {
        let source = format!("{{uid: s, name: s, namespace: {namespace}}}");
        refusal(FILE, &source, &format!("{dialled}:80"))
    };
    for ip in ["192.0.2.1", "198.51.100.1"] {
        assert_eq!(dialled("n", ip), "service n/db.example has no healthy endpoint");
    }
    // Nobody takes an address from another namespace by an entry that says it is its own affair.
    assert!(dialled("m", "192.0.2.1").starts_with("not refused: Passthrough"));
    assert_eq!(dialled("m", "198.51.100.1"), "service m/wide has no healthy endpoint");
    // A Service's address is Kubernetes' to give: it leads to the Service, and never around the mesh.
    for namespace in ["n", "m"] {
        assert!(dialled(namespace, "10.96.0.1").starts_with("not refused: Plaintext"));
    }
}

/// Where a route leads, and how.
fn told(file: &str, source: &str, dialled: &str) -> String {
    let source: Workload = serde_yaml_ng::from_str(source).unwrap();
    let snapshot = snapshot_of(file);
    let mut all: Vec<_> = (0..40)
        .map(
            |random| match snapshot.resolve(&source, OriginalDst(dialled.parse().unwrap()), random, &[]) {
                Route::Tunnel { target, .. } => format!("tunnel {target}"),
                Route::Plaintext { target, .. } => format!("plain {target}"),
                Route::Refused { reason } => reason.to_string(),
                other => format!("{other:?}"),
            },
        )
        .collect();
    all.sort();
    all.dedup();
    all.join(", ")
}

const HERE: &str = "{uid: s, name: s, namespace: n, node: n1, locality: {region: r, zone: z}}";

#[test]
fn a_pod_of_the_nodes_network_is_reached_by_its_service_in_plaintext_and_its_address_is_nobodys() {
    const FILE: &str = "workloads: [{uid: h, name: h, namespace: n, workloadIps: [172.16.0.1], networkMode: HostNetwork, \
            services: {n/h: {443: 6443}}}]\n\
            services: [{name: h, namespace: n, hostname: h, vips: [/10.96.0.1], ports: {443: 6443}}]";
    assert_eq!(told(FILE, HERE, "10.96.0.1:443"), "plain 172.16.0.1:6443");
    assert!(told(FILE, HERE, "172.16.0.1:6443").starts_with("Passthrough"));
}

#[test]
fn the_family_that_was_dialled_goes_first_and_the_other_stands_in() {
    const FILE: &str = "workloads:\n\
            - {uid: a, name: a, namespace: n, workloadIps: [10.0.0.1, 'fd00::1'], protocol: HBONE, services: {n/h: {}, n/a: {}}}\n\
            - {uid: b, name: b, namespace: n, workloadIps: ['fd00::2'], protocol: HBONE, services: {n/h: {}}}\n\
            services:\n\
            - {name: h, namespace: n, hostname: h, vips: [/10.96.0.1, '/fd00:96::1'], ports: {80: 81}}\n\
            - {name: a, namespace: n, hostname: a, vips: [/10.96.0.2, '/fd00:96::2'], ports: {80: 81}}";
    assert_eq!(
        told(FILE, HERE, "10.96.0.1:80"),
        "tunnel 10.0.0.1:81, tunnel [fd00::2]:81"
    );
    assert_eq!(
        told(FILE, HERE, "[fd00:96::1]:80"),
        "tunnel [fd00::1]:81, tunnel [fd00::2]:81"
    );
    assert_eq!(told(FILE, HERE, "10.96.0.2:80"), "tunnel 10.0.0.1:81");
    assert_eq!(told(FILE, HERE, "[fd00:96::2]:80"), "tunnel [fd00::1]:81");
}

#[test]
fn a_named_port_is_each_endpoints_own_and_who_lacks_it_is_passed_over() {
    const FILE: &str = "workloads:\n\
            - {uid: a, name: a, namespace: n, workloadIps: [10.0.0.1], services: {n/h: {80: 8080}}}\n\
            - {uid: b, name: b, namespace: n, workloadIps: [10.0.0.2], services: {n/h: {80: 9090}}}\n\
            - {uid: c, name: c, namespace: n, workloadIps: [10.0.0.3], services: {n/h: {}}}\n\
            services: [{name: h, namespace: n, hostname: h, vips: [/10.96.0.1], ports: {80: 0}}]";
    assert_eq!(
        told(FILE, HERE, "10.96.0.1:80"),
        "plain 10.0.0.1:8080, plain 10.0.0.2:9090"
    );
}

#[test]
fn nearness_as_services_say_it() {
    let file = |balancing: &str, near: &str| {
        format!(
            "workloads:\n\
             - {{uid: a, name: a, namespace: n, workloadIps: [10.0.0.1], node: n1, locality: {{region: r, zone: z}}, \
                services: {{n/h: {{}}}}, {near}}}\n\
             - {{uid: b, name: b, namespace: n, workloadIps: [10.0.0.2], node: n2, locality: {{region: r, zone: z}}, \
                services: {{n/h: {{}}}}}}\n\
             - {{uid: c, name: c, namespace: n, workloadIps: [10.0.0.3], services: {{n/h: {{}}}}}}\n\
             services: [{{name: h, namespace: n, hostname: h, vips: [/10.96.0.1], ports: {{80: 80}}, \
             loadBalancing: {{{balancing}}}}}]"
        )
    };
    let local = "routingPreference: [Node], mode: Strict";
    let same_node = "routingPreference: [Network, Region, Zone, Subzone, Node], mode: Failover";
    let same_zone = "routingPreference: [Network, Region, Zone], mode: Failover";
    for (balancing, near, expected) in [
        (local, "", "plain 10.0.0.1:80"),
        (
            local,
            "status: Unhealthy",
            "service n/h has no healthy endpoint on the source's node, and internalTrafficPolicy Local keeps it there (2 elsewhere)",
        ),
        // publishNotReadyAddresses.
        (
            "routingPreference: [Node], mode: Strict, healthPolicy: AllowAll",
            "status: Unhealthy",
            "plain 10.0.0.1:80",
        ),
        (same_node, "", "plain 10.0.0.1:80"),
        (same_node, "status: Unhealthy", "plain 10.0.0.2:80"),
        (same_zone, "", "plain 10.0.0.1:80, plain 10.0.0.2:80"),
    ] {
        assert_eq!(
            told(&file(balancing, near), HERE, "10.96.0.1:80"),
            expected,
            "{balancing} {near}"
        );
    }
    // Who runs on no node is local to nobody.
    let nowhere = "{uid: s, name: s, namespace: n}";
    assert_eq!(
        told(&file(local, ""), nowhere, "10.96.0.1:80"),
        "service n/h has no healthy endpoint on the source's node, and internalTrafficPolicy Local keeps it there (3 elsewhere)"
    );
}

#[test]
fn two_namespaces_may_each_keep_a_service_of_one_address_to_themselves() {
    const KEPT: &str = r#"
workloads:
- {uid: a, name: a, namespace: x, workloadIps: [192.0.2.1], services: {"x/db": {80: 80}}}
- {uid: b, name: b, namespace: y, workloadIps: [192.0.2.2], services: {"y/db": {80: 80}}}
- {uid: c, name: c, namespace: z, workloadIps: [192.0.2.3], services: {"z/all": {80: 80}}}
services:
- {name: db, namespace: x, hostname: db, vips: [/10.9.0.1, /10.8.0.0/16], ports: {80: 80}, visibility: Namespace}
- {name: db, namespace: y, hostname: db, vips: [/10.9.0.1, /10.8.0.1], ports: {80: 80}, visibility: Namespace}
"#;
    const FOR_ALL: &str = "- {name: all, namespace: z, hostname: all, vips: [/10.9.0.1], ports: {80: 80}}";
    let (mut writer, knowledge) = mesh::new();
    let replace = |writer: &mut mesh::Writer, file: &str| {
        let (contents, rejected) = static_file::parse(file).unwrap();
        assert!(
            rejected.is_empty() && writer.replace(contents, &[]).is_empty(),
            "{rejected:?}"
        );
    };
    let reached = |namespace: &str, dialled: &str| {
        let source = Workload {
            namespace: namespace.into(),
            ..Workload::default()
        };
        match knowledge
            .snapshot()
            .resolve(&source, OriginalDst(dialled.parse().unwrap()), 0, &[])
        {
            Route::Plaintext { workload, .. } => workload.uid.0.to_string(),
            Route::Passthrough { .. } => "passed".to_owned(),
            other => panic!("{other:?}"),
        }
    };
    replace(&mut writer, KEPT);
    assert_eq!(
        ["x", "y", "z"].map(|from| reached(from, "10.9.0.1:80")),
        ["a", "b", "passed"]
    );
    // Another namespace's longer range hides nothing.
    assert_eq!(
        ["x", "y", "z"].map(|from| reached(from, "10.8.0.1:80")),
        ["a", "b", "passed"]
    );
    let with_all = [KEPT, FOR_ALL].concat();
    replace(&mut writer, &with_all);
    assert_eq!(
        ["x", "y", "z"].map(|from| reached(from, "10.9.0.1:80")),
        ["a", "b", "c"]
    );
    // When one goes, the others stay.
    let without = with_all.replace("- {name: db, namespace: x", "- {name: db, namespace: w");
    replace(&mut writer, &without);
    assert_eq!(
        ["x", "y", "z"].map(|from| reached(from, "10.9.0.1:80")),
        ["c", "b", "c"]
    );
}
