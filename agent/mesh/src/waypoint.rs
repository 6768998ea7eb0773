//! Waypoints: what is handed to which of a waypoint's replicas, and, at the other end, what came through one.
//!
//! ```text
//! service dialled ─► has a waypoint? ───────────── yes ─► a replica, asked for VIP:port
//!        │ no: an endpoint is chosen                           ▲ asked for ip:port
//! pod dialled ─────► the pod has a waypoint? ───── yes ────────┘
//! ```
//! A waypoint that can't be used is never passed around: the way is refused, and the reason names the Gateway and what
//! is wrong with it (`a_waypoint_that_can_not_be_used_is_named_and_never_passed_around`). Its replicas are chosen like
//! any service's endpoints. A waypoint does not meet itself: what it sends to what is behind it goes there directly.
//!
//! **Unlike ztunnel**, which takes connections past a waypoint, a workload that has one is reached through it alone
//! ([`Snapshot::verdict`]): by its own waypoint or by that of a service that it serves; by itself; and by nobody else,
//! plaintext included (`who_has_a_waypoint_takes_only_what_came_through_it`). So a service without a waypoint whose
//! endpoint has one is reached through the endpoint's, where ztunnel dials the endpoint. With waypoints for services
//! alone (the default) a pod's own address stays open, as in Istio: that is what `istio.io/waypoint-for: service` says,
//! and probes, scrapers and StatefulSets rely on it; `workload` or `all` closes it.
//!
//! Deliberately unknown here: why a Gateway can't be used (the control plane says so in its address).

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use model::{
    Authority, GatewayAddress, GatewayDestination, Identity, NamespacedName, NetworkAddress, Service, TunnelProtocol,
    Unusable, Workload, WorkloadUid,
};
use policy::{Facts, Reason};

use crate::{Attempt, RefuseReason, Route, Snapshot, Wanted, choice::Choice};

/// Replicas without HBONE that are passed over before a waypoint is given up.
const PASSED_OVER: usize = 8;

/// What is wrong with a waypoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaypointFault {
    /// The control plane says so.
    Unusable(Unusable),
    /// Nothing is known of its address.
    Unknown,
    /// Its service has no port for HBONE of this number.
    NoPort(NamespacedName, u16),
    /// No replica (left) that can be reached.
    NoReplica(Box<RefuseReason>),
    /// This replica, and every other, takes no HBONE.
    NoHbone(WorkloadUid),
    /// There are several, and none has a share.
    NoShare,
    /// What is behind it has no address to ask it for.
    OnlyAName(Arc<str>),
}

impl fmt::Display for WaypointFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unusable(why) => why.fmt(f),
            Self::Unknown => f.write_str("nothing is known of that address"),
            Self::NoPort(service, port) => write!(f, "its service {service} has no port {port} for HBONE"),
            Self::NoReplica(why) => why.fmt(f),
            Self::NoHbone(workload) => write!(f, "its replica {workload} does not take HBONE"),
            Self::NoShare => f.write_str("of several waypoints none has a weight"),
            Self::OnlyAName(name) => write!(
                f,
                "it is asked for addresses, and what is behind it has only the name {name}"
            ),
        }
    }
}

/// What has a waypoint.
pub(crate) enum Behind<'a> {
    Service(&'a Arc<Service>),
    /// A workload, and the service that it was chosen for, if one was dialled.
    Workload(&'a Workload, Option<&'a Arc<Service>>),
}

/// What is to be handed to a waypoint.
pub(crate) struct HandOff<'a> {
    pub(crate) snapshot: &'a Snapshot,
    /// Who dials.
    pub(crate) source: &'a Workload,
    pub(crate) behind: Behind<'a>,
    pub(crate) waypoint: &'a GatewayAddress,
    /// What the waypoint is asked for.
    pub(crate) target: SocketAddr,
    pub(crate) attempt: Attempt<'a>,
}

