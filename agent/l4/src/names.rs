//! What a pod learned by DNS: which host names an address was given under.
//!
//! ```text
//! answers (our own, or forwarded: the name that was asked, CNAMEs followed) ─► learn ─► address → host names
//! a connection to an address ──────────────────────────────────────────────► hosts ◄─┘
//! ```
//! For egress by name and for the access log. One for each pod, shared by the shards and the pod's DNS server.
//!
//! A name stays with an address for the answer's TTL, but a minute at least, since applications keep addresses longer than
//! they are told to; and for ten minutes after the last connection that used it, so that a pool that never asks again is
//! not cut off ([`MIN_LIFE`], [`LIFE_IN_USE`]; `a_name_lives_by_its_ttl_and_by_its_use`).
//!
//! Bounded: [`ADDRESSES`] addresses, the one that was learned or used longest ago goes first; [`NAMES_OF_ADDRESS`] names
//! of each (`it_is_bounded_and_the_oldest_goes`). Readers share a lock that a writer holds for a few inserts only; who
//! can't have it reads nothing of it, it never waits for a network.
//!
//! A pod chooses the name server that it asks, so a name server of its own choice can say anything. [`Source`] keeps
//! apart what the mesh and the cluster's own name servers said from what others did: only the first may permit something.
//!
//! Not kept over a restart of the agent: what a pod asked before, it has to ask again.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How many addresses are remembered for a pod.
pub const ADDRESSES: usize = 4096;

/// How many names are remembered for an address.
pub const NAMES_OF_ADDRESS: usize = 8;

/// How long a name is remembered at least, whatever its TTL.
pub const MIN_LIFE: Duration = Duration::from_secs(60);

/// How long a name is remembered at most, whatever its TTL, where nobody uses it.
pub const MAX_LIFE: Duration = Duration::from_secs(86_400);

/// How long a name is remembered after a connection used it.
pub const LIFE_IN_USE: Duration = Duration::from_secs(600);

/// Who said that a name has an address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Source {
    /// A name server that the pod chose itself: may be logged, but permits nothing.
    Elsewhere,
    /// The mesh's own answer, or a name server that the mesh's operator vouches for.
    Trusted,
}

/// The names that a pod learned.
#[derive(Debug)]
pub struct Names {
    /// Times are seconds since this.
    start: Instant,
    by_ip: RwLock<HashMap<IpAddr, Entry>>,
}

#[derive(Debug)]
struct Entry {
    /// The youngest first.
    names: Vec<Name>,
}

#[derive(Debug)]
struct Name {
    host: Arc<str>,
    source: Source,
    expires: u64,
    /// When a connection last used the address while this name lived; 0: never. So one that is over stays so, whatever other
    /// name the address is used by.
    used: AtomicU64,
}

impl Name {
    fn lives(&self, now: u64) -> bool {
        let used = self.used.load(Relaxed);
        now < self.expires || (used != 0 && now < used + LIFE_IN_USE.as_secs())
    }

    /// The last moment at which it mattered.
    fn last(&self) -> u64 {
        self.expires.max(self.used.load(Relaxed))
    }
}

impl Entry {
    /// The last moment at which it mattered.
    fn last(&self) -> u64 {
        self.names.iter().map(Name::last).max().unwrap_or_default()
    }
}

impl Default for Names {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            by_ip: RwLock::default(),
        }
    }
}

