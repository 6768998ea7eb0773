//! Queries in datagrams.
//!
//! Each forwarded query has a socket of its own, in the pod's network, connected to the server: another source port each
//! time, and no answer but the server's gets in. What the server says is passed on only if it is an answer with the
//! query's id.
//!
//! Datagrams come from inside the pod alone: a socket on the pod's own address takes only what has that address as its
//! source, which the kernel lets no other machine claim (scenario `nobody_else_is_answered`).

use std::{io, net::SocketAddr, os::fd::AsFd, rc::Rc, time::Duration};

use tokio::net::UdpSocket;

use super::{Decision, Forwarding, Serving, Sockets, Transport, decide, learn, message, servfail};
use crate::{
    counters::increment,
    descriptors,
    shard::{PodState, Shard},
};

/// The longest datagram.
const LONGEST: usize = u16::MAX as usize;

/// Queries of a socket that are looked at before others get their turn.
const TURN: usize = 32;

/// The discard protocol's: nobody sends from it to a name server.
const NOBODY: u16 = 9;

/// How long a socket rests that fails.
const REST: Duration = Duration::from_millis(100);

/// Serves a pod's sockets until it is stopped.
pub(crate) fn serve(shard: &Rc<Shard>, pod: &Rc<PodState>, sockets: Sockets) {
    for (slot, socket) in sockets {
        let socket = socket.set_nonblocking(true).and_then(|()| UdpSocket::from_std(socket));
        match socket {
            Ok(socket) => {
                let socket = Rc::new(socket);
                let serving = listen(shard.clone(), pod.clone(), slot, socket.clone());
                let task = tokio::task::spawn_local(pod.group.fair(serving)).abort_handle();
                pod.dns.serving.borrow_mut().push(Serving { task, slot, socket });
            }
            Err(error) => {
                tracing::error!(pod = %pod.uid, slot, "a DNS socket can't be polled, so it is not served: {error}");
            }
        }
    }
}

async fn listen(shard: Rc<Shard>, pod: Rc<PodState>, slot: usize, socket: Rc<UdpSocket>) {
    loop {
        let Err(error) = take_turn(&shard, &pod, slot, &socket).await else {
            tokio::task::yield_now().await;
            continue;
        };
        shard.accept_errors.say(|| {
            tracing::warn!(pod = %pod.uid, "a pod's DNS socket failed, and is tried again: {error}");
        });
        tokio::time::sleep(REST).await;
    }
}

/// Takes a few datagrams.
async fn take_turn(shard: &Rc<Shard>, pod: &Rc<PodState>, slot: usize, socket: &Rc<UdpSocket>) -> io::Result<()> {
    socket.readable().await?;
    for _ in 0..TURN {
        let taken = take(shard, pod, slot, socket, |buffer| socket.try_recv_from(buffer));
        match taken {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            taken => taken?,
        }
    }
    Ok(())
}

/// Takes all that waits in a socket which from now on gets nothing more: connected to an end that nobody has, it is passed
/// over by the kernel, and others of its port get what it would have got. (Closed, it would lose what waits.)
pub(crate) fn leave(shard: &Rc<Shard>, pod: &Rc<PodState>, slot: usize, socket: &Rc<UdpSocket>) {
    let left = || {
        let nobody = SocketAddr::new(socket.local_addr()?.ip(), NOBODY);
        let left = std::net::UdpSocket::from(socket.as_fd().try_clone_to_owned()?);
        left.connect(nobody)?;
        // Not by the runtime, which may not have heard yet of what is there.
        loop {
            match take(shard, pod, slot, socket, |buffer| left.recv_from(buffer)) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                taken => taken?,
            }
        }
    };
    let left: io::Result<()> = left();
    if let Err(error) = left {
        tracing::warn!(pod = %pod.uid, slot, "queries that waited in a DNS socket are lost: {error}");
    }
}

