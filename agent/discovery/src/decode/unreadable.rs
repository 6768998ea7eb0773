//! Of a resource that can't be read, what is sure all the same: where it is, by its envelope's aliases and by as much of
//! its message as is understood. Connections to there are refused.

use model::NetworkAddress;
use proto::{
    Message,
    workload::{self as wire, Address, address},
};

use super::{Interner, ip, network_address};

/// No value of any version's.
const UNKNOWN: i32 = -1;

/// Where the resource is; nowhere for a host-network workload, whose address is its node's.
pub(crate) fn places(message: &[u8], aliases: &[String]) -> Vec<NetworkAddress> {
    let mut interner = Interner::default();
    // An alias that is no address is a name.
    let mut places: Vec<NetworkAddress> = aliases.iter().filter_map(|alias| alias.parse().ok()).collect();
    match Address::decode(message).ok().and_then(|read| read.r#type) {
        Some(address::Type::Workload(workload)) => {
            if workload.network_mode == wire::NetworkMode::HostNetwork as i32 {
                return Vec::new();
            }
            let ips = workload.addresses.iter().filter_map(|bytes| ip("", bytes).ok());
            places.extend(ips.map(|ip| NetworkAddress::new(workload.network.as_str(), ip)));
        }
        Some(address::Type::Service(service)) => {
            let vips = service.addresses.iter();
            places.extend(vips.filter_map(|vip| network_address("", vip, &mut interner).ok()));
        }
        None => {}
    }
    places
}

/// A message that can't be read either and has these places, for the disk: it knows no aliases.
pub(crate) fn stand_in(places: &[NetworkAddress]) -> Vec<u8> {
    let address = |place: &NetworkAddress| wire::NetworkAddress {
        network: place.network.to_string(),
        address: match place.address {
            std::net::IpAddr::V4(v4) => v4.octets().to_vec().into(),
            std::net::IpAddr::V6(v6) => v6.octets().to_vec().into(),
        },
        length: place.length.map(u32::from),
    };
    let service = wire::Service {
        addresses: places.iter().map(address).collect(),
        visibility: UNKNOWN,
        ..Default::default()
    };
    let message = Address {
        r#type: Some(address::Type::Service(service)),
    };
    message.encode_to_vec()
}
