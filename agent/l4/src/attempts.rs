//! One endpoint after another until one can be connected to, before the client notices anything.
//!
//! ```text
//! first ── failed ─────────────────────────────► next ── … (Config::attempts in all)
//!   └───── no answer for Config::patience ──┬──► next, beside it: who is connected first has the client
//!                                           └──► (no other endpoint: waits on)
//! ```
//! Nothing of the client's bytes is read before an upstream is there, so nothing is sent twice; but an endpoint that was
//! slow may see a connection that ends without a byte. What a client waits for at most: `patience` for each endpoint but
//! the last, and then the time limits of connecting to one, whatever the others do
//! (`black_holes_cost_the_client_little_and_are_passed_over`). The first failure is the one told, unless a policy denies a
//! later attempt. Each attempt has a [`Destination`] of its own: what is told is of one attempt, that which won or whose
//! failure it is (`what_is_told_of_the_first_failure_is_that_endpoints`).
//!
//! A workload that takes no tunnel may have left the mesh a moment ago, and this agent be slower to hear of it than its own: so
//! where all have failed, and that is known of one of them by now or within `Config::second_look`, the way is looked for
//! once more (`who_leaves_the_mesh_is_reached_by_who_hears_of_it_late`).
//!
//! Every failure, and every answer that is late, is remembered of the endpoint ([`crate::experience`]).

use std::{
    cell::RefCell,
    future::poll_fn,
    net::{Ipv4Addr, SocketAddr},
    pin::{Pin, pin},
    sync::Arc,
    time::Instant,
};

use futures_util::future::{Either, select};
use mesh::Route;
use model::{OriginalDst, Workload, WorkloadUid};
use telemetry::ResponseFlag;

use crate::{
    ask,
    connection::{Connection, Destination},
    counters::increment,
    egress,
    experience::Counted,
    failure::Failure,
    outbound::{Upstream, find_way, follow},
    socket,
};

type Way = (Arc<Workload>, Route);

/// Who was chosen where there may be others: an endpoint of a service, or a replica of a waypoint.
struct Endpoint {
    uid: WorkloadUid,
    at: SocketAddr,
    is_waypoint: bool,
}

impl Endpoint {
    /// Whether it is to be passed over for this failure: that a waypoint can't reach what is behind it says nothing of
    /// the waypoint (that its agent does not know yet who may, and says so, does), and that we have no port left for it
    /// says nothing of anybody else.
    fn is_to_blame(&self, failure: &Failure) -> bool {
        let is_behind =
            self.is_waypoint && matches!(failure, Failure::Open(hbone::OpenError::Refused { reason: None, .. }));
        !is_behind && !failure.is_exhaustion()
    }
}

/// An attempt that failed.
struct Failed {
    failure: Box<Failure>,
    /// Where it led.
    destination: Box<Destination>,
}

impl Failed {
    /// Of this failure and a later one that which is told: what a policy decided is more than that somebody else could not
    /// be connected to.
    fn or(self, later: Self) -> Self {
        let is_denial = |failed: &Self| failed.failure.flag() == ResponseFlag::Deny;
        if is_denial(&later) && !is_denial(&self) {
            later
        } else {
            self
        }
    }
}

/// The attempts of one connection.
struct Attempts<'a> {
    connection: &'a Connection,
    dialled: OriginalDst,
    /// The endpoints that were tried, or are being tried.
    tried: RefCell<Vec<WorkloadUid>>,
    /// It tells more than that there is no other endpoint.
    told: RefCell<Option<Failed>>,
    /// Whose own end of a tunnel could not be reached.
    untunnelled: RefCell<Vec<WorkloadUid>>,
}

/// Connects to what was dialled: where there is only one place to go, to that one.
pub(crate) async fn try_endpoints(connection: &Connection, dialled: OriginalDst) -> Result<Upstream, Failure> {
    match try_each(connection, dialled).await {
        Err((_, untunnelled)) if has_one_left(connection, &untunnelled).await => {
            connection.lead_to(Destination::dialled(dialled));
            try_each(connection, dialled).await.map_err(|(failure, _)| failure)
        }
        outcome => outcome.map_err(|(failure, _)| failure),
    }
}

/// Tries one endpoint after another. A failure, and whose own end of a tunnel could not be reached.
async fn try_each(connection: &Connection, dialled: OriginalDst) -> Result<Upstream, (Failure, Vec<WorkloadUid>)> {
    let way = find_allowed(connection, dialled, &[]).await;
    let way = way.map_err(|failure| (failure, Vec::new()))?;
    let attempts = Attempts {
        connection,
        dialled,
        tried: RefCell::default(),
        told: RefCell::default(),
        untunnelled: RefCell::default(),
    };
    attempts.run(way).await.map_err(|last| {
        let Failed { failure, destination } = attempts.and_earlier(last);
        connection.lead_to(*destination);
        (*failure, attempts.untunnelled.take())
    })
}

