//! Services: who is behind them, as EndpointSlices, as rules of the nodes (what kube-proxy does), and as names. Pure.

use std::{collections::BTreeMap, net::IpAddr};

use k8s_openapi::{
    api::{
        core::v1::{Pod, Service, ServicePort},
        discovery::v1::{Endpoint, EndpointSlice},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use serde_json::{Value, json};

use super::{
    api::Target,
    deployments::{name, namespace},
    pods::{addresses, is_ready},
};
use crate::{hosts::Name, proxy::Route};

/// A service and the pods that its selector finds.
pub(super) struct Backed<'a> {
    pub service: &'a Service,
    pods: Vec<&'a Pod>,
}

/// Every service with a selector, with its pods.
pub(super) fn backed<'a>(services: &'a [impl AsRef<Service>], pods: &'a [impl AsRef<Pod>]) -> Vec<Backed<'a>> {
    let mut all = Vec::new();
    for service in services.iter().map(AsRef::as_ref) {
        let Some(selector) = service.spec.as_ref().and_then(|spec| spec.selector.as_ref()) else {
            continue;
        };
        let selected = |pod: &&Pod| {
            let labels = pod.metadata.labels.as_ref();
            let has = |(key, value)| labels.is_some_and(|labels| labels.get(key) == Some(value));
            !selector.is_empty() && pod.metadata.namespace == service.metadata.namespace && selector.iter().all(has)
        };
        let pods = pods.iter().map(AsRef::as_ref).filter(selected);
        let pods = pods.filter(|pod| !addresses(pod).is_empty() && !is_over(pod)).collect();
        all.push(Backed { service, pods });
    }
    all
}

/// What the addresses of a service without a selector stand for: the EndpointSlices that somebody else wrote.
pub(super) fn written_routes(service: &Service, slices: &[impl AsRef<EndpointSlice>]) -> Vec<Route> {
    let backed = Backed {
        service,
        pods: Vec::new(),
    };
    let is_its = |slice: &&EndpointSlice| {
        let labels = slice.metadata.labels.as_ref();
        let of = labels.and_then(|labels| labels.get("kubernetes.io/service-name"));
        slice.metadata.namespace == service.metadata.namespace && of == service.metadata.name.as_ref()
    };
    let mut routes = backed.routes();
    for route in &mut routes {
        let port = backed.ports().find(|port| u16::try_from(port.port) == Ok(route.port));
        let name = port.and_then(|port| port.name.as_deref()).unwrap_or_default();
        for slice in slices.iter().map(AsRef::as_ref).filter(is_its) {
            let mut ports = slice.ports.iter().flatten();
            let target = ports.find(|port| port.name.as_deref().unwrap_or_default() == name);
            let Some(number) = target.and_then(|port| u16::try_from(port.port?).ok()) else {
                continue;
            };
            let serves = |endpoint: &&Endpoint| {
                let conditions = endpoint.conditions.as_ref();
                conditions.and_then(|conditions| conditions.ready).unwrap_or(true)
            };
            let addresses = slice
                .endpoints
                .iter()
                .flatten()
                .filter(serves)
                .flat_map(|endpoint| &endpoint.addresses);
            let addresses = addresses.filter_map(|address| address.parse::<IpAddr>().ok());
            let vip = route.vip;
            route.targets.extend(
                addresses
                    .filter(|address| address.is_ipv4() == vip.is_ipv4())
                    .map(|address| (address, number)),
            );
        }
    }
    routes
}

fn is_over(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn named_port(pod: &Pod, wanted: &str, protocol: &str) -> Option<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    let mut ports = containers.flat_map(|container| container.ports.iter().flatten());
    let is_it = |port: &k8s_openapi::api::core::v1::ContainerPort| {
        port.name.as_deref() == Some(wanted) && port.protocol.as_deref().unwrap_or("TCP") == protocol
    };
    ports.find(|port| is_it(port)).map(|port| port.container_port)
}

fn protocol(port: &ServicePort) -> &str {
    port.protocol.as_deref().unwrap_or("TCP")
}

fn target(pod: &Pod, port: &ServicePort) -> Option<u16> {
    let number = match &port.target_port {
        None => Some(port.port),
        Some(IntOrString::Int(number)) if *number == 0 => Some(port.port),
        Some(IntOrString::Int(number)) => Some(*number),
        Some(IntOrString::String(wanted)) => named_port(pod, wanted, protocol(port)),
    };
    number.and_then(|number| u16::try_from(number).ok())
}

impl Backed<'_> {
    fn ports(&self) -> impl Iterator<Item = &ServicePort> {
        self.service.spec.iter().flat_map(|spec| spec.ports.iter().flatten())
    }

    fn is_headless(&self) -> bool {
        let spec = self.service.spec.as_ref();
        spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
    }

    fn publishes_not_ready(&self) -> bool {
        let spec = self.service.spec.as_ref();
        spec.and_then(|spec| spec.publish_not_ready_addresses).unwrap_or(false)
    }

    fn vips(&self) -> Vec<IpAddr> {
        let given = self
            .service
            .spec
            .iter()
            .flat_map(|spec| spec.cluster_ips.iter().flatten());
        given.filter_map(|text| text.parse().ok()).collect()
    }

    fn families(&self) -> Vec<&str> {
        let given = self
            .service
            .spec
            .iter()
            .flat_map(|spec| spec.ip_families.iter().flatten());
        given.map(String::as_str).collect()
    }

    fn serves(&self, pod: &Pod) -> bool {
        let terminates = pod.metadata.deletion_timestamp.is_some();
        self.publishes_not_ready() || (is_ready(pod) && !terminates)
    }

    /// Its EndpointSlices: one for each IP version and set of target ports.
    pub fn slices(&self) -> Vec<(Target, Value)> {
        let mut slices = Vec::new();
        for family in self.families() {
            let mut groups: BTreeMap<Vec<Option<u16>>, Vec<&Pod>> = BTreeMap::new();
            for pod in &self.pods {
                groups
                    .entry(self.ports().map(|port| target(pod, port)).collect())
                    .or_default()
                    .push(pod);
            }
            if groups.is_empty() {
                groups.insert(Vec::new(), Vec::new());
            }
            for (number, (targets, pods)) in groups.iter().enumerate() {
                slices.push(self.slice(family, number, targets, pods));
            }
        }
        slices
    }

    fn slice(&self, family: &str, number: usize, targets: &[Option<u16>], pods: &[&Pod]) -> (Target, Value) {
        let metadata = &self.service.metadata;
        let suffix = if number == 0 {
            String::new()
        } else {
            format!("-{number}")
        };
        let slice = format!("{}-{}{suffix}", name(metadata), family.to_ascii_lowercase());
        let wants_v4 = family == "IPv4";
        let endpoints = pods.iter().filter_map(|pod| {
            let address = addresses(pod).into_iter().find(|address| address.is_ipv4() == wants_v4)?;
            let terminates = pod.metadata.deletion_timestamp.is_some();
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
            Some(json!({
                "addresses": [address.to_string()],
                "conditions": {"ready": self.serves(pod), "serving": is_ready(pod), "terminating": terminates},
                "nodeName": node,
                "targetRef": {"kind": "Pod", "name": name(&pod.metadata), "namespace": namespace(&pod.metadata), "uid": pod.metadata.uid},
            }))
        });
        let ports = self.ports().zip(targets).filter_map(|(port, target)| {
            let mut value =
                json!({"name": port.name.clone().unwrap_or_default(), "protocol": protocol(port), "port": (*target)?});
            if let Some(application) = &port.app_protocol {
                value["appProtocol"] = application.as_str().into();
            }
            Some(value)
        });
        let value = json!({
            "metadata": {
                "labels": {
                    "kubernetes.io/service-name": name(metadata),
                    "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
                },
                "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": name(metadata), "uid": metadata.uid,
                    "controller": true, "blockOwnerDeletion": true}],
            },
            "addressType": family,
            "endpoints": endpoints.collect::<Vec<_>>(),
            "ports": ports.collect::<Vec<_>>(),
        });
        let target = Target {
            api_version: "discovery.k8s.io/v1",
            ..Target::core("EndpointSlice", "endpointslices", namespace(metadata), &slice)
        };
        (target, value)
    }

    /// What its addresses stand for.
    pub fn routes(&self) -> Vec<Route> {
        let mut routes = Vec::new();
        for vip in self.vips() {
            for port in self.ports() {
                let targets = self.pods.iter().filter(|pod| self.serves(pod)).filter_map(|pod| {
                    let address = addresses(pod)
                        .into_iter()
                        .find(|address| address.is_ipv4() == vip.is_ipv4())?;
                    Some((address, target(pod, port)?))
                });
                routes.push(Route {
                    service: format!("{}/{}", namespace(&self.service.metadata), name(&self.service.metadata)),
                    vip,
                    protocol: protocol(port).to_ascii_lowercase(),
                    port: u16::try_from(port.port).unwrap_or(0),
                    targets: targets.collect(),
                });
            }
        }
        routes
    }

    /// Its name, and where that leads.
    pub fn name(&self) -> Name {
        let families = self.families();
        let is_asked = |address: &IpAddr| families.contains(if address.is_ipv4() { &"IPv4" } else { &"IPv6" });
        let addresses = match self.is_headless() {
            true => {
                let serving = self.pods.iter().filter(|pod| self.serves(pod));
                serving.flat_map(|pod| addresses(pod)).filter(is_asked).collect()
            }
            false => self.vips(),
        };
        Name {
            namespace: namespace(&self.service.metadata).to_owned(),
            name: name(&self.service.metadata).to_owned(),
            addresses,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn service(spec: Value) -> Arc<Service> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"name": "web", "namespace": "shop", "uid": "s"}, "spec": spec}))
                .unwrap(),
        )
    }

    fn pod(name: &str, host: u8, ready: bool, port: u16) -> Arc<Pod> {
        let ready = if ready { "True" } else { "False" };
        let value = json!({
            "metadata": {"name": name, "namespace": "shop", "uid": name, "labels": {"app": "web"}},
            "spec": {"nodeName": "node-1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": port}]}]},
            "status": {"phase": "Running", "podIPs": [{"ip": format!("10.244.1.{host}")}, {"ip": format!("fd00::{host}")}],
                "conditions": [{"type": "Ready", "status": ready}]},
        });
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn dual(extra: Value) -> Arc<Service> {
        let mut spec = json!({"selector": {"app": "web"}, "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"],
            "ipFamilies": ["IPv4", "IPv6"], "ports": [{"name": "http", "port": 80, "targetPort": "http"}]});
        for (key, value) in extra.as_object().unwrap() {
            spec[key] = value.clone();
        }
        service(spec)
    }

    #[test]
    fn only_ready_pods_are_routed_to_and_all_are_listed() {
        let (services, pods) = ([dual(json!({}))], [pod("a", 2, true, 8080), pod("b", 3, false, 8080)]);
        let backed = backed(&services, &pods);
        let slices = backed[0].slices();
        assert_eq!(slices.len(), 2, "one for each IP version");
        let endpoints = slices[0].1["endpoints"].as_array().unwrap();
        assert_eq!(endpoints.len(), 2);
        assert_eq!(endpoints[1]["conditions"]["ready"], false);
        assert_eq!(slices[0].1["ports"][0]["port"], 8080);
        let routes = backed[0].routes();
        assert_eq!(routes[0].targets, [("10.244.1.2".parse().unwrap(), 8080)]);
        assert_eq!(routes[1].targets, [("fd00::2".parse().unwrap(), 8080)]);
    }

    #[test]
    fn pods_that_mean_another_port_by_the_name_are_in_a_slice_of_their_own() {
        let (services, pods) = ([dual(json!({}))], [pod("a", 2, true, 8080), pod("b", 3, true, 9090)]);
        let backed = backed(&services, &pods);
        let ports: Vec<_> = backed[0]
            .slices()
            .iter()
            .map(|(_, slice)| slice["ports"][0]["port"].as_u64().unwrap())
            .collect();
        assert_eq!(ports, [8080, 9090, 8080, 9090]);
    }

    #[test]
    fn a_service_without_a_selector_leads_to_the_endpoints_that_were_written() {
        let api = service(
            json!({"clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "ipFamilies": ["IPv4"],
            "ports": [{"name": "https", "port": 443}]}),
        );
        let slice: EndpointSlice = serde_json::from_value(json!({
            "metadata": {"name": "x", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "endpoints": [{"addresses": ["172.30.0.254"]}], "ports": [{"name": "https", "port": 6443}],
        }))
        .unwrap();
        let routes = written_routes(&api, &[Arc::new(slice)]);
        assert_eq!(routes[0].targets, [("172.30.0.254".parse().unwrap(), 6443)]);
    }

    #[test]
    fn a_headless_services_name_leads_to_its_ready_pods() {
        let headless = dual(json!({"clusterIP": "None", "clusterIPs": ["None"]}));
        let (services, pods) = ([headless], [pod("a", 2, true, 1), pod("b", 3, false, 1)]);
        let found = backed(&services, &pods);
        assert_eq!(found[0].name().addresses.len(), 2, "the ready one's two");
        assert!(found[0].routes().is_empty());
        let (services, pods) = (
            [dual(
                json!({"publishNotReadyAddresses": true, "clusterIP": "None", "clusterIPs": ["None"]}),
            )],
            pods,
        );
        assert_eq!(backed(&services, &pods)[0].name().addresses.len(), 4);
    }
}
