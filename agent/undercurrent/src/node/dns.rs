//! What the node role is told of the pods' name server.

use std::{net::IpAddr, path::Path};

use clap::{ArgAction, Args};

/// How the agent is the pods' name server.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "DNS of the pods")]
pub struct DnsArgs {
    /// Whether the agent answers what captured pods ask name servers of the mesh, where a pod's annotation
    /// ambient.istio.io/dns-capture does not say.
    #[arg(
        long,
        env = "UNDERCURRENT_DNS_CAPTURE",
        value_name = "BOOL",
        default_value_t = true,
        action = ArgAction::Set
    )]
    pub dns_capture: bool,
    /// The cluster's domain.
    #[arg(
        long,
        env = "CLUSTER_DOMAIN",
        value_name = "DOMAIN",
        default_value = "cluster.local",
        value_parser = domain
    )]
    pub cluster_domain: String,
    /// Name servers of the cluster, whose answers may permit something (REGISTRY_ONLY by host name); what others answer is
    /// only logged [default: those of the agent's own --resolv-conf].
    #[arg(
        long,
        env = "UNDERCURRENT_TRUSTED_DNS",
        value_name = "ADDRESS",
        value_delimiter = ','
    )]
    pub trusted_dns: Vec<IpAddr>,
}

impl DnsArgs {
    /// The proxy's settings. A resolv.conf that can't be read names nobody.
    pub fn config(&self, resolv_conf: &Path) -> l4::dns::Config {
        let trusted = if self.trusted_dns.is_empty() {
            name_servers(&std::fs::read_to_string(resolv_conf).unwrap_or_default())
        } else {
            self.trusted_dns.clone()
        };
        l4::dns::Config {
            domain: self.cluster_domain.as_str().into(),
            trusted: trusted.into(),
            ..l4::dns::Config::default()
        }
    }
}

/// Those of a resolv.conf; a pod's own loopback is not the node's.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let servers = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        address.parse::<IpAddr>().ok()
    });
    servers.filter(|ip| !ip.is_loopback()).collect()
}

fn domain(text: &str) -> Result<String, String> {
    let domain = text.trim_matches('.').to_ascii_lowercase();
    let is_label =
        |label: &str| !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
    if domain.split('.').all(is_label) {
        Ok(domain)
    } else {
        Err("expected a domain, such as cluster.local".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_servers_of_a_resolv_conf_are_trusted_but_for_loopback() {
        let text =
            "# nameserver 1.1.1.1\nsearch a b\nnameserver 10.96.0.10\nnameserver 127.0.0.53\nnameserver fd00::a\n";
        let expected: Vec<IpAddr> = vec!["10.96.0.10".parse().unwrap(), "fd00::a".parse().unwrap()];
        assert_eq!(name_servers(text), expected);
    }

    #[test]
    fn a_domain_is_made_of_labels() {
        assert_eq!(domain("Cluster.Local."), Ok("cluster.local".to_owned()));
        for bad in ["", ".", "a..b", "a b"] {
            assert!(domain(bad).is_err(), "{bad}");
        }
    }
}
