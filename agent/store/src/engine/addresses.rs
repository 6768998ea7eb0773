//! The addresses of services: which are free.
//!
//! The lower end of a range is for those that are asked for by number, as in Kubernetes (KEP-3070); what is given out
//! by itself goes round the rest, so that an address just freed is not at once somebody else's.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;

use super::{
    object::{Key, Object},
    state::Visible,
};
use crate::kinds;

/// `IPv4` or `IPv6`, as Services say it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    pub(crate) fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
        [Self::V4, Self::V6].into_iter().find(|family| family.name() == name)
    }
}

/// The ranges, and who has which address of them.
#[derive(Debug)]
pub(crate) struct Addresses {
    ranges: Vec<Range>,
    used: HashMap<IpAddr, Key>,
}

#[derive(Debug)]
struct Range {
    net: IpNet,
    /// Where addresses that nobody asked for begin, counted from the first of the range.
    from: u128,
    /// One past the last that can be given out.
    end: u128,
    next: u128,
}

impl Range {
    fn new(net: IpNet) -> Self {
        let bits = u32::from(net.max_prefix_len() - net.prefix_len());
        // Kubernetes, too, goes no further than 2^16 into an IPv6 range.
        let size = if bits >= 32 { 1 << 32 } else { 1u128 << bits };
        // The network's own address and IPv4's broadcast address are nobody's.
        let end = if net.addr().is_ipv4() {
            size.saturating_sub(1)
        } else {
            size
        };
        let band = (size / 16).clamp(16, 256);
        let from = if band < end { band } else { 1 };
        Self {
            net,
            from,
            end,
            next: from,
        }
    }

    fn at(&self, offset: u128) -> IpAddr {
        match self.net.network() {
            // `end` keeps the sum in the range.
            IpAddr::V4(base) => IpAddr::V4(Ipv4Addr::from_bits(base.to_bits().wrapping_add(offset as u32))),
            IpAddr::V6(base) => IpAddr::V6(Ipv6Addr::from_bits(base.to_bits().wrapping_add(offset))),
        }
    }

    /// The range's first address but one: the API's own service.
    fn first(&self) -> IpAddr {
        self.at(1)
    }
}

impl Addresses {
    pub(super) fn new(ranges: &[IpNet]) -> Self {
        Self {
            ranges: ranges.iter().map(|net| Range::new(*net)).collect(),
            used: HashMap::new(),
        }
    }

    /// The families there are ranges of, the first being the one for services that do not say.
    pub(crate) fn families(&self) -> Vec<Family> {
        self.ranges.iter().map(|range| Family::of(range.net.addr())).collect()
    }

    /// The range of a family.
    pub(crate) fn range(&self, family: Family) -> Option<IpNet> {
        self.of(family).map(|range| range.net)
    }

    /// The address for the API's own service.
    pub(crate) fn first(&self) -> Option<IpAddr> {
        self.ranges.first().map(Range::first)
    }

    /// Who has an address.
    pub(crate) fn user(&self, address: IpAddr) -> Option<&Key> {
        self.used.get(&address)
    }

    fn of(&self, family: Family) -> Option<&Range> {
        self.ranges.iter().find(|range| Family::of(range.net.addr()) == family)
    }

    /// A free address, or `None` when all are in use. It is not taken until the service is staged ([`Addresses::note`]).
    pub(crate) fn free(&mut self, family: Family) -> Option<IpAddr> {
        let used = &self.used;
        let range = self
            .ranges
            .iter_mut()
            .find(|range| Family::of(range.net.addr()) == family)?;
        // What is in use bounds the search: one more than that has to hold a free one.
        let upper = (range.next..range.end).chain(range.from..range.next);
        let upper = upper.chain(1..range.from).take(used.len() + 1);
        let is_free = |offset: &u128| !used.contains_key(&range.at(*offset));
        let offset = upper.into_iter().find(is_free)?;
        if offset >= range.from {
            range.next = if offset + 1 < range.end { offset + 1 } else { range.from };
        }
        Some(range.at(offset))
    }

    /// Takes note of a service as it was and as it is.
    pub(super) fn note(&mut self, before: Option<&Object>, after: Option<&Object>) {
        for address in before.into_iter().flat_map(addresses_of) {
            if before.is_some_and(|object| self.used.get(&address) == Some(&object.key)) {
                self.used.remove(&address);
            }
        }
        if let Some(object) = after {
            for address in addresses_of(object) {
                self.used.entry(address).or_insert_with(|| object.key.clone());
            }
        }
    }

    /// Forgets what is known and reads it from the durable services.
    pub(super) fn rebuild(&mut self, visible: &Visible) {
        self.used.clear();
        let Some(services) = kinds::by_plural("", "services") else {
            return;
        };
        for service in visible.list(services, None) {
            self.note(None, Some(&service));
        }
    }
}

/// Whether a key is a service's.
pub(super) fn is_service(key: &Key) -> bool {
    key.kind.group.is_empty() && key.kind.plural == "services"
}

fn addresses_of(object: &Object) -> Vec<IpAddr> {
    let value = object.value();
    let listed = value["spec"]["clusterIPs"].as_array();
    let parse = |address: &serde_json::Value| address.as_str()?.parse().ok();
    listed.into_iter().flatten().filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, address: IpAddr) -> Object {
        let json = serde_json::json!({"spec": {"clusterIPs": [address]}}).to_string();
        Object {
            key: Key::new(kinds::by_plural("", "services").unwrap(), "default", name),
            revision: 1,
            labels: Default::default(),
            json: json.into(),
        }
    }

    #[test]
    fn no_address_is_given_twice_and_a_full_range_says_so() {
        let mut addresses = Addresses::new(&["10.0.0.0/27".parse().unwrap()]);
        let mut given = Vec::new();
        while let Some(address) = addresses.free(Family::V4) {
            assert!(!given.contains(&address));
            addresses.note(None, Some(&service(&given.len().to_string(), address)));
            given.push(address);
        }
        // 32 without the network's and the broadcast address.
        assert_eq!(given.len(), 30);
        assert!(!given.contains(&"10.0.0.31".parse().unwrap()) && !given.contains(&"10.0.0.0".parse().unwrap()));
        addresses.note(Some(&service("7", given[7])), None);
        assert_eq!(addresses.free(Family::V4), Some(given[7]));
        assert_eq!(addresses.free(Family::V6), None);
    }

    #[test]
    fn an_address_just_freed_is_not_the_next() {
        let mut addresses = Addresses::new(&["fd00::/112".parse().unwrap()]);
        let first = addresses.free(Family::V6).unwrap();
        let one = service("a", first);
        addresses.note(None, Some(&one));
        addresses.note(Some(&one), None);
        assert_ne!(addresses.free(Family::V6).unwrap(), first);
    }
}
