//! How one pod is captured: what its annotations ask for, as far as that is allowed.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{canonical_ip, service::is_default};

/// How a pod is captured. The default is: wholly, and as the mesh has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSettings {
    /// Whether traffic that the mesh does not carry is dropped.
    #[serde(skip_serializing_if = "is_default")]
    pub forbid_non_tcp: bool,
    /// `ambient.istio.io/dns-capture`: whether its DNS goes through the agent; none: as the node is set.
    #[serde(skip_serializing_if = "is_default")]
    pub dns_capture: Option<bool>,
    /// `ambient.istio.io/bypass-inbound-capture`: only what it opens is captured, and HBONE to it.
    #[serde(skip_serializing_if = "is_default")]
    pub bypass_inbound: bool,
    /// `istio.io/reroute-virtual-interfaces`: what comes into the pod by these (from virtual machines and containers
    /// inside of it) is captured as if the pod had opened it.
    #[serde(skip_serializing_if = "is_default")]
    pub virtual_interfaces: Vec<String>,
    /// What is not captured.
    #[serde(skip_serializing_if = "is_default")]
    pub exclusions: Exclusions,
}

/// Connections of a pod that do not go through the mesh. Sorted, without duplicates, and bounded by who read them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Exclusions {
    /// Destinations that it reaches directly.
    #[serde(skip_serializing_if = "is_default")]
    pub outbound_ranges: Vec<IpNet>,
    /// The only destinations that are captured; none: all.
    #[serde(skip_serializing_if = "is_default")]
    pub only_outbound_ranges: Option<Vec<IpNet>>,
    /// Destination ports that it reaches directly.
    #[serde(skip_serializing_if = "is_default")]
    pub outbound_ports: Vec<u16>,
    /// Ports of its own that are reached directly.
    #[serde(skip_serializing_if = "is_default")]
    pub inbound_ports: Vec<u16>,
}

impl Exclusions {
    /// Whether a connection that the pod opens is not captured. An excluded range inside an included one is excluded,
    /// whatever their lengths.
    pub fn excludes_outbound(&self, ip: IpAddr, port: u16) -> bool {
        let ip = canonical_ip(ip);
        let holds = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&ip));
        self.outbound_ports.contains(&port)
            || holds(&self.outbound_ranges)
            || self.only_outbound_ranges.as_ref().is_some_and(|only| !holds(only))
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl PodSettings {
    /// Whether a plaintext connection to this port of the pod is not captured.
    pub fn excludes_inbound(&self, port: u16) -> bool {
        self.bypass_inbound || self.exclusions.inbound_ports.contains(&port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_excluded_stays_so_inside_of_what_is_included() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        let exclusions = Exclusions {
            outbound_ranges: vec![net("10.0.0.0/8")],
            only_outbound_ranges: Some(vec![net("10.1.0.0/16"), net("192.168.0.0/16")]),
            outbound_ports: vec![5432],
            inbound_ports: Vec::new(),
        };
        assert!(exclusions.excludes_outbound(ip("10.1.0.1"), 80));
        assert!(!exclusions.excludes_outbound(ip("192.168.0.1"), 80));
        assert!(exclusions.excludes_outbound(ip("::ffff:192.168.0.1"), 5432));
        assert!(exclusions.excludes_outbound(ip("8.8.8.8"), 80));
        assert!(exclusions.excludes_outbound(ip("fd00::1"), 80));
        assert!(!Exclusions::default().excludes_outbound(ip("8.8.8.8"), 80));
    }
}