impl Names {
    /// An answer: this host has these addresses. The host's name is kept in lower case and without the final dot.
    pub fn learn(&self, host: &str, addresses: &[IpAddr], ttl: Duration, source: Source, now: Instant) {
        if addresses.is_empty() {
            return;
        }
        let host: Arc<str> = host.trim_end_matches('.').to_ascii_lowercase().into();
        let now = self.seconds(now);
        let expires = now + ttl.clamp(MIN_LIFE, MAX_LIFE).as_secs();
        let mut by_ip = self.by_ip.write().unwrap_or_else(PoisonError::into_inner);
        for ip in addresses {
            let ip = ip.to_canonical();
            if by_ip.len() >= ADDRESSES && !by_ip.contains_key(&ip) {
                make_room(&mut by_ip, now);
            }
            let entry = by_ip.entry(ip).or_insert_with(|| Entry {
                names: Vec::with_capacity(1),
            });
            let known = entry.names.iter().position(|name| name.host == host);
            let before = known.map(|position| entry.names.remove(position));
            // What an untrusted server repeats takes nothing away from what a trusted one said.
            let before = before.filter(|before| before.lives(now));
            let used = AtomicU64::new(before.as_ref().map_or(0, |before| before.used.load(Relaxed)));
            let (source, expires) = match before {
                Some(before) if before.source > source => (before.source, before.expires),
                _ => (source, expires),
            };
            entry.names.retain(|name| name.lives(now));
            let name = Name {
                host: host.clone(),
                source,
                expires,
                used,
            };
            entry.names.insert(0, name);
            forget_one_too_many(&mut entry.names);
        }
    }

    /// The host names of an address that are in force, the youngest first, with who said so.
    pub fn hosts(&self, ip: IpAddr, now: Instant) -> Vec<(Arc<str>, Source)> {
        let now = self.seconds(now);
        let by_ip = self.by_ip.read().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = by_ip.get(&ip.to_canonical()) else {
            return Vec::new();
        };
        let living = entry.names.iter().filter(|name| name.lives(now));
        living.map(|name| (name.host.clone(), name.source)).collect()
    }

    /// The name that an address was last given under, for the log.
    pub fn host(&self, ip: IpAddr, now: Instant) -> Option<Arc<str>> {
        let now = self.seconds(now);
        let by_ip = self.by_ip.read().unwrap_or_else(PoisonError::into_inner);
        let entry = by_ip.get(&ip.to_canonical())?;
        let name = entry.names.iter().find(|name| name.lives(now))?;
        Some(name.host.clone())
    }

    /// A connection to this address was made by one of its names: they live on. Nothing where they are over.
    pub fn used(&self, ip: IpAddr, now: Instant) {
        let now = self.seconds(now);
        let by_ip = self.by_ip.read().unwrap_or_else(PoisonError::into_inner);
        let Some(entry) = by_ip.get(&ip.to_canonical()) else {
            return;
        };
        let living = entry.names.iter().filter(|name| name.lives(now));
        living.for_each(|name| name.used.store(now, Relaxed));
    }

    /// How many addresses are remembered.
    pub fn len(&self) -> usize {
        self.by_ip.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether nothing was learned.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Never 0, which means "never".
    fn seconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_secs() + 1
    }
}

/// Drops what is over; if that is nothing, an eighth: what mattered last the longest ago.
fn make_room(by_ip: &mut HashMap<IpAddr, Entry>, now: u64) {
    by_ip.retain(|_, entry| entry.names.iter().any(|name| name.lives(now)));
    if by_ip.len() < ADDRESSES {
        return;
    }
    let mut ages: Vec<u64> = by_ip.values().map(Entry::last).collect();
    let (_, limit, _) = ages.select_nth_unstable(ADDRESSES / 8);
    let limit = *limit;
    let mut to_go = ADDRESSES / 8;
    by_ip.retain(|_, entry| {
        let goes = to_go > 0 && entry.last() <= limit;
        to_go -= usize::from(goes);
        !goes
    });
}

