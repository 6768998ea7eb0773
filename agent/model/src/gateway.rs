//! Where a gateway is: a waypoint, or the door to another network. Istio's `istio.workload.GatewayAddress`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::{NamespacedName, NetworkAddress};

/// Where a gateway is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayAddress {
    /// What is dialled.
    pub destination: GatewayDestination,
    /// The port of its HBONE listener.
    #[serde(default = "hbone_port")]
    pub hbone_mtls_port: u16,
}

/// What is dialled to reach a gateway. Written as its address (`network/address`) or else as a service
/// (`namespace/hostname`).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum GatewayDestination {
    /// This service.
    Hostname(NamespacedName),
    /// This address, of a workload or a service.
    Address(NetworkAddress),
}

fn hbone_port() -> u16 {
    15008
}

impl FromStr for GatewayDestination {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        match text.parse() {
            Ok(hostname) => Ok(Self::Hostname(hostname)),
            Err(_) => Err(format!("{text:?} is neither network/address nor namespace/hostname")),
        }
    }
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hostname(hostname) => hostname.fmt(f),
            Self::Address(address) => address.fmt(f),
        }
    }
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.destination, self.hbone_mtls_port)
    }
}

impl Serialize for GatewayDestination {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GatewayDestination {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_read_back_as_they_were_written() {
        for (text, is_address) in [
            ("n/10.0.0.1", true),
            ("/fd00::1", true),
            ("ns/way.ns.svc.cluster.local", false),
        ] {
            let read: GatewayDestination = text.parse().unwrap();
            assert_eq!(matches!(read, GatewayDestination::Address(_)), is_address);
            assert_eq!(read.to_string(), text);
        }
        assert!("nowhere".parse::<GatewayDestination>().is_err());
    }
}
