//! Model values to the messages of Istio's workload API, as [`Resource`]s.
//!
//! Knows nothing of where the values come from, nor of versions: those are the cache's. An agent reads them back with
//! `discovery`.
//!
//! Invariants: a workload on its node's network has no alias, for its address is not its own
//! (`a_host_network_workload_has_no_alias`); `LEGACY_ISTIO_MTLS` and enum values that old agents don't know have no value
//! here, so that they are never sent; fields and their numbers are as in Istio (`a_workloads_bytes`, `a_services_bytes`,
//! `a_policys_bytes`, written by hand). The default trust domain `cluster.local` is left out, as istiod does.

mod policy;
mod service;
#[cfg(test)]
mod tests;
mod workload;

use std::net::IpAddr;

use bytes::Bytes;
use model::{GatewayAddress, GatewayDestination, NetworkAddress, Policy, Service, Workload};
use proto::{
    Message,
    workload::{Address, NamespacedHostname, address, gateway_address},
};

use crate::resources::{Resource, Type};

/// A workload, by its uid; and by each `network/ip` that is its own.
pub fn workload(workload: &Workload) -> Resource {
    let message = Address {
        r#type: Some(address::Type::Workload(workload::message(workload))),
    };
    let aliases = workload.workload_ips.iter();
    let own = aliases.filter(|_| workload.network_mode == model::NetworkMode::Standard);
    Resource {
        type_: Type::Address,
        name: workload.uid.0.clone(),
        aliases: own.map(|ip| format!("{}/{ip}", workload.network).into()).collect(),
        message: encode(&message),
    }
}

/// A service, by `namespace/hostname`; and by each `network/ip` of it. Ranges can't be asked for.
pub fn service(service: &Service) -> Resource {
    let message = Address {
        r#type: Some(address::Type::Service(service::message(service))),
    };
    let single = service.vips.iter().filter(|vip| vip.length.is_none());
    Resource {
        type_: Type::Address,
        name: format!("{}/{}", service.namespace, service.hostname).into(),
        aliases: single.map(|vip| vip.to_string().into()).collect(),
        message: encode(&message),
    }
}

/// A policy, by `namespace/name`.
pub fn policy(policy: &Policy) -> Resource {
    Resource {
        type_: Type::Authorization,
        name: policy.key().to_string().into(),
        aliases: Vec::new(),
        message: encode(&policy::message(policy)),
    }
}

fn encode(message: &impl Message) -> Bytes {
    message.encode_to_vec().into()
}

/// The address, 4 or 16 bytes.
fn octets(ip: IpAddr) -> Bytes {
    match ip.to_canonical() {
        IpAddr::V4(ip) => Bytes::copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => Bytes::copy_from_slice(&ip.octets()),
    }
}

fn network_address(address: &NetworkAddress) -> proto::workload::NetworkAddress {
    proto::workload::NetworkAddress {
        network: address.network.to_string(),
        address: octets(address.address),
        length: address.length.map(u32::from),
    }
}

fn gateway(gateway: &GatewayAddress) -> proto::workload::GatewayAddress {
    let destination = match &gateway.destination {
        GatewayDestination::Hostname(name) => gateway_address::Destination::Hostname(NamespacedHostname {
            namespace: name.namespace.to_string(),
            hostname: name.name.to_string(),
        }),
        GatewayDestination::Address(address) => gateway_address::Destination::Address(network_address(address)),
    };
    proto::workload::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: gateway.hbone_mtls_port.into(),
    }
}
