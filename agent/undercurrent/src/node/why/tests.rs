//! What is said of connections that the data path treats otherwise than most. Knows no agent that serves them.

use model::{Exclusions, NamespacedName, PodSettings};

use super::*;

/// Two pods of the mesh and one outside, all of node n1. The policy refuses `a` to itself, the other plaintext to `b`.
const FILE: &str = r#"
settings: {outboundTrafficPolicy: {mode: REGISTRY_ONLY}}
workloads:
- {uid: c//v1/Pod/shop/a, name: a, namespace: shop, serviceAccount: a, workloadIps: ["10.0.0.1", "fd00::1"], protocol: HBONE,
   node: n1, authorizationPolicies: [shop/not-a]}
- {uid: c//v1/Pod/shop/b, name: b, namespace: shop, serviceAccount: b, workloadIps: ["10.0.0.2"], protocol: HBONE, node: n1,
   authorizationPolicies: [shop/strict, shop/not-a]}
- {uid: c//v1/Pod/shop/w, name: w, namespace: shop, serviceAccount: w, workloadIps: ["10.0.0.4"], protocol: HBONE, node: n1,
   waypoint: {destination: shop/wp}}
- {uid: c//v1/Pod/shop/wp, name: wp, namespace: shop, serviceAccount: wp, workloadIps: ["10.0.0.5"], protocol: HBONE, node: n1,
   services: {shop/wp: {}}}
- {uid: c//v1/Pod/shop/db-0, name: db-0, namespace: shop, workloadIps: ["10.0.0.6"], node: n1,
   services: {shop/db.shop.svc.mesh.example: {}}}
