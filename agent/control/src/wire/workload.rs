//! `istio.workload.Workload`.

use model::{ApplicationTunnelProtocol, HealthStatus, Locality, NetworkMode, PortMap, TunnelProtocol, Workload};
use proto::workload as wire;

use super::{gateway, octets};

/// What an agent takes an empty trust domain for.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";

pub(super) fn message(workload: &Workload) -> wire::Workload {
    let trust_domain = Some(workload.trust_domain.as_str()).filter(|domain| *domain != DEFAULT_TRUST_DOMAIN);
    wire::Workload {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        addresses: workload.workload_ips.iter().copied().map(octets).collect(),
        hostname: workload.hostname.to_string(),
        network: workload.network.to_string(),
        tunnel_protocol: match workload.protocol {
            TunnelProtocol::None => wire::TunnelProtocol::None,
            TunnelProtocol::Hbone => wire::TunnelProtocol::Hbone,
        }
        .into(),
        trust_domain: trust_domain.unwrap_or_default().to_owned(),
        service_account: workload.service_account.to_string(),
        waypoint: workload.waypoint.as_ref().map(gateway),
        network_gateway: workload.network_gateway.as_ref().map(gateway),
        node: workload.node.to_string(),
        canonical_name: workload.canonical_name.to_string(),
        canonical_revision: workload.canonical_revision.to_string(),
        workload_type: workload_type(&workload.workload_type).into(),
        workload_name: workload.workload_name.to_string(),
        native_tunnel: workload.native_tunnel,
        application_tunnel: workload.application_tunnel.as_ref().map(application_tunnel),
        services: services(workload),
        authorization_policies: workload
            .authorization_policies
            .iter()
            .map(ToString::to_string)
            .collect(),
        status: match workload.status {
            HealthStatus::Healthy => wire::WorkloadStatus::Healthy,
            HealthStatus::Unhealthy => wire::WorkloadStatus::Unhealthy,
        }
        .into(),
        cluster_id: workload.cluster_id.to_string(),
        locality: locality(&workload.locality),
        network_mode: match workload.network_mode {
            NetworkMode::Standard => wire::NetworkMode::Standard,
            NetworkMode::HostNetwork => wire::NetworkMode::HostNetwork,
        }
        .into(),
        extensions: Vec::new(),
        // 1 is what none means.
        capacity: Some(workload.capacity).filter(|capacity| *capacity != 1),
    }
}

fn services(workload: &Workload) -> std::collections::BTreeMap<String, wire::PortList> {
    let ports = |ports: &PortMap| wire::PortList {
        ports: ports.iter().map(|(from, to)| port(*from, *to)).collect(),
    };
    let services = workload.services.iter();
    services.map(|(name, map)| (name.to_string(), ports(map))).collect()
}

fn port(from: u16, to: u16) -> wire::Port {
    wire::Port {
        service_port: from.into(),
        target_port: to.into(),
        app_protocol: 0,
    }
}

fn workload_type(name: &str) -> wire::WorkloadType {
    match name {
        "deployment" => wire::WorkloadType::Deployment,
        "cronjob" => wire::WorkloadType::Cronjob,
        "job" => wire::WorkloadType::Job,
        _ => wire::WorkloadType::Pod,
    }
}

fn application_tunnel(tunnel: &model::ApplicationTunnel) -> wire::ApplicationTunnel {
    let protocol = match tunnel.protocol {
        ApplicationTunnelProtocol::None => wire::application_tunnel::Protocol::None,
        ApplicationTunnelProtocol::Proxy => wire::application_tunnel::Protocol::Proxy,
    };
    wire::ApplicationTunnel {
        protocol: protocol.into(),
        port: tunnel.port.unwrap_or_default().into(),
    }
}

fn locality(locality: &Locality) -> Option<wire::Locality> {
    (*locality != Locality::default()).then(|| wire::Locality {
        region: locality.region.to_string(),
        zone: locality.zone.to_string(),
        subzone: locality.subzone.to_string(),
    })
}
