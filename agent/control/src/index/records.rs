//! What is kept of each object: what its resources need, and no more.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s::{
    Metadata,
    live::{self, WorkloadKind},
};
use model::{ApplicationTunnel, GatewayAddress, Locality, Unusable, Visibility};

use super::{
    labels,
    names::{Labels, Names},
    service_records::ServicePort,
};

/// When an object was made; of two that contend, the older wins. What has no time is the youngest.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age(bool, Arc<str>);

impl Age {
    pub fn of(metadata: &Metadata, names: &mut Names) -> Self {
        let time = metadata.creation_timestamp.as_deref();
        Self(time.is_none(), names.text(time.unwrap_or_default()))
    }
}

/// How a workload is tunnelled to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Tunnel {
    /// Not at all.
    #[default]
    None,
    /// Its node's agent takes HBONE for it.
    Captured,
    /// It takes HBONE itself.
    Native,
}

/// A pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Pod {
    pub labels: Arc<Labels>,
    pub age: Age,
    pub node: Arc<str>,
    pub service_account: Arc<str>,
    pub addresses: Box<[IpAddr]>,
    pub network: Option<Arc<str>>,
    pub kind: WorkloadKind,
    pub workload_name: Arc<str>,
    pub tunnel: Tunnel,
    pub host_network: bool,
    pub ready: bool,
    pub terminating: bool,
}

impl Pod {
    /// A pod that others can talk to; none has no address yet, or has ended.
    pub fn new(pod: &live::Pod, names: &mut Names) -> Option<Self> {
        let addresses = addresses(pod.addresses());
        if pod.has_ended() || addresses.is_empty() {
            return None;
        }
        let metadata = &pod.metadata;
        let (kind, made_by) = pod.workload();
        let captured = metadata.annotations.get(labels::REDIRECTION).map(String::as_str) == Some("enabled");
        let host_network = pod.spec.host_network;
        Some(Self {
            age: Age::of(metadata, names),
            node: names.text(&pod.spec.node_name),
            service_account: names.text(pod.service_account()),
            addresses,
            network: metadata.label(labels::NETWORK).map(|network| names.text(network)),
            kind,
            workload_name: names.text(metadata.label(labels::WORKLOAD_NAME).unwrap_or(made_by)),
            tunnel: match metadata.label(labels::TUNNEL) {
                Some("http") => Tunnel::Native,
                // The node's network namespace is never captured, nor one with a sidecar in it.
                _ if captured && !host_network && !metadata.annotations.contains_key(labels::SIDECAR) => {
                    Tunnel::Captured
                }
                _ => Tunnel::None,
            },
            host_network,
            ready: pod.is_ready(),
            terminating: metadata.deletion_timestamp.is_some(),
            labels: names.labels(&metadata.labels),
        })
    }
}

pub(super) fn addresses<'a>(texts: impl Iterator<Item = &'a str>) -> Box<[IpAddr]> {
    let mut addresses = Vec::new();
    for ip in texts.filter_map(|text| text.parse::<IpAddr>().ok()) {
        let ip = ip.to_canonical();
        if !addresses.contains(&ip) && !ip.is_unspecified() {
            addresses.push(ip);
        }
    }
    addresses.into()
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Node {
    pub locality: Locality,
}

impl Node {
    pub fn new(node: &live::Node, names: &mut Names) -> Self {
        let mut of = |label: &str| names.text(node.metadata.label(label).unwrap_or_default());
        Self {
            locality: Locality {
                region: of("topology.kubernetes.io/region"),
                zone: of("topology.kubernetes.io/zone"),
                subzone: of("topology.istio.io/subzone"),
            },
        }
    }
}

/// A namespace.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Namespace {
    pub labels: Arc<Labels>,
    pub distribution: Option<Arc<str>>,
}

impl Namespace {
    pub fn new(namespace: &k8s::Namespace, names: &mut Names) -> Self {
        let metadata = &namespace.metadata;
        Self {
            labels: names.labels(&metadata.labels),
            distribution: annotation(metadata, labels::TRAFFIC_DISTRIBUTION, names),
        }
    }
}

pub(super) fn annotation(metadata: &Metadata, key: &str, names: &mut Names) -> Option<Arc<str>> {
    let value = metadata.annotations.get(key).filter(|value| !value.is_empty());
    value.map(|value| names.text(value))
}

