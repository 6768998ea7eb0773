//! A pod opens a connection: where to, and how.
//!
//! ```text
//! accept ─► original destination ─► route (one snapshot) ─► tunnel with the pod's own certificate ─┐
//!             │ none: not captured        │                 plain connection, where it is no mesh  ─┤
//!             ▼                           ▼ refused                  │ failed                       ▼
//!           reset                       reset      another endpoint, or reset                     relay
//! ```
//! Whatever fails before the two ends are joined, the client sees as a reset, never as an orderly close: it must not take
//! a refusal for an empty answer (`a_refused_upstream_is_a_reset_at_the_client`). Nothing of the client's bytes is read
//! before, so another endpoint may be tried (`attempts`). Where knowledge is on demand, a
//! destination that nothing is known of is asked for, and the connection waits (`on_demand_a_connection_waits_to_be_told`).

use std::{
    net::SocketAddr,
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use identity::Credentials;
use mesh::{Attempt, RefuseReason, Route, Snapshot};
use model::{Authority, OriginalDst, PeerAddr, Service, Workload, WorkloadUid, canonical_socket};
use socket2::SockRef;
use telemetry::Direction;
use tokio::net::TcpStream;

use crate::{
    ask,
    attempts::try_endpoints,
    connection::{Connection, Destination},
    descriptors, distrust, dns,
    failure::Failure,
    headers,
    lookup::{self, LookupError},
    pod::is_own_port,
    relay::{Relaying, relay_plain},
    shard::{PodState, Shard},
    socket::{self, ResetOnDrop},
};

/// What the client is joined to.
pub(crate) enum Upstream {
    Tunnel(hbone::ClientStream),
    Plain(TcpStream),
}

/// What becomes of an accepted connection.
enum Opened {
    Relay(Relaying),
    /// To a name server, which we may answer for.
    Dns(ResetOnDrop, OriginalDst),
}

/// The name server that a pod dialled.
struct NameServer<'a> {
    connection: &'a Connection,
    dialled: OriginalDst,
}

impl dns::Dial for NameServer<'_> {
    async fn dial(&self) -> Result<TcpStream, Failure> {
        match try_endpoints(self.connection, self.dialled).await? {
            Upstream::Plain(server) => Ok(server),
            Upstream::Tunnel(stream) => {
                let pair = socket::pair().await;
                let (ours, theirs) =
                    pair.map_err(|error| Failure::Relay(format!("no connection to itself: {error}")))?;
                // It ends when the other end is dropped.
                tokio::task::spawn_local(stream.relay(theirs));
                Ok(ours)
            }
        }
    }
}

/// Carries an accepted connection.
pub(crate) fn carry(shard: &Rc<Shard>, pod: &Rc<PodState>, client: TcpStream, peer: SocketAddr) {
    let connection = Connection::begin(shard, pod, Direction::Outbound, peer);
    connection.weigh();
    tokio::task::spawn_local(pod.group.fair(run(connection, ResetOnDrop::new(client))));
}

async fn run(connection: Connection, client: ResetOnDrop) {
    // Each part boxed, so that what opening needs is given back before the relay, which may last for days.
    match Box::pin(begin(&connection, client)).await {
        Ok(Opened::Relay(relaying)) => {
            let failure = relaying.await;
            connection.finish(failure);
        }
        Ok(Opened::Dns(client, dialled)) => {
            let dial = NameServer {
                connection: &connection,
                dialled,
            };
            let serving = Box::pin(dns::serve_tcp(&connection, client.keep(), dialled.0, dial));
            let failure = connection.unless_stopped(serving).await.flatten();
            connection.finish(failure);
        }
        Err((failure, client)) => {
            // In this order: who sees the reset finds the record.
            connection.finish(failure);
            drop(client);
        }
    }
}

