//! One moment's knowledge, indexed by what decisions look up.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

use model::{
    LoadBalancingMode, MeshSettings, NamespacedName, NetworkMode, OutboundTrafficPolicy, Policy, Scope, Service,
    Workload, WorkloadUid, canonical_ip,
};
use policy::{Facts, Reason, Verdict};

use crate::{
    EndpointList,
    claims::{Change, Claimant, Held},
    endpoints::Endpoints,
    hosts::Hosts,
    ranges::{Prefixes, Range, bits, range_of},
    trie::Trie,
    unreadable::Closed,
};

/// Namespace → its service.
type KeptServices = BTreeMap<Arc<str>, Arc<Service>>;
/// A range, of everybody's or of one namespace's.
type ServiceClaim = (Range, Option<Arc<str>>);
type PoliciesByName = BTreeMap<Arc<str>, Arc<Policy>>;

/// One moment's knowledge. Immutable; every index agrees with the others. Cheap to clone: snapshots share what did not
/// change.
#[derive(Clone, Default, Debug)]
pub struct Snapshot {
    pub(crate) generation: u64,
    pub(crate) ready: bool,
    pub(crate) network: Arc<str>,
    pub(crate) settings: Arc<MeshSettings>,
    pub(crate) outbound: Option<Arc<OutboundTrafficPolicy>>,
    pub(crate) workloads: Held<Workload>,
    pub(crate) services: Held<Service>,
    /// Of the services' addresses.
    prefixes: Prefixes,
    /// Those that are kept to their namespaces, by what they claim there.
    kept: Trie<Range, Arc<KeptServices>>,
    hosts: Hosts,
    pub(crate) closed: Closed,
    endpoints: Trie<NamespacedName, Arc<Endpoints>>,
    policies: Trie<NamespacedName, Arc<Policy>>,
    policies_by_namespace: Trie<Arc<str>, Arc<PoliciesByName>>,
    policies_of_mesh: Arc<BTreeMap<NamespacedName, Arc<Policy>>>,
    /// The node's own pods that the mesh has not announced as they are: see [`crate::Locals`].
    pub(crate) unannounced: Arc<HashMap<WorkloadUid, Arc<Workload>>>,
    pub(crate) unannounced_by_ip: Arc<HashMap<IpAddr, Arc<Workload>>>,
    /// On demand: the addresses that were asked for and of which the control plane knows nothing.
    pub(crate) on_demand: bool,
    pub(crate) absent: Trie<IpAddr, ()>,
}

impl Claimant for Workload {
    type Key = WorkloadUid;
    type Claim = IpAddr;

    fn key(&self) -> WorkloadUid {
        self.uid.clone()
    }

    fn claims(&self, network: &str) -> BTreeSet<IpAddr> {
        // A host-network workload's address is its node's: it names no workload.
        if self.network_mode == NetworkMode::HostNetwork || *self.network != *network {
            return BTreeSet::new();
        }
        self.workload_ips.iter().map(|ip| canonical_ip(*ip)).collect()
    }
}

impl Claimant for Service {
    type Key = NamespacedName;
    type Claim = ServiceClaim;

    fn key(&self) -> NamespacedName {
        self.key()
    }

    fn goes_first(&self) -> bool {
        self.canonical
    }

    /// Two namespaces that each keep a service to themselves may have the same address for it.
    fn claims(&self, network: &str) -> BTreeSet<ServiceClaim> {
        let scope = (!is_for_all(self)).then(|| self.namespace.clone());
        let own = self.vips.iter().filter(|vip| *vip.network == *network);
        let ranges = own.filter_map(range_of);
        ranges.map(|range| (range, scope.clone())).collect()
    }
}

impl Snapshot {
    pub(crate) fn nothing(network: &str, scope: crate::Scope) -> Self {
        Self {
            network: network.into(),
            on_demand: scope == crate::Scope::OnDemand,
            outbound: Some(Arc::default()),
            ..Self::default()
        }
    }

