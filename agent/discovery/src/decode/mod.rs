//! Istio's messages to model values, one at a time: a bad one is told by its name and spoils no other.
//!
//! What can't be understood is refused, never guessed: an enum value of a newer version, an address of neither 4 nor 16
//! bytes, a port that is none, a resource that describes another than it is named after
//! (`a_resource_that_is_not_understood_is_refused_by_its_field`). Nothing that is sent can panic
//! (`whatever_is_sent_is_read_or_refused`).
//!
//! Texts that many resources repeat (namespaces, nodes, services) are kept once: see [`Interner`].

mod intern;
mod policy;
mod service;
mod unreadable;
mod workload;

use std::{net::IpAddr, sync::Arc};

use model::{GatewayAddress, GatewayDestination, NamespacedName, NetworkAddress, Policy, Service, Workload};
use proto::{
    Message,
    workload::{Address, address, gateway_address},
};

pub(crate) use intern::Interner;
pub(crate) use policy::closing;
pub(crate) use unreadable::{places, stand_in};

/// What a resource says; as the mesh will hold it, so that nothing is left free between what stays.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Object {
    Workload(Arc<Workload>),
    Service(Arc<Service>),
    Policy(Box<Policy>),
}

/// Why a resource can't be used: which field, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct DecodeError(String);

fn wrong<T>(field: &str, what: impl std::fmt::Display) -> Result<T, DecodeError> {
    Err(DecodeError(format!("{field}: {what}")))
}

/// Reads an `istio.workload.Address` of this name.
pub(crate) fn address(name: &str, message: &[u8], interner: &mut Interner) -> Result<Object, DecodeError> {
    let read = Address::decode(message).or_else(|error| wrong("message", error))?;
    let (object, own_name) = match read.r#type {
        Some(address::Type::Workload(workload)) => {
            let workload = workload::read(workload, interner)?;
            let own_name = workload.uid.to_string();
            (Object::Workload(Arc::new(workload)), own_name)
        }
        Some(address::Type::Service(service)) => {
            let service = service::read(service, interner)?;
            let own_name = service.key().to_string();
            (Object::Service(Arc::new(service)), own_name)
        }
        None => return wrong("type", "neither a workload nor a service that this version knows"),
    };
    is_named(name, &own_name)?;
    Ok(object)
}

/// Reads an `istio.security.Authorization` of this name.
pub(crate) fn authorization(name: &str, message: &[u8], interner: &mut Interner) -> Result<Object, DecodeError> {
    let read = proto::security::Authorization::decode(message).or_else(|error| wrong("message", error))?;
    let policy = policy::read(read, interner)?;
    is_named(name, &policy.key().to_string())?;
    Ok(Object::Policy(Box::new(policy)))
}

/// Removals come by name: one that is named otherwise could never be removed.
fn is_named(name: &str, own_name: &str) -> Result<(), DecodeError> {
    if name == own_name {
        return Ok(());
    }
    wrong("name", format_args!("it describes {own_name:?}"))
}

fn ip(field: &str, bytes: &[u8]) -> Result<IpAddr, DecodeError> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Ok(v4.into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(v6) => Ok(IpAddr::from(v6)),
        Err(_) => wrong(field, format_args!("an address of {} bytes", bytes.len())),
    }
}

fn port(field: &str, number: u32) -> Result<u16, DecodeError> {
    u16::try_from(number).or_else(|_| wrong(field, format_args!("{number} is no port")))
}

/// An enum's value, or the name of the field that has one which this version does not know.
fn known<T: TryFrom<i32>>(field: &str, value: i32) -> Result<T, DecodeError> {
    T::try_from(value).or_else(|_| wrong(field, format_args!("value {value} is not known to this version")))
}

fn not_empty<'a>(field: &str, text: &'a str) -> Result<&'a str, DecodeError> {
    if text.is_empty() {
        wrong(field, "it is empty")
    } else {
        Ok(text)
    }
}

fn namespaced(field: &str, text: &str, interner: &mut Interner) -> Result<NamespacedName, DecodeError> {
    match text.split_once('/') {
        Some((namespace, name)) if !name.is_empty() && !name.contains('/') => {
            Ok(NamespacedName::new(interner.get(namespace), interner.get(name)))
        }
        _ => wrong(field, format_args!("{text:?} is not of the form namespace/name")),
    }
}

fn network_address(
    field: &str,
    read: &proto::workload::NetworkAddress,
    interner: &mut Interner,
) -> Result<NetworkAddress, DecodeError> {
    let address = ip(field, &read.address)?;
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let length = match read.length {
        Some(length) if length > bits => return wrong(field, format_args!("a prefix of {length} bits")),
        length => length.map(|length| length as u8),
    };
    Ok(NetworkAddress {
        network: interner.get(&read.network),
        address,
        length,
    })
}

fn gateway(
    field: &str,
    read: proto::workload::GatewayAddress,
    interner: &mut Interner,
) -> Result<GatewayAddress, DecodeError> {
    let destination = match read.destination {
        Some(gateway_address::Destination::Hostname(name)) => {
            let (namespace, hostname) = (&name.namespace, not_empty(field, &name.hostname)?);
            GatewayDestination::Hostname(NamespacedName::new(interner.get(namespace), interner.get(hostname)))
        }
        Some(gateway_address::Destination::Address(address)) => {
            GatewayDestination::Address(network_address(field, &address, interner)?)
        }
        None => return wrong(field, "it has no destination"),
    };
    Ok(GatewayAddress {
        destination,
        hbone_mtls_port: port(field, read.hbone_mtls_port)?,
    })
}

#[cfg(test)]
mod tests;
