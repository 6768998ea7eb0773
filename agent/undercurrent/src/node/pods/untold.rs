//! Pods that the API has and nobody told this agent of: they ran before it was installed, or they are of a namespace that
//! the CNI plugin leaves out and no agent answered it.
//!
//! ```text
//! pods of the API without a record ─┐
//! named network namespaces ─────────┴─► place ─► the one with the pod's addresses: a record, as if its ADD had come
//!                                          └───► none, several, or another pod's: said once, tried again
//! ```
//! A mix-up would give a pod another's identity: the addresses and the namespace must be nobody else's
//! (`what_may_be_anothers_is_nobodys`), what is told by ADD goes before what was found, and what the API takes back is
//! dropped. After a boot the API may have pods with addresses that others were given since
//! (`after_a_boot_only_what_the_api_goes_on_saying_counts`). Nothing is looked for while every pod has a record.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use capture::NamedNetns;
use model::NamespacedName;
use tokio::time::Instant;

use super::{expectation::Oracle, pod::Pod, reconciler::Reconciler};
use crate::node::{
    kube_source::{Cluster, UntoldPod},
    records::PodRecord,
};

/// How long the API may have a pod with the addresses of a sandbox that is gone.
const STALE: Duration = Duration::from_secs(30);
/// How long after the machine's boot kubelets may begin to say what has become of their pods.
const BOOT: Duration = Duration::from_secs(300);

/// A pod with its addresses.
type Holder = (NamespacedName, Vec<IpAddr>);

/// Where named namespaces are, and what it means for a pod if its own is not found.
struct Place<'p> {
    directory: &'p Path,
    mode: &'static str,
}

/// Looks for them, and remembers in vain for which.
#[derive(Default)]
pub(super) struct Lookout {
    missed: BTreeMap<NamespacedName, (UntoldPod, Miss)>,
    /// Since when the API has said the same of them.
    said: BTreeMap<NamespacedName, (UntoldPod, Instant)>,
    /// Whose sandbox this agent has lately been told to be gone.
    gone: BTreeMap<NamespacedName, Instant>,
}

/// Why a pod has no record still.
#[derive(Clone, Debug, PartialEq)]
enum Miss {
    Nowhere,
    Several(Vec<PathBuf>),
    Anothers(NamespacedName),
    Failed(String),
}

impl fmt::Display for Miss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nowhere => f.write_str("no network namespace there has its addresses"),
            Self::Several(paths) => write!(f, "several network namespaces have its addresses: {paths:?}"),
            Self::Anothers(pod) => write!(
                f,
                "its addresses, or the network namespace that has them, may be those of {pod}"
            ),
            Self::Failed(error) => f.write_str(error),
        }
    }
}

impl Lookout {
    /// A pod's sandbox is gone.
    pub fn ended(&mut self, pod: &NamespacedName) {
        self.gone.retain(|_, since| since.elapsed() < STALE);
        self.gone.insert(pod.clone(), Instant::now());
    }

    /// Those that were looked for in vain.
    pub fn missed(&self) -> BTreeSet<NamespacedName> {
        self.missed.keys().cloned().collect()
    }

    /// The records of those that are found. Between the regular looks only for pods that are new and run: one that starts is
    /// about to be told of.
    async fn look(
        &mut self,
        cluster: &Cluster,
        records: impl Iterator<Item = &PodRecord>,
        place: Place<'_>,
        regular: bool,
    ) -> Vec<PodRecord> {
        let records: BTreeMap<_, _> = records.map(|record| (&record.pod, record)).collect();
        self.gone.retain(|_, since| since.elapsed() < STALE);
        let untold = cluster.untold(|pod| records.contains_key(pod) || self.gone.contains_key(pod));
        if untold.is_empty() {
            (self.missed, self.said) = Default::default();
            return Vec::new();
        }
        let mut untold = self.settled(untold, uptime(), Instant::now());
        self.missed
            .retain(|pod, _| untold.iter().any(|untold| untold.pod == *pod));
        untold.retain(|untold| regular || untold.running && !self.is_missed(untold));
        if untold.is_empty() {
            return Vec::new();
        }
        let taken: Vec<_> = records.values().map(|record| record.netns.clone()).collect();
        let directory = place.directory.to_owned();
        let looked = tokio::task::spawn_blocking(move || capture::named_netns(&directory, &taken)).await;
        let looked = match looked {
            Ok(looked) => looked.map_err(|error| Miss::Failed(error.to_string())),
            Err(_ended) => return Vec::new(),
        };
        let mut holders = cluster.holders();
        holders.extend(
            records
                .values()
                .map(|record| (record.pod.clone(), record.addresses.clone())),
        );
        let mut found = Vec::new();
        for untold in untold {
            let placed = looked.as_ref().map_err(Miss::clone);
            match placed.and_then(|namespaces| netns_of(&untold, namespaces, &holders)) {
                Ok(netns) => {
                    self.missed.remove(&untold.pod);
                    found.push(record(untold, netns));
                }
                Err(miss) => self.miss(untold, miss, &place),
            }
        }
        found
    }

