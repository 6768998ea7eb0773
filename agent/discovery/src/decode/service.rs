//! `istio.workload.Service`.

use std::collections::BTreeMap;

use model::{
    AppProtocol, HealthPolicy, IpFamilies, LoadBalancing, LoadBalancingMode, RoutingScope, Service, Visibility,
    WeightedWaypoint,
};
use proto::workload as wire;

use super::{DecodeError, Interner, gateway, known, network_address, not_empty, port, wrong};

pub(super) fn read(read: wire::Service, interner: &mut Interner) -> Result<Service, DecodeError> {
    let vips = read
        .addresses
        .iter()
        .map(|address| network_address("addresses", address, interner));
    let vips = vips.collect::<Result<_, _>>()?;
    let waypoint = read.waypoint.map(|address| gateway("waypoint", address, interner));
    let mut weighted_waypoints = Vec::with_capacity(read.weighted_waypoints.len());
    for weighted in read.weighted_waypoints {
        let address = weighted.destination.unwrap_or_default();
        weighted_waypoints.push(WeightedWaypoint {
            destination: gateway("weighted_waypoints", address, interner)?,
            weight: weighted.weight,
        });
    }
    let mut ports = Vec::with_capacity(read.ports.len());
    let mut app_protocols = BTreeMap::new();
    for mapped in &read.ports {
        let service_port = port("ports", mapped.service_port)?;
        ports.push((service_port, port("ports", mapped.target_port)?));
        let protocol = app_protocol(mapped.app_protocol)?;
        if protocol != AppProtocol::Unknown {
            app_protocols.insert(service_port, protocol);
        }
    }
    Ok(Service {
        name: read.name.as_str().into(),
        namespace: interner.get(&read.namespace),
        hostname: interner.get(not_empty("hostname", &read.hostname)?),
        vips,
        ports: ports.into_iter().collect(),
        subject_alt_names: read.subject_alt_names.iter().map(|name| interner.get(name)).collect(),
        waypoint: waypoint.transpose()?,
        weighted_waypoints,
        load_balancing: read.load_balancing.map(load_balancing).transpose()?,
        ip_families: match known("ip_families", read.ip_families)? {
            wire::IpFamilies::Automatic => IpFamilies::Automatic,
            wire::IpFamilies::Ipv4Only => IpFamilies::V4Only,
            wire::IpFamilies::Ipv6Only => IpFamilies::V6Only,
            wire::IpFamilies::Dual => IpFamilies::Dual,
        },
        canonical: read.canonical,
        visibility: match known("visibility", read.visibility)? {
            wire::Visibility::Public => Visibility::Public,
            wire::Visibility::Namespace => Visibility::Namespace,
        },
        app_protocols,
    })
}

fn app_protocol(value: i32) -> Result<AppProtocol, DecodeError> {
    Ok(match known("ports.app_protocol", value)? {
        wire::AppProtocol::Unknown => AppProtocol::Unknown,
        wire::AppProtocol::Http11 => AppProtocol::Http11,
        wire::AppProtocol::Http2 => AppProtocol::Http2,
        wire::AppProtocol::Grpc => AppProtocol::Grpc,
        wire::AppProtocol::Tcp => AppProtocol::Tcp,
        wire::AppProtocol::Tls => AppProtocol::Tls,
    })
}

fn load_balancing(read: wire::LoadBalancing) -> Result<LoadBalancing, DecodeError> {
    use wire::load_balancing::{HealthPolicy as Health, Mode, Scope};
    let scope = |value: &i32| {
        Ok(match known("load_balancing.routing_preference", *value)? {
            Scope::UnspecifiedScope => return wrong("load_balancing.routing_preference", "an unspecified scope"),
            Scope::Region => RoutingScope::Region,
            Scope::Zone => RoutingScope::Zone,
            Scope::Subzone => RoutingScope::Subzone,
            Scope::Node => RoutingScope::Node,
            Scope::Cluster => RoutingScope::Cluster,
            Scope::Network => RoutingScope::Network,
        })
    };
    Ok(LoadBalancing {
        routing_preference: read.routing_preference.iter().map(scope).collect::<Result<_, _>>()?,
        mode: match known("load_balancing.mode", read.mode)? {
            Mode::UnspecifiedMode => LoadBalancingMode::Standard,
            Mode::Strict => LoadBalancingMode::Strict,
            Mode::Failover => LoadBalancingMode::Failover,
            Mode::Passthrough => LoadBalancingMode::Passthrough,
        },
        health_policy: match known("load_balancing.health_policy", read.health_policy)? {
            Health::OnlyHealthy => HealthPolicy::OnlyHealthy,
            Health::AllowAll => HealthPolicy::AllowAll,
        },
    })
}
