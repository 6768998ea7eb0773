//! The writing side: changes in, one snapshot for each.
//!
//! A change costs by its own size, not by the mesh's: see [`crate::trie`]. [`Writer`] and [`Locals`] write to the same
//! state under one lock, which readers never take.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use arc_swap::ArcSwap;
use model::{
    MeshSettings, NamespacedName, OutboundTrafficPolicy, Policy, Service, Workload, WorkloadUid, canonical_ip,
};
use tokio::sync::{mpsc, watch};

use crate::{
    Contents, Rejected, Snapshot, Unreadable, Wanted,
    claims::{Change, Claims, Held},
    contents::RejectedObject,
};

/// What changed. Removals go first; what is put replaces what had its name, and of two of one name the last counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Delta {
    /// What holds for the whole mesh, where that changed.
    pub settings: Option<MeshSettings>,
    /// Workloads that are new or changed.
    pub workloads: Vec<Arc<Workload>>,
    /// Workloads that are no more.
    pub removed_workloads: Vec<WorkloadUid>,
    /// Services that are new or changed.
    pub services: Vec<Arc<Service>>,
    /// Services that are no more.
    pub removed_services: Vec<NamespacedName>,
    /// Policies that are new or changed.
    pub policies: Vec<Policy>,
    /// Policies that are no more; a workload that still names one is closed.
    pub removed_policies: Vec<NamespacedName>,
    /// What could not be read, and where it is: connections there are refused, unless something known is there.
    pub unreadable: Vec<Unreadable>,
    /// What is gone or was read after all.
    pub removed_unreadable: Vec<Arc<str>>,
    /// On demand: addresses of the node's network that the control plane knows nothing of.
    pub absent: Vec<IpAddr>,
    /// On demand: addresses of which it is no longer known that there is nothing.
    pub not_absent: Vec<IpAddr>,
}

/// The writing end; there is one source of the mesh's knowledge.
pub struct Writer {
    shared: Arc<Shared>,
}

/// The node's own pods, as the node knows them: from the runtime that starts them and the API.
///
/// A pod works as soon as it is here, whether the mesh has announced it or not: it is the source of what it dials. But
/// nothing comes in before the mesh announced it, since only then its policies are known
/// ([`policy::Reason::NotAnnounced`]). What was announced counts from then on; unless it is somebody else: another
/// service account or other addresses are those of an earlier pod of the same name.
#[derive(Clone)]
pub struct Locals {
    shared: Arc<Shared>,
}

/// The way in for [`MeshSettings::outbound_traffic_policy`], where it comes from elsewhere than the rest of the mesh.
#[derive(Clone)]
pub struct Outbound {
    shared: Arc<Shared>,
}

pub(crate) struct Shared {
    current: Arc<ArcSwap<Snapshot>>,
    changed: watch::Sender<u64>,
    wanted: mpsc::Sender<Wanted>,
    state: Mutex<State>,
}

/// What only writers know.
struct State {
    workloads: Claims<Workload>,
    services: Claims<Service>,
    locals: BTreeMap<WorkloadUid, Arc<Workload>>,
    /// [`Outbound`] says where pods may go, not the settings.
    outbound_apart: bool,
}

impl Shared {
    pub(crate) fn new(
        current: Arc<ArcSwap<Snapshot>>,
        changed: watch::Sender<u64>,
        wanted: mpsc::Sender<Wanted>,
    ) -> Self {
        let network = current.load().network.clone();
        Self {
            current,
            changed,
            wanted,
            state: Mutex::new(State {
                workloads: Claims::new(network.clone()),
                services: Claims::new(network),
                locals: BTreeMap::new(),
                outbound_apart: false,
            }),
        }
    }

    /// The state as it is, also after a panic: every index is repaired by what is put next.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the next snapshot and publishes it.
    fn publish<R>(&self, change: impl FnOnce(&mut State, &mut Snapshot) -> R) -> R {
        let mut state = self.lock();
        let mut next = Snapshot::clone(&self.current.load());
        next.generation += 1;
        let generation = next.generation;
        let result = change(&mut state, &mut next);
        state.overlay(&mut next);
        self.current.store(Arc::new(next));
        self.changed.send_replace(generation);
        result
    }
}

impl Writer {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The way in for the node's own pods.
    pub fn locals(&self) -> Locals {
        Locals {
            shared: self.shared.clone(),
        }
    }

    /// The way in for the policy of outbound traffic. From now on the settings' own counts for nothing, and until
    /// something is set nothing is known of it ([`crate::Exit::NotKnown`]).
    pub fn outbound(&self) -> Outbound {
        self.shared.publish(|state, next| {
            state.outbound_apart = true;
            next.outbound = None;
        });
        Outbound {
            shared: self.shared.clone(),
        }
    }

