//! Where to? From the address that an application dialled to the way there.
//!
//! What Istio's model can say and this agent can't do yet is refused by name and never passed around: a workload of
//! another network, one without an address (`what_can_not_be_done_yet_is_refused_by_name` in `tests/routes.rs`). Who
//! dials a service meets the service's waypoint, who dials a pod the pod's: see [`crate::waypoint`]. An address that is a
//! service's and its endpoint's is the service's (`a_service_at_its_own_endpoints_address_goes_before_it`).

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use model::{
    LoadBalancingMode, NamespacedName, OriginalDst, RoutingScope, Service, TunnelProtocol, Workload, WorkloadUid,
};

use crate::{
    Attempt, Snapshot, Wanted,
    choice::{Choice, NoExperience},
    snapshot::Seen,
    waypoint::{Behind, HandOff, WaypointFault},
};

/// The port of every HBONE listener.
pub const HBONE_PORT: u16 = 15008;

/// The way to a destination.
#[derive(Clone, Debug, PartialEq)]
pub enum Route {
    /// Through HBONE to a workload of the mesh.
    Tunnel {
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled, if it was one.
        service: Option<Arc<Service>>,
        /// The workload's address and the application's port: the CONNECT's authority.
        target: SocketAddr,
        /// Where the workload's HBONE listener is.
        hbone: SocketAddr,
    },
    /// Through HBONE to a waypoint, which takes it from there.
    Waypoint {
        /// The replica of the waypoint.
        workload: Arc<Workload>,
        /// The waypoint's service, if it is reached by one: its names are as good as the replica's own.
        gateway: Option<Arc<Service>>,
        /// The service that was dialled, if it was one.
        service: Option<Arc<Service>>,
        /// The CONNECT's authority: what was dialled; or, of a service that has no waypoint, the endpoint that has one.
        target: SocketAddr,
        /// Where the replica's HBONE listener is.
        hbone: SocketAddr,
    },
    /// In plaintext to a workload that is known and not in the mesh.
    Plaintext {
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled, if it was one.
        service: Option<Arc<Service>>,
        /// The workload's address and port.
        target: SocketAddr,
    },
    /// To a workload that has no address but a name, which is to be looked up; [`Route::at`] is the way then.
    Named {
        /// The workload.
        workload: Arc<Workload>,
        /// The service that was dialled.
        service: Option<Arc<Service>>,
        /// The name, fully qualified, without a dot at its end.
        host: Arc<str>,
        /// The workload's port.
        port: u16,
    },
    /// In plaintext to somewhere the mesh knows nothing of.
    Passthrough {
        /// The address that was dialled.
        target: SocketAddr,
    },
    /// On demand: too little is known yet. To be asked for ([`crate::Knowledge::want`]) and resolved again.
    Unknown {
        /// The address that was dialled, or the waypoint that what is there has.
        wanted: Wanted,
    },
    /// Nowhere.
    Refused {
        /// Why.
        reason: RefuseReason,
    },
}

/// Why a connection has no way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RefuseReason {
    /// Nothing is known of the mesh yet: the way might have to be encrypted.
    NoKnowledge,
    /// The service has no such port.
    NoSuchPort(NamespacedName, u16),
    /// The service has no healthy endpoint (left) with an address that can be reached.
    NoHealthyEndpoint(NamespacedName),
    /// It has some (left), and only such as it keeps from this source.
    NoneNear {
        /// The service.
        service: NamespacedName,
        /// What an endpoint must share with the source.
        shared: Vec<RoutingScope>,
        /// How many do not.
        elsewhere: usize,
    },
    /// It has to go through a waypoint, and that can't be.
    Waypoint {
        /// What has the waypoint: a service or a workload.
        destination: String,
        /// The waypoint: its Gateway or its service, else its address.
        waypoint: String,
        /// What is wrong with it.
        why: WaypointFault,
    },
    /// The workload is in another network.
    OtherNetwork {
        /// The workload.
        workload: WorkloadUid,
        /// Its network.
        network: Arc<str>,
    },
    /// The mesh has something of this name there that could not be read, and has no last good version of.
    Unreadable(Arc<str>),
    /// On demand: the control plane did not answer in time what it knows of this.
    NotDiscovered(Wanted),
    /// `REGISTRY_ONLY`, and the registry has nothing there for the pod.
    NotRegistered {
        /// What was dialled.
        target: SocketAddr,
        /// The pod's namespace.
        namespace: Arc<str>,
        /// A service that has the address, but not the port, or that the pod's namespace may not use.
        near: Option<NamespacedName>,
    },
    /// It was not heard in time whether pods may go where the registry has nothing.
    OutboundNotKnown(SocketAddr),
}

