//! What was allotted to whom, kept between commands.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use k8s::{IpFamily, Objects};
use serde::{Deserialize, Serialize};

use crate::{
    files::write_atomically,
    layout::{Layout, node_addresses, node_name, pod_addresses, pod_netns, service_addresses},
};

/// What was allotted. It changes only under [`crate::owner::hold`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct State {
    pub nodes: u8,
    pub capture: String,
    pub access_log: String,
    pub manifests: PathBuf,
    /// The search path of whoever called `up`: containers run programs of this machine.
    pub path: String,
    /// `namespace/name` → where it runs.
    pub pods: BTreeMap<String, PodSlot>,
    /// `namespace/name` → number of its address.
    pub services: BTreeMap<String, u16>,
    /// Whether `up` mounted /sys/fs/bpf, so that `down` unmounts it.
    pub mounted_bpffs: bool,
}

/// A pod's place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodSlot {
    /// The node's number.
    pub node: u8,
    /// The last part of its addresses; none for a pod on the node's network.
    pub host: Option<u8>,
}

impl PodSlot {
    pub fn addresses(&self) -> [IpAddr; 2] {
        match self.host {
            Some(host) => pod_addresses(self.node, host),
            None => node_addresses(self.node),
        }
    }
}

impl State {
    /// Reads it; none if the playground is not up.
    pub fn load(layout: &Layout) -> Result<Option<Self>> {
        let path = layout.state();
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let state = serde_json::from_str(&text);
        state
            .map(Some)
            .with_context(|| format!("{} is damaged: take the playground down", path.display()))
    }

    /// Reads it, or says that the playground is not up.
    pub fn expect(layout: &Layout) -> Result<Self> {
        Self::load(layout)?.context("the playground is not up: undercurrent playground up --manifests DIR")
    }

    pub fn save(&self, layout: &Layout) -> Result<()> {
        write_atomically(&layout.state(), &serde_json::to_string_pretty(self)?)
    }

    pub fn node_names(&self) -> impl Iterator<Item = String> + use<> {
        (1..=self.nodes).map(node_name)
    }

    /// Gives every pod and service a place, keeping those that have one; forgets those that are gone. Returns what can't
    /// be placed, and why.
    pub fn allot(&mut self, objects: &mut Objects) -> Result<Vec<String>> {
        let wanted: BTreeSet<_> = objects.pods.iter().map(|(_, pod)| key(&pod.metadata)).collect();
        self.pods.retain(|name, _| wanted.contains(name));
        let mut refused = Vec::new();
        let mut netns = BTreeMap::new();
        let mut placed = Vec::new();
        for (place, pod) in std::mem::take(&mut objects.pods) {
            let name = key(&pod.metadata);
            let namespace = pod_netns(&pod.metadata.namespace, &pod.metadata.name);
            if let Some(other) = netns.insert(namespace.clone(), name.clone()) {
                refused.push(format!(
                    "Pod {name}: its network namespace would be {namespace}, which is {other}'s: rename one"
                ));
                continue;
            }
            match self.place(&pod) {
                Ok(slot) => {
                    self.pods.insert(name, slot);
                    placed.push((place, pod));
                }
                Err(why) => {
                    self.pods.remove(&name);
                    refused.push(format!("Pod {name}: {why}"));
                }
            }
        }
        objects.pods = placed;
        let wanted: BTreeSet<_> = objects
            .services
            .iter()
            .map(|(_, service)| key(&service.metadata))
            .collect();
        self.services.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if !self.services.contains_key(&name) {
                let taken: BTreeSet<_> = self.services.values().copied().collect();
                let free = (10..u16::MAX).find(|number| !taken.contains(number));
                self.services.insert(name, free.context("there are too many services")?);
            }
        }
        Ok(refused)
    }

    fn place(&self, pod: &k8s::Pod) -> Result<PodSlot> {
        let name = key(&pod.metadata);
        let asked = pod.spec.node_name.as_deref().filter(|node| !node.is_empty());
        let asked = match asked {
            Some(node) => {
                let found = (1..=self.nodes).find(|index| node_name(*index) == node);
                let known = || self.node_names().collect::<Vec<_>>().join(", ");
                Some(found.with_context(|| format!("spec.nodeName: there is no {node}, only {}", known()))?)
            }
            None => None,
        };
        if let Some(slot) = self.pods.get(&name)
            && asked.is_none_or(|node| node == slot.node)
            && slot.host.is_none() == pod.spec.host_network
        {
            return Ok(*slot);
        }
        let load = |node: u8| self.pods.values().filter(|slot| slot.node == node).count();
        let node = asked.or_else(|| (1..=self.nodes).min_by_key(|node| load(*node)));
        let node = node.context("there is no node")?;
        if pod.spec.host_network {
            return Ok(PodSlot { node, host: None });
        }
        let taken: BTreeSet<_> = self
            .pods
            .values()
            .filter(|slot| slot.node == node)
            .filter_map(|slot| slot.host)
            .collect();
        match (2..=254).find(|host| !taken.contains(host)) {
            Some(host) => Ok(PodSlot { node, host: Some(host) }),
            None => bail!("{} has no address left", node_name(node)),
        }
    }

    /// A service's addresses.
    pub fn vips(&self, service: &k8s::Service) -> Vec<IpAddr> {
        if service.is_headless() {
            return Vec::new();
        }
        let given = service
            .spec
            .cluster_ip
            .as_deref()
            .and_then(|text| text.parse::<IpAddr>().ok());
        let Some(number) = self.services.get(&key(&service.metadata)) else {
            return given.into_iter().collect();
        };
        let [v4, v6] = service_addresses(*number);
        let own = |family: &IpFamily| match family {
            IpFamily::IPv4 => given.filter(IpAddr::is_ipv4).unwrap_or(v4),
            IpFamily::IPv6 => given.filter(IpAddr::is_ipv6).unwrap_or(v6),
        };
        service.families().iter().map(own).collect()
    }
}

/// `namespace/name`.
pub(crate) fn key(metadata: &k8s::Metadata) -> String {
    format!("{}/{}", metadata.namespace, metadata.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn objects(pods: &str) -> Objects {
        k8s::parse([("t.yaml", pods)])
    }

    fn pod(name: &str, rest: &str) -> String {
        format!(
            "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec:\n  containers: [{{name: c, \
             command: [a]}}]\n{rest}"
        )
    }

    #[test]
    fn a_pod_keeps_its_place() {
        let mut state = State {
            nodes: 2,
            ..State::default()
        };
        let first = [pod("a", ""), pod("b", ""), pod("c", "  nodeName: node-2\n")].concat();
        assert!(state.allot(&mut objects(&first)).unwrap().is_empty());
        let before = state.pods.clone();
        assert_ne!(
            before["shop/a"].node, before["shop/b"].node,
            "the emptier node is taken"
        );
        assert!(
            state
                .allot(&mut objects(&[pod("0", ""), pod("b", "")].concat()))
                .unwrap()
                .is_empty()
        );
        assert_eq!(state.pods["shop/b"], before["shop/b"]);
        assert!(!state.pods.contains_key("shop/a"));
    }

    #[test]
    fn what_cannot_be_placed_is_named() {
        let mut state = State {
            nodes: 1,
            ..State::default()
        };
        let mut objects = objects(&[pod("a", "  nodeName: node-7\n"), pod("b", "")].concat());
        let refused = state.allot(&mut objects).unwrap();
        assert!(refused[0].contains("there is no node-7, only node-1"), "{refused:?}");
        assert_eq!(objects.pods.len(), 1);
    }
}
