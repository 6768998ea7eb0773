//! Somebody opens a connection to a pod.
//!
//! ```text
//! 15008 ─► handshake (bounded) ─► hbone serves ─► each CONNECT: facts ─► verdict ─► application ─► 200 ─► relay
//! 15006 ─► facts without an identity ─► verdict ─► application ─► relay
//! ```
//! The verdict comes before the application is dialled, always. A pod that nothing is known of takes nothing
//! (`without_knowledge_everything_is_refused`); where too little is known yet to decide, the connection waits for a while
//! (`who_comes_before_the_pod_is_announced_waits`): the kubelet's probe may have found the pod ready before its own agent was told.
//!
//! Order and status codes of a CONNECT are ztunnel's: 400 for an authority that is malformed or somebody else's, 503 for
//! a pod, service or port that is not known, 401 when policy denies, 503 where the policies are not known (yet) or the
//! application does not accept, and 200 only once it has. Deviation: a host name must be that of a service that the pod is an endpoint of.

use std::{
    cell::Cell,
    net::SocketAddr,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use hbone::{Decision, IncomingRequest, RelayEnd};
use identity::Credentials;
use mesh::Snapshot;
use model::{Authority, AuthorityError, OriginalDst, Workload, canonical_ip, canonical_socket};
use policy::{Facts, Reason};
use socket2::SockRef;
use telemetry::{Direction, TraceId};
use tokio::net::TcpStream;

use crate::{
    application, ask,
    connection::Connection,
    counters::increment,
    descriptors, distrust,
    failure::Failure,
    handed, headers,
    outbound::credentials,
    pod::is_own_port,
    relay::relay_plain,
    shard::{PodState, Shard},
    socket::{self, ResetOnDrop},
};

/// Carries an accepted plaintext connection.
pub(crate) fn carry_plaintext(shard: &Rc<Shard>, pod: &Rc<PodState>, client: TcpStream, peer: SocketAddr) {
    let connection = Connection::begin(shard, pod, Direction::Inbound, peer);
    connection.weigh();
    tokio::task::spawn_local(pod.group.fair(run_plaintext(connection, ResetOnDrop::new(client))));
}

async fn run_plaintext(connection: Connection, client: ResetOnDrop) {
    let opening = Box::pin(open_plaintext(&connection, &client));
    let failure = match connection.unless_stopped(opening).await {
        Some(Ok(application)) => {
            connection.establish();
            let failure = relay_plain(client.keep(), application, connection.relay.clone()).await;
            return connection.finish(failure);
        }
        Some(Err(failure)) => Some(failure),
        None => None,
    };
    // In this order: who sees the reset finds the record.
    connection.finish(failure);
    drop(client);
}

async fn open_plaintext(connection: &Connection, client: &TcpStream) -> Result<TcpStream, Failure> {
    let local = client
        .local_addr()
        .map_err(|error| Failure::Relay(format!("the client's socket failed: {error}")))?;
    let accepted = SockRef::from(client);
    let OriginalDst(target) = connection
        .pod
        .sockets
        .inbound_destination(accepted, canonical_socket(local));
    let target = canonical_socket(target);
    connection.known.borrow_mut().destination = Some(target);
    descriptors::spare(client)?;
    if is_own_port(target.port()) {
        return Err(Failure::Loop(target));
    }
    let judge = || {
        let snapshot = connection.shard.knowledge.snapshot();
        let workload = own_workload(connection, &snapshot)?.clone();
        connection.learn_source(&snapshot);
        connection.learn_destination(workload.clone(), None, None);
        handed::refuse_proxy_port(&workload, target)?;
        let facts = Facts {
            identity: None,
            aliases: Arc::new([]),
            source: connection.client.ip(),
            destination: target,
        };
        admit(connection, &snapshot, &workload, facts)
    };
    // Who comes in plaintext has nowhere else to go.
    judged(connection, connection.shard.config.discovery_timeout, judge).await?;
    Ok(application::dial(connection, target, connection.client.ip()).await?)
}

/// Judges, and where too little is known yet to decide, as of a pod that started a moment ago, again when more is.
async fn judged<T>(
    connection: &Connection,
    within: Duration,
    judge: impl Fn() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let is_open = |judged: &Result<T, Failure>| matches!(judged, Err(Failure::Denied(why)) if !why.is_decided());
    let first = judge();
    if !is_open(&first) {
        return first;
    }
    let look = || Some(judge()).filter(|judged| !is_open(judged)).ok_or_else(Vec::new);
    let later = ask::until_known_within(connection, within, look).await;
    later.unwrap_or(first)
}

/// Judges the connection, and lets it be judged again when knowledge changes.
fn admit(connection: &Connection, snapshot: &Snapshot, workload: &Workload, facts: Facts) -> Result<(), Failure> {
    connection.pod.judged_by(snapshot);
    let verdict = snapshot.verdict(&facts, workload);
    let mut known = connection.known.borrow_mut();
    known.dry_run = connection.rehearse(verdict.allowed, verdict.dry_run);
    if !verdict.allowed {
        return Err(Failure::Denied(verdict.reason));
    }
    known.rule = Some(verdict.reason);
    known.facts = Some(facts);
    Ok(())
}

fn own_workload<'a>(connection: &Connection, snapshot: &'a Snapshot) -> Result<&'a Arc<Workload>, Failure> {
    let workload = snapshot.workload(&connection.pod.uid);
    workload.ok_or_else(|| Failure::UnknownWorkload(connection.pod.uid.clone()))
}