    /// Those of whom the API says what still holds.
    fn settled(&mut self, untold: Vec<UntoldPod>, uptime: Duration, now: Instant) -> Vec<UntoldPod> {
        let mut before = std::mem::take(&mut self.said);
        let mut settled = Vec::new();
        for untold in untold {
            let before = before
                .remove(&untold.pod)
                .filter(|(before, _)| is_same(before, &untold));
            let since = before.map_or(now, |(_, since)| since);
            self.said.insert(untold.pod.clone(), (untold.clone(), since));
            if uptime > BOOT || now.duration_since(since) > STALE {
                settled.push(untold);
            }
        }
        settled
    }

    fn is_missed(&self, untold: &UntoldPod) -> bool {
        let missed = self.missed.get(&untold.pod);
        missed.is_some_and(|(before, _)| is_same(before, untold))
    }

    /// Says it once.
    fn miss(&mut self, untold: UntoldPod, miss: Miss, place: &Place<'_>) {
        let known = self.is_missed(&untold) && self.missed.get(&untold.pod).is_some_and(|(_, before)| *before == miss);
        if !known {
            let so = match place.mode {
                "iptables" => "it is not captured",
                _ => "it can open no TCP connection",
            };
            tracing::warn!(
                pod = %untold.pod,
                addresses = ?untold.addresses,
                directory = %place.directory.display(),
                "nobody told the agent of this pod, and {so}: {miss}. Delete the pod, so that it starts anew, or let --netns-dir \
                 name where the container runtime keeps network namespaces"
            );
        }
        self.missed.insert(untold.pod.clone(), (untold, miss));
    }
}

impl Reconciler {
    /// Pods of the API that nobody told of get a record where their namespace is found, and lose it when the API has them no
    /// more.
    pub(super) async fn look_for_untold(&mut self, regular: bool) {
        let Oracle::Cluster(pods) = &self.parts.oracle else {
            return;
        };
        let cluster = pods.cluster.clone();
        let is_denied = |pod: &Pod| {
            let PodRecord {
                pod,
                addresses,
                found,
                api,
                ..
            } = &pod.record;
            *found && api.as_ref().is_none_or(|api| cluster.denies(pod, &api.uid, addresses))
        };
        for key in self.which(is_denied) {
            tracing::info!(pod = %key, "the API has it no more with the addresses that it was found by");
            self.drop_pod(&key).await;
        }
        let place = Place {
            directory: &self.parts.netns_dir,
            mode: self.parts.capture.mode(),
        };
        let records = self.pods.values().map(|pod| &pod.record);
        for record in self.lookout.look(&cluster, records, place, regular).await {
            let (key, netns) = (record.pod.clone(), record.netns.display().to_string());
            match self.keep(record).await {
                Ok(()) => tracing::info!(pod = %key, netns, "found by its addresses: nobody had told the agent of it"),
                Err(error) => tracing::warn!(pod = %key, error, "cannot take in a pod that was found"),
            }
        }
    }

    /// What is told goes before what was found: the API may have had a pod with the addresses of one that has them now.
    pub(super) async fn make_way(&mut self, told: &PodRecord) {
        let is_rival = |pod: &Pod| {
            let found = &pod.record;
            let shares = found.netns == told.netns || found.addresses.iter().any(|ip| told.addresses.contains(ip));
            found.found && found.pod != told.pod && shares
        };
        for key in self.which(is_rival) {
            tracing::warn!(pod = %key, told = %told.pod, "its addresses are another pod's, as the container runtime says");
            self.drop_pod(&key).await;
        }
    }
}

/// Whether both are of one pod in one sandbox.
fn is_same(a: &UntoldPod, b: &UntoldPod) -> bool {
    a.api.uid == b.api.uid && a.addresses == b.addresses
}

/// How long the machine has been up; where that can't be read it is taken for new.
fn uptime() -> Duration {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split('.').next().and_then(|seconds| seconds.parse().ok());
    Duration::from_secs(seconds.unwrap_or_default())
}

fn record(untold: UntoldPod, netns: &NamedNetns) -> PodRecord {
    PodRecord {
        pod: untold.pod,
        netns: netns.path.clone(),
        addresses: untold.addresses,
        container_id: String::new(),
        found: true,
        starting: false,
        captured: None,
        api: Some(untold.api),
    }
}