/// Whether one of them has left the mesh, as is known now or soon; it is there still.
async fn has_one_left(connection: &Connection, untunnelled: &[WorkloadUid]) -> bool {
    if untunnelled.is_empty() {
        return false;
    }
    let (knowledge, within) = (&connection.shard.knowledge, connection.shard.config.second_look);
    let look = || {
        let snapshot = knowledge.snapshot();
        let has_left = |uid| snapshot.workload(uid).is_some_and(|workload| !workload.is_captured());
        if untunnelled.iter().any(has_left) {
            Ok(())
        } else {
            Err(Vec::new())
        }
    };
    ask::until_known_within(connection, within, look).await.is_some()
}

impl Attempts<'_> {
    /// Follows the way, and others where it leads nowhere.
    async fn run(&self, mut way: Way) -> Result<Upstream, Failed> {
        loop {
            let failed = match self.follow(way).await {
                Ok(upstream) => return Ok(upstream),
                Err((failed, false)) => return Err(failed),
                Err((failed, true)) => failed,
            };
            way = match self.next_way().await {
                Some(next) => next,
                None => return Err(failed),
            };
            self.remember(failed);
        }
    }

    fn remember(&self, failed: Failed) {
        let told = self.and_earlier(failed);
        self.told.replace(Some(told));
    }

    /// What is told, of this failure and those before.
    fn and_earlier(&self, failed: Failed) -> Failed {
        match self.told.take() {
            Some(earlier) => earlier.or(failed),
            None => failed,
        }
    }

    /// Follows one way, and when that takes long, others beside it. A failure, and whether to go on.
    async fn follow(&self, (source, route): Way) -> Result<Upstream, (Failed, bool)> {
        let connection = self.connection;
        let shard = &connection.shard;
        let endpoint = endpoint_of_service(&route);
        let counted = workload_of(&route).map(|workload| shard.experience.count(&workload.uid));
        let tunnelled = match &route {
            Route::Tunnel { workload, .. } => Some(workload.uid.clone()),
            _ => None,
        };
        if let Some(endpoint) = &endpoint {
            self.tried.borrow_mut().push(endpoint.uid.clone());
            shard.experience.begin(&endpoint.uid, endpoint.at, Instant::now());
        }
        let mut following = pin!(async {
            let outcome = follow(connection, &source, route, shard.config.connect_timeout).await;
            if outcome.as_ref().is_err_and(has_no_tunnel) {
                self.untunnelled.borrow_mut().extend(tunnelled);
            }
            outcome
        });
        let patience = endpoint.is_some() && self.may_go_on();
        let outcome = match patience {
            false => following.await,
            true => match tokio::time::timeout(shard.config.patience, following.as_mut()).await {
                Ok(outcome) => outcome,
                Err(_late) => return self.beside(following, endpoint, counted).await,
            },
        };
        self.judge(outcome, endpoint.as_ref(), counted)
    }

    /// What came of an attempt, whose destination the connection has.
    fn judge(
        &self,
        outcome: Result<Upstream, Failure>,
        endpoint: Option<&Endpoint>,
        counted: Option<Counted>,
    ) -> Result<Upstream, (Failed, bool)> {
        let experience = &self.connection.shard.experience;
        let failed = |failure: Failure| Failed {
            failure: failure.into(),
            destination: self.connection.lead_to(Destination::dialled(self.dialled)).into(),
        };
        match (outcome, endpoint) {
            (Ok(upstream), endpoint) => {
                if let Some(endpoint) = endpoint {
                    experience.succeeded(&endpoint.uid, endpoint.at);
                }
                self.connection.counts_at(counted);
                Ok(upstream)
            }
            (Err(failure), Some(endpoint)) if is_endpoints_fault(&failure) => {
                match endpoint.is_to_blame(&failure) {
                    true => experience.failed(&endpoint.uid, endpoint.at, Instant::now()),
                    // Nobody heard of it.
                    false if failure.is_exhaustion() => {}
                    false => experience.succeeded(&endpoint.uid, endpoint.at),
                }
                Err((failed(failure), self.may_go_on()))
            }
            (Err(failure), _) => Err((failed(failure), false)),
        }
    }

    /// An attempt that is late, and the next ones beside it.
    async fn beside(
        &self,
        late: Pin<&mut impl Future<Output = Result<Upstream, Failure>>>,
        endpoint: Option<Endpoint>,
        counted: Option<Counted>,
    ) -> Result<Upstream, (Failed, bool)> {
        if let Some(Endpoint { uid, at, .. }) = &endpoint {
            self.connection.shard.experience.failed(uid, *at, Instant::now());
        }
        let destination = self.connection.lead_to(Destination::dialled(self.dialled));
        let mut late = pin!(apart(self.connection, destination, late));
        // Another way may have to be asked for, which takes its time, too.
        let others: Pin<Box<dyn Future<Output = _> + '_>> = Box::pin(async {
            match self.next_way().await {
                Some(next) => Some(self.run(next).await),
                None => None,
            }
        });
        match select(late.as_mut(), others).await {
            Either::Left(((Err(failure), destination), others)) if is_endpoints_fault(&failure) => {
                let failed = Failed {
                    failure: failure.into(),
                    destination: destination.into(),
                };
                match others.await {
                    Some(Ok(upstream)) => Ok(upstream),
                    Some(Err(later)) => Err((failed.or(later), false)),
                    None => Err((failed, false)),
                }
            }
            Either::Left(((outcome, destination), others)) => {
                drop(others);
                self.connection.lead_to(destination);
                self.judge(outcome, endpoint.as_ref(), counted)
            }
            Either::Right((Some(Ok(upstream)), _)) => Ok(upstream),
            Either::Right((None, late)) => {
                let (outcome, destination) = late.await;
                self.connection.lead_to(destination);
                self.judge(outcome, endpoint.as_ref(), counted)
            }
            Either::Right((Some(Err(failed)), late)) => {
                self.remember(failed);
                let (outcome, destination) = late.await;
                self.connection.lead_to(destination);
                let outcome = self.judge(outcome, endpoint.as_ref(), counted);
                outcome.map_err(|(failed, _)| (failed, false))
            }
        }
    }

    fn may_go_on(&self) -> bool {
        self.tried.borrow().len() < self.connection.shard.config.attempts
    }

    /// The way to another endpoint, if there is one.
    async fn next_way(&self) -> Option<Way> {
        let tried = self.tried.borrow().clone();
        let next = find_allowed(self.connection, self.dialled, &tried).await.ok()?;
        endpoint_of_service(&next.1)?;
        increment(&self.connection.shard.counters.failed_over);
        Some(next)
    }
}