impl HandOff<'_> {
    /// The way to one of the waypoint's replicas.
    pub(crate) fn route(&self) -> Result<Route, RefuseReason> {
        self.to_replica()
            .map_err(|why| self.snapshot.refusal(&self.behind, self.waypoint, why))
    }

    fn to_replica(&self) -> Result<Route, WaypointFault> {
        if let Some((_, why)) = self.waypoint.why_unusable() {
            return Err(WaypointFault::Unusable(why));
        }
        if let Behind::Workload(workload, _) = self.behind
            && self.target.ip().is_unspecified()
        {
            return Err(WaypointFault::OnlyAName(workload.hostname.clone()));
        }
        let port = self.waypoint.hbone_mtls_port;
        match self.snapshot.gateway(self.waypoint) {
            Some(Gateway::Service(gateway)) => {
                let (workload, hbone) = self.choose(gateway, port)?;
                Ok(self.through(&workload, Some(gateway), hbone))
            }
            Some(Gateway::Workload(workload, address)) => {
                let reachable = self.snapshot.reachable(workload);
                reachable.map_err(|why| WaypointFault::NoReplica(Box::new(why)))?;
                match takes_hbone(workload, address) {
                    true => Ok(self.through(workload, None, address)),
                    false => Err(WaypointFault::NoHbone(workload.uid.clone())),
                }
            }
            None => {
                let wanted = self.snapshot.to_ask_for(self.waypoint);
                let wanted = wanted.ok_or(WaypointFault::Unknown)?;
                Ok(Route::Unknown { wanted })
            }
        }
    }

    /// A replica that takes HBONE, and where.
    fn choose(&self, gateway: &Arc<Service>, port: u16) -> Result<(Arc<Workload>, SocketAddr), WaypointFault> {
        if !gateway.ports.contains_key(&port) {
            return Err(WaypointFault::NoPort(gateway.key(), port));
        }
        let mut tried = self.attempt.tried.to_vec();
        let mut without = None;
        for _ in 0..PASSED_OVER {
            let choice = Choice {
                snapshot: self.snapshot,
                source: self.source,
                service: gateway,
                key: gateway.key(),
                // Of the replica's addresses the one of the family that the client speaks.
                dialled: SocketAddr::new(self.target.ip(), port),
                attempt: Attempt {
                    tried: &tried,
                    ..self.attempt
                },
            };
            let chosen = choice.choose();
            match chosen.map(|(workload, hbone)| (workload.clone(), hbone)) {
                Ok((workload, hbone)) if takes_hbone(&workload, hbone) => return Ok((workload, hbone)),
                Ok((workload, _)) => {
                    tried.push(workload.uid.clone());
                    without = Some(workload.uid.clone());
                }
                Err(why) => {
                    return Err(match without {
                        Some(uid) => WaypointFault::NoHbone(uid),
                        None => WaypointFault::NoReplica(Box::new(why)),
                    });
                }
            }
        }
        Err(without.map_or(WaypointFault::Unknown, WaypointFault::NoHbone))
    }

    fn through(&self, workload: &Arc<Workload>, gateway: Option<&Arc<Service>>, hbone: SocketAddr) -> Route {
        let service = match self.behind {
            Behind::Service(service) => Some(service),
            Behind::Workload(_, service) => service,
        };
        Route::Waypoint {
            workload: workload.clone(),
            gateway: gateway.cloned(),
            service: service.cloned(),
            target: self.target,
            hbone,
        }
    }
}

/// The services of its own namespace that a workload serves.
fn own_services(workload: &Workload) -> impl Iterator<Item = &NamespacedName> {
    let keys = workload.services.keys();
    keys.filter(|key| key.namespace == workload.namespace)
}

/// An unspecified address stands for a name (see `choice`), and nobody tunnels to that.
fn takes_hbone(workload: &Workload, at: SocketAddr) -> bool {
    workload.protocol == TunnelProtocol::Hbone && !at.ip().is_unspecified()
}

