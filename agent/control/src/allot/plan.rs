//! Which host of which ServiceEntry gets which address; pure.
//!
//! Invariants, held by `whatever_there_is_every_host_gets_addresses_of_its_own`: no two hosts have one address, nor one
//! that somebody wrote into an entry; who has a good address keeps it; done again, nothing is left to do. Of two that have
//! one address the older entry keeps it. A new address follows from the entry's and the host's name, so that an entry
//! that is made again, or whose status was lost, gets what it had (`an_entry_that_comes_back_has_its_address_again`);
//! where that one is taken, the next free one.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use k8s::live;
use model::NamespacedName;

/// `240.240.0.0/16`, as Istio.
const V4: Ipv4Addr = Ipv4Addr::new(240, 240, 0, 0);
/// How many addresses of it are used: all but the first and the last.
const V4_SIZE: u64 = (1 << 16) - 2;
/// `2001:2::/48`, as Istio.
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 2, 0, 0, 0, 0, 0, 0);
/// How many addresses of it are used: as many as are ever needed.
const V6_SIZE: u64 = 1 << 32;
/// Whether addresses are to be allotted.
const ENABLED: &str = "networking.istio.io/enable-autoallocate-ip";

/// What counts of a ServiceEntry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entry {
    /// When it was made; none is the youngest.
    pub created: Option<String>,
    /// The hosts that need addresses, each once; none where they are written, or can't be had.
    pub hosts: Vec<String>,
    /// What is written.
    pub written: Vec<IpNet>,
    /// What was allotted.
    pub allotted: Vec<(String, IpAddr)>,
}

impl Entry {
    /// As far as addresses are concerned.
    pub fn new(entry: &live::ServiceEntry) -> Self {
        let (metadata, spec) = (&entry.metadata, &entry.spec);
        let mut hosts: Vec<String> = Vec::new();
        if wants(entry) {
            for host in spec
                .hosts
                .iter()
                .filter(|host| !host.is_empty() && !host.starts_with('*'))
            {
                if !hosts.contains(host) {
                    hosts.push(host.clone());
                }
            }
        }
        let block = |text: &String| {
            text.parse()
                .ok()
                .or_else(|| Some(IpNet::from(text.parse::<IpAddr>().ok()?)))
        };
        let allotted = entry.status.addresses.iter();
        Self {
            created: metadata.creation_timestamp.clone(),
            hosts,
            written: spec.addresses.iter().filter_map(block).collect(),
            allotted: allotted
                .filter_map(|one| Some((one.host.clone().unwrap_or_default(), one.value.parse::<IpAddr>().ok()?)))
                .collect(),
        }
    }
}

/// Whether an entry's hosts are to have addresses allotted.
pub fn wants(entry: &live::ServiceEntry) -> bool {
    let found = |how: &str| how != "NONE";
    let disabled = entry
        .metadata
        .label(ENABLED)
        .is_some_and(|value| value.eq_ignore_ascii_case("false"));
    entry.spec.addresses.is_empty() && entry.spec.resolution.as_deref().is_some_and(found) && !disabled
}

/// The entries whose addresses have to be other than they are, with all that each is to have.
pub fn plan(entries: &BTreeMap<NamespacedName, Entry>) -> Vec<(NamespacedName, Vec<(String, IpAddr)>)> {
    let written: Vec<IpNet> = entries
        .values()
        .flat_map(|entry| entry.written.iter().copied())
        .collect();
    let mut by_age: Vec<(&NamespacedName, &Entry)> =
        entries.iter().filter(|(_, entry)| !entry.hosts.is_empty()).collect();
    by_age.sort_by_key(|(name, entry)| (entry.created.is_none(), entry.created.as_deref(), *name));
    let mut used = Used {
        written,
        taken: BTreeSet::new(),
    };
    let kept: Vec<BTreeMap<(&str, bool), IpAddr>> = by_age.iter().map(|(_, entry)| used.keep(entry)).collect();
    let mut changes = Vec::new();
    for ((name, entry), kept) in by_age.into_iter().zip(kept) {
        let mut all = Vec::with_capacity(2 * entry.hosts.len());
        for host in &entry.hosts {
            for v4 in [true, false] {
                let kept = kept.get(&(host.as_str(), v4)).copied();
                let address = kept.or_else(|| used.free(name, host, v4));
                all.extend(address.map(|address| (host.clone(), address)));
            }
        }
        if all != entry.allotted {
            changes.push((name.clone(), all));
        }
    }
    changes
}

struct Used {
    written: Vec<IpNet>,
    taken: BTreeSet<IpAddr>,
}

impl Used {
    /// What of an entry's addresses can stay: the first good one of a host and family.
    fn keep<'a>(&mut self, entry: &'a Entry) -> BTreeMap<(&'a str, bool), IpAddr> {
        let mut kept = BTreeMap::new();
        for (host, ip) in &entry.allotted {
            let key = (host.as_str(), ip.is_ipv4());
            if entry.hosts.contains(host) && !kept.contains_key(&key) && is_ours(*ip) && self.take(*ip) {
                kept.insert(key, *ip);
            }
        }
        kept
    }

    fn take(&mut self, ip: IpAddr) -> bool {
        !self.written.iter().any(|block| block.contains(&ip)) && self.taken.insert(ip)
    }

    /// The host's own address, or the next free one; none where all are taken.
    fn free(&mut self, entry: &NamespacedName, host: &str, v4: bool) -> Option<IpAddr> {
        let size = if v4 { V4_SIZE } else { V6_SIZE };
        let start = hash(&[&entry.namespace, &entry.name, host]) % size;
        let tries = size.min(self.taken.len() as u64 + V4_SIZE);
        (0..tries)
            .map(|step| address(v4, (start + step) % size + 1))
            .find(|ip| self.take(*ip))
    }
}