impl fmt::Display for RefuseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoKnowledge => f.write_str("nothing is known of the mesh yet"),
            Self::NoSuchPort(service, port) => write!(f, "service {service} has no port {port}"),
            Self::NoHealthyEndpoint(service) => write!(f, "service {service} has no healthy endpoint"),
            Self::NoneNear {
                service,
                shared,
                elsewhere,
            } => {
                write!(f, "service {service} has no healthy endpoint on the source's ")?;
                match &shared[..] {
                    [RoutingScope::Node] => f.write_str("node, and internalTrafficPolicy Local keeps it there")?,
                    scopes => {
                        let names: Vec<&str> = scopes.iter().map(|scope| scope.name()).collect();
                        write!(f, "{}, and strictly prefers that", names.join(" and "))?;
                    }
                }
                write!(f, " ({elsewhere} elsewhere)")
            }
            Self::Waypoint {
                destination,
                waypoint,
                why,
            } => write!(
                f,
                "{destination} has to be reached through {waypoint}, which can't be used: {why}"
            ),
            Self::OtherNetwork { workload, network } => write!(
                f,
                "workload {workload} is in network {network:?}, and this agent can not reach other networks yet"
            ),
            Self::Unreadable(name) => write!(
                f,
                "what the control plane said of {name} could not be read, and the way might have to be encrypted; its \
                 status tells which field this agent does not understand"
            ),
            Self::NotDiscovered(wanted) => write!(
                f,
                "the control plane knows nothing of {wanted}, or did not say in time; the way might have to be encrypted"
            ),
            Self::NotRegistered {
                target,
                namespace,
                near: None,
            } => write!(
                f,
                "{target} is not in the registry, and namespace {namespace} is REGISTRY_ONLY; a ServiceEntry that \
                 names it, or the name that it was looked up by, opens it"
            ),
            Self::NotRegistered {
                target,
                namespace,
                near: Some(service),
            } => write!(
                f,
                "{target} is not in the registry, and namespace {namespace} is REGISTRY_ONLY; {service} has that \
                 address, but either not this port, or it is not exported to {namespace}"
            ),
            Self::OutboundNotKnown(target) => write!(
                f,
                "nothing is known of {target}, and it is not known yet whether the mesh is REGISTRY_ONLY: the \
                 Kubernetes API was not heard from"
            ),
        }
    }
}

impl Snapshot {
    /// The way from `source`, a workload of this node, to what it dialled, without any experience of endpoints. `random`
    /// picks among a service's endpoints; those in `tried` failed already and are passed over.
    pub fn resolve(&self, source: &Workload, dialled: OriginalDst, random: u64, tried: &[WorkloadUid]) -> Route {
        let experience = &NoExperience;
        self.resolve_attempt(
            source,
            dialled,
            Attempt {
                random,
                tried,
                experience,
            },
        )
    }

    /// The way from `source`, a workload of this node, to what it dialled.
    pub fn resolve_attempt(&self, source: &Workload, dialled: OriginalDst, attempt: Attempt<'_>) -> Route {
        if !self.ready() {
            return refused(RefuseReason::NoKnowledge);
        }
        let target = model::canonical_socket(dialled.0);
        if let Some(workload) = self.workload_by_ip(target.ip()) {
            let route = match self.service_before(source, workload, target.ip()) {
                Some(service) => self.to_service(source, service, target, attempt),
                None => self.to_pod(source, workload, target, attempt),
            };
            return route.unwrap_or_else(refused);
        }
        let seen = self.service_seen_in(&source.namespace, target.ip());
        if let Some((length, name)) = self.closed.at(target.ip())
            && !matches!(seen, Seen::Service(known, _) if known >= length)
        {
            return refused(RefuseReason::Unreadable(name.clone()));
        }
        if let Seen::Service(_, service) = seen {
            return self
                .to_service(source, service, target, attempt)
                .unwrap_or_else(refused);
        }
        let is_known = matches!(seen, Seen::Hidden) || self.absent.get(&target.ip()).is_some();
        match self.on_demand && !is_known {
            true => Route::Unknown {
                wanted: self.wanted_address(target.ip()),
            },
            false => Route::Passthrough { target },
        }
    }