/// The only namespace that has all addresses of the pod, and none of another pod.
fn netns_of<'n>(untold: &UntoldPod, namespaces: &'n [NamedNetns], holders: &[Holder]) -> Result<&'n NamedNetns, Miss> {
    let another = |of: &[IpAddr]| {
        let mut others = holders.iter().filter(|(pod, _)| *pod != untold.pod);
        others
            .find(|(_, addresses)| addresses.iter().any(|ip| of.contains(ip)))
            .map(|(pod, _)| Miss::Anothers(pod.clone()))
    };
    let has_all = |netns: &&NamedNetns| untold.addresses.iter().all(|ip| netns.addresses.contains(ip));
    let fitting: Vec<_> = namespaces.iter().filter(has_all).collect();
    if let Some(miss) = another(&untold.addresses) {
        return Err(miss);
    }
    match fitting[..] {
        [] => Err(Miss::Nowhere),
        [netns] => another(&netns.addresses).map_or(Ok(netns), Err),
        _ => Err(Miss::Several(fitting.iter().map(|netns| netns.path.clone()).collect())),
    }
}

#[cfg(test)]
mod tests {
    use model::{NonTcp, PodSettings};

    use super::*;
    use crate::node::kube_source::ApiPod;

    fn ips(text: &str) -> Vec<IpAddr> {
        text.split_whitespace().map(|ip| ip.parse().unwrap()).collect()
    }

    fn untold(addresses: &str) -> UntoldPod {
        UntoldPod {
            pod: NamespacedName::new("shop", "web"),
            addresses: ips(addresses),
            running: true,
            api: ApiPod {
                uid: "u1".to_owned(),
                service_account: "web".into(),
                in_mesh: false,
                left_out: None,
                non_tcp: NonTcp::default(),
                settings: PodSettings::default(),
                problems: Vec::new(),
            },
        }
    }

    fn netns(name: &str, addresses: &str) -> NamedNetns {
        NamedNetns {
            path: name.into(),
            addresses: ips(addresses),
        }
    }

    #[test]
    fn the_namespace_with_all_of_the_pods_addresses_is_its_own() {
        let namespaces = [
            netns("a", "127.0.0.1 ::1 10.0.0.1 fd00::1 fe80::1"),
            netns("b", "127.0.0.1 ::1 10.0.0.2 fd00::2 fe80::1"),
            netns("c", "127.0.0.1 10.0.0.3"),
            netns("empty", ""),
        ];
        let holders = [
            (NamespacedName::new("shop", "web"), ips("10.0.0.2 fd00::2")),
            (NamespacedName::new("shop", "other"), ips("10.0.0.1 fd00::1")),
        ];
        let place = |addresses| netns_of(&untold(addresses), &namespaces, &holders).map(|netns| netns.path.clone());
        assert_eq!(place("10.0.0.2 fd00::2"), Ok("b".into()));
        assert_eq!(place("10.0.0.2"), Ok("b".into()));
        assert_eq!(place("10.0.0.3"), Ok("c".into()));
        assert_eq!(place("10.0.0.3 fd00::3"), Err(Miss::Nowhere));
        assert_eq!(place("10.0.0.9"), Err(Miss::Nowhere));
    }

    #[test]
    fn what_may_be_anothers_is_nobodys() {
        let other = NamespacedName::new("shop", "other");
        let holders = [(other.clone(), ips("10.0.0.1"))];
        let place = |addresses, namespaces: &[NamedNetns]| netns_of(&untold(addresses), namespaces, &holders).cloned();
        let anothers = Err(Miss::Anothers(other));
        // Another pod is said to have the address.
        assert_eq!(place("10.0.0.1", &[netns("a", "10.0.0.1")]), anothers);
        // The namespace has another pod's address besides.
        assert_eq!(place("10.0.0.2", &[netns("a", "10.0.0.1 10.0.0.2")]), anothers);
        let two = [netns("a", "10.0.0.2"), netns("b", "10.0.0.2 10.0.0.8")];
        let several = Err(Miss::Several(vec!["a".into(), "b".into()]));
        assert_eq!(place("10.0.0.2", &two), several);
    }

    #[test]
    fn after_a_boot_only_what_the_api_goes_on_saying_counts() {
        let (mut lookout, start) = (Lookout::default(), Instant::now());
        let mut settled = |addresses, uptime, after| {
            let settled = lookout.settled(
                vec![untold(addresses)],
                Duration::from_secs(uptime),
                start + Duration::from_secs(after),
            );
            !settled.is_empty()
        };
        assert!(!settled("10.0.0.1", 20, 0));
        assert!(!settled("10.0.0.1", 40, 20));
        assert!(!settled("10.0.0.2", 60, 40), "it has another sandbox");
        assert!(!settled("10.0.0.2", 80, 60));
        assert!(settled("10.0.0.2", 100, 80));
        assert!(settled("10.0.0.3", 4000, 4000));
        assert!(uptime() > Duration::ZERO);
    }
}
