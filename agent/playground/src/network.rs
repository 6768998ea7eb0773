//! The network of the playground: a plan in lines of `ip`, then its application.
//!
//! ```text
//!  uc-shop-web            uc-node-1                        uc-fabric                    uc-node-2
//!  eth0 10.244.1.2/32 ─── ucHASH 169.254.1.1   eth0 ─── node-1 ─ br0 ─ node-2 ─── eth0 172.30.0.2 …
//!  default via 169.254.1.1  route 10.244.1.2/32  172.30.0.1
//! ```
//! Pods are routed, not bridged: each has a link of its own to its node, and whatever it sends is seen there. IPv6 is
//! the same with fe80::1 as the gateway. Invariant: between nodes there is nothing but br0.

use std::{fmt::Write, net::IpAddr};

use anyhow::Result;

use crate::{
    layout::{BRIDGE, CONTROL_NETNS, FABRIC, control_addresses, node_addresses, node_name, node_netns, pod_networks},
    netns,
};

const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";

/// Makes the bridge and the nodes that are not there yet, and the routes between all of them.
pub(crate) fn ensure_nodes(count: u8) -> Result<()> {
    let fresh_fabric = netns::create(FABRIC)?;
    if fresh_fabric {
        netns::sysctl(FABRIC, &[("net/ipv6/conf/default/disable_ipv6", "1")])?;
        netns::batch(
            Some(FABRIC),
            &format!("link add {BRIDGE} type bridge\nlink set {BRIDGE} up\n"),
        )?;
    }
    if fresh_fabric {
        netns::delete(CONTROL_NETNS)?;
    }
    if netns::create(CONTROL_NETNS)? {
        netns::sysctl(CONTROL_NETNS, NODE_SYSCTLS)?;
        netns::batch(Some(FABRIC), &link_plan("control", CONTROL_NETNS))?;
        netns::batch(Some(CONTROL_NETNS), &address_plan(control_addresses()))?;
    }
    for index in 1..=count {
        let name = node_netns(&node_name(index));
        if fresh_fabric {
            // It has lost its link.
            netns::delete(&name)?;
        }
        if netns::create(&name)? {
            netns::sysctl(&name, NODE_SYSCTLS)?;
            netns::batch(Some(FABRIC), &link_plan(&node_name(index), &name))?;
            netns::batch(Some(&name), &address_plan(node_addresses(index)))?;
        }
        netns::batch(Some(&name), &route_plan(index, count))?;
    }
    // The cluster's name server answers pods.
    netns::batch(Some(CONTROL_NETNS), &route_plan(0, count))?;
    Ok(())
}

const NODE_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    // Duplicate address detection would make each address wait a second.
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
];

/// Kernel parameters of a pod's namespace, set before its link comes.
pub(crate) const POD_SYSCTLS: &[(&str, &str)] = &[
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
    ("net/ipv6/conf/all/accept_dad", "0"),
    ("net/ipv6/conf/default/accept_dad", "0"),
    // As container runtimes do, so that a program need not be root to listen on port 80.
    ("net/ipv4/ip_unprivileged_port_start", "0"),
    ("net/ipv4/ping_group_range", "0 2147483647"),
];

/// A link from the bridge into a namespace, run in the fabric's.
fn link_plan(link: &str, netns: &str) -> String {
    format!(
        "link add {link} type veth peer name eth0 netns {netns}\n\
         link set {link} master {BRIDGE}\n\
         link set {link} up\n"
    )
}

fn address_plan([v4, v6]: [IpAddr; 2]) -> String {
    format!("link set eth0 up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\n")
}

fn route_plan(index: u8, count: u8) -> String {
    let mut plan = String::new();
    for other in (1..=count).filter(|other| *other != index) {
        for ((network, length), via) in pod_networks(other).into_iter().zip(node_addresses(other)) {
            writeln!(plan, "route replace {network}/{length} via {via}").expect("writing to a String does not fail");
        }
    }
    plan
}

/// The node's side of a pod's link, run in the node's namespace.
pub(crate) fn pod_link_plan(veth: &str, netns: &str, node: &[IpAddr], addresses: &[IpAddr]) -> String {
    let mut plan = format!(
        "link add {veth} type veth peer name eth0 netns {netns}\n\
         link set {veth} up\n\
         addr add {GATEWAY_V4}/32 dev {veth}\n\
         addr add {GATEWAY_V6}/64 dev {veth} nodad\n"
    );
    for address in addresses {
        let source = node.iter().find(|source| source.is_ipv4() == address.is_ipv4());
        let source = source.map_or(String::new(), |source| format!(" src {source}"));
        writeln!(plan, "route replace {address} dev {veth}{source}").expect("writing to a String does not fail");
    }
    plan
}

/// The pod's side of its link, run in the pod's namespace.
pub(crate) fn pod_plan(addresses: &[IpAddr]) -> String {
    let mut plan = "link set eth0 up\n".to_owned();
    for address in addresses {
        match address {
            IpAddr::V4(v4) => write!(
                plan,
                "addr add {v4}/32 dev eth0\nroute add {GATEWAY_V4} dev eth0 scope link\n\
                 route add default via {GATEWAY_V4} dev eth0 src {v4}\n"
            ),
            IpAddr::V6(v6) => write!(
                plan,
                "addr add {v6}/128 dev eth0 nodad\nroute add default via {GATEWAY_V6} dev eth0 src {v6}\n"
            ),
        }
        .expect("writing to a String does not fail");
    }
    plan
}