fn address(v4: bool, offset: u64) -> IpAddr {
    match v4 {
        // Both sizes are smaller than what is left of the range.
        true => Ipv4Addr::from_bits(V4.to_bits() | (offset as u32)).into(),
        false => Ipv6Addr::from_bits(V6.to_bits() | u128::from(offset)).into(),
    }
}

fn is_ours(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == V4.octets()[..2],
        IpAddr::V6(ip) => ip.octets()[..6] == V6.octets()[..6],
    }
}

/// FNV-1a: the same in every version and on every machine, which is all that is asked of it.
fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([b'/']));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Entries = BTreeMap<NamespacedName, Entry>;

    fn applied(mut entries: Entries) -> Entries {
        for (name, addresses) in plan(&entries) {
            entries.get_mut(&name).unwrap().allotted = addresses;
        }
        entries
    }

    fn entry(hosts: &[&str]) -> Entry {
        Entry {
            hosts: hosts.iter().map(ToString::to_string).collect(),
            ..Entry::default()
        }
    }

    #[test]
    fn an_entry_that_comes_back_has_its_address_again() {
        let name = NamespacedName::new("shop", "api");
        let first = applied(Entries::from([(name.clone(), entry(&["a.example", "b.example"]))]));
        let addresses = &first[&name].allotted;
        assert_eq!(addresses.len(), 4, "both families of each host: {addresses:?}");
        assert!(addresses.iter().all(|(_, ip)| is_ours(*ip)));
        let others: Entries = (0..50)
            .map(|n| (NamespacedName::new("shop", format!("o{n}")), entry(&["x"])))
            .collect();
        let mut later = applied(others);
        later.insert(name.clone(), entry(&["a.example", "b.example"]));
        assert_eq!(&applied(later)[&name].allotted, addresses);
    }

    #[test]
    fn what_is_written_is_not_allotted_and_the_older_keeps_what_two_have() {
        let shared: IpAddr = "240.240.3.4".parse().unwrap();
        let with = |created: &str| Entry {
            created: Some(created.to_owned()),
            allotted: vec![("a".to_owned(), shared)],
            ..entry(&["a"])
        };
        let (young, old) = (NamespacedName::new("a", "young"), NamespacedName::new("b", "old"));
        let mut entries = Entries::from([(young.clone(), with("2026")), (old.clone(), with("2025"))]);
        let both = applied(entries.clone());
        assert_eq!(both[&old].allotted[0].1, shared);
        assert_ne!(both[&young].allotted[0].1, shared);
        let written = Entry {
            written: vec!["240.240.3.0/24".parse().unwrap()],
            ..Entry::default()
        };
        entries.insert(NamespacedName::new("c", "written"), written);
        assert_ne!(applied(entries)[&old].allotted[0].1, shared);
    }

    #[test]
    fn who_wants_addresses() {
        let wants = |label: &str, spec: serde_json::Value| {
            let value = serde_json::json!({"metadata": {"name": "e", "namespace": "n", "labels": {ENABLED: label}}, "spec": spec});
            let live::Object::ServiceEntry(entry) = live::read(live::Kind::ServiceEntry, &value).object else {
                panic!("not read")
            };
            Entry::new(&entry).hosts
        };
        let spec = |resolution: &str| serde_json::json!({"hosts": ["a", "*.b", "a"], "resolution": resolution});
        assert_eq!(wants("true", spec("DNS")), ["a"]);
        assert_eq!(wants("", spec("STATIC")), ["a"]);
        assert!(wants("False", spec("DNS")).is_empty());
        assert!(wants("true", spec("NONE")).is_empty());
        assert!(
            wants("true", serde_json::json!({"hosts": ["a"]})).is_empty(),
            "NONE is the default"
        );
        let written = serde_json::json!({"hosts": ["a"], "resolution": "DNS", "addresses": ["1.2.3.4"]});
        assert!(wants("true", written).is_empty());
    }

    proptest! {
        #[test]
        fn whatever_there_is_every_host_gets_addresses_of_its_own(
            made in proptest::collection::vec((0..4u8, 0..6u8, proptest::collection::vec((0..4u8, 0..12u8), 0..6), 0..3u8), 0..12)
        ) {
            let entries: Entries = made.into_iter().map(|(namespace, name, allotted, created)| {
                let allotted = allotted.into_iter().map(|(host, last)| {
                    let ip = if last % 2 == 0 { address(true, last.into()) } else { address(false, last.into()) };
                    (host.to_string(), if last == 10 { "10.0.0.1".parse().unwrap() } else { ip })
                });
                let entry = Entry {
                    created: (created > 0).then(|| created.to_string()),
                    allotted: allotted.collect(),
                    written: if name == 5 { vec!["240.240.0.4/31".parse().unwrap()] } else { Vec::new() },
                    ..entry(&["0", "1", "2"])
                };
                (NamespacedName::new(namespace.to_string(), name.to_string()), entry)
            }).collect();
            let after = applied(entries);
            let mut seen = BTreeSet::new();
            for entry in after.values() {
                prop_assert_eq!(entry.allotted.len(), 6);
                for (_, ip) in &entry.allotted {
                    prop_assert!(is_ours(*ip) && seen.insert(*ip), "{}", ip);
                    prop_assert!(after.values().flat_map(|entry| &entry.written).all(|block| !block.contains(ip)));
                }
            }
            prop_assert_eq!(plan(&after), Vec::new());
        }
    }
}