/// What others said goes before what is trusted, and the old before the young.
fn forget_one_too_many(names: &mut Vec<Name>) {
    if names.len() <= NAMES_OF_ADDRESS {
        return;
    }
    let untrusted = names.iter().rposition(|name| name.source == Source::Elsewhere);
    names.remove(untrusted.unwrap_or(names.len() - 1));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn hosts(names: &Names, address: &str, now: Instant) -> Vec<String> {
        let hosts = names.hosts(ip(address), now);
        hosts.into_iter().map(|(host, _)| host.to_string()).collect()
    }

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn an_address_has_the_names_it_was_given_under_the_youngest_first() {
        let (names, now) = (Names::default(), Instant::now());
        names.learn(
            "A.example.com.",
            &[ip("192.0.2.1"), ip("192.0.2.2")],
            HOUR,
            Source::Trusted,
            now,
        );
        names.learn("b.example.com", &[ip("::ffff:192.0.2.1")], HOUR, Source::Trusted, now);
        assert_eq!(hosts(&names, "192.0.2.1", now), ["b.example.com", "a.example.com"]);
        assert_eq!(hosts(&names, "192.0.2.2", now), ["a.example.com"]);
        assert_eq!(names.host(ip("192.0.2.1"), now).as_deref(), Some("b.example.com"));
        assert!(hosts(&names, "192.0.2.3", now).is_empty());
    }

    #[test]
    fn a_name_that_is_over_is_not_revived_by_another_of_its_address() {
        let (names, now) = (Names::default(), Instant::now());
        let address = ip("192.0.2.1");
        let after = |seconds| now + Duration::from_secs(seconds);
        names.learn("a", &[address], Duration::from_secs(5), Source::Trusted, now);
        names.learn("b", &[address], Duration::from_secs(3600), Source::Trusted, now);
        assert_eq!(hosts(&names, "192.0.2.1", after(100)), ["b"]);
        names.used(address, after(100));
        assert_eq!(hosts(&names, "192.0.2.1", after(100)), ["b"]);
    }

    #[test]
    fn a_name_lives_by_its_ttl_and_by_its_use() {
        let (names, now) = (Names::default(), Instant::now());
        let address = ip("192.0.2.1");
        names.learn("a", &[address], Duration::from_secs(5), Source::Trusted, now);
        let after = |seconds| now + Duration::from_secs(seconds);
        assert_eq!(hosts(&names, "192.0.2.1", after(59)), ["a"]);
        assert!(hosts(&names, "192.0.2.1", after(61)).is_empty());
        names.used(address, after(61));
        assert!(
            hosts(&names, "192.0.2.1", after(61)).is_empty(),
            "a use revived what was over"
        );
        names.used(address, after(50));
        assert_eq!(hosts(&names, "192.0.2.1", after(640)), ["a"]);
        names.used(address, after(640));
        assert_eq!(hosts(&names, "192.0.2.1", after(1200)), ["a"]);
        assert!(hosts(&names, "192.0.2.1", after(1300)).is_empty());
        names.learn("b", &[address], Duration::MAX, Source::Trusted, after(1300));
        assert!(hosts(&names, "192.0.2.1", after(1300 + 86_401)).is_empty());
    }

    #[test]
    fn it_is_bounded_and_the_oldest_goes() {
        let (names, now) = (Names::default(), Instant::now());
        for number in 0..3 * ADDRESSES as u32 {
            let address = IpAddr::from(number.to_be_bytes());
            names.learn(
                "x",
                &[address],
                HOUR,
                Source::Trusted,
                now + Duration::from_secs(u64::from(number)),
            );
            assert!(names.len() <= ADDRESSES);
        }
        let last = 3 * ADDRESSES as u32 - 1;
        let then = now + Duration::from_secs(u64::from(last));
        assert!(!names.hosts(IpAddr::from(last.to_be_bytes()), then).is_empty());
        for number in 0..100 {
            names.learn(&format!("n{number}"), &[ip("10.0.0.1")], HOUR, Source::Trusted, then);
        }
        let known = hosts(&names, "10.0.0.1", then);
        assert_eq!(known.len(), NAMES_OF_ADDRESS);
        assert_eq!(known[0], "n99");
    }

    #[test]
    fn what_a_server_of_the_pods_choice_says_is_never_trusted_and_takes_nothing_away() {
        let (names, now) = (Names::default(), Instant::now());
        let address = ip("192.0.2.1");
        names.learn("good", &[address], HOUR, Source::Trusted, now);
        for number in 0..100 {
            names.learn(&format!("bad{number}"), &[address], HOUR, Source::Elsewhere, now);
        }
        names.learn("good", &[address], HOUR, Source::Elsewhere, now);
        let trusted: Vec<_> = names
            .hosts(address, now)
            .into_iter()
            .filter(|(_, source)| *source == Source::Trusted)
            .map(|(host, _)| host.to_string())
            .collect();
        assert_eq!(trusted, ["good"]);
    }
}
