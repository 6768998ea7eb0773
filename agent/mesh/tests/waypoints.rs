//! Waypoints: what is handed to them, what never passes them by, and what they are let through with.
#![allow(clippy::unwrap_used)]

use std::{collections::BTreeMap, sync::Arc};

use mesh::{Route, Snapshot, Wanted, static_file};
use model::{
    Authority, GatewayAddress, Identity, NamespacedName, NetworkAddress, OriginalDst, Unusable, Workload, WorkloadUid,
};
use policy::Facts;

/// A service and a pod behind waypoints of two replicas each, and a pod of the same service that is behind none.
const FILE: &str = r#"
workloads:
- {uid: pod, name: pod, namespace: n, workloadIps: [10.0.0.1], protocol: HBONE, serviceAccount: app,
   waypoint: {destination: n/for-pods}, services: {n/web: {80: 8080}, n/open: {80: 8080}}}
- {uid: s1, name: s1, namespace: n, workloadIps: [10.0.0.21], protocol: HBONE, serviceAccount: for-services,
   services: {n/for-services: {}}}
- {uid: s2, name: s2, namespace: n, workloadIps: [10.0.0.22, "fd00::22"], protocol: HBONE, serviceAccount: for-services,
   nativeTunnel: true, services: {n/for-services: {15008: 16008}}}
- {uid: p1, name: p1, namespace: n, workloadIps: [10.0.0.31], protocol: HBONE, serviceAccount: for-pods,
   applicationTunnel: {protocol: Proxy, port: 15088}, services: {n/for-pods: {}}}
- {uid: client, name: client, namespace: n, workloadIps: [10.0.0.9], protocol: HBONE, serviceAccount: client}
services:
- {name: web, namespace: n, hostname: web, vips: [10.9.0.1], ports: {80: 8080}, waypoint: {destination: /10.9.0.2}}
- {name: open, namespace: n, hostname: open, vips: [10.9.0.4], ports: {80: 8080}}
- {name: for-services, namespace: n, hostname: for-services, vips: [10.9.0.2], ports: {15008: 15008}}
- {name: for-pods, namespace: n, hostname: for-pods, vips: [10.9.0.3], ports: {15008: 15008},
   subjectAltNames: ["spiffe://cluster.local/ns/n/sa/its-other-name"]}
"#;

fn snapshot_of(file: &str) -> Arc<Snapshot> {
    let (contents, rejected) = static_file::parse(file).unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    let (mut writer, knowledge) = mesh::new();
    assert!(writer.replace(contents, &[]).is_empty());
    knowledge.snapshot()
}

fn workload(snapshot: &Snapshot, uid: &str) -> Arc<Workload> {
    snapshot.workload(&WorkloadUid(uid.into())).unwrap().clone()
}

/// In a few words.
fn told(route: Route) -> String {
    match route {
        Route::Waypoint {
            workload,
            target,
            hbone,
            service,
            ..
        } => {
            let service = service.map(|service| format!(" of {}", service.hostname));
            format!("{target}{} by {} at {hbone}", service.unwrap_or_default(), workload.uid)
        }
        Route::Tunnel { target, hbone, .. } => format!("{target} at {hbone}"),
        Route::Refused { reason } => reason.to_string(),
        other => format!("{other:?}"),
    }
}

fn way(file: &str, source: &str, dialled: &str, random: u64, tried: &[&str]) -> String {
    let snapshot = snapshot_of(file);
    let tried: Vec<_> = tried.iter().map(|uid| WorkloadUid((*uid).into())).collect();
    let dialled = OriginalDst(dialled.parse().unwrap());
    told(snapshot.resolve(&workload(&snapshot, source), dialled, random, &tried))
}

