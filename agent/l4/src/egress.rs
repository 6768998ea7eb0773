//! Whether a pod may go where its connection leads (`outboundTrafficPolicy`): asked before anything is dialled, and
//! again while the connection lives. What is decided is [`mesh::Exit`]'s; here are the wait and the names.
//!
//! Names are those that the pod learned by DNS from servers that are trusted ([`crate::names`]); a live connection keeps
//! those that it had when it began, for an application does not ask again while it is connected.
//!
//! What the pod's name server passes on is not judged, over TCP as over UDP: it is DNS and no more, and who was answered
//! with a part over UDP asks again over TCP (`what_the_name_server_passes_on_is_not_judged`).
//!
//! Before it is known what the mesh says (the Kubernetes API was never heard from), a connection that the registry has
//! nothing for waits for a while and is refused then (`before_it_is_known_a_connection_waits_and_is_refused`). A
//! connection inside the mesh asks and waits for nothing.

use std::{net::SocketAddr, sync::Arc, time::Instant};

use mesh::{Exit, RefuseReason, Route};
use model::{NamespacedName, OriginalDst, Workload};

use crate::{
    connection::{Connection, Live},
    dns,
    failure::Failure,
    names::Source,
    shard::{PodState, Shard},
};

/// What a connection left the mesh by.
#[derive(Debug)]
pub(crate) struct Left {
    dialled: SocketAddr,
    /// The service that was dialled.
    service: Option<NamespacedName>,
    names: Vec<Arc<str>>,
}

/// The route, if the pod may take it.
pub(crate) async fn check(
    connection: &Connection,
    source: &Workload,
    OriginalDst(dialled): OriginalDst,
    route: Route,
) -> Result<Route, Failure> {
    if is_name_servers(&connection.pod, dialled) {
        return Ok(route);
    }
    let service = match &route {
        Route::Plaintext { service, .. } | Route::Named { service, .. } => service.as_ref(),
        Route::Passthrough { .. } => None,
        _ => return closed_or(connection, source, dialled, route),
    };
    let left = Box::new(Left {
        dialled,
        service: service.map(|service| service.key()),
        names: learned(&connection.pod, dialled),
    });
    let exit = match exit(connection, source, dialled, &route, &left.names) {
        Exit::NotKnown => wait(connection, source, dialled, &route, &left.names).await,
        known => known,
    };
    match exit {
        Exit::Open(found) => {
            if !left.names.is_empty() {
                connection.pod.names.used(dialled.ip(), Instant::now());
            }
            let mut known = connection.known.borrow_mut();
            known.exit = Some(left);
            known.service = found.or(known.service.take());
            Ok(route)
        }
        Exit::NotKnown => Err(Failure::NoRoute(RefuseReason::OutboundNotKnown(dialled))),
        Exit::Closed(reason) => Err(Failure::NoRoute(reason)),
    }
}

/// Whether our name server has the connection: it carries DNS and no more.
fn is_name_servers(pod: &PodState, dialled: SocketAddr) -> bool {
    dialled.port() == dns::PORT && pod.dns.on.get()
}

/// A way within the mesh: no names are looked up for it, and nothing is kept to judge it again.
fn closed_or(connection: &Connection, source: &Workload, dialled: SocketAddr, route: Route) -> Result<Route, Failure> {
    match exit(connection, source, dialled, &route, &[]) {
        Exit::Closed(reason) => Err(Failure::NoRoute(reason)),
        Exit::Open(_) | Exit::NotKnown => Ok(route),
    }
}

fn exit(connection: &Connection, source: &Workload, dialled: SocketAddr, route: &Route, names: &[Arc<str>]) -> Exit {
    let snapshot = connection.shard.knowledge.snapshot();
    snapshot.exit(source, dialled, route, names)
}

/// Waits until it is known, or for as long as a connection may wait to be told of its destination.
async fn wait(
    connection: &Connection,
    source: &Workload,
    dialled: SocketAddr,
    route: &Route,
    names: &[Arc<str>],
) -> Exit {
    let mut changed = connection.shard.knowledge.changed();
    let waiting = async {
        loop {
            match exit(connection, source, dialled, route, names) {
                // The writer is gone: nothing comes, and the wait ends by time.
                Exit::NotKnown if changed.changed().await.is_err() => std::future::pending().await,
                Exit::NotKnown => {}
                known => return known,
            }
        }
    };
    let answered = tokio::time::timeout(connection.shard.config.discovery_timeout, Box::pin(waiting)).await;
    answered.unwrap_or(Exit::NotKnown)
}

/// The names that the pod may have the address by.
fn learned(pod: &PodState, dialled: SocketAddr) -> Vec<Arc<str>> {
    let hosts = pod.names.hosts(dialled.ip(), Instant::now());
    let trusted = hosts.into_iter().filter(|(_, source)| *source == Source::Trusted);
    trusted.map(|(host, _)| host).collect()
}

/// Why a live connection may be no more, if so.
pub(crate) fn closed_by_now(shard: &Shard, live: &Live) -> Option<RefuseReason> {
    let known = live.known.borrow();
    let left = known.exit.as_ref()?;
    let source = known.source_workload.as_ref()?;
    let snapshot = shard.knowledge.snapshot();
    // What a service was dialled by is its own address: it is there for as long as the service is.
    if let Some(service) = left.service.as_ref().and_then(|key| snapshot.service(key))
        && service.ports.contains_key(&left.dialled.port())
        && snapshot.may_use(source, service)
    {
        return None;
    }
    let mut names = left.names.clone();
    names.extend(learned(&live.pod, left.dialled));
    match snapshot.exit_to(source, left.dialled, &names) {
        Exit::Closed(reason) => Some(reason),
        Exit::Open(_) | Exit::NotKnown => None,
    }
}