/// An attempt beside which there are others, with the destination that it has learned of and goes on learning of.
async fn apart<O>(
    connection: &Connection,
    mut destination: Destination,
    mut attempt: Pin<&mut impl Future<Output = O>>,
) -> (O, Destination) {
    let outcome = poll_fn(|cx| {
        let others = connection.lead_to(std::mem::take(&mut destination));
        let polled = attempt.as_mut().poll(cx);
        destination = connection.lead_to(others);
        polled
    });
    (outcome.await, destination)
}

/// The way, if the pod may take it.
async fn find_allowed(connection: &Connection, dialled: OriginalDst, tried: &[WorkloadUid]) -> Result<Way, Failure> {
    let (source, route) = find_way(connection, dialled, tried).await?;
    let route = egress::check(connection, &source, dialled, route).await?;
    Ok((source, route))
}

/// Whom a way leads to, where that is known; of one through a waypoint, its replica.
fn workload_of(route: &Route) -> Option<&Arc<Workload>> {
    match route {
        Route::Tunnel { workload, .. }
        | Route::Plaintext { workload, .. }
        | Route::Named { workload, .. }
        | Route::Waypoint { workload, .. } => Some(workload),
        Route::Passthrough { .. } | Route::Unknown { .. } | Route::Refused { .. } => None,
    }
}

/// Who was chosen, where there may be others.
fn endpoint_of_service(route: &Route) -> Option<Endpoint> {
    let (workload, at, is_waypoint) = match route {
        Route::Tunnel {
            workload,
            service: Some(_),
            target,
            ..
        }
        | Route::Plaintext {
            workload,
            service: Some(_),
            target,
        } => (workload, *target, false),
        // As `mesh` asks for one whose address is not known yet.
        Route::Named {
            workload,
            service: Some(_),
            port,
            ..
        } => (workload, (Ipv4Addr::UNSPECIFIED, *port).into(), false),
        Route::Waypoint {
            workload,
            gateway: Some(_),
            hbone,
            ..
        } => (workload, *hbone, true),
        _ => return None,
    };
    let uid = workload.uid.clone();
    Some(Endpoint { uid, at, is_waypoint })
}

/// Whether nobody took a tunnel there, or any more. Who answers by one is in the mesh.
fn has_no_tunnel(failure: &Failure) -> bool {
    matches!(failure, Failure::Open(error) if error.retryable() && !matches!(error, hbone::OpenError::Refused { .. }))
}

/// Whether another endpoint may do better.
fn is_endpoints_fault(failure: &Failure) -> bool {
    match failure {
        Failure::Connect(socket::ConnectError::Socket(_)) => false,
        Failure::Connect(_) | Failure::Lookup(_) => true,
        Failure::Open(error) => error.retryable(),
        _ => false,
    }
}
