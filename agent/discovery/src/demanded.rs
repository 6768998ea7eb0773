//! On demand: the names that were asked for, which of them wait for an answer, and which mean nothing to the control
//! plane. What means nothing stays subscribed, so that it is learned when it comes to mean something; of these there are
//! [`ABSENT`] at most, then the oldest are given up.

use std::{
    collections::{BTreeMap, HashMap},
    net::IpAddr,
};

use mesh::Wanted;
use model::{NetworkAddress, canonical_ip};

use crate::decode::Object;

/// Names that mean nothing, addresses outside the mesh among them, that are remembered as such.
const ABSENT: usize = 4096;

#[derive(Debug)]
struct Demand {
    /// The address, if it is one.
    ip: Option<IpAddr>,
    /// The name of a service. What is subscribed to tells of it when it comes, so it is not asked for again.
    service: bool,
    /// A pod of this node, perhaps not yet known: never given up.
    own: bool,
    pending: bool,
    /// Its place among the absent.
    absent: Option<u64>,
}

/// The names that were asked for.
#[derive(Debug, Default)]
pub(crate) struct Demanded {
    names: HashMap<String, Demand>,
    absent: BTreeMap<u64, String>,
    next: u64,
    /// Absent, and the mesh has not been told.
    news: Vec<IpAddr>,
}

fn alias(address: &NetworkAddress) -> String {
    format!("{}/{}", address.network, canonical_ip(address.address))
}

impl Demanded {
    /// The name to subscribe to, unless that was done and the answer is awaited.
    pub(crate) fn want(&mut self, wanted: &Wanted) -> Option<String> {
        let (name, ip) = match wanted {
            Wanted::Address(address) => (alias(address), Some(canonical_ip(address.address))),
            Wanted::Workload(uid) => (uid.to_string(), None),
            Wanted::Service(name) => (name.to_string(), None),
        };
        let demand = self.names.entry(name.clone()).or_insert(Demand {
            ip,
            service: matches!(wanted, Wanted::Service(_)),
            own: matches!(wanted, Wanted::Workload(_)),
            pending: false,
            absent: None,
        });
        (!std::mem::replace(&mut demand.pending, true)).then_some(name)
    }

    /// Every name, for a new connection.
    pub(crate) fn reopen(&mut self) -> Vec<String> {
        self.names.values_mut().for_each(|demand| demand.pending = true);
        let mut names: Vec<String> = self.names.keys().cloned().collect();
        names.sort();
        names
    }

    /// There is something of this name.
    pub(crate) fn answered(&mut self, name: &str) {
        if let Some(demand) = self.names.get_mut(name) {
            demand.pending = false;
            if let Some(place) = demand.absent.take() {
                self.absent.remove(&place);
            }
        }
    }

    /// There is something with these addresses.
    pub(crate) fn found(&mut self, object: &Object) {
        if self.names.is_empty() {
            return;
        }
        match object {
            Object::Workload(workload) => {
                for ip in &workload.workload_ips {
                    self.answered(&alias(&NetworkAddress::new(workload.network.clone(), *ip)));
                }
            }
            Object::Service(service) => service.vips.iter().for_each(|vip| self.answered(&alias(vip))),
            Object::Policy(_) => {}
        }
    }

    /// There is nothing of this name.
    pub(crate) fn answered_absent(&mut self, name: &str) {
        let Some(demand) = self.names.get_mut(name) else { return };
        demand.pending = demand.service;
        if demand.absent.is_none() && !demand.own {
            demand.absent = Some(self.next);
            self.absent.insert(self.next, name.to_owned());
            self.next += 1;
            self.news.extend(demand.ip);
        }
    }

    /// Addresses that are newly known to be absent, and the names that are given up, some of them addresses.
    pub(crate) fn take_absent(&mut self) -> (Vec<IpAddr>, Vec<(String, Option<IpAddr>)>) {
        let mut given_up = Vec::new();
        while self.absent.len() > ABSENT {
            let Some((_, name)) = self.absent.pop_first() else {
                break;
            };
            let ip = self.names.remove(&name).and_then(|demand| demand.ip);
            given_up.push((name, ip));
        }
        let gone = |ip: &IpAddr| given_up.iter().any(|(_, other)| other.as_ref() == Some(ip));
        let news = std::mem::take(&mut self.news)
            .into_iter()
            .filter(|ip| !gone(ip))
            .collect();
        (news, given_up)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(last: u32) -> Wanted {
        Wanted::Address(NetworkAddress::new("n", IpAddr::from(last.to_be_bytes())))
    }

    #[test]
    fn a_name_is_asked_for_once_until_it_is_answered() {
        let mut demanded = Demanded::default();
        let name = demanded.want(&want(1)).unwrap();
        assert_eq!(name, "n/0.0.0.1");
        assert_eq!(demanded.want(&want(1)), None);
        demanded.answered(&name);
        assert_eq!(demanded.want(&want(1)), Some(name));
        assert_eq!(demanded.reopen().len(), 1);
    }

    #[test]
    fn of_addresses_that_mean_nothing_the_oldest_are_given_up() {
        let mut demanded = Demanded::default();
        let names: Vec<String> = (0..=ABSENT as u32)
            .filter_map(|number| demanded.want(&want(number)))
            .collect();
        names.iter().for_each(|name| demanded.answered_absent(name));
        let (absent, given_up) = demanded.take_absent();
        assert_eq!(
            (absent.len(), given_up),
            (ABSENT, vec![(names[0].clone(), Some(IpAddr::from([0, 0, 0, 0])))])
        );
        // What came to mean something does not count.
        demanded.answered(&names[1]);
        let again = demanded.want(&want(0)).unwrap();
        demanded.answered_absent(&again);
        assert_eq!(demanded.take_absent().1, []);
    }

    #[test]
    fn a_service_that_means_nothing_is_not_asked_for_again_until_it_is_given_up() {
        let mut demanded = Demanded::default();
        let service = Wanted::Service(model::NamespacedName::new("infra", "gone.infra.svc"));
        let own = demanded
            .want(&Wanted::Workload(model::WorkloadUid("own".into())))
            .unwrap();
        demanded.answered_absent(&own);
        let name = demanded.want(&service).unwrap();
        demanded.answered_absent(&name);
        assert_eq!(demanded.want(&service), None);
        for number in 0..ABSENT as u32 {
            let other = demanded.want(&want(number)).unwrap();
            demanded.answered_absent(&other);
        }
        assert_eq!(demanded.take_absent().1, [(name.clone(), None)]);
        assert_eq!(demanded.want(&service), Some(name));
        assert!(demanded.reopen().contains(&own));
    }
}