#[test]
fn a_service_is_handed_over_by_its_own_address_to_any_replica() {
    let handed = |random, tried: &[&str]| way(FILE, "client", "10.9.0.1:80", random, tried);
    assert_eq!(handed(0, &[]), "10.9.0.1:80 of web by s1 at 10.0.0.21:15008");
    assert_eq!(handed(1, &[]), "10.9.0.1:80 of web by s2 at 10.0.0.22:16008");
    assert_eq!(handed(0, &["s1"]), "10.9.0.1:80 of web by s2 at 10.0.0.22:16008");
    let none_left = handed(0, &["s1", "s2"]);
    assert_eq!(
        none_left,
        "service n/web has to be reached through waypoint n/for-services, which can't be used: service \
         n/for-services has no healthy endpoint"
    );
}

#[test]
fn a_pod_is_handed_over_by_its_own_address() {
    let handed = way(FILE, "client", "10.0.0.1:1234", 0, &[]);
    assert_eq!(handed, "10.0.0.1:1234 by p1 at 10.0.0.31:15008");
    // A service without a waypoint does not lead past its endpoint's.
    let handed = way(FILE, "client", "10.9.0.4:80", 0, &[]);
    assert_eq!(handed, "10.0.0.1:8080 of open by p1 at 10.0.0.31:15008");
    // By a workload's address in place of a service's.
    let file = FILE.replace("n/for-pods}, services", "/10.0.0.31, hboneMtlsPort: 15009}, services");
    let handed = way(&file, "client", "10.0.0.1:1234", 0, &[]);
    assert_eq!(handed, "10.0.0.1:1234 by p1 at 10.0.0.31:15009");
}

#[test]
fn a_waypoint_does_not_meet_itself_nor_a_pod_its_own() {
    // What a service's waypoint sends to an endpoint went through the waypoint that it had to.
    for (source, dialled) in [
        ("s1", "10.9.0.1:80"),
        ("s2", "10.0.0.1:8080"),
        ("p1", "10.0.0.1:8080"),
        ("p1", "10.9.0.4:80"),
        ("pod", "10.0.0.1:8080"),
    ] {
        let expected = "10.0.0.1:8080 at 10.0.0.1:15008";
        assert_eq!(way(FILE, source, dialled, 0, &[]), expected, "{source} to {dialled}");
    }
    // A waypoint of others is a client like any.
    assert!(way(FILE, "p1", "10.9.0.1:80", 0, &[]).contains(" by s1 "));
}

#[test]
fn a_waypoint_that_can_not_be_used_is_named_and_never_passed_around() {
    let through = |waypoint: &str, more: &str| {
        let file = FILE.replace("n/for-pods}, services", &format!("{waypoint}}}, services")) + more;
        way(&file, "client", "10.0.0.1:80", 0, &[])
    };
    let unusable = |why| {
        let gateway = model::NamespacedName::new("n", "wp");
        through(&GatewayAddress::unusable(&gateway, why).destination.to_string(), "")
    };
    assert_eq!(
        unusable(Unusable::NotThere),
        "workload pod has to be reached through Gateway n/wp, which can't be used: it is not there"
    );
    assert!(unusable(Unusable::NotProgrammed).ends_with("it is not programmed yet"));
    // Even if somebody makes a service of that name.
    let squatter =
        "- {name: x, namespace: n, hostname: not-there.wp.n.waypoint.invalid, vips: [10.9.0.8], ports: {15008: 15008}}";
    let through_squatter = through("n/not-there.wp.n.waypoint.invalid", squatter);
    assert!(through_squatter.ends_with("it is not there"), "{through_squatter}");
    for (waypoint, more, expected) in [
        ("n/nobody", "", "nothing is known of that address"),
        ("far/10.9.0.2", "", "nothing is known of that address"),
        ("/10.9.9.9", "", "nothing is known of that address"),
        (
            "n/for-pods, hboneMtlsPort: 1",
            "",
            "its service n/for-pods has no port 1 for HBONE",
        ),
        (
            "n/idle",
            "- {name: idle, namespace: n, hostname: idle, ports: {15008: 15008}}",
            "service n/idle has no healthy endpoint",
        ),
    ] {
        let refusal = through(waypoint, more);
        assert!(refusal.ends_with(expected), "{waypoint}: {refusal}");
    }
    // Plaintext to a waypoint would be no mesh.
    for waypoint in ["n/for-pods", "/10.0.0.31"] {
        let file = FILE.replace("n/for-pods}, services", &format!("{waypoint}}}, services"));
        let file = file.replace("10.0.0.31], protocol: HBONE", "10.0.0.31]");
        let refusal = way(&file, "client", "10.0.0.1:80", 0, &[]);
        assert!(refusal.ends_with("its replica p1 does not take HBONE"), "{refusal}");
    }
}

