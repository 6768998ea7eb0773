//! Where a gateway is: a waypoint, or the door to another network. Istio's `istio.workload.GatewayAddress`.

use std::{fmt, str::FromStr, sync::Arc};

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

/// What keeps a waypoint that an object names from taking its traffic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unusable {
    /// There is no such Gateway.
    NotThere,
    /// The Gateway is not programmed (yet).
    NotProgrammed,
    /// The Gateway's status has no address (yet).
    NoAddress,
    /// The Gateway has no HBONE listener: it is no waypoint.
    NoHboneListener,
    /// The Gateway's listener does not allow the namespace.
    NotAllowed,
    /// What the Gateway, or its class, says that it is for means nothing.
    WrongPurpose,
    /// There is none, and the AuthorizationPolicy that the name is of can be enforced by a waypoint alone.
    PolicyAlone,
}

/// The names of waypoints that can't be used end so: nobody has an address for them (RFC 2606).
const INVALID: &str = ".waypoint.invalid";

impl Unusable {
    const ALL: [Self; 7] = [
        Self::NotThere,
        Self::NotProgrammed,
        Self::NoAddress,
        Self::NoHboneListener,
        Self::NotAllowed,
        Self::WrongPurpose,
        Self::PolicyAlone,
    ];

    /// As a label of a host name.
    const fn label(self) -> &'static str {
        match self {
            Self::NotThere => "not-there",
            Self::NotProgrammed => "not-programmed",
            Self::NoAddress => "no-address",
            Self::NoHboneListener => "no-hbone-listener",
            Self::NotAllowed => "not-allowed",
            Self::WrongPurpose => "wrong-purpose",
            Self::PolicyAlone => "policy-alone",
        }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotThere => "it is not there",
            Self::NotProgrammed => "it is not programmed yet",
            Self::NoAddress => "it has no address yet",
            Self::NoHboneListener => "it has no HBONE listener",
            Self::NotAllowed => "its listener does not allow this namespace",
            Self::WrongPurpose => {
                "its label istio.io/waypoint-for, or its class's, is none of service, workload, all and none"
            }
            Self::PolicyAlone => "there is none, and nothing else can enforce a policy with targetRefs",
        })
    }
}

impl GatewayAddress {
    /// The address of a Gateway that can't be used: `<why>.<name>.<namespace>.waypoint.invalid`, which no agent can
    /// resolve, so that every one refuses; ours reads the reason in it.
    pub fn unusable(gateway: &NamespacedName, why: Unusable) -> Self {
        let (name, namespace) = (&gateway.name, &gateway.namespace);
        Self {
            destination: GatewayDestination::Hostname(NamespacedName {
                namespace: namespace.clone(),
                name: format!("{}.{name}.{namespace}{INVALID}", why.label()).into(),
            }),
            hbone_mtls_port: hbone_port(),
        }
    }

    /// The Gateway and why it can't be used, where that is what the address says.
    pub fn why_unusable(&self) -> Option<(NamespacedName, Unusable)> {
        let GatewayDestination::Hostname(hostname) = &self.destination else {
            return None;
        };
        let rest = hostname.name.strip_suffix(INVALID)?;
        let (label, gateway) = rest.split_once('.')?;
        let (name, namespace) = gateway.rsplit_once('.')?;
        let why = Unusable::ALL.into_iter().find(|why| why.label() == label)?;
        let gateway = NamespacedName {
            namespace: Arc::from(namespace),
            name: Arc::from(name),
        };
        Some((gateway, why))
    }
}

/// One of several waypoints of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightedWaypoint {
    /// Where it is.
    pub destination: GatewayAddress,
    /// Its share of the connections, relative to the others'; 0: none.
    pub weight: u32,
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

    #[test]
    fn a_waypoint_that_can_not_be_used_says_why() {
        let gateway = NamespacedName::new("shop", "way.point");
        for why in Unusable::ALL {
            let address = GatewayAddress::unusable(&gateway, why);
            assert_eq!(address.why_unusable(), Some((gateway.clone(), why)));
        }
        for other in [
            "shop/wp.shop.svc.cluster.local",
            "shop/x.y.z.waypoint.invalid",
            "shop/not-there.waypoint.invalid",
        ] {
            let destination = other.parse().unwrap();
            let address = GatewayAddress {
                destination,
                hbone_mtls_port: 15008,
            };
            assert_eq!(address.why_unusable(), None, "{other}");
        }
    }
}
