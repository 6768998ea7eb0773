//! A service: virtual addresses, and ports that map to its endpoints' ports.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::NamespacedName;

/// An address in a network, written `network/address`; the default network is the empty name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct NetworkAddress {
    /// The network's name; empty for the default one.
    pub network: Arc<str>,
    /// The address in it.
    pub address: IpAddr,
}

impl FromStr for NetworkAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (network, address) = text.split_once('/').unwrap_or(("", text));
        let address = address
            .parse()
            .map_err(|_| format!("{text:?} is not network/address"))?;
        Ok(Self {
            network: network.into(),
            address,
        })
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)
    }
}

impl Serialize for NetworkAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NetworkAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A service. Its endpoints name it, it does not name them: see [`crate::Workload::services`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// The object's name.
    pub name: Arc<str>,
    /// The object's namespace.
    pub namespace: Arc<str>,
    /// Its full DNS name, such as `web.shop.svc.cluster.local`.
    pub hostname: Arc<str>,
    /// The virtual addresses, IPv4 and IPv6; none for a headless service.
    #[serde(default)]
    pub vips: Vec<NetworkAddress>,
    /// Service port → target port, where an endpoint does not say otherwise.
    #[serde(default)]
    pub ports: BTreeMap<u16, u16>,
}

impl Service {
    /// `namespace/hostname`, its key everywhere.
    pub fn key(&self) -> NamespacedName {
        NamespacedName {
            namespace: self.namespace.clone(),
            name: self.hostname.clone(),
        }
    }
}