/// What stands at a waypoint's address.
enum Gateway<'a> {
    Service(&'a Arc<Service>),
    /// And where its HBONE listener is.
    Workload(&'a Arc<Workload>, SocketAddr),
}

impl Snapshot {
    fn refusal(&self, behind: &Behind<'_>, waypoint: &GatewayAddress, why: WaypointFault) -> RefuseReason {
        RefuseReason::Waypoint {
            destination: match behind {
                Behind::Service(service) => format!("service {}", service.key()),
                Behind::Workload(workload, _) => format!("workload {}", workload.uid),
            },
            waypoint: self.name_of(waypoint),
            why,
        }
    }

    /// A waypoint in words: its Gateway or its service, where that is known, else its address.
    fn name_of(&self, waypoint: &GatewayAddress) -> String {
        match waypoint.why_unusable() {
            Some((policy, Unusable::PolicyAlone)) => {
                return format!("the waypoint that AuthorizationPolicy {policy} needs");
            }
            Some((gateway, _)) => return format!("Gateway {gateway}"),
            None => {}
        }
        match self.gateway(waypoint) {
            Some(Gateway::Service(service)) => format!("waypoint {}", service.key()),
            Some(Gateway::Workload(workload, _)) => format!("waypoint {}", workload.uid),
            None => format!("waypoint {waypoint}"),
        }
    }

    /// The waypoint that what `source` dials of this service is handed to; one of several by their weights.
    pub(crate) fn waypoint_of_service<'a>(
        &self,
        source: &Workload,
        service: &'a Arc<Service>,
        random: u64,
    ) -> Result<Option<&'a GatewayAddress>, RefuseReason> {
        if service.waypoints().any(|waypoint| self.is_at(source, waypoint)) {
            return Ok(None);
        }
        let Some(first) = service.weighted_waypoints.first() else {
            return Ok(service.waypoint.as_ref());
        };
        let weighted = &service.weighted_waypoints;
        let total: u64 = weighted.iter().map(|one| u64::from(one.weight)).sum();
        // Other bits than those that choose the replica.
        let Some(mut left) = random.rotate_left(32).checked_rem(total) else {
            let behind = Behind::Service(service);
            return Err(self.refusal(&behind, &first.destination, WaypointFault::NoShare));
        };
        let chosen = weighted.iter().find(|one| match left.checked_sub(one.weight.into()) {
            Some(rest) => {
                left = rest;
                false
            }
            None => true,
        });
        Ok(chosen.map(|one| &one.destination))
    }

    /// The waypoint that what `source` sends to this workload is handed to.
    pub(crate) fn waypoint_of_workload<'a>(
        &self,
        source: &Workload,
        workload: &'a Workload,
    ) -> Option<&'a GatewayAddress> {
        let waypoint = workload.waypoint.as_ref()?;
        let is_itself = source.uid == workload.uid;
        let sent_it = is_itself || self.waypoints_before(workload).any(|one| self.is_at(source, one));
        (!sent_it).then_some(waypoint)
    }

    /// A workload's own waypoint, and those of the services of its namespace that it serves: what goes through either ends
    /// here. Whoever writes its address into a service of another namespace has no say in what it takes
    /// (`a_service_of_another_namespace_brings_no_waypoint_along`).
    fn waypoints_before<'a>(&'a self, workload: &'a Workload) -> impl Iterator<Item = &'a GatewayAddress> {
        let services = own_services(workload).filter_map(|key| self.service(key));
        let of_services = services.flat_map(|service| service.waypoints());
        workload.waypoint.iter().chain(of_services)
    }

    fn gateway(&self, waypoint: &GatewayAddress) -> Option<Gateway<'_>> {
        match &waypoint.destination {
            GatewayDestination::Hostname(name) => self.service(name).map(Gateway::Service),
            GatewayDestination::Address(address) if address.network == self.network => {
                let port = waypoint.hbone_mtls_port;
                let of_workload = self.workload_by_ip(address.address);
                let found = of_workload.map(|it| Gateway::Workload(it, SocketAddr::new(address.address, port)));
                found.or_else(|| self.service_by_vip(address.address).map(Gateway::Service))
            }
            GatewayDestination::Address(_) => None,
        }
    }

    /// On demand: what is to be asked for, where nothing is known of what stands at a waypoint's address.
    fn to_ask_for(&self, waypoint: &GatewayAddress) -> Option<Wanted> {
        if !self.on_demand || waypoint.why_unusable().is_some() || self.gateway(waypoint).is_some() {
            return None;
        }
        match &waypoint.destination {
            GatewayDestination::Hostname(name) => Some(Wanted::Service(name.clone())),
            GatewayDestination::Address(address) if address.network == self.network => {
                self.address_to_ask_for(address.address)
            }
            GatewayDestination::Address(_) => None,
        }
    }

    pub(crate) fn wanted_address(&self, ip: IpAddr) -> Wanted {
        Wanted::Address(NetworkAddress::new(self.network.clone(), ip))
    }

    /// On demand: an address that nothing is known of, not even that there is nothing to know.
    fn address_to_ask_for(&self, ip: IpAddr) -> Option<Wanted> {
        let ip = model::canonical_ip(ip);
        let known = || self.workload_by_ip(ip).is_some() || self.service_by_vip(ip).is_some();
        (self.on_demand && self.absent.get(&ip).is_none() && !known()).then(|| self.wanted_address(ip))
    }

    /// On demand: what is to be asked for before it is known whether [`Snapshot::is_waypoint_for`] holds of what is asked.
    pub fn to_ask_behind(&self, asked: &Authority) -> Vec<Wanted> {
        let Authority::Address(asked) = asked else {
            return Vec::new();
        };
        let waypoints = self.waypoints_at(asked.ip());
        let unknown = waypoints.filter_map(|waypoint| self.to_ask_for(waypoint));
        self.address_to_ask_for(asked.ip()).into_iter().chain(unknown).collect()
    }

    /// On demand: what is to be asked for before it is known whether a connection to a workload that has a waypoint came
    /// through one; nothing where it did, or can't have. It grows with the services that the workload serves.
    pub fn to_ask_before(&self, facts: &Facts, workload: &Workload) -> Vec<Wanted> {
        if !self.on_demand || facts.identity.is_none() || self.past_waypoint(facts, workload).is_none() {
            return Vec::new();
        }
        let services = own_services(workload).filter(|key| self.service(key).is_none());
        let waypoints = self.waypoints_before(workload);
        let waypoints = waypoints.filter_map(|waypoint| self.to_ask_for(waypoint));
        waypoints.chain(services.cloned().map(Wanted::Service)).collect()
    }

    /// Whether a workload is what stands at this address: a replica of the waypoint.
    pub(crate) fn is_at(&self, workload: &Workload, waypoint: &GatewayAddress) -> bool {
        if waypoint.why_unusable().is_some() {
            return false;
        }
        match self.gateway(waypoint) {
            Some(Gateway::Service(service)) => workload.services.contains_key(&service.key()),
            Some(Gateway::Workload(other, _)) => other.uid == workload.uid,
            None => false,
        }
    }

    /// Whether this workload is the waypoint of what is asked for.
    pub fn is_waypoint_for(&self, workload: &Workload, asked: &Authority) -> bool {
        let Authority::Address(asked) = asked else { return false };
        self.waypoints_at(asked.ip())
            .any(|waypoint| self.is_at(workload, waypoint))
    }

    /// The waypoints of what stands at an address.
    fn waypoints_at(&self, ip: IpAddr) -> impl Iterator<Item = &GatewayAddress> {
        let target = self.workload_by_ip(ip);
        let is_there = move |service: &&Arc<Service>| target.is_none_or(|it| it.services.contains_key(&service.key()));
        let services = self.services_by_vip(ip).filter(is_there);
        let of_target = target.and_then(|target| target.waypoint.as_ref());
        services.flat_map(|service| service.waypoints()).chain(of_target)
    }

    /// Why a connection may not be taken, where the workload has a waypoint and it did not come through one.
    pub(crate) fn past_waypoint(&self, facts: &Facts, workload: &Workload) -> Option<Reason> {
        let waypoint = workload.waypoint.as_ref()?;
        if let Some(peer) = &facts.identity {
            let is_itself = *peer == workload.identity() && workload.workload_ips.contains(&facts.source);
            if is_itself || self.any_waypoint_identity(workload, |identity| identity == *peer) {
                return None;
            }
        }
        let mut name = self.name_of(waypoint);
        if let Some((_, why)) = waypoint.why_unusable() {
            name = format!("{name} ({why})");
        }
        Some(Reason::PastWaypoint(name.into(), facts.into()))
    }

    /// Who may have sent what arrives at a workload that has a waypoint: those who stand there, ready or not, and the
    /// names that their service says. Whether one of them is what is looked for.
    pub(crate) fn any_waypoint_identity(&self, workload: &Workload, mut is: impl FnMut(Identity) -> bool) -> bool {
        let usable = |waypoint: &&GatewayAddress| waypoint.why_unusable().is_none();
        let found = |gateway: Gateway<'_>| match gateway {
            Gateway::Workload(workload, _) => is(workload.identity()),
            Gateway::Service(service) => {
                let key = service.key();
                let replicas = self.endpoints(&key).iter().chain(self.unhealthy_endpoints(&key).iter());
                let named = service.subject_alt_names.iter().filter_map(|name| name.parse().ok());
                replicas.map(|replica| replica.identity()).chain(named).any(&mut is)
            }
        };
        let waypoints = self.waypoints_before(workload).filter(usable);
        waypoints.filter_map(|waypoint| self.gateway(waypoint)).any(found)
    }
}