    /// Publishes a change as one snapshot. Returns which objects of it now wait for an address or name that is another's,
    /// and which others do because of it; each takes over as soon as the other is gone ([`Writer::conflicts`]).
    pub fn apply(&mut self, delta: Delta) -> Vec<Rejected> {
        self.shared.publish(|state, next| {
            next.ready = true;
            state.apply(next, delta)
        })
    }

    /// Publishes new contents as one snapshot: what they do not say is no more. An object that the caller rejected stays
    /// as it was when it was last good. Returns what could not be taken over, with what the caller already rejected left
    /// out.
    pub fn replace(&mut self, mut contents: Contents, rejected: &[Rejected]) -> Vec<Rejected> {
        let mut duplicates = contents.reject_duplicates();
        self.shared.publish(|state, next| {
            contents.keep_last_good(
                |uid| state.workload(next, uid),
                |key| state.service(next, key),
                rejected,
            );
            let delta = state.difference(next, contents);
            next.ready = true;
            state.apply(next, delta);
            duplicates.extend(state.conflicts(next));
        });
        duplicates
    }

    /// Everything that waits for an address that is another's, and why.
    pub fn conflicts(&self) -> Vec<Rejected> {
        let state = self.shared.lock();
        state.conflicts(&self.shared.current.load())
    }
}

impl Locals {
    /// The node's own pods, all of them. On demand, what the mesh says of them is asked for.
    pub fn set(&self, workloads: Vec<Workload>) {
        self.shared.publish(|state, next| {
            if next.on_demand {
                for workload in workloads
                    .iter()
                    .filter(|workload| !state.locals.contains_key(&workload.uid))
                {
                    // Full: whoever fetches asks for what is local anyway when it connects anew.
                    let _ = self.shared.wanted.try_send(Wanted::Workload(workload.uid.clone()));
                }
            }
            let by_uid = workloads
                .into_iter()
                .map(|workload| (workload.uid.clone(), Arc::new(workload)));
            state.locals = by_uid.collect();
        });
    }

    /// The node's own pods, as they were set.
    pub fn workloads(&self) -> Vec<Arc<Workload>> {
        self.shared.lock().locals.values().cloned().collect()
    }
}

impl Outbound {
    /// What holds from now on.
    pub fn set(&self, policy: OutboundTrafficPolicy) {
        if self.shared.current.load().outbound.as_deref() == Some(&policy) {
            return;
        }
        self.shared.publish(|_, next| next.outbound = Some(Arc::new(policy)));
    }
}

impl State {
    fn workload<'a>(&'a self, snapshot: &'a Snapshot, uid: &WorkloadUid) -> Option<&'a Workload> {
        self.workloads.get(&snapshot.workloads, uid).map(|workload| &**workload)
    }

    fn service<'a>(&'a self, snapshot: &'a Snapshot, key: &NamespacedName) -> Option<&'a Service> {
        self.services.get(&snapshot.services, key).map(|service| &**service)
    }

    fn apply(&mut self, next: &mut Snapshot, delta: Delta) -> Vec<Rejected> {
        let mut lost = Lost::default();
        if let Some(settings) = delta.settings {
            if !self.outbound_apart {
                next.outbound = Some(Arc::new(settings.outbound_traffic_policy.clone()));
            }
            next.settings = Arc::new(settings);
        }
        for key in &delta.removed_policies {
            next.remove_policy(key);
        }
        for policy in delta.policies {
            next.put_policy(Arc::new(policy));
        }
        for key in &delta.removed_services {
            let changes = self.services.remove(&mut next.services, key);
            changes.into_iter().for_each(|change| next.apply_service(change));
        }
        for service in delta.services {
            lost.services.insert(service.key());
            for change in self.services.put(&mut next.services, service) {
                lost.services.extend(lost_of(&change).map(Service::key));
                next.apply_service(change);
            }
        }
        for uid in &delta.removed_workloads {
            let changes = self.workloads.remove(&mut next.workloads, uid);
            changes.into_iter().for_each(|change| next.apply_workload(change));
        }
        for workload in delta.workloads {
            lost.workloads.insert(workload.uid.clone());
            for change in self.workloads.put(&mut next.workloads, workload) {
                lost.workloads
                    .extend(lost_of(&change).map(|workload| workload.uid.clone()));
                next.apply_workload(change);
            }
        }
        for name in &delta.removed_unreadable {
            next.closed.remove(name);
        }
        for unreadable in delta.unreadable {
            let network = next.network.clone();
            next.closed.put(unreadable, &network);
        }
        for ip in &delta.not_absent {
            next.absent.remove(&canonical_ip(*ip));
        }
        for ip in delta.absent {
            next.absent.insert(canonical_ip(ip), ());
        }
        self.rejected(next, &lost)
    }

