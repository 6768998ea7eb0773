//! Messages as a control plane sends them, and as none should.

use proptest::prelude::*;
use proto::{security, workload as wire};

use model::{Action, Rule, Scope};

use super::*;

fn workload() -> wire::Workload {
    wire::Workload {
        uid: "c//v1/Pod/shop/web".to_owned(),
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        services: [(
            "shop/web.example".to_owned(),
            wire::PortList {
                ports: vec![wire::Port {
                    service_port: 80,
                    target_port: 8080,
                    app_protocol: 0,
                }],
            },
        )]
        .into(),
        authorization_policies: vec!["shop/deny".to_owned()],
        ..Default::default()
    }
}

fn as_address(kind: address::Type) -> Vec<u8> {
    Address { r#type: Some(kind) }.encode_to_vec()
}

fn read_workload(change: impl FnOnce(&mut wire::Workload)) -> Result<Object, String> {
    let mut message = workload();
    change(&mut message);
    let name = message.uid.clone();
    let bytes = as_address(address::Type::Workload(message));
    address(&name, &bytes, &mut Interner::default()).map_err(|error| error.to_string())
}

fn read_service(change: impl FnOnce(&mut wire::Service)) -> Result<Object, String> {
    let mut message = wire::Service {
        name: "web".to_owned(),
        namespace: "shop".to_owned(),
        hostname: "web.example".to_owned(),
        ..Default::default()
    };
    change(&mut message);
    let bytes = as_address(address::Type::Service(message));
    address("shop/web.example", &bytes, &mut Interner::default()).map_err(|error| error.to_string())
}

fn policy(change: impl FnOnce(&mut security::Authorization)) -> Vec<u8> {
    let mut message = security::Authorization {
        name: "deny".to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::Namespace.into(),
        action: security::Action::Deny.into(),
        ..Default::default()
    };
    change(&mut message);
    message.encode_to_vec()
}

fn read_policy(change: impl FnOnce(&mut security::Authorization)) -> Result<Object, String> {
    authorization("shop/deny", &policy(change), &mut Interner::default()).map_err(|error| error.to_string())
}

#[test]
fn what_is_left_out_means_what_istio_says() {
    let Ok(Object::Workload(read)) = read_workload(|_| ()) else {
        panic!("not a workload")
    };
    assert_eq!(
        (read.trust_domain.as_str(), &*read.service_account),
        ("cluster.local", "default")
    );
    assert_eq!(
        (read.capacity, &*read.workload_type, &*read.network),
        (1, "deployment", "")
    );
    assert_eq!(
        read.services.get(&NamespacedName::new("shop", "web.example")),
        Some(&[(80, 8080)].into())
    );
    let Ok(Object::Service(read)) = read_service(|_| ()) else {
        panic!("not a service")
    };
    assert_eq!((&read.load_balancing, &read.waypoint), (&None, &None));
}

#[test]
fn several_waypoints_are_read_with_their_weights() {
    let Ok(Object::Service(read)) = read_service(|service| {
        let hostname = gateway_address::Destination::Hostname(wire::NamespacedHostname {
            namespace: "n".to_owned(),
            hostname: "way".to_owned(),
        });
        service.weighted_waypoints = vec![wire::WeightedWaypoint {
            destination: Some(wire::GatewayAddress {
                hbone_mtls_port: 15008,
                destination: Some(hostname),
            }),
            weight: 7,
        }];
    }) else {
        panic!("not a service")
    };
    let [one] = &read.weighted_waypoints[..] else {
        panic!("{read:?}")
    };
    assert_eq!((one.destination.to_string().as_str(), one.weight), ("n/way:15008", 7));
}

/// What the refusal begins with, and the change that leads to it.
type Case<T> = (&'static str, fn(&mut T));

#[test]
fn a_resource_that_is_not_understood_is_refused_by_its_field() {
    let workloads: [Case<wire::Workload>; 9] = [
        ("uid: ", |workload| workload.uid.clear()),
        ("addresses: ", |workload| {
            workload.addresses = vec![vec![1, 2, 3].into()]
        }),
        ("tunnel_protocol: value 9 ", |workload| workload.tunnel_protocol = 9),
        ("network_mode: value 9 ", |workload| workload.network_mode = 9),
        ("workload_type: value 9 ", |workload| workload.workload_type = 9),
        ("status: value -1 ", |workload| workload.status = -1),
        ("services: ", |workload| {
            workload.services.insert("nowhere".to_owned(), Default::default());
        }),
        ("authorization_policies: ", |workload| {
            workload.authorization_policies = vec!["a/b/c".to_owned()]
        }),
        ("waypoint: ", |workload| workload.waypoint = Some(Default::default())),
    ];
    for (expected, change) in workloads {
        let error = read_workload(change).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    let services: [Case<wire::Service>; 5] = [
        ("name: ", |service| service.hostname = "other".to_owned()),
        ("addresses: a prefix of 33 bits", |service| {
            service.addresses = vec![wire::NetworkAddress {
                network: String::new(),
                address: vec![10, 0, 0, 1].into(),
                length: Some(33),
            }];
        }),
        ("ports: 70000 ", |service| {
            service.ports = vec![wire::Port {
                service_port: 70000,
                ..Default::default()
            }];
        }),
        ("visibility: value 7 ", |service| service.visibility = 7),
        ("load_balancing.mode: value 7 ", |service| {
            service.load_balancing = Some(wire::LoadBalancing {
                mode: 7,
                ..Default::default()
            });
        }),
    ];
    for (expected, change) in services {
        let error = read_service(change).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    let policies: [Case<security::Authorization>; 3] = [
        ("scope: value 5 ", |policy| policy.scope = 5),
        ("action: value 5 ", |policy| policy.action = 5),
        ("principals: ", |policy| {
            policy.rules = vec![security::Rule {
                clauses: vec![security::Clause {
                    matches: vec![security::Match {
                        principals: vec![Default::default()],
                        ..Default::default()
                    }],
                }],
            }];
        }),
    ];
    for (expected, change) in policies {
        let error = read_policy(change).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }
    assert!(address("x", &[], &mut Interner::default()).is_err());
}

#[test]
fn a_policy_that_can_not_be_read_closes_what_it_may_be_about() {
    let closes = |message: &[u8]| closing("shop/deny", message);
    let unknown_action = closes(&policy(|policy| policy.action = 5)).unwrap();
    assert_eq!(
        (unknown_action.scope, unknown_action.action),
        (Scope::Namespace, Action::Deny)
    );
    assert_eq!(
        unknown_action.rules,
        [Rule::new()],
        "a rule without clauses always matches"
    );
    let allow = closes(&policy(|policy| policy.action = security::Action::Allow.into())).unwrap();
    assert_eq!((allow.action, allow.rules.len()), (Action::Allow, 0));
    let global = closes(&policy(|policy| policy.scope = security::Scope::Global.into())).unwrap();
    assert_eq!(global.scope, Scope::Global);
    let selector = policy(|policy| policy.scope = security::Scope::WorkloadSelector.into());
    assert_eq!(closes(&selector), None, "a workload that names it is closed anyway");
    let garbage = closes(b"\xff\xff").unwrap();
    assert_eq!((garbage.scope, garbage.action), (Scope::Namespace, Action::Deny));
}

#[test]
fn of_what_can_not_be_read_it_is_known_where_it_is() {
    let texts = |places: Vec<model::NetworkAddress>| places.iter().map(ToString::to_string).collect::<Vec<_>>();
    let mut message = workload();
    message.tunnel_protocol = 9;
    message.addresses.push(vec![1, 2, 3].into());
    let bytes = as_address(address::Type::Workload(message.clone()));
    assert_eq!(texts(places(&bytes, &[])), ["/10.0.0.1"]);
    message.network_mode = wire::NetworkMode::HostNetwork.into();
    let of_node = as_address(address::Type::Workload(message));
    assert_eq!(places(&of_node, &["/10.0.0.1".to_owned()]), []);

    let aliases = ["n/fd00::1", "/10.9.0.0/24", "shop/web.example"].map(str::to_owned);
    let found = places(b"\xff", &aliases);
    assert_eq!(texts(found.clone()), ["n/fd00::1", "/10.9.0.0/24"]);
    let on_disk = stand_in(&found);
    assert!(address("shop/web.example", &on_disk, &mut Interner::default()).is_err());
    assert_eq!(places(&on_disk, &[]), found);
}

/// Good messages with some bytes replaced: closer to what goes wrong than random bytes are.
fn damaged(good: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    (0..good.len(), 0..6usize, proptest::collection::vec(any::<u8>(), 0..6)).prop_map(move |(start, length, bytes)| {
        let mut damaged = good.clone();
        damaged.splice(start..(start + length).min(good.len()), bytes);
        damaged
    })
}

proptest! {
    #[test]
    fn whatever_is_sent_is_read_or_refused(
        pod in damaged(as_address(address::Type::Workload(workload()))),
        rules in damaged(policy(|policy| policy.rules = vec![security::Rule::default()])),
        bytes in proptest::collection::vec(any::<u8>(), 0..64),
    ) {
        let mut interner = Interner::default();
        for message in [&pod, &rules, &bytes] {
            let _ = address("c//v1/Pod/shop/web", message, &mut interner);
            let _ = authorization("shop/deny", message, &mut interner);
            let _ = closing("shop/deny", message);
            let _ = places(message, &[]);
        }
    }
}
