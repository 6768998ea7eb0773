//! Ranges of addresses, and which of the known ones an address is in: the longest first.

use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

use ipnet::IpNet;
use model::{NetworkAddress, canonical_ip};

/// The first address, and how many of its bits count.
pub(crate) type Range = (IpAddr, u8);

pub(crate) fn bits(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 32 } else { 128 }
}

fn masked(ip: IpAddr, length: u8) -> Option<Range> {
    Some((IpNet::new(ip, length).ok()?.network(), length))
}

/// What an address or prefix of a message covers.
pub(crate) fn range_of(address: &NetworkAddress) -> Option<Range> {
    let ip = canonical_ip(address.address);
    let length = match address.length {
        // Of a mapped address (`::ffff:a.b.c.d/104`) only the last bits count.
        Some(length) if ip.is_ipv4() != address.address.is_ipv4() => length.saturating_sub(96),
        Some(length) => length,
        None => bits(ip),
    };
    masked(ip, length)
}

/// How many ranges there are of which length; whole addresses are not counted.
#[derive(Clone, Default, Debug)]
pub(crate) struct Prefixes(Arc<BTreeMap<(bool, u8), usize>>);

impl Prefixes {
    pub(crate) fn add(&mut self, (ip, length): Range) {
        if length != bits(ip) {
            *Arc::make_mut(&mut self.0).entry((ip.is_ipv4(), length)).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, (ip, length): Range) {
        let key = (ip.is_ipv4(), length);
        if !self.0.contains_key(&key) {
            return;
        }
        let counts = Arc::make_mut(&mut self.0);
        let count = counts.entry(key).or_default();
        *count = count.saturating_sub(1);
        if *count == 0 {
            counts.remove(&key);
        }
    }

    /// The ranges that the address might be in, the longest first; the address itself is not among them.
    pub(crate) fn around(&self, ip: IpAddr) -> impl Iterator<Item = Range> + '_ {
        let lengths = self.0.keys().rev().filter(move |(ipv4, _)| *ipv4 == ip.is_ipv4());
        lengths.filter_map(move |(_, length)| masked(ip, *length))
    }
}