/// Where an endpoint outside Kubernetes is.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Place {
    /// An address.
    Ip(IpAddr),
    /// A name that DNS knows.
    Host(Arc<str>),
}

/// A WorkloadEntry, or an endpoint of a ServiceEntry.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Endpoint {
    pub place: Place,
    pub labels: Arc<Labels>,
    pub ports: Box<[(Arc<str>, u16)]>,
    pub network: Option<Arc<str>>,
    pub locality: Locality,
    pub service_account: Arc<str>,
    pub capacity: u32,
    pub tunnel: Tunnel,
    /// For a host of a ServiceEntry that is its own endpoint: which one. Others are endpoints of each.
    pub only: Option<u32>,
}

impl Endpoint {
    pub fn new(endpoint: &live::Endpoint, metadata: &Metadata, names: &mut Names) -> Result<Self, String> {
        let address = endpoint.address.as_str();
        let place = match address.parse::<IpAddr>() {
            Ok(ip) if ip.is_unspecified() => return Err(format!("{address} is no endpoint's address")),
            Ok(ip) => Place::Ip(ip.to_canonical()),
            Err(_) if address.is_empty() => return Err("without an address it can't be reached".to_owned()),
            Err(_) if address.starts_with("unix:") => {
                return Err(format!("{address} can't be reached from other workloads"));
            }
            Err(_) => Place::Host(names.text(address)),
        };
        let mut all = metadata.labels.clone();
        all.extend(endpoint.labels.clone());
        let network = all.get(labels::NETWORK).filter(|_| endpoint.network.is_empty());
        let network = Some(network.unwrap_or(&endpoint.network)).filter(|network| !network.is_empty());
        let mut locality = endpoint.locality.split('/');
        let mut next = || names.text(locality.next().unwrap_or_default());
        let locality = Locality {
            region: next(),
            zone: next(),
            subzone: next(),
        };
        Ok(Self {
            place,
            ports: endpoint
                .ports
                .iter()
                .map(|(name, port)| (names.text(name), *port))
                .collect(),
            network: network.map(|network| names.text(network)),
            locality,
            service_account: match endpoint.service_account.as_str() {
                "" => names.text("default"),
                name => names.text(name),
            },
            capacity: endpoint.weight.max(1),
            tunnel: match all.get(labels::TUNNEL).map(String::as_str) {
                Some("http") => Tunnel::Native,
                _ => Tunnel::None,
            },
            labels: names.labels(&all),
            only: None,
        })
    }

    /// The port that it calls so.
    pub fn port(&self, name: &str) -> Option<u16> {
        let mut found = self.ports.iter().filter(|(other, _)| &**other == name);
        found.next().map(|(_, port)| *port)
    }
}

/// A WorkloadEntry.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    pub age: Age,
    pub endpoint: Endpoint,
}

/// A host of a ServiceEntry.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Host {
    pub hostname: Arc<str>,
    pub addresses: Box<[IpNet]>,
}

/// A ServiceEntry.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServiceEntry {
    pub age: Age,
    pub labels: Arc<Labels>,
    pub hosts: Box<[Host]>,
    pub ports: Box<[ServicePort]>,
    pub endpoints: Box<[Endpoint]>,
    /// Empty: it selects nothing.
    pub selector: Arc<Labels>,
    pub passthrough: bool,
    pub distribution: Option<Arc<str>>,
    pub subject_alt_names: Box<[Arc<str>]>,
    pub visibility: Visibility,
}

/// Whom a waypoint takes traffic for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Allowed {
    All,
    Same,
    Selector(Arc<Labels>),
    Nobody,
}

/// What a waypoint takes (`istio.io/waypoint-for`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UsedFor {
    Services,
    Workloads,
    All,
    Nothing,
    /// What is written means nothing.
    Unreadable,
}

/// A Gateway, as a waypoint.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Gateway {
    /// Where it is, or why it can't be used.
    pub address: Result<GatewayAddress, Unusable>,
    /// The GatewayClass.
    pub class: Arc<str>,
    /// For what; none: as its class says.
    pub used_for: Option<UsedFor>,
    pub allowed: Allowed,
    /// How what arrives by HBONE is handed to its pods.
    pub binding: Option<ApplicationTunnel>,
}