    fn to_service(
        &self,
        source: &Workload,
        service: &Arc<Service>,
        dialled: SocketAddr,
        attempt: Attempt<'_>,
    ) -> Result<Route, RefuseReason> {
        if let Some(waypoint) = self.waypoint_of_service(source, service, attempt.random)? {
            let hand_off = HandOff {
                snapshot: self,
                source,
                behind: Behind::Service(service),
                waypoint,
                target: dialled,
                attempt,
            };
            return hand_off.route();
        }
        let balancing = service.load_balancing.as_ref();
        if balancing.is_some_and(|balancing| balancing.mode == LoadBalancingMode::Passthrough) {
            return Ok(Route::Passthrough { target: dialled });
        }
        let choice = Choice {
            snapshot: self,
            source,
            service,
            key: service.key(),
            dialled,
            attempt,
        };
        if !service.ports.contains_key(&dialled.port()) {
            return Err(RefuseReason::NoSuchPort(choice.key, dialled.port()));
        }
        let (workload, target) = choice.choose()?;
        if let Some(waypoint) = self.waypoint_of_workload(source, workload) {
            let hand_off = HandOff {
                snapshot: self,
                source,
                behind: Behind::Workload(workload, Some(service)),
                waypoint,
                target,
                attempt,
            };
            return hand_off.route();
        }
        Ok(to_workload(workload.clone(), Some(service.clone()), target))
    }

    fn to_pod(
        &self,
        source: &Workload,
        workload: &Arc<Workload>,
        dialled: SocketAddr,
        attempt: Attempt<'_>,
    ) -> Result<Route, RefuseReason> {
        if let Some(waypoint) = self.waypoint_of_workload(source, workload) {
            let hand_off = HandOff {
                snapshot: self,
                source,
                behind: Behind::Workload(workload, None),
                waypoint,
                target: dialled,
                attempt,
            };
            return hand_off.route();
        }
        self.reachable(workload)?;
        Ok(to_workload(workload.clone(), None, dialled))
    }

    /// Whether it can be reached at all by what this agent can do.
    pub(crate) fn reachable(&self, workload: &Workload) -> Result<(), RefuseReason> {
        if workload.network != self.network {
            return Err(RefuseReason::OtherNetwork {
                workload: workload.uid.clone(),
                network: workload.network.clone(),
            });
        }
        Ok(())
    }
}

fn refused(reason: RefuseReason) -> Route {
    Route::Refused { reason }
}

impl Route {
    /// The way to a [`Route::Named`], once its name is known to be this address; any other way stays what it is.
    pub fn at(self, ip: IpAddr) -> Self {
        match self {
            Self::Named {
                workload,
                service,
                port,
                ..
            } => by_address(workload, service, SocketAddr::new(ip, port)),
            other => other,
        }
    }
}

/// An unspecified address stands for the workload's name (see `choice`).
fn to_workload(workload: Arc<Workload>, service: Option<Arc<Service>>, target: SocketAddr) -> Route {
    if target.ip().is_unspecified() {
        return Route::Named {
            host: workload.hostname.clone(),
            workload,
            service,
            port: target.port(),
        };
    }
    by_address(workload, service, target)
}

fn by_address(workload: Arc<Workload>, service: Option<Arc<Service>>, target: SocketAddr) -> Route {
    match workload.protocol {
        TunnelProtocol::Hbone => {
            let hbone = SocketAddr::new(target.ip(), HBONE_PORT);
            Route::Tunnel {
                workload,
                service,
                target,
                hbone,
            }
        }
        TunnelProtocol::None => Route::Plaintext {
            workload,
            service,
            target,
        },
    }
}