/// Carries an accepted tunnel.
pub(crate) fn carry_tunnel(shard: &Rc<Shard>, pod: &Rc<PodState>, socket: TcpStream, peer: SocketAddr) {
    shard.peers[shard.index].tunnels.fetch_add(1, Relaxed);
    pod.tunnels.set(pod.tunnels.get() + 1);
    let tunnel = Tunnel {
        shard: shard.clone(),
        pod: pod.clone(),
        peer: canonical_socket(peer),
    };
    let task = tokio::task::spawn_local(pod.group.fair(tunnel.carry(socket)));
    if let Some(dropped) = pod.half_open.enter(canonical_ip(peer.ip()), task.abort_handle()) {
        increment(&shard.counters.half_open_dropped);
        shard.refusals.say(|| {
            tracing::warn!(pod = %pod.uid, peer = %dropped, "too many unfinished handshakes: the oldest was dropped");
        });
    }
}

/// A tunnel that a peer opened.
struct Tunnel {
    shard: Rc<Shard>,
    pod: Rc<PodState>,
    peer: SocketAddr,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.shard.peers[self.shard.index].tunnels.fetch_sub(1, Relaxed);
        let left = self.pod.tunnels.get() - 1;
        self.pod.tunnels.set(left);
        if left == 0 {
            self.pod.idle.notify_waiters();
        }
        if let Some(task) = tokio::task::try_id() {
            self.pod.half_open.leave(task);
        }
    }
}

impl Tunnel {
    async fn carry(self, socket: TcpStream) {
        let local = socket.local_addr().ok().map(canonical_socket);
        let failure = self.serve(socket).await.err();
        if let Some(failure) = failure {
            // A tunnel that was never one has no connections that could tell: it gets a record of its own.
            let connection = Connection::begin(&self.shard, &self.pod, Direction::Inbound, self.peer);
            connection.known.borrow_mut().destination = local;
            connection.finish(Some(failure));
        }
    }

