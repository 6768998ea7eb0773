//! Where pods run and which addresses they have, kept between starts: who finds a pod by its address must not find another
//! one there after a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde::{Deserialize, Serialize};

use crate::{
    files::write_atomically,
    layout::{Layout, node_addresses, pod_addresses},
};

/// An annotation of pods: `ipv4` or `ipv6`, for a pod that has addresses of that family alone. It counts when the pod is made.
const IP_FAMILY: &str = "playground.undercurrent.io/ip-family";

/// Which addresses a pod has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IpFamily {
    #[default]
    Dual,
    Ipv4,
    Ipv6,
}

impl IpFamily {
    /// What a pod asks for.
    pub fn of(pod: &Pod) -> Result<Self> {
        match pod.annotations().get(IP_FAMILY).map(String::as_str) {
            None | Some("dual") => Ok(Self::Dual),
            Some("ipv4") => Ok(Self::Ipv4),
            Some("ipv6") => Ok(Self::Ipv6),
            Some(other) => bail!("its annotation {IP_FAMILY} is {other:?}: expected ipv4, ipv6 or dual"),
        }
    }

    fn has(self, address: IpAddr) -> bool {
        match self {
            Self::Dual => true,
            Self::Ipv4 => address.is_ipv4(),
            Self::Ipv6 => address.is_ipv6(),
        }
    }
}

/// A pod's place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct PodSlot {
    /// The node's number.
    pub node: u8,
    /// The last part of its addresses; none for a pod on the node's network.
    pub host: Option<u8>,
    /// A pod on the node's network has the node's addresses, whatever this says.
    #[serde(default)]
    pub family: IpFamily,
}

impl PodSlot {
    pub fn addresses(&self) -> Vec<IpAddr> {
        match self.host {
            Some(host) => {
                let addresses = pod_addresses(self.node, host).into_iter();
                addresses.filter(|address| self.family.has(*address)).collect()
            }
            None => node_addresses(self.node).to_vec(),
        }
    }
}

/// `namespace/name` → where it runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Places {
    pub pods: BTreeMap<String, PodSlot>,
}

impl Places {
    /// What is kept; nothing if nothing is.
    pub fn load(layout: &Layout) -> Result<Self> {
        let path = layout.places();
        if !path.exists() {
            return Ok(Self::default());
        }
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged: take the playground down", path.display()))
    }

    pub fn save(&self, layout: &Layout) -> Result<()> {
        write_atomically(&layout.places(), &serde_json::to_string_pretty(self)?)
    }

    /// The pod's place on this node: the one it has, or a free one. None if the node is full.
    pub fn take(&mut self, pod: &str, node: u8, host_network: bool, family: IpFamily) -> Option<PodSlot> {
        let kept = self.pods.get(pod);
        if let Some(slot) = kept.filter(|slot| slot.node == node && slot.host.is_none() == host_network) {
            return Some(*slot);
        }
        let taken: BTreeSet<_> = self
            .pods
            .iter()
            .filter(|(name, slot)| slot.node == node && *name != pod)
            .filter_map(|(_, slot)| slot.host)
            .collect();
        let host = match host_network {
            true => None,
            false => Some((2..=254).find(|host| !taken.contains(host))?),
        };
        let slot = PodSlot { node, host, family };
        self.pods.insert(pod.to_owned(), slot);
        Some(slot)
    }

    /// How many pods a node has.
    pub fn load_of(&self, node: u8) -> usize {
        self.pods.values().filter(|slot| slot.node == node).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_kept_and_a_free_one_is_given_again() {
        let mut places = Places::default();
        let first = places.take("shop/a", 1, false, IpFamily::Dual).unwrap();
        let second = places.take("shop/b", 1, false, IpFamily::Dual).unwrap();
        assert_ne!(first.host, second.host);
        assert_eq!(places.take("shop/a", 1, false, IpFamily::Dual), Some(first));
        places.pods.remove("shop/a");
        assert_eq!(
            places.take("shop/c", 1, false, IpFamily::Dual).unwrap().host,
            first.host
        );
        assert_eq!(
            places.take("shop/d", 1, true, IpFamily::Dual).unwrap().host,
            None,
            "it shares the node's"
        );
    }

    #[test]
    fn a_pod_has_the_addresses_that_it_asks_for() {
        let mut places = Places::default();
        let families = [IpFamily::Dual, IpFamily::Ipv4, IpFamily::Ipv6].map(|family| {
            let slot = places.take(&format!("shop/{family:?}"), 1, false, family).unwrap();
            slot.addresses().iter().map(IpAddr::is_ipv4).collect::<Vec<_>>()
        });
        assert_eq!(families, [vec![true, false], vec![true], vec![false]]);
        let asking = |family: &str| {
            let mut pod = Pod::default();
            pod.annotations_mut().insert(IP_FAMILY.to_owned(), family.to_owned());
            IpFamily::of(&pod)
        };
        assert_eq!(asking("ipv6").unwrap(), IpFamily::Ipv6);
        assert_eq!(IpFamily::of(&Pod::default()).unwrap(), IpFamily::Dual);
        assert!(asking("ipv5").unwrap_err().to_string().contains("ipv5"));
    }

    #[test]
    fn a_full_node_takes_no_more() {
        let mut places = Places::default();
        for number in 2..=254 {
            assert!(
                places
                    .take(&format!("shop/{number}"), 1, false, IpFamily::Dual)
                    .is_some()
            );
        }
        assert_eq!(places.take("shop/more", 1, false, IpFamily::Dual), None);
        assert!(places.take("shop/more", 2, false, IpFamily::Dual).is_some());
    }
}