    pub(crate) fn apply_workload(&mut self, change: Change<Workload>) {
        match change {
            Change::Gained(workload) => {
                for service in workload.services.keys() {
                    Arc::make_mut(self.endpoints.entry(service)).insert(&workload);
                }
            }
            Change::Lost(workload) => {
                for service in workload.services.keys() {
                    let endpoints = Arc::make_mut(self.endpoints.entry(service));
                    endpoints.remove(&workload);
                    if endpoints.is_empty() {
                        self.endpoints.remove(service);
                    }
                }
            }
        }
    }

    pub(crate) fn apply_service(&mut self, change: Change<Service>) {
        match change {
            Change::Gained(service) => {
                for (range, scope) in service.claims(&self.network) {
                    self.prefixes.add(range);
                    if let Some(namespace) = scope {
                        Arc::make_mut(self.kept.entry(&range)).insert(namespace, service.clone());
                    }
                }
                self.hosts.add(&service);
            }
            Change::Lost(service) => {
                for (range, scope) in service.claims(&self.network) {
                    self.prefixes.remove(range);
                    if let Some(namespace) = scope {
                        let kept = Arc::make_mut(self.kept.entry(&range));
                        kept.remove(&namespace);
                        if kept.is_empty() {
                            self.kept.remove(&range);
                        }
                    }
                }
                self.hosts.remove(&service);
            }
        }
    }

    pub(crate) fn put_policy(&mut self, policy: Arc<Policy>) {
        let key = policy.key();
        // The same one again stays the one that is there: see `standing`.
        if self.policies.get(&key) == Some(&policy) {
            return;
        }
        self.remove_policy(&key);
        match policy.scope {
            Scope::Global => {
                Arc::make_mut(&mut self.policies_of_mesh).insert(key.clone(), policy.clone());
            }
            Scope::Namespace => {
                let of_namespace = self.policies_by_namespace.entry(&policy.namespace);
                Arc::make_mut(of_namespace).insert(policy.name.clone(), policy.clone());
            }
            Scope::WorkloadSelector => {}
        }
        self.policies.insert(key, policy);
    }

    pub(crate) fn remove_policy(&mut self, key: &NamespacedName) {
        let Some(policy) = self.policies.remove(key) else {
            return;
        };
        match policy.scope {
            Scope::Global => {
                Arc::make_mut(&mut self.policies_of_mesh).remove(key);
            }
            Scope::Namespace => {
                let of_namespace = Arc::make_mut(self.policies_by_namespace.entry(&policy.namespace));
                of_namespace.remove(&policy.name);
                if of_namespace.is_empty() {
                    self.policies_by_namespace.remove(&policy.namespace);
                }
            }
            Scope::WorkloadSelector => {}
        }
    }

    /// Counts the snapshots; 0 is the empty one before anything was known.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Whether what is known is the mesh's, and not only the node's own.
    pub fn ready(&self) -> bool {
        self.ready
    }

    /// What holds for the whole mesh.
    pub fn settings(&self) -> &MeshSettings {
        &self.settings
    }

    /// The network that this node is of; only addresses of it are looked up.
    pub fn network(&self) -> &Arc<str> {
        &self.network
    }