    async fn serve(&self, socket: TcpStream) -> Result<(), Failure> {
        let credentials = match self.first_bytes(&socket).await {
            Ok(credentials) => credentials,
            Err(failure) => {
                socket::reset(socket);
                return Err(failure);
            }
        };
        let handler = Handler {
            shard: self.shard.clone(),
            pod: self.pod.clone(),
            half_open: Rc::new(Cell::new(tokio::task::try_id())),
        };
        let (tls, config) = (credentials.server_config(), self.shard.hbone.clone());
        // Boxed: what the handshake needs is more than a tunnel should hold.
        let serving = Box::pin(hbone::serve(socket, tls, config, handler, self.pod.drain_signal()));
        match serving.await {
            Ok(()) | Err(hbone::TunnelError::Drained) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until the peer says something: who says nothing shall cost no more than its socket. Then there must be a
    /// certificate to answer with.
    async fn first_bytes(&self, socket: &TcpStream) -> Result<Arc<Credentials>, Failure> {
        descriptors::spare(socket)?;
        let snapshot = self.shard.knowledge.snapshot();
        let workload = snapshot.workload(&self.pod.uid);
        let identity = workload
            .ok_or_else(|| Failure::UnknownWorkload(self.pod.uid.clone()))?
            .identity();
        drop(snapshot);
        let within = self.shard.hbone.handshake_timeout;
        if tokio::time::timeout(within, socket.readable()).await.is_err() {
            return Err(hbone::TunnelError::Handshake(hbone::HandshakeError::Timeout(within)).into());
        }
        credentials(&self.shard, &identity).await
    }
}

/// Answers the CONNECTs of a tunnel.
#[derive(Clone)]
struct Handler {
    shard: Rc<Shard>,
    pod: Rc<PodState>,
    /// The tunnel's task, until the first CONNECT: a peer that has shaken hands and asks for nothing is half-open, too.
    half_open: Rc<Cell<Option<tokio::task::Id>>>,
}

impl hbone::Handler for Handler {
    type Context = Connection;

    fn group(&self) -> tasks::Group {
        self.pod.group.clone()
    }

    async fn connect(&self, tunnel: &hbone::Accepted, request: IncomingRequest) -> Decision<Connection> {
        if let Some(task) = self.half_open.take() {
            self.pod.half_open.leave(task);
        }
        increment(&self.shard.counters.inbound_streams);
        let connection = Connection::begin(&self.shard, &self.pod, Direction::Inbound, tunnel.peer_address);
        let peer = self.shard.identities.trust().normalize(tunnel.peer.clone());
        connection.learn_tunnel(tunnel.local_address, &peer, forwarded_host(&request));
        connection.known.borrow_mut().trace = trace(&request);
        let opening = Box::pin(Self::open(&connection, tunnel, request.authority));
        let opened = connection.unless_stopped(opening).await;
        match opened {
            Some(Ok(application)) => {
                connection.establish();
                let known = connection.known.borrow().destination_workload.clone();
                let baggage = known.map(|workload| ("baggage", self.pod.baggage(&workload)));
                let live = connection.relay.clone();
                Decision::Accept {
                    application,
                    headers: Vec::from_iter(baggage),
                    context: connection,
                    live,
                }
            }
            Some(Err(failure)) => {
                let decision = answer(&failure);
                connection.finish(Some(failure));
                decision
            }
            None => {
                connection.finish(None);
                Decision::Refuse {
                    status: 503,
                    reason: None,
                }
            }
        }
    }

    fn relayed(&self, connection: Connection, end: RelayEnd) {
        connection.finish(end.outcome.err().and_then(Failure::of_stream));
    }
}

fn forwarded_host(request: &IncomingRequest) -> Option<Arc<str>> {
    headers::forwarded_host(request.headers.get("forwarded")?.to_str().ok()?).map(Arc::from)
}

/// The trace that the peer began for this connection.
fn trace(request: &IncomingRequest) -> Option<TraceId> {
    TraceId::of_traceparent(request.headers.get("traceparent")?.to_str().ok()?)
}

impl Handler {
    /// Everything before the 200: what it is joined to, or why not.
    async fn open(
        connection: &Connection,
        tunnel: &hbone::Accepted,
        authority: Result<Authority, AuthorityError>,
    ) -> Result<TcpStream, Failure> {
        let authority = authority.map_err(|error| Failure::BadRequest(error.to_string()))?;
        let own = canonical_socket(tunnel.local_address);
        handed::wait_until_behind(connection, own.ip(), &authority).await?;
        let trust = connection.shard.identities.trust();
        let facts = Facts {
            identity: Some(trust.normalize(tunnel.peer.clone())),
            aliases: trust.aliases(),
            source: connection.client.ip(),
            destination: own,
        };
        handed::wait_for_waypoints(connection, &facts).await;
        let judge = || {
            let snapshot = connection.shard.knowledge.snapshot();
            let workload = own_workload(connection, &snapshot)?.clone();
            connection.learn_source(&snapshot);
            let target = target_of(&authority, own, &snapshot, &workload)?;
            let service = connection.claimed_service(&snapshot, &workload);
            connection.learn_destination(workload.clone(), service, Some(target));
            if is_own_port(target.port()) {
                return Err(Failure::NotServed(authority.clone()));
            }
            distrust::refuse(&connection.shard, &workload.identity(), &tunnel.proof, || {
                tunnel.peer.clone()
            })?;
            connection.known.borrow_mut().proof = Some(tunnel.proof.clone());
            let facts = Facts {
                destination: target,
                ..facts.clone()
            };
            admit(connection, &snapshot, &workload, facts)?;
            Ok((workload, target))
        };
        // Who comes by a tunnel may try another endpoint when it is told.
        let (workload, target) = match judged(connection, connection.shard.config.second_look, judge).await {
            // That it has a waypoint may be what was not known before.
            Err(Failure::Denied(Reason::PastWaypoint(..))) => {
                handed::wait_for_waypoints(connection, &facts).await;
                judge()?
            }
            judged => judged?,
        };
        match workload.application_tunnel {
            Some(way) => handed::dial(connection, &workload, way, target, own.ip(), &tunnel.peer).await,
            None => Ok(application::dial(connection, target, connection.client.ip()).await?),
        }
    }
}

/// What an authority means: the address must be the one that the tunnel came to, or for a waypoint that of something
/// behind it; a host name that of a service with this pod as an endpoint.
fn target_of(
    authority: &Authority,
    own: SocketAddr,
    snapshot: &Snapshot,
    workload: &Workload,
) -> Result<SocketAddr, Failure> {
    match authority {
        Authority::Address(asked) if asked.ip() == own.ip() => Ok(*asked),
        Authority::Address(asked) if snapshot.is_waypoint_for(workload, authority) => {
            match workload.application_tunnel {
                Some(_) => Ok(*asked),
                None => Err(Failure::NoBinding(authority.clone())),
            }
        }
        Authority::Address(_) if workload.application_tunnel.is_some() => Err(Failure::NotBehind(authority.clone())),
        Authority::Address(_) => Err(Failure::NotThisPod {
            asked: authority.clone(),
            own,
        }),
        Authority::Host(host, port) => {
            let not_served = || Failure::NotServed(authority.clone());
            let (service, ports) = workload
                .services
                .iter()
                .find(|(service, _)| service.name == *host)
                .ok_or_else(not_served)?;
            let of_service = || snapshot.service(service)?.ports.get(port).copied();
            let port = ports.get(port).copied().or_else(of_service).ok_or_else(not_served)?;
            Ok(SocketAddr::new(own.ip(), port))
        }
    }
}

/// What the peer is told: where it may not, why.
fn answer(failure: &Failure) -> Decision<Connection> {
    let reason = match failure {
        Failure::Denied(reason) => Some(reason.to_string()),
        _ => None,
    };
    Decision::Refuse {
        status: status_of(failure),
        reason,
    }
}

/// ztunnel's status for a CONNECT that failed.
fn status_of(failure: &Failure) -> u16 {
    match failure {
        Failure::BadRequest(_) | Failure::NotThisPod { .. } | Failure::NotBehind(_) | Failure::NoBinding(_) => 400,
        // Another endpoint's agent may know more.
        Failure::Denied(reason) if !reason.is_decided() => 503,
        Failure::Denied(_) | Failure::NoLongerAllowed(_) | Failure::NoLongerTrusted(_) => 401,
        _ => 503,
    }
}
