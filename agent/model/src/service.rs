//! A service: virtual addresses, and ports that map to its endpoints' ports. Field by field Istio's
//! `istio.workload.Service`.

use std::{collections::BTreeMap, fmt, net::IpAddr, str::FromStr, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{GatewayAddress, NamespacedName, PortMap, WeightedWaypoint};

/// An address or a range in a network, written `network/address` or `network/address/length`; the default network is
/// the empty name.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct NetworkAddress {
    /// The network's name; empty for the default one.
    pub network: Arc<str>,
    /// The address in it.
    pub address: IpAddr,
    /// How many leading bits count, where it is a range. At most the address's own, which means the same as none.
    pub length: Option<u8>,
}

impl NetworkAddress {
    /// One address of a network.
    pub fn new(network: impl Into<Arc<str>>, address: IpAddr) -> Self {
        Self {
            network: network.into(),
            address,
            length: None,
        }
    }
}

impl FromStr for NetworkAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || format!("{text:?} is not network/address or network/address/length");
        let (network, rest) = text.split_once('/').unwrap_or(("", text));
        let (address, length) = match rest.split_once('/') {
            Some((address, length)) => (address, Some(length.parse::<u8>().map_err(|_| error())?)),
            None => (rest, None),
        };
        let address: IpAddr = address.parse().map_err(|_| error())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        if length.is_some_and(|length| length > bits) {
            return Err(error());
        }
        Ok(Self {
            network: network.into(),
            address,
            length,
        })
    }
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.address)?;
        match self.length {
            Some(length) => write!(f, "/{length}"),
            None => Ok(()),
        }
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

/// A scope within which endpoints are preferred.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RoutingScope {
    /// The same region.
    Region,
    /// The same zone.
    Zone,
    /// The same subzone.
    Subzone,
    /// The same node.
    Node,
    /// The same cluster.
    Cluster,
    /// The same network.
    Network,
}

impl RoutingScope {
    /// As people say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Region => "region",
            Self::Zone => "zone",
            Self::Subzone => "subzone",
            Self::Node => "node",
            Self::Cluster => "cluster",
            Self::Network => "network",
        }
    }
}

/// What a routing preference demands.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum LoadBalancingMode {
    /// Nothing: every endpoint alike.
    #[default]
    Standard,
    /// Only endpoints that match every scope.
    Strict,
    /// The endpoints that match most scopes, counted from the first.
    Failover,
    /// No balancing: the address that was dialled is the destination.
    Passthrough,
}

/// Which endpoints new connections may go to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum HealthPolicy {
    /// The healthy ones.
    #[default]
    OnlyHealthy,
    /// All (`publishNotReadyAddresses`).
    AllowAll,
}

/// How a service's connections are spread over its endpoints.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct LoadBalancing {
    /// Which endpoints go first: those that share the first scope, then the second…
    pub routing_preference: Vec<RoutingScope>,
    /// What the preference demands.
    pub mode: LoadBalancingMode,
    /// Which endpoints may be used at all.
    pub health_policy: HealthPolicy,
}

/// The families of a service's addresses, as its `ipFamilies` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum IpFamilies {
    /// Nothing is said.
    #[default]
    Automatic,
    /// IPv4 alone.
    V4Only,
    /// IPv6 alone.
    V6Only,
    /// Both.
    Dual,
}

/// Who may find a service by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Its own namespace (`exportTo: .`).
    Namespace,
}

/// What is spoken on a port, as `appProtocol` or the port's name says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum AppProtocol {
    /// Nothing is said.
    #[default]
    Unknown,
    /// HTTP/1.1.
    Http11,
    /// HTTP/2 in plaintext.
    Http2,
    /// gRPC.
    Grpc,
    /// Bytes.
    Tcp,
    /// TLS of the application's own.
    Tls,
}

/// A service. Its endpoints name it, it does not name them: see [`crate::Workload::services`].
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
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
    /// Service port → target port, where an endpoint does not say otherwise; 0 where only endpoints can say.
    #[serde(default)]
    pub ports: PortMap,
    /// What its endpoints' certificates may say instead of their identity (`spiffe://…`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub subject_alt_names: Vec<Arc<str>>,
    /// The waypoint that its traffic goes through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Several waypoints that share its connections, in place of `waypoint`; empty where there is one or none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// How connections are spread; none: over all healthy endpoints alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancing: Option<LoadBalancing>,
    /// The families of its addresses.
    #[serde(default, skip_serializing_if = "is_default")]
    pub ip_families: IpFamilies,
    /// Whether it is the one meant where several have its hostname.
    #[serde(default, skip_serializing_if = "is_default")]
    pub canonical: bool,
    /// Who may find it by name.
    #[serde(default, skip_serializing_if = "is_default")]
    pub visibility: Visibility,
    /// What is spoken on which service port, where something is said.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub app_protocols: BTreeMap<u16, AppProtocol>,
}

impl Service {
    /// Every waypoint that its connections may be handed to.
    pub fn waypoints(&self) -> impl Iterator<Item = &GatewayAddress> {
        let weighted = self.weighted_waypoints.iter().map(|one| &one.destination);
        let only = self.waypoint.iter().filter(|_| self.weighted_waypoints.is_empty());
        weighted.chain(only)
    }

    /// `namespace/hostname`, its key everywhere.
    pub fn key(&self) -> NamespacedName {
        NamespacedName {
            namespace: self.namespace.clone(),
            name: self.hostname.clone(),
        }
    }
}

/// Whether a value says no more than its absence would.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn network_addresses_read_back_as_they_were_written() {
        for text in ["/10.0.0.1", "n/fd00::1", "n/10.0.0.0/8", "/fd00::/128"] {
            assert_eq!(text.parse::<NetworkAddress>().unwrap().to_string(), text);
        }
        assert_eq!("10.0.0.1".parse::<NetworkAddress>().unwrap().to_string(), "/10.0.0.1");
        for bad in [
            "",
            "n/",
            "n/x",
            "n/10.0.0.0/33",
            "n/10.0.0.0/",
            "n/10.0.0.0/8/8",
            "10.0.0.0/8",
        ] {
            assert!(bad.parse::<NetworkAddress>().is_err(), "{bad}");
        }
    }
}