/// Opens the way; gives the client back if there is none.
async fn begin(connection: &Connection, client: ResetOnDrop) -> Result<Opened, (Option<Failure>, ResetOnDrop)> {
    let dialled = match original_destination(connection, &client) {
        Ok(dialled) => dialled,
        Err(failure) => return Err((Some(failure), client)),
    };
    connection.known.borrow_mut().destination = Some(dialled.0);
    if let Err(none) = descriptors::spare(&*client) {
        return Err((Some(none.into()), client));
    }
    if dialled.0.port() == dns::PORT && connection.pod.dns.on.get() {
        // It may be answered without a way to anywhere; who asks is told all the same. Unknown, it is answered too.
        let _ = source(connection, &connection.shard.knowledge.snapshot());
        connection.establish();
        return Ok(Opened::Dns(client, dialled));
    }
    let opening = Box::pin(try_endpoints(connection, dialled));
    let upstream = match connection.unless_stopped(opening).await {
        Some(Ok(upstream)) => upstream,
        Some(Err(failure)) => return Err((Some(failure), client)),
        None => return Err((None, client)),
    };
    connection.establish();
    let live = connection.relay.clone();
    Ok(Opened::Relay(match upstream {
        Upstream::Tunnel(stream) => {
            let relaying = stream.relay_watched(client.keep(), live);
            Box::pin(async move { relaying.await.outcome.err().and_then(Failure::of_stream) })
        }
        Upstream::Plain(server) => relay_plain(client.keep(), server, live),
    }))
}

fn original_destination(connection: &Connection, client: &TcpStream) -> Result<OriginalDst, Failure> {
    let local = client
        .local_addr()
        .map_err(|error| Failure::Relay(format!("the client's socket failed: {error}")))?;
    let OriginalDst(dialled) = connection
        .pod
        .sockets
        .original_destination(
            SockRef::from(client),
            PeerAddr(connection.client),
            canonical_socket(local),
        )
        .ok_or(Failure::NotCaptured)?;
    Ok(OriginalDst(canonical_socket(dialled)))
}

/// Whether an address is this workload's own: then the proxy's ports there are the proxy's.
fn is_of(workload: &Workload, address: SocketAddr) -> bool {
    let ip = address.ip();
    ip.is_loopback() && workload.workload_ips.iter().all(|own| !own.is_loopback())
        || workload.workload_ips.contains(&ip)
}

/// The pod and its way to what it dialled; on demand it may have to be asked for, and is waited for, for a while.
pub(crate) async fn find_way(
    connection: &Connection,
    dialled: OriginalDst,
    tried: &[WorkloadUid],
) -> Result<(Arc<Workload>, Route), Failure> {
    match resolve(connection, dialled, tried)? {
        (_, Route::Unknown { mut wanted }) => {
            // What is dialled, and then the waypoint that this turns out to have.
            let look = || match resolve(connection, dialled, tried) {
                Ok((_, Route::Unknown { wanted: lacking })) => {
                    wanted = lacking.clone();
                    Err(vec![lacking])
                }
                known => Ok(known),
            };
            let known = ask::until_known(connection, look).await;
            known.unwrap_or(Err(Failure::NoRoute(RefuseReason::NotDiscovered(wanted))))
        }
        known => Ok(known),
    }
}

/// The pod as it is known now.
fn source(connection: &Connection, snapshot: &Snapshot) -> Result<Arc<Workload>, Failure> {
    let unknown = || Failure::UnknownWorkload(connection.pod.uid.clone());
    connection.pod.judged_by(snapshot);
    let source = snapshot.workload(&connection.pod.uid).ok_or_else(unknown)?;
    connection.known.borrow_mut().source_workload = Some(source.clone());
    Ok(source.clone())
}

/// The pod as it is known now, and its way to what it dialled.
fn resolve(
    connection: &Connection,
    OriginalDst(dialled): OriginalDst,
    tried: &[WorkloadUid],
) -> Result<(Arc<Workload>, Route), Failure> {
    let snapshot = connection.shard.knowledge.snapshot();
    let source = &source(connection, &snapshot)?;
    if is_own_port(dialled.port()) && is_of(source, dialled) {
        return Err(Failure::Loop(dialled));
    }
    let attempt = Attempt {
        random: connection.shard.random(),
        tried,
        experience: &*connection.shard.experience,
    };
    let route = snapshot.resolve_attempt(source, OriginalDst(dialled), attempt);
    Ok((source.clone(), route))
}