    /// What is still lost in the end.
    fn rejected(&self, next: &Snapshot, lost: &Lost) -> Vec<Rejected> {
        let waits = lost.workloads.iter().any(|uid| self.workloads.is_waiting(uid))
            || lost.services.iter().any(|key| self.services.is_waiting(key));
        if !waits {
            return Vec::new();
        }
        let mut conflicts = self.conflicts(next);
        conflicts.retain(|rejected| match &rejected.object {
            RejectedObject::Workload(uid) => lost.workloads.contains(uid),
            RejectedObject::Service(key) => lost.services.contains(key),
            RejectedObject::Entry(..) => false,
        });
        conflicts
    }

    fn conflicts(&self, snapshot: &Snapshot) -> Vec<Rejected> {
        let workloads = self
            .workloads
            .conflicts(&snapshot.workloads)
            .map(|(workload, ip, holder)| Rejected {
                object: RejectedObject::Workload(workload.uid.clone()),
                reason: format!("its address {ip} is that of workload {}", holder.uid),
            });
        let services = self
            .services
            .conflicts(&snapshot.services)
            .map(|(service, ((ip, length), _), holder)| {
                let whole = length == if ip.is_ipv4() { 32 } else { 128 };
                let range = if whole {
                    ip.to_string()
                } else {
                    format!("{ip}/{length}")
                };
                Rejected {
                    object: RejectedObject::Service(service.key()),
                    reason: format!("its address {range} is that of service {}", holder.key()),
                }
            });
        workloads.chain(services).collect()
    }

    /// What leads from what is known to these contents.
    fn difference(&self, snapshot: &Snapshot, contents: Contents) -> Delta {
        let mut delta = Delta {
            settings: Some(contents.settings),
            ..Delta::default()
        };
        let mut workloads: BTreeSet<WorkloadUid> = self.workloads.keys(&snapshot.workloads).collect();
        for workload in contents.workloads {
            workloads.remove(&workload.uid);
            if self.workload(snapshot, &workload.uid) != Some(&workload) {
                delta.workloads.push(Arc::new(workload));
            }
        }
        delta.removed_workloads = workloads.into_iter().collect();
        let mut services: BTreeSet<NamespacedName> = self.services.keys(&snapshot.services).collect();
        for service in contents.services {
            services.remove(&service.key());
            if self.service(snapshot, &service.key()) != Some(&service) {
                delta.services.push(Arc::new(service));
            }
        }
        delta.removed_services = services.into_iter().collect();
        let mut policies: BTreeSet<NamespacedName> = snapshot.policies().map(|policy| policy.key()).collect();
        for policy in contents.policies {
            policies.remove(&policy.key());
            delta.policies.push(policy);
        }
        delta.removed_policies = policies.into_iter().collect();
        delta
    }

    /// The node's own pods that the mesh has not announced as they are.
    fn overlay(&self, next: &mut Snapshot) {
        if self.locals.is_empty() && next.unannounced.is_empty() {
            return;
        }
        let announced = |local: &Workload| {
            let workload = next.workloads.by_key.get(&local.uid);
            workload.is_some_and(|workload| is_the_same_pod(local, workload))
        };
        let unannounced: HashMap<WorkloadUid, Arc<Workload>> = self
            .locals
            .iter()
            .filter(|(_, local)| !announced(local))
            .map(|(uid, local)| (uid.clone(), local.clone()))
            .collect();
        if unannounced == *next.unannounced {
            return;
        }
        let by_ip = unannounced.values().flat_map(|workload| {
            let ips = workload.workload_ips.iter();
            ips.map(move |ip| (canonical_ip(*ip), workload.clone()))
        });
        next.unannounced_by_ip = Arc::new(by_ip.collect());
        next.unannounced = Arc::new(unannounced);
    }
}

/// Whether what the mesh announced is this pod, and not an earlier one of its name. Its trust domain is the mesh's to say:
/// while that changes, agents and control plane do not learn of it at once, and who may be who is judged with its aliases.
fn is_the_same_pod(local: &Workload, announced: &Workload) -> bool {
    let has = |ip: &IpAddr| {
        let ip = canonical_ip(*ip);
        announced.workload_ips.iter().any(|other| canonical_ip(*other) == ip)
    };
    (&local.namespace, &local.service_account) == (&announced.namespace, &announced.service_account)
        && (announced.node.is_empty() || local.node == announced.node)
        && local.workload_ips.iter().all(has)
}

#[derive(Default)]
struct Lost {
    workloads: BTreeSet<WorkloadUid>,
    services: BTreeSet<NamespacedName>,
}

fn lost_of<T>(change: &Change<T>) -> Option<&T> {
    match change {
        Change::Lost(object) => Some(object),
        Change::Gained(_) => None,
    }
}

impl<T: crate::claims::Claimant> Claims<T> {
    /// Every key, held or waiting.
    fn keys<'a>(&'a self, held: &'a Held<T>) -> impl Iterator<Item = T::Key> + 'a {
        let held = held.by_key.iter().map(|(key, _)| key.clone());
        held.chain(self.waiting_keys().cloned())
    }
}
