//! `istio.workload.Workload`.

use std::sync::Arc;

use model::{
    ApplicationTunnel, ApplicationTunnelProtocol, HealthStatus, Locality, NamespacedName, NetworkMode, NonTcp, PortMap,
    SortedMap, TrustDomain, TunnelProtocol, Workload, WorkloadUid,
};
use proto::workload as wire;

use super::{DecodeError, Interner, gateway, ip, known, namespaced, not_empty, port};

pub(super) fn read(read: wire::Workload, interner: &mut Interner) -> Result<Workload, DecodeError> {
    let addresses = read.addresses.iter().map(|address| ip("addresses", address));
    let policies = read.authorization_policies.iter();
    let waypoint = read.waypoint.map(|address| gateway("waypoint", address, interner));
    let network_gateway = read
        .network_gateway
        .map(|address| gateway("network_gateway", address, interner));
    Ok(Workload {
        uid: WorkloadUid(not_empty("uid", &read.uid)?.into()),
        name: read.name.as_str().into(),
        namespace: interner.get(&read.namespace),
        trust_domain: or(
            &read.trust_domain,
            TrustDomain::default().as_str(),
            interner,
            TrustDomain::new,
        ),
        service_account: or(&read.service_account, "default", interner, |account| account),
        workload_ips: addresses.collect::<Result<_, _>>()?,
        protocol: match known("tunnel_protocol", read.tunnel_protocol)? {
            wire::TunnelProtocol::Hbone => TunnelProtocol::Hbone,
            // A sidecar: it is reached as it is, as by ztunnel.
            wire::TunnelProtocol::None | wire::TunnelProtocol::LegacyIstioMtls => TunnelProtocol::None,
        },
        network_mode: match known("network_mode", read.network_mode)? {
            wire::NetworkMode::Standard => NetworkMode::Standard,
            wire::NetworkMode::HostNetwork => NetworkMode::HostNetwork,
        },
        node: interner.get(&read.node),
        canonical_name: interner.get(&read.canonical_name),
        canonical_revision: interner.get(&read.canonical_revision),
        workload_name: interner.get(&read.workload_name),
        workload_type: interner.get(match known("workload_type", read.workload_type)? {
            wire::WorkloadType::Deployment => "deployment",
            wire::WorkloadType::Cronjob => "cronjob",
            wire::WorkloadType::Pod => "pod",
            wire::WorkloadType::Job => "job",
        }),
        cluster_id: interner.get(&read.cluster_id),
        services: services(&read.services, interner)?,
        authorization_policies: policies
            .map(|key| namespaced("authorization_policies", key, interner))
            .collect::<Result<_, _>>()?,
        status: match known("status", read.status)? {
            wire::WorkloadStatus::Healthy => HealthStatus::Healthy,
            wire::WorkloadStatus::Unhealthy => HealthStatus::Unhealthy,
        },
        // Not in Istio's message.
        non_tcp: NonTcp::Inherit,
        network: interner.get(&read.network),
        hostname: interner.get(&read.hostname),
        waypoint: waypoint.transpose()?,
        network_gateway: network_gateway.transpose()?,
        native_tunnel: read.native_tunnel,
        application_tunnel: read.application_tunnel.map(application_tunnel).transpose()?,
        locality: locality(read.locality.unwrap_or_default(), interner),
        capacity: read.capacity.unwrap_or(1),
    })
}

/// A text, or what its absence means.
fn or<T>(text: &str, absent: &str, interner: &mut Interner, make: impl Fn(Arc<str>) -> T) -> T {
    make(interner.get(if text.is_empty() { absent } else { text }))
}

fn services(
    read: &std::collections::BTreeMap<String, wire::PortList>,
    interner: &mut Interner,
) -> Result<SortedMap<NamespacedName, PortMap>, DecodeError> {
    let ports = |list: &wire::PortList| {
        let ports = list.ports.iter();
        ports
            .map(|mapped| {
                Ok((
                    port("services", mapped.service_port)?,
                    port("services", mapped.target_port)?,
                ))
            })
            .collect::<Result<PortMap, DecodeError>>()
    };
    read.iter()
        .map(|(key, list)| Ok((namespaced("services", key, interner)?, ports(list)?)))
        .collect()
}

fn application_tunnel(read: wire::ApplicationTunnel) -> Result<ApplicationTunnel, DecodeError> {
    Ok(ApplicationTunnel {
        protocol: match known("application_tunnel.protocol", read.protocol)? {
            wire::application_tunnel::Protocol::None => ApplicationTunnelProtocol::None,
            wire::application_tunnel::Protocol::Proxy => ApplicationTunnelProtocol::Proxy,
        },
        port: Some(port("application_tunnel.port", read.port)?).filter(|port| *port != 0),
    })
}

fn locality(read: wire::Locality, interner: &mut Interner) -> Locality {
    Locality {
        region: interner.get(&read.region),
        zone: interner.get(&read.zone),
        subzone: interner.get(&read.subzone),
    }
}