/// Opens the way, a plain connection within this time.
pub(crate) async fn follow(
    connection: &Connection,
    source: &Arc<Workload>,
    route: Route,
    timeout: Duration,
) -> Result<Upstream, Failure> {
    match route {
        Route::Refused { reason } => Err(Failure::NoRoute(reason)),
        Route::Unknown { wanted } => Err(Failure::NoRoute(RefuseReason::NotDiscovered(wanted))),
        Route::Passthrough { target } => plain(connection, source, target, timeout).await,
        named @ Route::Named { .. } => by_name(connection, source, named).await,
        Route::Plaintext {
            workload,
            service,
            target,
        } => {
            connection.learn_destination(workload, service, None);
            plain(connection, source, target, timeout).await
        }
        Route::Tunnel {
            workload,
            service,
            target,
            hbone,
        } => {
            let end = TunnelEnd {
                workload: &workload,
                names: service.as_deref(),
                address: hbone,
            };
            through(connection, source, &end, target, service.as_ref()).await
        }
        Route::Waypoint {
            workload,
            gateway,
            service,
            target,
            hbone,
        } => {
            let end = TunnelEnd {
                workload: &workload,
                names: gateway.as_deref(),
                address: hbone,
            };
            through(connection, source, &end, target, service.as_ref()).await
        }
    }
}

/// Opens the way through a tunnel: to the destination's own end of it, or to its waypoint.
async fn through(
    connection: &Connection,
    source: &Arc<Workload>,
    end: &TunnelEnd<'_>,
    target: SocketAddr,
    service: Option<&Arc<Service>>,
) -> Result<Upstream, Failure> {
    connection.learn_destination(end.workload.clone(), service.cloned(), Some(target));
    let opened = tunnel(connection, source, end, target, service.map(Arc::as_ref)).await;
    opened.map(Upstream::Tunnel)
}

/// Looks a name up and tries its addresses in turn; all of it within one connect timeout.
async fn by_name(connection: &Connection, source: &Arc<Workload>, route: Route) -> Result<Upstream, Failure> {
    let Route::Named {
        host, port, service, ..
    } = &route
    else {
        return Box::pin(follow(
            connection,
            source,
            route,
            connection.shard.config.connect_timeout,
        ))
        .await;
    };
    let config = &connection.shard.config;
    let end = Instant::now() + config.connect_timeout;
    let dialled = connection.known.borrow().destination;
    let v4_first = dialled.is_none_or(|dialled| dialled.is_ipv4());
    let asking = tokio::time::timeout(config.connect_timeout, config.lookup.addresses(host));
    let addresses = asking.await.unwrap_or_else(|_elapsed| {
        Err(LookupError {
            host: host.clone(),
            resolver: "the node's".into(),
            reason: format!("it was not answered within {:?}", config.connect_timeout),
        })
    })?;
    let addresses = lookup::in_turn(addresses, v4_first);
    let own = service.as_ref().map(|service| service.key());
    // Where the first that failed led, too: what is told is of one address.
    let mut first: Option<(Failure, Destination)> = None;
    let mut failed = |failure| {
        let nowhere = dialled.map_or_else(Destination::default, |dialled| {
            Destination::dialled(OriginalDst(dialled))
        });
        let led = connection.lead_to(nowhere);
        first.get_or_insert((failure, led));
    };
    for (index, ip) in addresses.iter().enumerate() {
        let left = u32::try_from(addresses.len() - index).unwrap_or(1);
        let within = end.saturating_duration_since(Instant::now()) / left;
        let way = match find_way(connection, OriginalDst(SocketAddr::new(*ip, *port)), &[]).await {
            // Nothing of the mesh: it is the workload itself.
            Ok((_, Route::Passthrough { .. })) => route.clone().at(*ip),
            // And so it is where its service has that very address, or a range around it.
            Ok((_, Route::Named { service: Some(of), .. })) if own == Some(of.key()) => route.clone().at(*ip),
            Ok((
                _,
                Route::Refused {
                    reason: RefuseReason::NoSuchPort(of, _),
                },
            )) if own == Some(of.clone()) => route.clone().at(*ip),
            // One name for another would go round in circles.
            Ok((_, Route::Named { .. })) => continue,
            Ok((_, of_mesh)) => of_mesh,
            Err(failure) => {
                failed(failure);
                continue;
            }
        };
        match Box::pin(follow(connection, source, way, within)).await {
            Ok(upstream) => return Ok(upstream),
            Err(failure) => failed(failure),
        }
    }
    let none = || LookupError {
        host: host.clone(),
        resolver: "the node's".into(),
        reason: "none of its addresses can be connected to".to_owned(),
    };
    let Some((failure, destination)) = first else {
        return Err(none().into());
    };
    connection.lead_to(destination);
    Err(failure)
}

