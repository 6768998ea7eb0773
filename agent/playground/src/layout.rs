//! What is called how: paths in the state directory, network namespaces, interfaces, cgroups, addresses. Pure.
//!
//! ```text
//! STATE/                       default /var/lib/undercurrent/playground
//!   state.json                 what `up` was asked for
//!   places.json                where pods run, and their addresses
//!   kubeconfig                 the way to the API, for people
//!   api/ cluster.log           what the API keeps
//!   control/                   the control plane's kubeconfig, control.log
//!   bin/undercurrent           the binary that `up` was called with
//!   nodes/node-1/              agent/ (its own) token root-cert.pem kubeconfig *.log *.json (process ids)
//!     desired/NS-POD.json      what the kubelet is to run
//!     pods/NS-POD/             status.json hosts resolv.conf logs/CONTAINER.log
//! ```

use std::{
    collections::hash_map::DefaultHasher,
    hash::{Hash, Hasher},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::{Path, PathBuf},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// The namespace of the bridge that joins the nodes.
pub(crate) const FABRIC: &str = "uc-fabric";
/// The namespace of the control plane, on the same bridge.
pub(crate) const CONTROL_NETNS: &str = "uc-control";
/// The bridge in it.
pub(crate) const BRIDGE: &str = "br0";
/// A file name may have 255 bytes; a namespace's name is one.
const NAME_LIMIT: usize = 200;

/// Where everything is kept.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub root: PathBuf,
}

impl Layout {
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }
    pub fn state(&self) -> PathBuf {
        self.root.join("state.json")
    }
    pub fn places(&self) -> PathBuf {
        self.root.join("places.json")
    }
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }
    pub fn api(&self) -> PathBuf {
        self.root.join("api")
    }
    pub fn control(&self) -> PathBuf {
        self.root.join("control")
    }
    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.log"))
    }
    pub fn process(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.json"))
    }
    pub fn binary(&self) -> PathBuf {
        self.root.join("bin/undercurrent")
    }
    pub fn node(&self, node: &str) -> NodeLayout {
        NodeLayout {
            root: self.root.join("nodes").join(node),
        }
    }
}

/// Where a node's things are kept.
#[derive(Clone, Debug)]
pub(crate) struct NodeLayout {
    pub root: PathBuf,
}

impl NodeLayout {
    pub fn agent_state(&self) -> PathBuf {
        self.root.join("agent")
    }
    pub fn agent_socket(&self) -> PathBuf {
        self.agent_state().join("agent.sock")
    }
    pub fn token(&self) -> PathBuf {
        self.root.join("token")
    }
    pub fn roots(&self) -> PathBuf {
        self.root.join("root-cert.pem")
    }
    pub fn kubeconfig(&self) -> PathBuf {
        self.root.join("kubeconfig")
    }
    pub fn agent_log(&self) -> PathBuf {
        self.root.join("agent.log")
    }
    pub fn access_log(&self) -> PathBuf {
        self.root.join("access.log")
    }
    pub fn kubelet_log(&self) -> PathBuf {
        self.root.join("kubelet.log")
    }
    pub fn process(&self, name: &str) -> PathBuf {
        self.root.join(format!("{name}.json"))
    }
    pub fn desired(&self) -> PathBuf {
        self.root.join("desired")
    }
    pub fn pod(&self, id: &str) -> PodLayout {
        PodLayout {
            root: self.root.join("pods").join(id),
        }
    }
}

/// Where a pod's things are kept.
#[derive(Clone, Debug)]
pub(crate) struct PodLayout {
    pub root: PathBuf,
}

impl PodLayout {
    pub fn status(&self) -> PathBuf {
        self.root.join("status.json")
    }
    pub fn hosts(&self) -> PathBuf {
        self.root.join("hosts")
    }
    pub fn resolv_conf(&self) -> PathBuf {
        self.root.join("resolv.conf")
    }
    pub fn log(&self, container: &str) -> PathBuf {
        self.root.join("logs").join(format!("{container}.log"))
    }
}

/// `NAMESPACE-POD`, which names the pod's cgroup and directory, shortened by a hash where it is too long.
pub(crate) fn pod_id(namespace: &str, pod: &str) -> String {
    let id = format!("{namespace}-{pod}");
    if id.len() <= NAME_LIMIT {
        return id;
    }
    format!("{}-{:016x}", &id[..NAME_LIMIT - 17], hash(&(namespace, pod)))
}

/// The pod's network namespace.
pub(crate) fn pod_netns(namespace: &str, pod: &str) -> String {
    format!("uc-{}", pod_id(namespace, pod))
}

/// The node's network namespace.
pub(crate) fn node_netns(node: &str) -> String {
    format!("uc-{node}")
}

/// The node's name.
pub(crate) fn node_name(index: u8) -> String {
    format!("node-{index}")
}

/// Where a network namespace of this name is mounted.
pub(crate) fn netns_path(name: &str) -> PathBuf {
    Path::new("/run/netns").join(name)
}

/// The node's end of the pod's veth pair: an interface has at most 15 characters.
pub(crate) fn pod_veth(namespace: &str, pod: &str) -> String {
    format!("uc{:012x}", hash(&(namespace, pod)) & 0xffff_ffff_ffff)
}

fn hash(value: &impl Hash) -> u64 {
    // Unkeyed, and so the same in every process of the same build; nothing depends on more than that.
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A node's addresses on the fabric.
pub(crate) fn node_addresses(index: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(172, 30, 0, index).into(),
        Ipv6Addr::new(0xfd00, 0x172, 0x30, 0, 0, 0, 0, index.into()).into(),
    ]
}

/// The addresses of a node's pods: `(network, prefix length)` of each IP version.
pub(crate) fn pod_networks(node: u8) -> [(IpAddr, u8); 2] {
    [
        (Ipv4Addr::new(10, 244, node, 0).into(), 24),
        (Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, 0).into(), 64),
    ]
}

/// A pod's addresses.
pub(crate) fn pod_addresses(node: u8, host: u8) -> [IpAddr; 2] {
    [
        Ipv4Addr::new(10, 244, node, host).into(),
        Ipv6Addr::new(0xfd00, 0x10, 0x244, node.into(), 0, 0, 0, host.into()).into(),
    ]
}

/// The addresses of services.
pub(crate) fn service_networks() -> Vec<IpNet> {
    vec![
        Ipv4Net::new_assert(Ipv4Addr::new(10, 96, 0, 0), 16).into(),
        Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0), 112).into(),
    ]
}

/// The control plane's addresses on the fabric.
pub(crate) fn control_addresses() -> [IpAddr; 2] {
    node_addresses(254)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_their_limits() {
        let (namespace, pod) = ("n".repeat(63), "p".repeat(253));
        assert!(pod_netns(&namespace, &pod).len() < 255);
        assert!(pod_veth(&namespace, &pod).len() <= 15);
        assert_ne!(
            pod_netns(&namespace, &pod),
            pod_netns(&namespace, &format!("{}q", &pod[1..])),
            "shortened names stay apart"
        );
        assert_eq!(pod_netns("shop", "web"), "uc-shop-web");
    }
}
