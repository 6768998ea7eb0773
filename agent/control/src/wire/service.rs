//! `istio.workload.Service`.

use model::{
    AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, RoutingScope, Service, Visibility,
};
use proto::workload::{self as wire, load_balancing};

use super::{gateway, network_address};

pub(super) fn message(service: &Service) -> wire::Service {
    let protocol = |port: &u16| service.app_protocols.get(port).copied().unwrap_or_default();
    let ports = service.ports.iter().map(|(from, to)| wire::Port {
        service_port: u32::from(*from),
        target_port: u32::from(*to),
        app_protocol: app_protocol(protocol(from)).into(),
    });
    wire::Service {
        name: service.name.to_string(),
        namespace: service.namespace.to_string(),
        hostname: service.hostname.to_string(),
        addresses: service.vips.iter().map(network_address).collect(),
        ports: ports.collect(),
        subject_alt_names: service.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: service.waypoint.as_ref().map(gateway),
        weighted_waypoints: service
            .weighted_waypoints
            .iter()
            .map(|one| wire::WeightedWaypoint {
                destination: Some(gateway(&one.destination)),
                weight: one.weight,
            })
            .collect(),
        load_balancing: service.load_balancing.as_ref().map(load_balancing),
        ip_families: match service.ip_families {
            IpFamilies::Automatic => wire::IpFamilies::Automatic,
            IpFamilies::V4Only => wire::IpFamilies::Ipv4Only,
            IpFamilies::V6Only => wire::IpFamilies::Ipv6Only,
            IpFamilies::Dual => wire::IpFamilies::Dual,
        }
        .into(),
        canonical: service.canonical,
        visibility: match service.visibility {
            Visibility::Public => wire::Visibility::Public,
            Visibility::Namespace => wire::Visibility::Namespace,
        }
        .into(),
        ..wire::Service::default()
    }
}

fn app_protocol(protocol: AppProtocol) -> wire::AppProtocol {
    match protocol {
        AppProtocol::Unknown => wire::AppProtocol::Unknown,
        AppProtocol::Http11 => wire::AppProtocol::Http11,
        AppProtocol::Http2 => wire::AppProtocol::Http2,
        AppProtocol::Grpc => wire::AppProtocol::Grpc,
        AppProtocol::Tcp => wire::AppProtocol::Tcp,
        AppProtocol::Tls => wire::AppProtocol::Tls,
    }
}

fn load_balancing(load_balancing: &LoadBalancing) -> wire::LoadBalancing {
    use load_balancing::{HealthPolicy as Health, Mode, Scope};
    let scope = |scope: &RoutingScope| match scope {
        RoutingScope::Region => Scope::Region,
        RoutingScope::Zone => Scope::Zone,
        RoutingScope::Subzone => Scope::Subzone,
        RoutingScope::Node => Scope::Node,
        RoutingScope::Cluster => Scope::Cluster,
        RoutingScope::Network => Scope::Network,
    };
    wire::LoadBalancing {
        routing_preference: load_balancing
            .routing_preference
            .iter()
            .map(|s| scope(s).into())
            .collect(),
        mode: match load_balancing.mode {
            LoadBalancingMode::Standard => Mode::UnspecifiedMode,
            LoadBalancingMode::Strict => Mode::Strict,
            LoadBalancingMode::Failover => Mode::Failover,
            LoadBalancingMode::Passthrough => Mode::Passthrough,
        }
        .into(),
        health_policy: match load_balancing.health_policy {
            HealthPolicy::OnlyHealthy => Health::OnlyHealthy,
            HealthPolicy::AllowAll => Health::AllowAll,
        }
        .into(),
    }
}