async fn plain(
    connection: &Connection,
    source: &Workload,
    target: SocketAddr,
    timeout: Duration,
) -> Result<Upstream, Failure> {
    connection.known.borrow_mut().destination = Some(target);
    if is_own_port(target.port()) && is_of(source, target) {
        return Err(Failure::Loop(target));
    }
    let socket = connection.pod.sockets.outbound_socket(target);
    let server = socket::connect(socket, target, timeout).await?;
    // Without it a peer that vanished is never noticed; a socket that refuses it still works.
    let _ = socket::keep_alive(&server);
    Ok(Upstream::Plain(server))
}

/// Who takes a tunnel, and where.
struct TunnelEnd<'a> {
    workload: &'a Arc<Workload>,
    /// The service whose names are as good as the workload's identity.
    names: Option<&'a Service>,
    address: SocketAddr,
}

async fn tunnel(
    connection: &Connection,
    source: &Arc<Workload>,
    end: &TunnelEnd<'_>,
    target: SocketAddr,
    service: Option<&Service>,
) -> Result<hbone::ClientStream, Failure> {
    let (shard, pod, hbone) = (&connection.shard, &connection.pod, end.address);
    let (own, peer) = (source.identity(), end.workload.identity());
    connection.learn_peer(hbone, peer.clone());
    let credentials = credentials(shard, &own).await?;
    let forwarded = headers::forwarded(connection.client, service.map(|service| &*service.hostname));
    let request = hbone::ConnectRequest {
        authority: Authority::Address(target),
        headers: vec![
            ("baggage", pod.baggage(source)),
            ("forwarded", forwarded),
            ("traceparent", connection.begin_trace().traceparent(shard.random())),
        ],
    };
    let alternatives = end.names.into_iter().flat_map(|service| &service.subject_alt_names);
    let key = hbone::TunnelKey {
        source: own,
        destination: std::iter::once(peer)
            .chain(alternatives.filter_map(|name| name.parse().ok()))
            .collect(),
        workload: end.workload.uid.clone(),
        address: hbone,
    };
    let dial = || descriptors::spared(pod.sockets.outbound_socket(hbone));
    let stream = pod.pool.open(&key, &credentials, dial, request).await?;
    let proof = stream.proof();
    // The answer may have taken its time. From here on it is looked at when a root leaves.
    distrust::refuse(shard, &key.source, &proof, || end.workload.identity())?;
    connection.known.borrow_mut().proof = Some(proof);
    Ok(stream)
}

/// The certificate of an identity; waits for one, for a while.
pub(crate) async fn credentials(shard: &Shard, identity: &model::Identity) -> Result<Arc<Credentials>, Failure> {
    if let Some(credentials) = shard.identities.cached(identity) {
        return Ok(credentials);
    }
    let within = shard.config.credentials_timeout;
    match tokio::time::timeout(within, shard.identities.credentials(identity)).await {
        Ok(issued) => issued.map_err(|error| Failure::NoCredentials(error.to_string())),
        Err(_) => Err(Failure::NoCredentials(format!(
            "none was issued for {identity} within {within:?}"
        ))),
    }
}
