//! What a pod's resolver finds: an /etc/hosts with the pod itself, and a resolv.conf as a kubelet writes it. Pure.

use std::{fmt::Write, net::IpAddr};

use crate::layout::control_addresses;

/// A service's name and addresses; for a headless one, those of its pods.
pub(crate) struct Name {
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

/// A pod's /etc/hosts.
pub(crate) fn hosts(hostname: &str, own: &[IpAddr]) -> String {
    let mut text = "# Written by the playground.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n".to_owned();
    for address in own {
        writeln!(text, "{address}\t{hostname}").expect("writing to a String does not fail");
    }
    text
}

/// A pod's /etc/resolv.conf: the search list of Kubernetes, and the cluster's name server by the families that the pod
/// has.
pub(crate) fn resolv_conf(namespace: &str, own: &[IpAddr]) -> String {
    let mut text = format!(
        "# Written by the playground.\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
    );
    let reached = |server: &IpAddr| own.iter().any(|address| address.is_ipv4() == server.is_ipv4());
    for server in control_addresses().iter().filter(|server| reached(server)) {
        writeln!(text, "nameserver {server}").expect("writing to a String does not fail");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_asks_the_server_of_a_family_that_it_has() {
        let v4 = resolv_conf("shop", &["10.244.1.2".parse().unwrap()]);
        assert!(
            v4.contains("search shop.svc.cluster.local svc.cluster.local cluster.local\n"),
            "{v4}"
        );
        assert!(v4.ends_with("options ndots:5\nnameserver 172.30.0.254\n"), "{v4}");
        let both = ["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(resolv_conf("shop", &both).matches("nameserver").count(), 2);
        assert!(hosts("web-1", &both).contains("10.244.1.2\tweb-1\n"));
    }
}