/// Takes one datagram.
fn take(
    shard: &Rc<Shard>,
    pod: &Rc<PodState>,
    slot: usize,
    socket: &Rc<UdpSocket>,
    receive: impl FnOnce(&mut [u8]) -> io::Result<(usize, SocketAddr)>,
) -> io::Result<()> {
    let mut buffer = shard.datagram.borrow_mut();
    // Once for each shard: a datagram may be that long, and hardly ever is.
    buffer.resize(LONGEST, 0);
    let (length, client) = receive(&mut buffer)?;
    if !is_own(socket.local_addr()?, client) {
        increment(&shard.counters.dns_foreign);
        return Ok(());
    }
    let query = &buffer[..length];
    match decide(shard, pod, query, Transport::Udp) {
        // The client's buffer is full: it asks again.
        Decision::Reply(reply) => drop(socket.try_send_to(&reply, client)),
        Decision::Drop => {}
        Decision::Forward => {
            let query = query.to_vec();
            drop(buffer);
            begin_forwarding(shard, pod, slot, socket, client, query);
        }
    }
    Ok(())
}

/// Whether a client is the pod whose address this is.
fn is_own(local: SocketAddr, client: SocketAddr) -> bool {
    let (local, client) = (local.ip().to_canonical(), client.ip().to_canonical());
    local.is_loopback() || client.is_loopback() || local == client
}

fn begin_forwarding(
    shard: &Rc<Shard>,
    pod: &Rc<PodState>,
    slot: usize,
    socket: &Rc<UdpSocket>,
    client: SocketAddr,
    query: Vec<u8>,
) {
    let (shard, pod, socket) = (shard.clone(), pod.clone(), socket.clone());
    let group = pod.group.clone();
    tokio::task::spawn_local(group.fair(async move {
        let reply = match forward(&shard, &pod, slot, client, &query).await {
            Ok(response) => response,
            Err(why) => {
                increment(&shard.counters.dns_failed);
                tracing::debug!(pod = %pod.uid, slot, "a DNS query was not answered: {why}");
                servfail(&query)
            }
        };
        // As above.
        let _ = socket.try_send_to(&reply, client);
    }));
}

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error("too many queries of the pod are waiting for its name servers")]
    TooMany,
    #[error("which name server it was sent to is not known")]
    NoServer,
    #[error("the name server {0} failed: {1}")]
    Server(SocketAddr, io::Error),
    #[error("the name server {0} did not answer within {1:?}")]
    Timeout(SocketAddr, Duration),
}

async fn forward(
    shard: &Shard,
    pod: &PodState,
    slot: usize,
    client: SocketAddr,
    query: &[u8],
) -> Result<Vec<u8>, ForwardError> {
    let config = &shard.config.dns;
    let server = pod.sockets.name_server(slot, client).ok_or(ForwardError::NoServer)?;
    let _counted = Forwarding::begin(pod, config.forwarding).ok_or(ForwardError::TooMany)?;
    increment(&shard.counters.dns_forwarded);
    let asking = Box::pin(ask(shard, pod, server, query));
    match tokio::time::timeout(config.timeout, asking).await {
        Ok(Ok(response)) => {
            learn(shard, pod, server, &response);
            Ok(response)
        }
        Ok(Err(error)) => Err(ForwardError::Server(server, error)),
        Err(_) => Err(ForwardError::Timeout(server, config.timeout)),
    }
}

async fn ask(shard: &Shard, pod: &PodState, server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let socket = descriptors::spared(pod.sockets.datagram_socket(server))?;
    socket.connect(&server.into())?;
    let socket = UdpSocket::from_std(socket.into())?;
    socket.send(query).await?;
    loop {
        socket.readable().await?;
        let mut buffer = shard.datagram.borrow_mut();
        buffer.resize(LONGEST, 0);
        match socket.try_recv(&mut buffer) {
            Ok(length) if message::answers(query, &buffer[..length]) => return Ok(buffer[..length].to_vec()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}
