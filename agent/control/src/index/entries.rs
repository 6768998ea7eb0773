//! ServiceEntries and Gateways, as they are kept.

use std::{net::IpAddr, sync::Arc};

use ipnet::IpNet;
use k8s::{Effect, Problem, live};
use model::{
    AppProtocol, ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, NamespacedName,
    NetworkAddress, Unusable, Visibility,
};

use super::{
    labels,
    names::Names,
    records::{Age, Allowed, Endpoint, Gateway, Host, ServiceEntry, UsedFor},
    service_records::{ServicePort, visibility},
};

/// What to tell an object's author: field, why, what follows.
pub(super) type Note = (String, Problem, Effect);

/// The port of HBONE.
const HBONE: u16 = 15008;

impl ServiceEntry {
    /// As far as it can be used; what can't is noted.
    pub fn new(entry: &live::ServiceEntry, names: &mut Names, notes: &mut Vec<Note>) -> Self {
        let (metadata, spec) = (&entry.metadata, &entry.spec);
        let resolution = spec.resolution.as_deref().unwrap_or("NONE");
        if !matches!(resolution, "NONE" | "STATIC" | "DNS" | "DNS_ROUND_ROBIN") {
            let problem = Problem::Unsupported(format!("{resolution}; its endpoints are not found"));
            notes.push(("spec.resolution".to_owned(), problem, Effect::Narrowed));
        }
        let selector = spec.workload_selector.as_ref().map(|selector| &selector.labels);
        let ports = spec
            .ports
            .iter()
            .filter(|port| port.number != 0)
            .map(|port| ServicePort {
                name: names.text(&port.name),
                port: port.number,
                target: port.target_port.unwrap_or(port.number),
                target_name: None,
                protocol: entry_protocol(&port.protocol),
            });
        let ports = ports.collect();
        let annotation = metadata.annotations.get(labels::TRAFFIC_DISTRIBUTION);
        Self {
            age: Age::of(metadata, names),
            hosts: hosts(entry, names, notes),
            ports,
            endpoints: endpoints(entry, resolution, names, notes),
            selector: names.labels(selector.into_iter().flatten()),
            passthrough: resolution == "NONE",
            distribution: annotation.map(|text| names.text(text)),
            subject_alt_names: spec.subject_alt_names.iter().map(|name| names.text(name)).collect(),
            visibility: match spec.export_to.as_slice() {
                [] => Visibility::Public,
                to => visibility(to.iter().map(String::as_str), &metadata.namespace),
            },
            labels: names.labels(&metadata.labels),
        }
    }
}

/// `ports.protocol` of a ServiceEntry.
fn entry_protocol(protocol: &str) -> AppProtocol {
    match protocol.to_ascii_uppercase().as_str() {
        "HTTP" => AppProtocol::Http11,
        "HTTP2" => AppProtocol::Http2,
        "GRPC" | "GRPC-WEB" => AppProtocol::Grpc,
        "HTTPS" | "TLS" => AppProtocol::Tls,
        "TCP" | "MONGO" | "MYSQL" | "REDIS" => AppProtocol::Tcp,
        _ => AppProtocol::Unknown,
    }
}

/// The hosts, each once, with their addresses: those that are written, else those that were allotted.
fn hosts(entry: &live::ServiceEntry, names: &mut Names, notes: &mut Vec<Note>) -> Box<[Host]> {
    let mut written = Vec::new();
    for (index, text) in entry.spec.addresses.iter().enumerate() {
        match block(text) {
            Some(block) => written.push(block),
            None => {
                let problem = Problem::Invalid(format!("{text:?} is neither an address nor a block of them"));
                notes.push((format!("spec.addresses[{index}]"), problem, Effect::Narrowed));
            }
        }
    }
    let allotted = |host: &str| {
        let for_host = entry.status.addresses.iter();
        let for_host = for_host.filter(|address| address.host.as_deref().is_none_or(|other| other == host));
        for_host.filter_map(|address| block(&address.value)).collect()
    };
    let mut hosts: Vec<Host> = Vec::new();
    for host in &entry.spec.hosts {
        let hostname = names.text(&host.to_ascii_lowercase());
        if hostname.is_empty() || hosts.iter().any(|other| other.hostname == hostname) {
            continue;
        }
        let all: Vec<IpNet> = match !host.starts_with('*') && crate::allot::wants(entry) {
            true => allotted(host),
            false => written.clone(),
        };
        let mut addresses = Vec::new();
        for block in all {
            if !addresses.contains(&block) {
                addresses.push(block);
            }
        }
        let addresses = addresses.into();
        hosts.push(Host { hostname, addresses });
    }
    hosts.into()
}

/// An address or a block; of v4-mapped addresses, the IPv4 block that they are.
fn block(text: &str) -> Option<IpNet> {
    let written = match text.parse::<IpNet>() {
        Ok(block) => block.trunc(),
        Err(_) => IpNet::from(text.parse::<IpAddr>().ok()?),
    };
    let block = match (written.addr().to_canonical(), written.prefix_len()) {
        (ip @ IpAddr::V4(_), length) if written.addr().is_ipv6() => {
            IpNet::new(ip, length.checked_sub(96)?).ok()?.trunc()
        }
        _ => written,
    };
    let is_single = block.prefix_len() == block.max_prefix_len();
    Some(block).filter(|block| !(is_single && block.addr().is_unspecified()))
}

