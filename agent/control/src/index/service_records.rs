//! What is kept of Services and EndpointSlices.

use std::{net::IpAddr, sync::Arc};

use k8s::{IntOrString, live};
use model::{AppProtocol, IpFamilies, NamespacedName, Visibility};

use super::{
    labels,
    names::{Labels, Names},
    records::{Age, addresses, annotation},
};

/// A port of a service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct ServicePort {
    pub name: Arc<str>,
    pub port: u16,
    /// 0 where it has a name.
    pub target: u16,
    /// The name that an endpoint calls it by.
    pub target_name: Option<Arc<str>>,
    pub protocol: AppProtocol,
}

/// A Service.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Service {
    pub labels: Arc<Labels>,
    pub age: Age,
    pub hostname: Arc<str>,
    /// The cluster IPs. A load balancer's address is not the Service's, as in Istio since 1.22 (istio/istio#51623): what is
    /// sent there is the load balancer's to treat, several Services may share it, and it may be a node's own.
    pub addresses: Box<[IpAddr]>,
    pub selector: Arc<Labels>,
    pub ports: Box<[ServicePort]>,
    pub families: IpFamilies,
    pub distribution: Option<Arc<str>>,
    pub node_local: bool,
    pub not_ready_too: bool,
    pub visibility: Visibility,
}

impl Service {
    /// A service with endpoints; an ExternalName is a name and no more.
    pub fn new(service: &k8s::Service, domain: &str, names: &mut Names) -> Option<Self> {
        let (metadata, spec) = (&service.metadata, &service.spec);
        if spec.type_.as_deref() == Some("ExternalName") {
            return None;
        }
        let cluster_ips = spec.cluster_ips.iter().map(String::as_str);
        let all = cluster_ips.chain(spec.cluster_ip.as_deref());
        let tcp = spec
            .ports
            .iter()
            .filter(|port| port.protocol == "TCP" && port.port != 0);
        let ports = tcp.map(|port| {
            let (target, target_name) = match &port.target_port {
                None => (port.port, None),
                Some(IntOrString::Number(number)) => (*number, None),
                Some(IntOrString::Name(name)) => (0, Some(names.text(name))),
            };
            let name = port.name.as_deref().unwrap_or_default();
            ServicePort {
                name: names.text(name),
                port: port.port,
                target,
                target_name,
                protocol: app_protocol(port.app_protocol.as_deref(), name),
            }
        });
        let ports = ports.collect();
        let written = spec.traffic_distribution.as_deref().map(|text| names.text(text));
        Some(Self {
            age: Age::of(metadata, names),
            hostname: format!("{}.{}.svc.{domain}", metadata.name, metadata.namespace).into(),
            addresses: addresses(all),
            selector: names.labels(&spec.selector),
            ports,
            families: families(&spec.ip_families),
            distribution: written.or_else(|| annotation(metadata, labels::TRAFFIC_DISTRIBUTION, names)),
            node_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            not_ready_too: spec.publish_not_ready_addresses,
            visibility: visibility(
                metadata
                    .annotations
                    .get(labels::EXPORT_TO)
                    .into_iter()
                    .flat_map(|text| text.split(',')),
                &metadata.namespace,
            ),
            labels: names.labels(&metadata.labels),
        })
    }
}

fn families(families: &[k8s::IpFamily]) -> IpFamilies {
    match families {
        [] => IpFamilies::Automatic,
        [k8s::IpFamily::IPv4] => IpFamilies::V4Only,
        [k8s::IpFamily::IPv6] => IpFamilies::V6Only,
        _ => IpFamilies::Dual,
    }
}

/// `exportTo`: what can't be said on the wire (a list of other namespaces) is public, as it is for every agent.
pub(super) fn visibility<'a>(export_to: impl Iterator<Item = &'a str>, namespace: &str) -> Visibility {
    let mut own = false;
    for to in export_to.map(str::trim) {
        match to {
            "." | "~" => own = true,
            to if to == namespace => own = true,
            _ => return Visibility::Public,
        }
    }
    if own { Visibility::Namespace } else { Visibility::Public }
}

/// What is spoken on a port: `appProtocol`, else the port's name up to its first `-` (Istio's protocol selection).
pub(super) fn app_protocol(written: Option<&str>, name: &str) -> AppProtocol {
    let of = |text: &str| match text.to_ascii_lowercase().as_str() {
        "http" | "http/1.1" | "kubernetes.io/ws" => AppProtocol::Http11,
        "http2" | "h2c" | "kubernetes.io/h2c" => AppProtocol::Http2,
        "grpc" | "grpc-web" => AppProtocol::Grpc,
        "https" | "tls" | "kubernetes.io/wss" => AppProtocol::Tls,
        "tcp" | "mongo" | "mysql" | "redis" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    };
    match written {
        Some(written) => of(written),
        None if name.starts_with("grpc-web") => AppProtocol::Grpc,
        None => of(name.split('-').next().unwrap_or_default()),
    }
}

/// An endpoint of a slice that is no pod.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Other {
    pub ip: IpAddr,
    pub ready: bool,
    /// Empty where it is not known.
    pub node: Arc<str>,
    /// Empty where it is not known.
    pub zone: Arc<str>,
}

/// An EndpointSlice.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Slice {
    pub age: Age,
    pub service: NamespacedName,
    pub ports: Box<[(Arc<str>, u16)]>,
    /// The pods among its endpoints, sorted.
    pub pods: Box<[NamespacedName]>,
    /// The other endpoints.
    pub others: Box<[Other]>,
}

impl Slice {
    /// A slice of a service of its namespace. Those of host names have no address to send to.
    pub fn new(slice: &live::EndpointSlice, names: &mut Names) -> Option<Self> {
        let metadata = &slice.metadata;
        let service = metadata.label(labels::SERVICE_NAME)?;
        if slice.address_type == "FQDN" {
            return None;
        }
        let is_tcp = |port: &&live::SlicePort| port.protocol.as_deref().is_none_or(|protocol| protocol == "TCP");
        let ports = slice.ports.iter().filter(is_tcp);
        let ports = ports
            .filter_map(|port| Some((names.text(&port.name), port.port?)))
            .collect();
        let (mut pods, mut others) = (Vec::new(), Vec::new());
        for endpoint in &slice.endpoints {
            match &endpoint.target_ref {
                // A slice speaks for the pods of its own namespace.
                Some(target) if target.kind == "Pod" => {
                    if target.namespace.is_empty() || target.namespace == metadata.namespace {
                        pods.push(names.name(&metadata.namespace, &target.name));
                    }
                }
                _ => {
                    let conditions = &endpoint.conditions;
                    // On its way out it takes nothing new, even where `ready` is not said.
                    let ready = conditions.ready.unwrap_or(true) && conditions.terminating != Some(true);
                    let first = addresses(endpoint.addresses.iter().map(String::as_str));
                    others.extend(first.first().map(|ip| Other {
                        ip: *ip,
                        ready,
                        node: names.text(endpoint.node_name.as_deref().unwrap_or_default()),
                        zone: names.text(endpoint.zone.as_deref().unwrap_or_default()),
                    }));
                }
            }
        }
        pods.sort();
        pods.dedup();
        Some(Self {
            age: Age::of(metadata, names),
            service: names.name(&metadata.namespace, service),
            ports,
            pods: pods.into(),
            others: others.into(),
        })
    }
}
