//! Policies, as agents get them.

use k8s::live::Kind;
use proto::security::{Action, Scope};
use serde_json::{Value, json};

use super::{Mesh, merged, object, pod};

fn authorization(name: &str, spec: Value) -> Value {
    object("AuthorizationPolicy", "shop", name, json!({"spec": spec}))
}

fn authentication(namespace: &str, name: &str, spec: Value) -> Value {
    object("PeerAuthentication", namespace, name, json!({"spec": spec}))
}

fn selector(app: &str) -> Value {
    json!({"matchLabels": {"app": app}})
}

#[test]
fn policies_with_a_selector_are_listed() {
    let mut mesh = Mesh::with([
        pod("shop", "web", "10.0.0.1", json!({})),
        pod("shop", "db", "10.0.0.2", json!({})),
        authorization("web", json!({"selector": selector("web")})),
        authorization("all", json!({})),
    ]);
    assert_eq!(mesh.pod("shop", "web").authorization_policies, ["shop/web"]);
    assert!(mesh.pod("shop", "db").authorization_policies.is_empty());
    assert_eq!(mesh.policy("shop/web").unwrap().scope(), Scope::WorkloadSelector);
    assert_eq!(mesh.policy("shop/all").unwrap().scope(), Scope::Namespace);
    let outcome = mesh.put(authorization("web", json!({"selector": selector("db")})));
    assert_eq!(outcome.changes.len(), 2, "the lists; the policy itself is as it was");
    assert_eq!(mesh.pod("shop", "db").authorization_policies, ["shop/web"]);
    // What it says is its own business.
    let outcome = mesh.put(authorization("web", json!({"selector": selector("db"), "rules": [{}]})));
    assert_eq!((outcome.changes.len(), outcome.recomputed), (1, 1));
}

#[test]
fn what_l4_cannot_do_is_told() {
    let mut mesh = Mesh::new();
    let of = |mesh: &mut Mesh, spec: Value| {
        mesh.put(authorization("p", spec));
        (
            mesh.policy("shop/p"),
            mesh.found(Kind::AuthorizationPolicy, "shop", "p"),
        )
    };
    let (policy, found) = of(&mut mesh, json!({"action": "AUDIT", "rules": [{}]}));
    assert!(policy.is_none() && found.len() == 1);
    let (policy, found) = of(&mut mesh, json!({"targetRefs": [{"kind": "Service", "name": "web"}]}));
    assert!(policy.is_none() && found.len() == 1);
    let get = json!([{"operation": {"methods": ["GET"]}}]);
    let (policy, found) = of(&mut mesh, json!({"rules": [{"to": get.clone()}]}));
    assert!(
        policy.unwrap().rules.is_empty() && found.len() == 1,
        "it allows nothing"
    );
    let (policy, found) = of(&mut mesh, json!({"action": "DENY", "rules": [{"to": get}]}));
    let policy = policy.unwrap();
    assert_eq!((policy.action(), policy.rules.len(), found.len()), (Action::Deny, 1, 1));
    assert!(policy.rules[0].clauses.is_empty(), "it denies more");
}

#[test]
fn a_policy_that_cannot_be_read_closes() {
    let closed = |mesh: &Mesh, name: &str| {
        let policy = mesh.policy(name).unwrap();
        policy.action() == Action::Deny && policy.rules.len() == 1 && policy.rules[0].clauses.is_empty()
    };
    for bad in [
        json!({"selector": selector("web"), "rules": [{"from": [{"source": {"ipBlocks": ["nowhere"]}}]}]}),
        json!({"selector": selector("web"), "rules": 1}),
        json!({"selector": selector("web"), "rule": []}),
        json!({"selector": selector("web"), "action": "CUSTOM", "provider": {"name": "x"}}),
    ] {
        let mut mesh = Mesh::with([
            pod("shop", "web", "10.0.0.1", json!({})),
            authorization("p", bad.clone()),
        ]);
        assert!(closed(&mesh, "shop/p"), "{bad}");
        assert_eq!(mesh.pod("shop", "web").authorization_policies, ["shop/p"], "{bad}");
        assert!(
            mesh.found(Kind::AuthorizationPolicy, "shop", "p")[0].starts_with("closed: "),
            "{bad}"
        );
        mesh.put(authorization("p", json!({"rules": [{}]})));
        assert!(!closed(&mesh, "shop/p") && mesh.findings.is_empty());
    }
    let mesh = Mesh::with([
        pod("shop", "web", "10.0.0.1", json!({})),
        authentication("shop", "bad", json!({"mtls": {"mode": "SOMETIMES"}})),
    ]);
    assert!(closed(&mesh, "shop/converted_peer_authentication_bad"));
}