- {uid: c//v1/Pod/out/c, name: c, namespace: out, workloadIps: ["10.0.0.3"], node: n1}
services:
- {name: wp, namespace: shop, hostname: wp, vips: [/10.9.0.1], ports: {15008: 15008}}
- {name: away, namespace: shop, hostname: a.svc.elsewhere.example, vips: [/10.9.0.2], ports: {80: 80}}
- {name: b, namespace: shop, hostname: b.shop.svc.mesh.example, vips: [/10.9.0.3], ports: {80: 80}}
- {name: db, namespace: shop, hostname: db.shop.svc.mesh.example, ports: {80: 80}}
policies:
- {name: not-a, namespace: shop, scope: WorkloadSelector, action: Deny,
   rules: [[[{principals: [!Exact cluster.local/ns/shop/sa/a]}]]]}
- {name: strict, namespace: shop, scope: WorkloadSelector, action: Deny, rules: [[[{notPrincipals: [Presence]}]]]}
"#;

fn view(namespace: &str, name: &str, captured: bool) -> PodView {
    PodView {
        pod: NamespacedName::new(namespace, name),
        uid: WorkloadUid::of_pod("c", namespace, name),
        addresses: Vec::new(),
        captured,
        identity: None,
        answers_dns: false,
        problem: None,
        settings: PodSettings::default(),
        notes: Vec::new(),
    }
}

/// What the agent of n1 sees, where pod `b` is captured like this.
async fn seen(of_b: PodSettings) -> Seen {
    let (contents, rejected) = mesh::static_file::parse(FILE).unwrap();
    assert!(rejected.is_empty(), "{rejected:?}");
    let (mut writer, knowledge) = mesh::new();
    assert!(writer.replace(contents, &[]).is_empty());
    let domain = model::TrustDomain::default();
    let (root, key) = identity::generate_root(&domain).unwrap();
    let authority = identity::LocalAuthority::from_pem(&root, &key).unwrap();
    let identities = Identities::new(Arc::new(authority), domain, identity::Clock::system());
    let snapshot = knowledge.snapshot();
    for workload in snapshot.workloads() {
        identities.credentials(&workload.identity()).await.unwrap();
    }
    let b = PodView {
        settings: of_b,
        ..view("shop", "b", true)
    };
    Seen {
        node: "n1".to_owned(),
        capture: "ebpf",
        snapshot,
        pods: vec![view("shop", "a", true), b, view("out", "c", false)],
        identities,
        domain: "mesh.example".into(),
    }
}

/// Whether it is allowed, and all that is said of it.
fn why(seen: &Seen, source: &str, destination: &str, port: u16) -> (bool, String) {
    let question = Question {
        source: source.to_owned(),
        destination: destination.to_owned(),
        port,
    };
    let why = seen.explain(&question).unwrap();
    let said = format!("{:?}", why.steps);
    if let Some(arrival) = &why.arrival {
        // Asked as its destination's agent it says the same.
        let policy = why.steps.iter().filter(|step| step.stage == "policy");
        assert_eq!(seen.arrives(arrival).unwrap(), Vec::from_iter(policy.cloned()));
    }
    (why.allowed, said)
}

#[tokio::test]
async fn what_does_not_leave_the_pod_is_judged_by_nobody() {
    let seen = seen(PodSettings::default()).await;
    for (destination, named) in [
        ("shop/a", "10.0.0.1:80 is the pod's own address"),
        ("10.0.0.1", "10.0.0.1:80 is the pod's own address"),
        ("::ffff:10.0.0.1", "10.0.0.1:80 is the pod's own address"),
        ("fd00::1", "[fd00::1]:80 is the pod's own address"),
        ("127.0.0.1", "127.0.0.1:80 is the pod's loopback"),
        ("127.1.2.3", "127.1.2.3:80 is the pod's loopback"),
        ("::1", "[::1]:80 is the pod's loopback"),
        ("0.0.0.0", "0.0.0.0:80 is the pod's loopback"),
    ] {
        let (allowed, said) = why(&seen, "shop/a", destination, 80);
        assert!(allowed && said.contains(named), "{destination}: {said}");
        assert!(
            !said.contains("TLS") && !said.contains("\"policy\""),
            "{destination}: {said}"
        );
    }
    // Of a pod outside the mesh nothing leaves, either.
    for destination in ["out/c", "127.0.0.1"] {
        let (allowed, said) = why(&seen, "out/c", destination, 80);
        assert!(allowed && said.contains("does not leave the pod"), "{said}");
    }
    // The agent's own ports there, and another pod, are as ever.
    for port in l4::OWN_PORTS {
        let (allowed, said) = why(&seen, "shop/a", "shop/a", port);
        assert!(!allowed && said.contains("go round in circles"), "{said}");
    }
    let (allowed, said) = why(&seen, "shop/a", "shop/b", 80);
    assert!(!allowed && said.contains("shop/not-a"), "{said}");
    assert!(why(&seen, "shop/b", "shop/a", 80).0);
}

#[tokio::test]
async fn plaintext_to_an_excluded_port_is_judged_by_nobody() {
    let excluded = PodSettings {
        exclusions: Exclusions {
            inbound_ports: vec![8001],
            ..Exclusions::default()
        },
        ..PodSettings::default()
    };
    let bypassed = PodSettings {
        bypass_inbound: true,
        ..PodSettings::default()
    };
    for (settings, port, annotation) in [
        (
            excluded.clone(),
            8001,
            Some("traffic.sidecar.istio.io/excludeInboundPorts"),
        ),
        (excluded, 8002, None),
        (bypassed.clone(), 8001, Some("ambient.istio.io/bypass-inbound-capture")),
        (bypassed, 15008, None),
        (PodSettings::default(), 8001, None),
    ] {
        let mut seen = seen(settings).await;
        let (allowed, said) = why(&seen, "out/c", "shop/b", port);
        assert_eq!(allowed, annotation.is_some(), "{port}: {said}");
        let words = annotation.unwrap_or("shop/strict");
        assert!(said.contains(words) && said.contains("shop/b"), "{port}: {said}");
        // By mutual TLS it is judged.
        let (allowed, said) = why(&seen, "shop/a", "shop/b", port);
        assert!(!allowed && said.contains("shop/not-a"), "{port}: {said}");
        // Nothing is in force of what is not captured.
        seen.pods[1].captured = false;
        assert!(!why(&seen, "out/c", "shop/b", port).0);
    }
}

#[tokio::test]
async fn plaintext_does_not_pass_a_waypoint() {
    let mut seen = seen(PodSettings::default()).await;
    seen.pods.push(view("shop", "w", true));
    let (allowed, said) = why(&seen, "out/c", "shop/w", 80);
    assert!(!allowed && said.contains("behind waypoint shop/wp"), "{said}");
    assert!(why(&seen, "shop/a", "shop/w", 80).0);
}

/// Whatever other domains there are services of.
#[tokio::test]
async fn a_name_is_that_of_the_clusters_domain() {
    let seen = seen(PodSettings::default()).await;
    let source = seen.source("shop/a").unwrap();
    for (name, host, address) in [
        ("b", "b.shop.svc.mesh.example", "10.9.0.3:80"),
        ("B.shop", "b.shop.svc.mesh.example", "10.9.0.3:80"),
        ("b.shop.svc.mesh.example.", "b.shop.svc.mesh.example", "10.9.0.3:80"),
        ("db", "db.shop.svc.mesh.example", "10.0.0.6:80"),
        ("db-0.db", "db-0.db.shop.svc.mesh.example", "10.0.0.6:80"),
        ("db-0.db.shop.svc", "db-0.db.shop.svc.mesh.example", "10.0.0.6:80"),
        ("10-0-0-6.db.shop", "10-0-0-6.db.shop.svc.mesh.example", "10.0.0.6:80"),
        ("a.svc.elsewhere.example", "a.svc.elsewhere.example", "10.9.0.2:80"),
    ] {
        let (shown, dialled, object) = seen.destination(source, name, 80).unwrap();
        assert_eq!((&*shown, dialled.to_string()), (host, address.to_owned()), "{name}");
        assert!(object.is_some(), "{name}");
    }
    for unknown in [
        "db-1.db",
        "b.bank",
        "b.shop.svc.cluster.local",
        "b.shop.svc.elsewhere.example",
    ] {
        let error = seen.destination(source, unknown, 80).unwrap_err();
        assert!(error.contains("no service is called"), "{unknown}: {error}");
    }
}
