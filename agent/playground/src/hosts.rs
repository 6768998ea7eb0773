//! What a pod's resolver finds: /etc/hosts with the services' names, since there is no DNS server yet. Pure.

use std::{fmt::Write, net::IpAddr};

/// A service's name and addresses; for a headless one, those of its pods.
pub(crate) struct Name {
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<IpAddr>,
}

/// A pod's /etc/hosts.
pub(crate) fn hosts(namespace: &str, hostname: &str, own: &[IpAddr], names: &[Name]) -> String {
    let mut text = "# Written by the playground.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n".to_owned();
    for address in own {
        writeln!(text, "{address}\t{hostname}").expect("writing to a String does not fail");
    }
    for found in names {
        let (service, within) = (&found.name, &found.namespace);
        let short = if within == namespace {
            format!(" {service}")
        } else {
            String::new()
        };
        for address in &found.addresses {
            let full = format!("{service}.{within}.svc.cluster.local {service}.{within}.svc {service}.{within}");
            writeln!(text, "{address}\t{full}{short}").expect("writing to a String does not fail");
        }
    }
    text
}

/// A pod's /etc/resolv.conf: the search list of Kubernetes, and no server, so that an unknown name fails at once.
pub(crate) fn resolv_conf(namespace: &str) -> String {
    format!(
        "# Written by the playground: names are in /etc/hosts.\nsearch {namespace}.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_has_its_short_name_only_in_its_own_namespace() {
        let names = || {
            [Name {
                namespace: "shop".to_owned(),
                name: "web".to_owned(),
                addresses: vec!["10.96.0.10".parse().unwrap()],
            }]
        };
        let own = ["10.244.1.2".parse().unwrap()];
        let line = "10.96.0.10\tweb.shop.svc.cluster.local web.shop.svc web.shop";
        assert!(hosts("shop", "client", &own, &names()).contains(&format!("{line} web\n")));
        assert!(hosts("bank", "client", &own, &names()).contains(&format!("{line}\n")));
    }
}