#[test]
fn peer_authentications() {
    let mut mesh = Mesh::with([
        pod("shop", "web", "10.0.0.1", json!({})),
        pod("far", "x", "10.0.0.2", json!({})),
    ]);
    let listed = |mesh: &Mesh| mesh.pod("shop", "web").authorization_policies;
    let strict = json!({"mtls": {"mode": "STRICT"}});
    mesh.put(authentication("istio-system", "mesh", strict.clone()));
    assert_eq!(listed(&mesh), ["istio-system/converted_peer_authentication_mesh"]);
    mesh.put(authentication("shop", "open", json!({"mtls": {"mode": "PERMISSIVE"}})));
    assert!(listed(&mesh).is_empty());
    assert_eq!(mesh.pod("far", "x").authorization_policies.len(), 1);
    let ports = json!({"selector": selector("web"), "portLevelMtls": {"8080": {"mode": "STRICT"}}});
    mesh.put(authentication("shop", "web", ports));
    assert_eq!(listed(&mesh), ["shop/converted_peer_authentication_web"]);
    let policy = mesh.policy("shop/converted_peer_authentication_web").unwrap();
    assert_eq!(policy.rules[0].clauses[1].matches[0].destination_ports, [8080]);
    // The wider mode is part of what the narrower becomes.
    mesh.put(authentication("shop", "open", strict));
    let policy = mesh.policy("shop/converted_peer_authentication_web").unwrap();
    assert_eq!(policy.rules[0].clauses.len(), 1);
    mesh.check();
}

#[test]
fn of_two_peer_authentications_that_overlap_the_older_has_the_workload() {
    let made = |name: &str, time: &str, labels: Value, mode: &str| {
        let spec = json!({"selector": {"matchLabels": labels}, "mtls": {"mode": mode}});
        merged(
            authentication("shop", name, spec),
            json!({"metadata": {"creationTimestamp": time}}),
        )
    };
    let labelled = |name: &str, ip: &str, labels: Value| pod("shop", name, ip, json!({"metadata": {"labels": labels}}));
    let front = json!({"tier": "front"});
    let mut mesh = Mesh::with([
        labelled("web", "10.0.0.1", json!({"tier": "front"})),
        labelled("cart", "10.0.0.2", front),
        made("old", "2026-01-01T00:00:00Z", json!({"app": "web"}), "PERMISSIVE"),
        made("young", "2026-02-01T00:00:00Z", json!({"tier": "front"}), "STRICT"),
    ]);
    let told = |mesh: &Mesh| mesh.found(Kind::PeerAuthentication, "shop", "young");
    let shared = "PeerAuthentication shop/young: spec.selector: PeerAuthentication shop/old is older and wins for what \
                  both select: web";
    assert!(mesh.pod("shop", "web").authorization_policies.is_empty());
    assert_eq!(mesh.pod("shop", "cart").authorization_policies.len(), 1);
    assert_eq!(told(&mesh), [format!("divided: {shared}")]);
    assert!(mesh.found(Kind::PeerAuthentication, "shop", "old").is_empty());
    // Without anything of its own it has no effect; a workload's readiness says nothing of that.
    mesh.delete(Kind::Pod, "shop", "cart");
    assert_eq!(told(&mesh), [format!("refused: {shared}")]);
    let unready = json!({"metadata": {"labels": {"tier": "front"}}, "status": {"conditions": []}});
    assert_eq!(mesh.put(pod("shop", "web", "10.0.0.1", unready)).recomputed, 1);
    // Another label, and they share nothing.
    mesh.put(labelled("web", "10.0.0.1", json!({"app": "other", "tier": "front"})));
    assert!(told(&mesh).is_empty());
    mesh.check();
}