    /// Every workload that the mesh announced, in no order.
    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.by_key.values()
    }

    /// Every service, in no order.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.by_key.values()
    }

    /// Every policy, in no order.
    pub fn policies(&self) -> impl Iterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// How many workloads, services and policies there are.
    pub fn counts(&self) -> Counts {
        Counts {
            workloads: self.workloads.by_key.len(),
            services: self.services.by_key.len(),
            policies: self.policies.len(),
        }
    }

    /// The workload of this uid: as the mesh announced it, or, for a pod of this node that it has not announced as it
    /// is, as the node knows it.
    pub fn workload(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        self.unannounced(uid).or_else(|| self.workloads.by_key.get(uid))
    }

    pub(crate) fn unannounced(&self, uid: &WorkloadUid) -> Option<&Arc<Workload>> {
        // Nearly always there is none, and then nothing is hashed.
        (!self.unannounced.is_empty()).then(|| self.unannounced.get(uid))?
    }

    /// The workload of this address in the node's network; none for a host-network one, whose address is its node's.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<&Arc<Workload>> {
        let ip = canonical_ip(ip);
        let of_node = || (!self.unannounced_by_ip.is_empty()).then(|| self.unannounced_by_ip.get(&ip))?;
        self.workloads.by_claim.get(&ip).or_else(of_node)
    }

    /// The service of this key.
    pub fn service(&self, key: &NamespacedName) -> Option<&Arc<Service>> {
        self.services.by_key.get(key)
    }

    /// The service of exactly this host name as a namespace sees it: its own first, then the canonical one. The name is in
    /// lower case and has no final dot; a wildcard's is `*.example.com`.
    pub fn service_by_host(&self, host: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.hosts.get(host, namespace)
    }

    /// The service whose host name is the longest wildcard that this name is under, as a namespace sees it.
    pub fn service_by_wildcard(&self, host: &str, namespace: &str) -> Option<&Arc<Service>> {
        self.hosts.wildcard(host, namespace)
    }

    /// The service with this virtual address, or else with the longest range that it is in, in the node's network; where
    /// only namespaces have one for themselves, that of the first of them. Who dials it may see another one.
    pub fn service_by_vip(&self, ip: IpAddr) -> Option<&Arc<Service>> {
        self.services_by_vip(ip).next()
    }

    /// The same as a namespace sees it.
    pub fn service_by_vip_in(&self, ip: IpAddr, namespace: &str) -> Option<&Arc<Service>> {
        match self.service_seen_in(namespace, canonical_ip(ip)) {
            Seen::Service(_, service) => Some(service),
            Seen::Hidden | Seen::Nothing => None,
        }
    }

    /// All that have the longest of the ranges that the address is in; what is everybody's first.
    pub(crate) fn services_by_vip(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let mut around = self.ranges_around(canonical_ip(ip));
        let found = around.find(|range| self.services_of(*range).next().is_some());
        found.into_iter().flat_map(|range| self.services_of(range))
    }

    /// Who has exactly this range: for everybody, and for single namespaces.
    fn services_of(&self, range: Range) -> impl Iterator<Item = &Arc<Service>> {
        let kept = self.kept.get(&range).into_iter().flat_map(|kept| kept.values());
        self.services.by_claim.get(&(range, None)).into_iter().chain(kept)
    }

    /// The ranges that the address might be in, itself first, then the longest first.
    fn ranges_around(&self, ip: IpAddr) -> impl Iterator<Item = Range> + '_ {
        std::iter::once((ip, bits(ip))).chain(self.prefixes.around(ip))
    }

    /// What stands at an address for who is in a namespace. A service that another namespace keeps to itself is not there;
    /// its own one goes before everybody's of the same range. But one that has its name and address by Kubernetes is
    /// there for all who dial it: `exportTo` hides the name, what keeps them out is policy, and passing them around the
    /// mesh would be plaintext.
    pub(crate) fn service_seen_in(&self, namespace: &str, ip: IpAddr) -> Seen<'_> {
        let mut is_hidden = false;
        for range in self.ranges_around(ip) {
            if let Some(service) = self.service_seen_of(namespace, range) {
                return Seen::Service(range.1, service);
            }
            is_hidden |= self.kept_of(range).is_some();
        }
        if is_hidden { Seen::Hidden } else { Seen::Nothing }
    }

    /// The service that a namespace sees of exactly this range.
    fn service_seen_of(&self, namespace: &str, range: Range) -> Option<&Arc<Service>> {
        let own = self.kept_of(range).and_then(|kept| kept.get(namespace));
        own.or_else(|| self.services.by_claim.get(&(range, None)))
    }

    fn kept_of(&self, range: Range) -> Option<&KeptServices> {
        // Nearly always there is none, and then nothing is hashed.
        (self.kept.len() > 0)
            .then(|| self.kept.get(&range))?
            .map(|kept| &**kept)
    }

    /// The service that has a workload's address for its own, is served there and goes before it: by its ports, and through
    /// its waypoint. The workload itself is met by who sends for the service, its waypoint, and by itself; and by all where
    /// the service is not more than a way to the same place, in plaintext.
    pub fn service_before(&self, source: &Workload, workload: &Workload, ip: IpAddr) -> Option<&Arc<Service>> {
        if workload.services.is_empty() || workload.uid == source.uid {
            return None;
        }
        let ip = canonical_ip(ip);
        let service = self.service_seen_of(&source.namespace, (ip, bits(ip)))?;
        let mut waypoints = service.waypoints().peekable();
        let balancing = service.load_balancing.as_ref();
        let passes =
            waypoints.peek().is_none() && balancing.is_some_and(|it| it.mode == LoadBalancingMode::Passthrough);
        let is_endpoint = workload.services.contains_key(&service.key());
        let goes_before = is_endpoint && !passes && !waypoints.any(|waypoint| self.is_at(source, waypoint));
        goes_before.then_some(service)
    }

    /// Every service that has this address, or a range that it is in, in the node's network; the longest range first.
    pub(crate) fn services_around(&self, ip: IpAddr) -> impl Iterator<Item = &Arc<Service>> {
        let ranges = self.ranges_around(canonical_ip(ip));
        ranges.flat_map(|range| self.services_of(range))
    }

    /// The healthy endpoints of a service.
    pub fn endpoints(&self, service: &NamespacedName) -> &EndpointList {
        let endpoints = self.endpoints.get(service);
        endpoints.map_or(EndpointList::EMPTY, |endpoints| &endpoints.healthy)
    }

    /// The endpoints that are not healthy; for services to which that does not matter.
    pub fn unhealthy_endpoints(&self, service: &NamespacedName) -> &EndpointList {
        let endpoints = self.endpoints.get(service);
        endpoints.map_or(EndpointList::EMPTY, |endpoints| &endpoints.unhealthy)
    }

    /// The policies that concern a workload; `Err` names one that it is under and that is not known.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Result<&'a Policy, NamespacedName>> + 'a {
        self.shared_policies_for(workload)
            .map(|policy| policy.map(|policy| &**policy))
    }

    pub(crate) fn shared_policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = Result<&'a Arc<Policy>, NamespacedName>> + 'a {
        let of_namespace = self.policies_by_namespace.get(&workload.namespace);
        let of_namespace = of_namespace.into_iter().flat_map(|policies| policies.values());
        let selected = workload
            .authorization_policies
            .iter()
            .map(|key| self.policies.get(key).ok_or_else(|| key.clone()));
        self.policies_of_mesh
            .values()
            .chain(of_namespace)
            .map(Ok)
            .chain(selected)
    }

    /// Whether there is anything that may refuse a connection to this workload: a policy, or a waypoint that all has to come
    /// through.
    pub fn restricts(&self, workload: &Workload) -> bool {
        workload.waypoint.is_some() || self.shared_policies_for(workload).next().is_some()
    }

    /// Whether a connection to this workload may be, and what decided. A pod of this node that the mesh has not
    /// announced takes none, since its policies are not known; one with a waypoint takes only what came through it.
    pub fn verdict(&self, facts: &Facts, workload: &Workload) -> Verdict {
        if !self.ready() {
            return Verdict::deny(Reason::NoKnowledge);
        }
        if self.unannounced(&workload.uid).is_some() {
            return Verdict::deny(Reason::NotAnnounced);
        }
        match self.past_waypoint(facts, workload) {
            Some(reason) => Verdict::deny(reason),
            None => policy::decide(facts, self.policies_for(workload)),
        }
    }
}

/// What stands at an address for a workload.
pub(crate) enum Seen<'a> {
    /// A service, and how long the range is that it has the address by.
    Service(u8, &'a Arc<Service>),
    /// What others than this workload's namespace do not see, and nothing else.
    Hidden,
    /// No service.
    Nothing,
}

/// Whether it is there for whoever dials its address.
fn is_for_all(service: &Service) -> bool {
    let is_of_kubernetes = || {
        let rest = service.hostname.strip_prefix(&*service.name);
        let rest = rest.and_then(|rest| rest.strip_prefix('.')?.strip_prefix(&*service.namespace));
        rest.is_some_and(|rest| rest.starts_with(".svc."))
    };
    service.visibility == model::Visibility::Public || is_of_kubernetes()
}

/// How many of each kind there are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counts {
    /// Workloads.
    pub workloads: usize,
    /// Services.
    pub services: usize,
    /// Policies.
    pub policies: usize,
}
