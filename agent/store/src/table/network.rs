//! Services and their endpoints.

use serde_json::Value;

use super::{AGE, Column, NAME, SELECTOR, Table, at, created, first_three, labels, list, name, number, or, text};

pub(super) const SERVICE: Table = Table {
    columns: &[
        NAME,
        Column::text(
            "Type",
            "How the service is reached: ClusterIP, NodePort, LoadBalancer or ExternalName.",
        ),
        Column::text("Cluster-IP", "The address inside the cluster."),
        Column::text("External-IP", "Addresses, or the name, outside the cluster."),
        Column::text("Port(s)", "Ports, with those on the nodes, and protocols."),
        AGE,
        SELECTOR,
    ],
    cells: |service, now| {
        vec![
            name(service),
            Value::from(text(service, "spec.type")),
            Value::from(cluster_ip(service)),
            Value::from(external_ip(service)),
            Value::from(ports(service)),
            created(service, now),
            Value::from(labels(service, "spec.selector")),
        ]
    },
};

pub(super) const ENDPOINTS: Table = Table {
    columns: &[
        NAME,
        Column::text("Endpoints", "Addresses and ports that are ready."),
        AGE,
    ],
    cells: |object, now| {
        let mut all = Vec::new();
        for subset in list(object, "subsets") {
            let addresses: Vec<&str> = list(subset, "addresses")
                .iter()
                .map(|address| text(address, "ip"))
                .collect();
            let ports = list(subset, "ports");
            if ports.is_empty() {
                all.extend(addresses.iter().map(|ip| (*ip).to_owned()));
            }
            for port in ports {
                all.extend(addresses.iter().map(|ip| with_port(ip, number(port, "port"))));
            }
        }
        vec![
            name(object),
            Value::from(first_three(&all, "<none>")),
            created(object, now),
        ]
    },
};

pub(super) const ENDPOINT_SLICE: Table = Table {
    columns: &[
        NAME,
        Column::text("AddressType", "The type of the addresses: IPv4, IPv6 or FQDN."),
        Column::text("Ports", "The ports of every endpoint."),
        Column::text("Endpoints", "Their addresses."),
        AGE,
    ],
    cells: |slice, now| {
        let port = |port: &Value| match at(port, "port").and_then(Value::as_i64) {
            Some(port) => port.to_string(),
            None => or(text(port, "name"), "*").to_owned(),
        };
        let ports: Vec<String> = list(slice, "ports").iter().map(port).collect();
        let addresses = list(slice, "endpoints")
            .iter()
            .flat_map(|endpoint| list(endpoint, "addresses"));
        let addresses: Vec<String> = addresses.filter_map(Value::as_str).map(str::to_owned).collect();
        vec![
            name(slice),
            Value::from(text(slice, "addressType")),
            Value::from(first_three(&ports, "<unset>")),
            Value::from(first_three(&addresses, "<unset>")),
            created(slice, now),
        ]
    },
};

fn with_port(ip: &str, port: i64) -> String {
    if ip.contains(':') {
        return format!("[{ip}]:{port}");
    }
    format!("{ip}:{port}")
}

fn cluster_ip(service: &Value) -> &str {
    let first = list(service, "spec.clusterIPs").first().and_then(Value::as_str);
    or(first.unwrap_or_else(|| text(service, "spec.clusterIP")), "<none>")
}

fn external_ip(service: &Value) -> String {
    let external = list(service, "spec.externalIPs").iter().filter_map(Value::as_str);
    match text(service, "spec.type") {
        "ExternalName" => text(service, "spec.externalName").to_owned(),
        "LoadBalancer" => {
            let balancers = list(service, "status.loadBalancer.ingress").iter();
            let mut balancers: Vec<&str> = balancers.map(|at| or(text(at, "ip"), text(at, "hostname"))).collect();
            balancers.sort_unstable();
            balancers.extend(external);
            or(&balancers.join(","), "<pending>").to_owned()
        }
        _ => or(&external.collect::<Vec<_>>().join(","), "<none>").to_owned(),
    }
}

fn ports(service: &Value) -> String {
    let port = |port: &Value| {
        let (number, node, protocol) = (number(port, "port"), number(port, "nodePort"), text(port, "protocol"));
        match node {
            0 => format!("{number}/{protocol}"),
            node => format!("{number}:{node}/{protocol}"),
        }
    };
    let ports: Vec<String> = list(service, "spec.ports").iter().map(port).collect();
    or(&ports.join(","), "<none>").to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::line;

    #[test]
    fn services_show_their_addresses_and_ports() {
        let check = |spec: serde_json::Value, status: serde_json::Value, expected: &str| {
            let service = json!({"metadata": {"name": "s"}, "spec": spec, "status": status});
            assert_eq!(line("", "services", service), expected);
        };
        let ports = json!([{"port": 80, "protocol": "TCP"}, {"port": 53, "nodePort": 30053, "protocol": "UDP"}]);
        let spec = json!({"type": "ClusterIP", "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.1"], "ports": ports,
            "selector": {"app": "a", "b": "c"}});
        let expected = "s | ClusterIP | 10.0.0.1 | <none> | 80/TCP,53:30053/UDP | 5m | app=a,b=c";
        check(spec, json!({}), expected);
        let headless = json!({"type": "ClusterIP", "clusterIP": "None"});
        check(
            headless,
            json!({}),
            "s | ClusterIP | None | <none> | <none> | 5m | <none>",
        );
        let named = json!({"type": "ExternalName", "externalName": "a.example"});
        check(
            named,
            json!({}),
            "s | ExternalName | <none> | a.example | <none> | 5m | <none>",
        );
        let balancer = json!({"type": "LoadBalancer", "clusterIP": "10.0.0.1"});
        check(
            balancer.clone(),
            json!({}),
            "s | LoadBalancer | 10.0.0.1 | <pending> | <none> | 5m | <none>",
        );
        let ingress = json!({"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}, {"hostname": "lb"}]}});
        check(
            balancer,
            ingress,
            "s | LoadBalancer | 10.0.0.1 | 192.0.2.1,lb | <none> | 5m | <none>",
        );
    }

    #[test]
    fn endpoints_show_the_first_three() {
        let addresses: Vec<_> = (1..=5).map(|at| json!({"ip": format!("10.0.0.{at}")})).collect();
        let object = json!({"metadata": {"name": "e"}, "subsets": [{"addresses": addresses, "ports": [{"port": 80}]}]});
        let expected = "e | 10.0.0.1:80,10.0.0.2:80,10.0.0.3:80 + 2 more... | 5m";
        assert_eq!(line("", "endpoints", object), expected);
        assert_eq!(
            line("", "endpoints", json!({"metadata": {"name": "e"}})),
            "e | <none> | 5m"
        );
        let slice = json!({
            "metadata": {"name": "e"}, "addressType": "IPv6", "ports": [{"port": 80}, {"name": "x"}],
            "endpoints": [{"addresses": ["fd00::1"]}, {"addresses": ["fd00::2"]}],
        });
        let expected = "e | IPv6 | 80,x | fd00::1,fd00::2 | 5m";
        assert_eq!(line("discovery.k8s.io", "endpointslices", slice), expected);
        let bare = json!({"metadata": {"name": "e"}, "addressType": "IPv4"});
        assert_eq!(
            line("discovery.k8s.io", "endpointslices", bare),
            "e | IPv4 | <unset> | <unset> | 5m"
        );
    }
}
