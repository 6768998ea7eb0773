//! Addresses of which it is known that they are something of the mesh, and not what: the resource could not be read.
//! What is dialled there might have to be encrypted, or to be refused, so it is not passed through
//! (`what_can_not_be_read_is_refused_and_not_passed_through` in `tests/routes.rs`).
//!
//! Any number of resources may say one address; it is closed until the last of them is gone or read
//! (`an_address_is_closed_as_long_as_anything_unreadable_has_it`).

use std::{collections::BTreeSet, net::IpAddr, sync::Arc};

use model::NetworkAddress;

use crate::{
    ranges::{Prefixes, Range, bits, range_of},
    trie::Trie,
};

/// A resource that could not be read, and what its envelope says of where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// The resource's name.
    pub name: Arc<str>,
    /// Its addresses and ranges; only those of the node's network matter.
    pub addresses: Vec<NetworkAddress>,
}

/// What of the node's network is closed.
#[derive(Clone, Default, Debug)]
pub(crate) struct Closed {
    by_name: Trie<Arc<str>, Arc<BTreeSet<Range>>>,
    by_range: Trie<Range, Arc<BTreeSet<Arc<str>>>>,
    prefixes: Prefixes,
}

impl Closed {
    /// In place of what was said by this name before.
    pub(crate) fn put(&mut self, unreadable: Unreadable, network: &str) {
        self.remove(&unreadable.name);
        let own = unreadable.addresses.iter().filter(|at| *at.network == *network);
        let ranges: BTreeSet<Range> = own.filter_map(range_of).collect();
        if ranges.is_empty() {
            return;
        }
        for range in &ranges {
            let names = Arc::make_mut(self.by_range.entry(range));
            if names.is_empty() {
                self.prefixes.add(*range);
            }
            names.insert(unreadable.name.clone());
        }
        self.by_name.insert(unreadable.name, Arc::new(ranges));
    }

    pub(crate) fn remove(&mut self, name: &Arc<str>) {
        let Some(ranges) = self.by_name.remove(name) else {
            return;
        };
        for range in ranges.iter() {
            let names = Arc::make_mut(self.by_range.entry(range));
            names.remove(name);
            if names.is_empty() {
                self.by_range.remove(range);
                self.prefixes.remove(*range);
            }
        }
    }

    /// The narrowest that an address is in: its length, and the first resource that says it.
    pub(crate) fn at(&self, ip: IpAddr) -> Option<(u8, &Arc<str>)> {
        // Nearly always there is none, and then nothing is hashed.
        if self.by_range.len() == 0 {
            return None;
        }
        let mut ranges = std::iter::once((ip, bits(ip))).chain(self.prefixes.around(ip));
        ranges.find_map(|range| Some((range.1, self.by_range.get(&range)?.first()?)))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn ip(last: u8) -> IpAddr {
        [10, 0, 0, last].into()
    }

    proptest! {
        #[test]
        fn an_address_is_closed_as_long_as_anything_unreadable_has_it(
            steps in vec((0..5u8, proptest::option::of(vec((0..8u8, 30..=32u8), 0..3))), 1..60)
        ) {
            let (mut closed, mut said) = (Closed::default(), BTreeMap::<Arc<str>, Vec<(u8, u8)>>::new());
            for (name, addresses) in steps {
                let name: Arc<str> = name.to_string().into();
                match addresses {
                    Some(addresses) => {
                        let at = |(last, length): &(u8, u8)| NetworkAddress {
                            length: Some(*length),
                            ..NetworkAddress::new("", ip(*last))
                        };
                        let mut addresses_of: Vec<_> = addresses.iter().map(at).collect();
                        addresses_of.push(NetworkAddress::new("far", ip(9)));
                        closed.put(Unreadable { name: name.clone(), addresses: addresses_of }, "");
                        said.insert(name, addresses);
                    }
                    None => {
                        closed.remove(&name);
                        said.remove(&name);
                    }
                }
                for last in 0..10 {
                    let covers = |(first, length): &&(u8, u8)| (first ^ last) >> (32 - length) == 0;
                    let longest = said.values().flatten().filter(covers).map(|(_, length)| *length).max();
                    prop_assert_eq!(closed.at(ip(last)).map(|(length, _)| length), longest);
                }
            }
            said.into_keys().for_each(|name| closed.remove(&name));
            prop_assert_eq!(closed.by_range.len() + closed.by_name.len(), 0);
            prop_assert_eq!(closed.prefixes.around(ip(0)).count(), 0);
        }
    }
}