#[test]
fn what_has_only_a_name_is_not_led_past_its_waypoint() {
    let file = FILE.replace("workloadIps: [10.0.0.1]", "hostname: x.example");
    let refusal = way(&file, "client", "10.9.0.4:80", 0, &[]);
    assert!(refusal.ends_with("has only the name x.example"), "{refusal}");
}

#[test]
fn several_waypoints_share_by_weight() {
    let file = FILE.replace(
        "ports: {80: 8080}, waypoint: {destination: /10.9.0.2}",
        "ports: {80: 8080}, weightedWaypoints: [{destination: {destination: n/for-services}, weight: 3}, {destination: \
         {destination: n/for-pods}, weight: 1}]",
    );
    let snapshot = snapshot_of(&file);
    let client = workload(&snapshot, "client");
    let mut counts = BTreeMap::<_, u32>::new();
    for random in 0..400u64 {
        let dialled = OriginalDst("10.9.0.1:80".parse().unwrap());
        match snapshot.resolve(&client, dialled, random.rotate_left(32), &[]) {
            Route::Waypoint { gateway, .. } => *counts.entry(gateway.unwrap().name.to_string()).or_default() += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(
        counts,
        [("for-pods".to_owned(), 100), ("for-services".to_owned(), 300)].into()
    );
    // Each of them is the service's.
    for source in ["s1", "p1"] {
        assert_eq!(
            way(&file, source, "10.9.0.1:80", 0, &[]),
            "10.0.0.1:8080 at 10.0.0.1:15008"
        );
    }
    let none = file
        .replace("weight: 3", "weight: 0")
        .replace("weight: 1}", "weight: 0}");
    let refusal = way(&none, "client", "10.9.0.1:80", 0, &[]);
    assert!(refusal.ends_with("of several waypoints none has a weight"), "{refusal}");
}

fn facts_of(account: Option<&str>, source: &str) -> Facts {
    let identity = account.map(|account| Identity {
        trust_domain: Default::default(),
        namespace: "n".into(),
        service_account: account.into(),
    });
    Facts {
        identity,
        source: source.parse().unwrap(),
        destination: "10.0.0.1:8080".parse().unwrap(),
        aliases: Default::default(),
    }
}

/// Whether the pod takes a connection from this account, or in plaintext from nobody.
fn takes(file: &str, account: Option<&str>, source: &str) -> Result<(), String> {
    let snapshot = snapshot_of(file);
    let verdict = snapshot.verdict(&facts_of(account, source), &workload(&snapshot, "pod"));
    verdict.allowed.then_some(()).ok_or(verdict.reason.to_string())
}

#[test]
fn who_has_a_waypoint_takes_only_what_came_through_it() {
    for (account, source) in [
        ("for-pods", "10.0.0.31"),
        ("its-other-name", "10.0.0.31"),
        ("for-services", "10.0.0.21"),
        ("app", "10.0.0.1"),
    ] {
        assert_eq!(takes(FILE, Some(account), source), Ok(()), "{account}");
    }
    let refused = |account, source| takes(FILE, account, source).unwrap_err();
    assert_eq!(
        refused(Some("client"), "10.0.0.9"),
        "denied: the workload is behind waypoint n/for-pods and takes only what comes through it: the peer is \
         spiffe://cluster.local/ns/n/sa/client"
    );
    assert!(refused(None, "192.0.2.1").ends_with("the peer came in plaintext, without an identity"));
    assert!(
        refused(None, "10.0.0.31").starts_with("denied"),
        "an address is no proof"
    );
    assert!(
        refused(Some("app"), "10.0.0.9").starts_with("denied"),
        "another pod of its account"
    );
    // A replica that is not ready still finishes what it has.
    let sick = FILE.replace("{uid: p1,", "{uid: p1, status: Unhealthy,");
    assert_eq!(takes(&sick, Some("for-pods"), "10.0.0.31"), Ok(()));
    // With a waypoint for services alone, the pod's own address is open to all.
    let for_services = FILE.replace("waypoint: {destination: n/for-pods}, services", "services");
    for account in [Some("client"), None] {
        assert_eq!(takes(&for_services, account, "10.0.0.9"), Ok(()));
    }
    // None that can be used: nobody can have come through it.
    let gone = FILE.replace("n/for-pods}, services", "n/not-there.wp.n.waypoint.invalid}, services");
    let refusal = takes(&gone, Some("for-pods"), "10.0.0.31").unwrap_err();
    assert!(refusal.contains("behind Gateway n/wp (it is not there)"), "{refusal}");
    assert_eq!(takes(&gone, Some("for-services"), "10.0.0.21"), Ok(()));
}

/// Anybody may write an address into an object of his own namespace.
#[test]
fn a_service_of_another_namespace_brings_no_waypoint_along() {
    let foreign =
        FILE.replace(
            "services: {n/web: {80: 8080}, n/open",
            "services: {far/theirs: {}, n/web: {80: 8080}, n/open",
        )
        .replace(
            "serviceAccount: for-services,\n   services: {n/for-services: {}}",
            "serviceAccount: theirs,\n   services: {far/wp: {}}",
        ) + "- {name: theirs, namespace: far, hostname: theirs, vips: [10.9.0.8], ports: {80: 8080}, \
             waypoint: {destination: /10.9.0.9}}\n\
           - {name: wp, namespace: far, hostname: wp, vips: [10.9.0.9], ports: {15008: 15008}}\n";
    let refusal = takes(&foreign, Some("theirs"), "10.0.0.21").unwrap_err();
    assert!(refusal.contains("is behind waypoint n/for-pods"), "{refusal}");
    // And what stands there is led through the pod's own.
    let there = way(&foreign, "s1", "10.0.0.1:8080", 0, &[]);
    assert_eq!(there, "10.0.0.1:8080 by p1 at 10.0.0.31:15008");
}

#[test]
fn a_waypoint_is_asked_only_for_what_is_behind_it() {
    let snapshot = snapshot_of(FILE);
    let asked = |uid: &str, text: &str| {
        let authority: Authority = text.parse().unwrap();
        snapshot.is_waypoint_for(&workload(&snapshot, uid), &authority)
    };
    assert!(asked("s1", "10.9.0.1:80") && asked("s2", "10.9.0.1:81"));
    assert!(asked("p1", "10.0.0.1:22"));
    for (uid, text) in [
        ("p1", "10.9.0.1:80"),
        ("s1", "10.0.0.1:80"),
        ("s1", "10.0.0.9:80"),
        ("s1", "192.0.2.1:80"),
        ("client", "10.9.0.1:80"),
        ("s1", "web:80"),
    ] {
        assert!(!asked(uid, text), "{uid} for {text}");
    }
    // A service at its own endpoint's address.
    let snapshot = snapshot_of(&FILE.replace("vips: [10.9.0.1]", "vips: [10.0.0.1]"));
    let asked = |uid: &str| snapshot.is_waypoint_for(&workload(&snapshot, uid), &"10.0.0.1:80".parse().unwrap());
    assert!(asked("s1") && asked("p1") && !asked("client"));
}

#[test]
fn on_demand_the_waypoints_address_is_asked_for() {
    let (mut writer, knowledge, _) = mesh::with("", mesh::Scope::OnDemand);
    let (contents, _) = static_file::parse(&FILE.replace("n/for-pods}, services", "/10.9.0.77}, services")).unwrap();
    writer.replace(contents, &[]);
    let dialled = OriginalDst("10.0.0.1:80".parse().unwrap());
    let route = || knowledge.snapshot().resolve(&Workload::default(), dialled, 0, &[]);
    let wanted = Wanted::Address(NetworkAddress::new("", "10.9.0.77".parse().unwrap()));
    assert_eq!(route(), Route::Unknown { wanted });
    writer.apply(mesh::Delta {
        absent: vec!["10.9.0.77".parse().unwrap()],
        ..Default::default()
    });
    assert!(told(route()).ends_with("nothing is known of that address"));
}

#[test]
fn on_demand_a_waypoint_with_a_name_is_asked_for_by_it_at_both_ends() {
    let (mut writer, knowledge, _) = mesh::with("", mesh::Scope::OnDemand);
    let (mut contents, _) = static_file::parse(FILE).unwrap();
    let all = std::mem::take(&mut contents.services);
    writer.replace(contents, &[]);
    let name = |name| Wanted::Service(NamespacedName::new("n", name));
    let route = || {
        let dialled = OriginalDst("10.0.0.1:80".parse().unwrap());
        knowledge.snapshot().resolve(&Workload::default(), dialled, 0, &[])
    };
    let before = |account: Option<&str>| {
        let snapshot = knowledge.snapshot();
        let facts = facts_of(account, "10.0.0.31");
        snapshot.to_ask_before(&facts, &workload(&snapshot, "pod"))
    };
    let behind = |asked: &str| knowledge.snapshot().to_ask_behind(&asked.parse().unwrap());
    let wanted = name("for-pods");
    assert_eq!(route(), Route::Unknown { wanted });
    // Its own waypoint, or that of a service that it serves.
    assert_eq!(before(Some("for-pods")), [name("for-pods"), name("open"), name("web")]);
    assert_eq!(before(None), [], "who proved nothing is none of them");
    assert_eq!(before(Some("client")).len(), 3);
    assert_eq!(behind("10.0.0.1:80"), [name("for-pods")]);
    let unknown = Wanted::Address(NetworkAddress::new("", "192.0.2.1".parse().unwrap()));
    assert_eq!(behind("192.0.2.1:80"), [unknown]);
    // A service's waypoint is known of once the service is.
    let put = |writer: &mut mesh::Writer, name: &str| {
        let service = all.iter().find(|service| &*service.name == name).unwrap();
        let services = vec![Arc::new(service.clone())];
        writer.apply(mesh::Delta {
            services,
            ..Default::default()
        });
    };
    put(&mut writer, "for-pods");
    assert_eq!(before(Some("for-pods")), [], "it is its waypoint");
    assert!(told(route()).contains(" by p1 "));
    put(&mut writer, "web");
    let of_web = Wanted::Address(NetworkAddress::new("", "10.9.0.2".parse().unwrap()));
    assert_eq!(before(Some("for-services")), [of_web, name("open")]);
    put(&mut writer, "for-services");
    assert_eq!(before(Some("for-services")), []);
    put(&mut writer, "open");
    assert_eq!(before(Some("client")), [], "everything is known, and it is none");
    assert_eq!(behind("10.0.0.1:80"), []);
}

#[test]
fn who_the_waypoint_is_concerns_the_pod_behind_it() {
    let (mut writer, knowledge) = mesh::new();
    let (contents, _) = static_file::parse(FILE).unwrap();
    writer.replace(contents, &[]);
    let uid = WorkloadUid("pod".into());
    let before = knowledge.snapshot().standing(&uid);
    let mut replica = (*workload(&knowledge.snapshot(), "p1")).clone();
    let apply = |writer: &mut mesh::Writer, replica: &Workload| {
        writer.apply(mesh::Delta {
            workloads: vec![Arc::new(replica.clone())],
            ..Default::default()
        });
    };
    replica.status = model::HealthStatus::Unhealthy;
    apply(&mut writer, &replica);
    assert!(
        knowledge.snapshot().standing(&uid) == before,
        "a replica that is not ready is still the waypoint"
    );
    replica.service_account = "other".into();
    apply(&mut writer, &replica);
    assert!(knowledge.snapshot().standing(&uid) != before);
}