/// The endpoints that are written; without any, and found by DNS, each host is its own.
fn endpoints(
    entry: &live::ServiceEntry,
    resolution: &str,
    names: &mut Names,
    notes: &mut Vec<Note>,
) -> Box<[Endpoint]> {
    let spec = &entry.spec;
    let mut endpoints: Vec<Endpoint> = Vec::new();
    if resolution == "NONE" && !spec.endpoints.is_empty() {
        let problem = Problem::Invalid("with resolution NONE there are none".to_owned());
        notes.push(("spec.endpoints".to_owned(), problem, Effect::Narrowed));
        return Box::default();
    }
    if resolution.starts_with("DNS") && spec.endpoints.is_empty() && spec.workload_selector.is_none() {
        for (index, host) in spec.hosts.iter().enumerate() {
            let written = live::Endpoint {
                address: host.to_ascii_lowercase(),
                ..live::Endpoint::default()
            };
            if host.starts_with('*') {
                let problem = Problem::Unsupported("a wildcard has no address of its own in DNS".to_owned());
                notes.push((format!("spec.hosts[{index}]"), problem, Effect::Narrowed));
            } else if let Ok(endpoint) = Endpoint::new(&written, &k8s::Metadata::default(), names)
                && endpoints.iter().all(|other| other.place != endpoint.place)
            {
                let only = unique_hosts(&spec.hosts[..index]);
                endpoints.push(Endpoint {
                    only: Some(only),
                    ..endpoint
                });
            }
        }
        return endpoints.into();
    }
    for (index, written) in spec.endpoints.iter().enumerate() {
        let at = format!("spec.endpoints[{index}].address");
        match Endpoint::new(written, &k8s::Metadata::default(), names) {
            Ok(endpoint) if endpoints.iter().any(|other| other.place == endpoint.place) => {
                let problem = Problem::Invalid(format!("{} is there twice", written.address));
                notes.push((at, problem, Effect::Narrowed));
            }
            Ok(endpoint) => endpoints.push(endpoint),
            Err(why) => notes.push((at, Problem::Unsupported(why), Effect::Narrowed)),
        }
    }
    endpoints.into()
}

/// How many different hosts these are: the index of the next one among them.
fn unique_hosts(hosts: &[String]) -> u32 {
    let different: std::collections::BTreeSet<_> = hosts.iter().map(|host| host.to_ascii_lowercase()).collect();
    u32::try_from(different.iter().filter(|host| !host.is_empty()).count()).unwrap_or(u32::MAX)
}

impl Gateway {
    /// A Gateway as a waypoint; or why it is none that can be used now.
    pub fn new(gateway: &live::Gateway, network: &Arc<str>, names: &mut Names) -> Self {
        let metadata = &gateway.metadata;
        let binding = metadata
            .annotations
            .get(labels::INBOUND_BINDING)
            .and_then(|text| binding(text));
        let listener = gateway.hbone_listener();
        let is_waypoint = listener.is_some() || binding.is_some();
        let port = listener.map(|listener| listener.port).filter(|port| *port != 0);
        let first = gateway
            .status
            .addresses
            .iter()
            .find(|address| !address.value.is_empty());
        let address = match first {
            _ if !is_waypoint => Err(Unusable::NoHboneListener),
            _ if !gateway.is_programmed() => Err(Unusable::NotProgrammed),
            None => Err(Unusable::NoAddress),
            Some(address) => Ok(GatewayAddress {
                destination: destination(address, &metadata.namespace, network, names),
                hbone_mtls_port: port.unwrap_or(HBONE),
            }),
        };
        let listener = listener.or(gateway.spec.listeners.first());
        Self {
            address,
            class: names.text(&gateway.spec.gateway_class_name),
            used_for: used_for(metadata),
            allowed: allowed(listener, names),
            binding,
        }
    }
}

/// What the label of a Gateway or a GatewayClass says.
pub(super) fn used_for(metadata: &k8s::Metadata) -> Option<UsedFor> {
    Some(match metadata.label(labels::WAYPOINT_FOR)? {
        "service" => UsedFor::Services,
        "workload" => UsedFor::Workloads,
        "all" => UsedFor::All,
        "none" => UsedFor::Nothing,
        _ => UsedFor::Unreadable,
    })
}

fn destination(
    address: &live::GatewayStatusAddress,
    namespace: &str,
    network: &Arc<str>,
    names: &mut Names,
) -> GatewayDestination {
    match address.value.parse::<IpAddr>() {
        Ok(ip) => GatewayDestination::Address(NetworkAddress::new(network.clone(), ip.to_canonical())),
        Err(_) => GatewayDestination::Hostname(NamespacedName {
            namespace: names.text(namespace),
            name: names.text(&address.value.to_ascii_lowercase()),
        }),
    }
}

/// `<protocol>` or `<protocol>/<port>`.
fn binding(text: &str) -> Option<ApplicationTunnel> {
    let (protocol, port) = match text.split_once('/') {
        Some((protocol, port)) => (protocol, Some(port.parse().ok()?)),
        None => (text, None),
    };
    let protocol = match protocol {
        "PROXY" => ApplicationTunnelProtocol::Proxy,
        "NONE" => ApplicationTunnelProtocol::None,
        _ => return None,
    };
    Some(ApplicationTunnel { protocol, port })
}

fn allowed(listener: Option<&live::Listener>, names: &mut Names) -> Allowed {
    let routes = listener.and_then(|listener| listener.allowed_routes.as_ref());
    let Some(namespaces) = routes.and_then(|routes| routes.namespaces.as_ref()) else {
        return Allowed::Same;
    };
    match namespaces.from.as_deref() {
        None | Some("Same") => Allowed::Same,
        Some("All") => Allowed::All,
        // `matchExpressions` can't be checked here, so they allow nobody; and so does a selector of nothing.
        Some("Selector") => match &namespaces.selector {
            Some(selector) if selector.match_expressions.is_empty() && !selector.match_labels.is_empty() => {
                Allowed::Selector(names.labels(&selector.match_labels))
            }
            _ => Allowed::Nobody,
        },
        Some(_) => Allowed::Nobody,
    }
}
