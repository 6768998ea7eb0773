//! Services.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{IntOrString, Metadata, Problem, meta::null_is_empty, pod::FieldProblem};

/// A service.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    /// Name, labels, annotations.
    pub metadata: Metadata,
    /// What it is to be.
    pub spec: ServiceSpec,
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum IpFamily {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// What a service is to be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceSpec {
    /// `None` for a headless service; an address otherwise, or nothing.
    #[serde(default, rename = "clusterIP")]
    pub cluster_ip: Option<String>,
    /// `ClusterIP` where nothing is said; the other types are that as well.
    #[serde(default, rename = "type")]
    pub type_: Option<String>,
    /// The pods behind it.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub selector: BTreeMap<String, String>,
    /// The ports it offers.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub ports: Vec<ServicePort>,
    /// The IP versions of its addresses, the first one first.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub ip_families: Vec<IpFamily>,
    /// `SingleStack`, `PreferDualStack` or `RequireDualStack`.
    #[serde(default)]
    pub ip_family_policy: Option<String>,
    /// Every address of its own, the first being `cluster_ip`.
    #[serde(
        default,
        rename = "clusterIPs",
        deserialize_with = "null_is_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub cluster_ips: Vec<String>,
    /// Whether connections may go to endpoints that are not ready.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub publish_not_ready_addresses: bool,
    /// `Local`: endpoints of the caller's node alone. `Cluster` where nothing is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub internal_traffic_policy: Option<String>,
    /// `PreferSameZone` (`PreferClose`) or `PreferSameNode`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traffic_distribution: Option<String>,
}

/// A port that a service offers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Needed where there are several.
    #[serde(default)]
    pub name: Option<String>,
    /// The port of the service's address.
    pub port: u16,
    /// The pod's port; the same where nothing is said.
    #[serde(default)]
    pub target_port: Option<IntOrString>,
    /// `TCP` or `UDP`.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// A hint for proxies; not needed at L4.
    #[serde(default)]
    pub app_protocol: Option<String>,
}

fn tcp() -> String {
    "TCP".to_owned()
}

impl Service {
    /// Whether it has no address of its own.
    pub fn is_headless(&self) -> bool {
        self.spec.cluster_ip.as_deref() == Some("None")
    }

    /// The IP versions it has addresses of. Nothing said means IPv4, as in a cluster whose first family that is.
    pub fn families(&self) -> Vec<IpFamily> {
        let dual = matches!(
            self.spec.ip_family_policy.as_deref(),
            Some("PreferDualStack" | "RequireDualStack")
        );
        match (self.spec.ip_families.as_slice(), dual) {
            ([], false) => vec![IpFamily::IPv4],
            ([], true) | ([IpFamily::IPv4], true) => vec![IpFamily::IPv4, IpFamily::IPv6],
            ([IpFamily::IPv6], true) => vec![IpFamily::IPv6, IpFamily::IPv4],
            (given, _) => given.to_vec(),
        }
    }

    /// What can't be.
    pub(crate) fn check(&self) -> Result<(), FieldProblem> {
        let spec = &self.spec;
        let invalid = |field: &str, why: &str| Err((field.to_owned(), Problem::Invalid(why.to_owned())));
        match spec.type_.as_deref() {
            None | Some("ClusterIP" | "NodePort" | "LoadBalancer") => {}
            Some("ExternalName") => {
                let problem = Problem::Unsupported("ExternalName".to_owned());
                return Err(("spec.type".to_owned(), problem));
            }
            Some(_) => return invalid("spec.type", "is not a type of service"),
        }
        match spec.ip_family_policy.as_deref() {
            None | Some("SingleStack") if spec.ip_families.len() > 1 => {
                return invalid(
                    "spec.ipFamilies",
                    "two need ipFamilyPolicy PreferDualStack or RequireDualStack",
                );
            }
            None | Some("SingleStack" | "PreferDualStack" | "RequireDualStack") => {}
            Some(_) => {
                return invalid(
                    "spec.ipFamilyPolicy",
                    "is not SingleStack, PreferDualStack or RequireDualStack",
                );
            }
        }
        if spec.ip_families.len() > 2 || (spec.ip_families.len() == 2 && spec.ip_families[0] == spec.ip_families[1]) {
            return invalid("spec.ipFamilies", "at most one of each");
        }
        if spec.ports.is_empty() && !self.is_headless() {
            return invalid("spec.ports", "at least one port is needed");
        }
        for (index, port) in spec.ports.iter().enumerate() {
            let at = format!("spec.ports[{index}]");
            if port.port == 0 || port.target_port == Some(IntOrString::Number(0)) {
                return invalid(&at, "port 0 is none");
            }
            if !matches!(port.protocol.as_str(), "TCP" | "UDP") {
                let problem = Problem::Unsupported(format!("the protocol {}", port.protocol));
                return Err((format!("{at}.protocol"), problem));
            }
            let same = |other: &&ServicePort| other.port == port.port && other.protocol == port.protocol;
            if spec.ports[..index].iter().any(|other| same(&other)) {
                return invalid(&format!("{at}.port"), "is there twice");
            }
        }
        match spec.cluster_ip.as_deref() {
            Some(text) if text != "None" && !text.is_empty() && text.parse::<std::net::IpAddr>().is_err() => {
                invalid("spec.clusterIP", "is neither an address nor None")
            }
            _ => Ok(()),
        }
    }
}
