//! Where pods run and which addresses they have, kept between starts: who finds a pod by its address must not find another
//! one there after a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    files::write_atomically,
    layout::{Layout, node_addresses, pod_addresses},
};

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
    pub fn take(&mut self, pod: &str, node: u8, host_network: bool) -> Option<PodSlot> {
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
        let slot = PodSlot { node, host };
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
        let first = places.take("shop/a", 1, false).unwrap();
        let second = places.take("shop/b", 1, false).unwrap();
        assert_ne!(first.host, second.host);
        assert_eq!(places.take("shop/a", 1, false), Some(first));
        places.pods.remove("shop/a");
        assert_eq!(places.take("shop/c", 1, false).unwrap().host, first.host);
        assert_eq!(
            places.take("shop/d", 1, true).unwrap().host,
            None,
            "it shares the node's"
        );
    }

    #[test]
    fn a_full_node_takes_no_more() {
        let mut places = Places::default();
        for number in 2..=254 {
            assert!(places.take(&format!("shop/{number}"), 1, false).is_some());
        }
        assert_eq!(places.take("shop/more", 1, false), None);
        assert!(places.take("shop/more", 2, false).is_some());
    }
}
