//! The messages, byte by byte: each expected text was written by hand from Istio's field numbers and protobuf's encoding.

use model::{
    Action, AppProtocol, GatewayAddress, GatewayDestination, HealthPolicy, HealthStatus, IpFamilies, LoadBalancing,
    LoadBalancingMode, Locality, Match, NamespacedName, NetworkAddress, NetworkMode, Policy, RoutingScope, Scope,
    Service, ServiceAccountMatch, StringMatch, TrustDomain, TunnelProtocol, Visibility, WeightedWaypoint, Workload,
    WorkloadUid,
};

use super::*;

/// Fields of a message: number and contents.
enum Field {
    Number(u64),
    Bytes(Vec<u8>),
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap());
    bytes
}

/// Protobuf by hand: tag, then a varint or a length and bytes.
fn encoded(fields: &[(u64, Field)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (number, field) in fields {
        match field {
            Field::Number(value) => all.extend([varint(number << 3), varint(*value)].concat()),
            Field::Bytes(bytes) => {
                let length = varint(bytes.len() as u64);
                all.extend([varint(number << 3 | 2), length, bytes.clone()].concat());
            }
        }
    }
    all
}

fn text(text: &str) -> Field {
    Field::Bytes(text.as_bytes().to_vec())
}

fn message(fields: &[(u64, Field)]) -> Field {
    Field::Bytes(encoded(fields))
}

use Field::{Bytes as Raw, Number};

fn waypoint() -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedName::new("ns", "wp")),
        hbone_mtls_port: 15008,
    }
}

fn waypoint_field() -> Field {
    message(&[(1, message(&[(1, text("ns")), (2, text("wp"))])), (3, Number(15008))])
}

fn some_workload() -> Workload {
    Workload {
        uid: WorkloadUid("c//v1/Pod/ns/web".into()),
        name: "web".into(),
        namespace: "ns".into(),
        workload_ips: vec!["10.0.0.1".parse().unwrap()],
        network: "n".into(),
        protocol: TunnelProtocol::Hbone,
        trust_domain: TrustDomain::new("td"),
        service_account: "sa".into(),
        waypoint: Some(waypoint()),
        node: "node".into(),
        canonical_name: "cn".into(),
        canonical_revision: "v1".into(),
        workload_type: "job".into(),
        workload_name: "wn".into(),
        native_tunnel: true,
        authorization_policies: vec![NamespacedName::new("ns", "p")],
        status: HealthStatus::Unhealthy,
        cluster_id: "c".into(),
        services: [(NamespacedName::new("ns", "h"), [(80, 8080)].into())].into(),
        application_tunnel: Some(model::ApplicationTunnel {
            protocol: model::ApplicationTunnelProtocol::Proxy,
            port: Some(15088),
        }),
        locality: Locality {
            zone: "z".into(),
            ..Locality::default()
        },
        capacity: 5,
        ..Workload::default()
    }
}

#[test]
fn a_workloads_bytes() {
    let resource = workload(&some_workload());
    let port = message(&[(1, Number(80)), (2, Number(8080))]);
    let ports = message(&[(1, port)]);
    let fields = [
        (1, text("web")),
        (2, text("ns")),
        (3, Raw(vec![10, 0, 0, 1])),
        (4, text("n")),
        (5, Number(1)),
        (6, text("td")),
        (7, text("sa")),
        (8, waypoint_field()),
        (9, text("node")),
        (10, text("cn")),
        (11, text("v1")),
        (12, Number(3)),
        (13, text("wn")),
        (14, Number(1)),
        (16, text("ns/p")),
        (17, Number(1)),
        (18, text("c")),
        (20, text("c//v1/Pod/ns/web")),
        (22, message(&[(1, text("ns/h")), (2, ports)])),
        (23, message(&[(1, Number(1)), (2, Number(15088))])),
        (24, message(&[(2, text("z"))])),
        (27, message(&[(1, Number(5))])),
    ];
    assert_eq!(&resource.message[..], encoded(&[(1, message(&fields))]));
    assert_eq!((&*resource.name, resource.type_), ("c//v1/Pod/ns/web", Type::Address));
    assert_eq!(resource.aliases, ["n/10.0.0.1".into()]);
}

#[test]
fn what_says_nothing_takes_no_bytes() {
    let workload = super::workload(&Workload {
        uid: WorkloadUid("u".into()),
        service_account: "".into(),
        cluster_id: "".into(),
        workload_type: "deployment".into(),
        ..Workload::default()
    });
    assert_eq!(&workload.message[..], encoded(&[(1, message(&[(20, text("u"))]))]));
}

#[test]
fn a_host_network_workload_has_no_alias() {
    let resource = workload(&Workload {
        network_mode: NetworkMode::HostNetwork,
        ..some_workload()
    });
    assert!(resource.aliases.is_empty());
    let address = proto::workload::Address::decode(resource.message).unwrap();
    let Some(address::Type::Workload(found)) = address.r#type else {
        panic!("no workload");
    };
    assert_eq!((found.network_mode, found.addresses.len()), (1, 1));
}

#[test]
fn a_services_bytes() {
    let vip = |text: &str| text.parse::<NetworkAddress>().unwrap();
    let resource = service(&Service {
        name: "web".into(),
        namespace: "ns".into(),
        hostname: "h".into(),
        vips: vec![vip("n/10.0.0.1"), vip("/10.1.0.0/16"), vip("/::ffff:10.0.0.9")],
        ports: [(80, 0)].into(),
        app_protocols: [(80, AppProtocol::Grpc)].into(),
        subject_alt_names: vec!["s".into()],
        weighted_waypoints: vec![WeightedWaypoint {
            destination: waypoint(),
            weight: 3,
        }],
        waypoint: Some(GatewayAddress {
            destination: GatewayDestination::Address(vip("/10.0.0.2")),
            hbone_mtls_port: 15008,
        }),
        load_balancing: Some(LoadBalancing {
            routing_preference: vec![RoutingScope::Network, RoutingScope::Region, RoutingScope::Zone],
            mode: LoadBalancingMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        }),
        ip_families: IpFamilies::Dual,
        canonical: true,
        visibility: Visibility::Namespace,
    });
    let gateway = [(2, message(&[(2, Raw(vec![10, 0, 0, 2]))])), (3, Number(15008))];
    let fields = [
        (1, text("web")),
        (2, text("ns")),
        (3, text("h")),
        (4, message(&[(1, text("n")), (2, Raw(vec![10, 0, 0, 1]))])),
        (4, message(&[(2, Raw(vec![10, 1, 0, 0])), (3, Number(16))])),
        (4, message(&[(2, Raw(vec![10, 0, 0, 9]))])),
        (5, message(&[(1, Number(80)), (3, Number(3))])),
        (6, text("s")),
        (7, message(&gateway)),
        (8, message(&[(1, Raw(vec![6, 1, 2])), (2, Number(2)), (3, Number(1))])),
        (9, Number(3)),
        (11, Number(1)),
        (13, message(&[(1, waypoint_field()), (2, Number(3))])),
        (14, Number(1)),
    ];
    assert_eq!(&resource.message[..], encoded(&[(2, message(&fields))]));
    assert_eq!(&*resource.name, "ns/h");
}

#[test]
fn a_policys_bytes() {
    let exact = |text: &str| StringMatch::Exact(text.into());
    let account = ServiceAccountMatch {
        namespace: "ns".into(),
        service_account: "sa".into(),
    };
    let found = Match {
        namespaces: vec![exact("a")],
        not_namespaces: vec![StringMatch::Prefix("b".into())],
        service_accounts: vec![account.clone()],
        not_service_accounts: vec![account],
        principals: vec![StringMatch::Suffix("c".into())],
        not_principals: vec![StringMatch::Presence],
        source_ips: vec!["10.0.0.0/8".parse().unwrap()],
        not_source_ips: vec!["fd00::/8".parse().unwrap()],
        destination_ips: vec!["::ffff:10.0.0.1/128".parse().unwrap()],
        not_destination_ips: vec!["10.0.0.1/32".parse().unwrap()],
        destination_ports: vec![80, 443],
        not_destination_ports: vec![1],
    };
    let resource = policy(&Policy {
        name: "p".into(),
        namespace: "ns".into(),
        scope: Scope::WorkloadSelector,
        action: Action::Deny,
        rules: vec![vec![vec![found]], vec![]],
        dry_run: true,
        origin: Some("PeerAuthentication ns/p".into()),
    });
    let account = || message(&[(1, text("ns")), (2, text("sa"))]);
    let block = |bytes: &[u8], length: u64| message(&[(1, Raw(bytes.to_vec())), (2, Number(length))]);
    let six = [&[0xfd][..], &[0; 15]].concat();
    let fields = [
        (1, message(&[(1, text("a"))])),
        (2, message(&[(2, text("b"))])),
        (3, message(&[(3, text("c"))])),
        (4, message(&[(4, message(&[]))])),
        (5, block(&[10, 0, 0, 0], 8)),
        (6, block(&six, 8)),
        (7, block(&[10, 0, 0, 1], 32)),
        (8, block(&[10, 0, 0, 1], 32)),
        (9, Raw(vec![80, 0xbb, 3])),
        (10, Raw(vec![1])),
        (11, account()),
        (12, account()),
    ];
    let expected = [
        (1, text("p")),
        (2, text("ns")),
        (3, Number(2)),
        (4, Number(1)),
        (5, message(&[(1, message(&[(2, message(&fields))]))])),
        (5, message(&[])),
        (6, Number(1)),
    ];
    let read = |bytes: &[u8]| proto::security::Authorization::decode(bytes).unwrap();
    assert_eq!(read(&resource.message), read(&encoded(&expected)));
    assert_eq!(resource.message.len(), encoded(&expected).len());
    assert_eq!((&*resource.name, resource.type_), ("ns/p", Type::Authorization));
}
