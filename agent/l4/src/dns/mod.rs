//! The name server of every captured pod.
//!
//! ```text
//! the pod's query, UDP ─► 15053+i in the pod ─┬─ A, AAAA of a name that the mesh knows ─► answered from the snapshot
//!                   TCP ─► 15001, to port 53 ─┘─ everything else, byte by byte ─► the server that the pod addressed
//! ```
//! `message` reads and writes, `resolve` looks up, `udp` and `tcp` carry. Which server a pod addressed is asked of
//! [`crate::PodSockets`]; nothing here knows how queries are captured.
//!
//! What holds (`tests/scenarios/dns.rs`):
//! - What the mesh knows is answered without any name server, however slow or far away that is.
//! - What is forwarded is not changed by a bit, in either direction, and comes from the pod's own address: network policy
//!   and the server's views apply. Only the source port is another.
//! - A pod's forwarded queries are bounded in number ([`Config::forwarding`]) and in time ([`Config::timeout`]); then, or
//!   when the server refuses, the pod is told SERVFAIL, and it is the pod's resolver that tries its next server. Pods do
//!   not wait for each other. Over TCP the way to the server is bounded in time, and what it then says is the client's to
//!   wait for.
//! - Nobody but the pod itself is answered.
//!
//! Before anything is known of the mesh, or of the pod itself, everything is forwarded. A name server that is itself in
//! the mesh is reached through the mesh over TCP; over UDP it is reached as without the mesh, which does not carry UDP.
//!
//! What an answer tells is kept in the pod's [`Names`](crate::names::Names): as trusted when it is ours or that of a
//! name server which the operator named ([`Config::trusted`]), else for the log alone.

mod message;
mod resolve;
mod tcp;
mod udp;

use std::{
    cell::{Cell, RefCell},
    net::{IpAddr, SocketAddr},
    rc::Rc,
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::op::ResponseCode;
use tokio::{net::UdpSocket, task::AbortHandle};

pub use message::{Answer, Family, Question, Read, Transport, read};
pub use resolve::{Resolved, resolve};
pub(crate) use tcp::{Dial, serve as serve_tcp};

use crate::{
    counters::increment,
    names::Source,
    shard::{PodState, Shard},
};

/// The port of name servers.
pub const PORT: u16 = 53;

/// How long an answer of the mesh may be kept: ztunnel's 30 s.
const TTL: Duration = Duration::from_secs(30);

/// How the name server of the pods works.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster's domain.
    pub domain: Arc<str>,
    /// How long a name server may take; less than the 5 s that resolvers wait, so that they hear of it.
    pub timeout: Duration,
    /// How many queries of a pod may be with name servers at once; what exceeds that is answered with SERVFAIL.
    pub forwarding: usize,
    /// Name servers whose answers are taken for true where names permit something.
    pub trusted: Arc<[IpAddr]>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            timeout: Duration::from_secs(4),
            forwarding: 512,
            trusted: Arc::new([]),
        }
    }
}

/// A pod's datagram sockets, by the number of the name server that each stands for.
pub type Sockets = Vec<(usize, std::net::UdpSocket)>;

/// A pod's name server, as one shard serves it.
#[derive(Default)]
pub(crate) struct PodDns {
    /// Whether TCP connections to name servers are ours.
    pub on: Cell<bool>,
    /// Queries that are with name servers now.
    forwarding: Cell<usize>,
    serving: RefCell<Vec<Serving>>,
}

/// A socket that is served.
struct Serving {
    task: AbortHandle,
    slot: usize,
    socket: Rc<UdpSocket>,
}

impl PodDns {
    /// Serves these sockets instead of those before; none: nothing.
    pub(crate) fn set(&self, shard: &Rc<Shard>, pod: &Rc<PodState>, sockets: Option<Sockets>) {
        self.stop();
        if let Some(sockets) = sockets {
            self.on.set(true);
            udp::serve(shard, pod, sockets);
        }
    }

    /// Ends serving; what is with a name server is still answered.
    fn stop(&self) {
        for serving in self.stopped() {
            serving.task.abort();
        }
    }

    /// Ends serving for good: what is sent from now on is for whoever has sockets beside these, and what came before is
    /// still answered (scenario `an_upgrade_under_load_fails_no_connection`).
    pub(crate) fn leave(&self, shard: &Rc<Shard>, pod: &Rc<PodState>) {
        for serving in self.stopped() {
            serving.task.abort();
            udp::leave(shard, pod, serving.slot, &serving.socket);
        }
    }

    fn stopped(&self) -> Vec<Serving> {
        self.on.set(false);
        std::mem::take(&mut *self.serving.borrow_mut())
    }

    /// Whether no query is with a name server.
    pub(crate) fn is_idle(&self) -> bool {
        self.forwarding.get() == 0
    }
}

/// What becomes of a message.
enum Decision {
    Reply(Vec<u8>),
    Forward,
    Drop,
}

/// Answers what the mesh knows.
fn decide(shard: &Shard, pod: &PodState, query: &[u8], transport: Transport) -> Decision {
    increment(&shard.counters.dns_queries);
    let question = match message::read(query) {
        Read::Address(question) => question,
        Read::Other => return Decision::Forward,
        Read::Malformed(reply) => {
            increment(&shard.counters.dns_malformed);
            return reply.map_or(Decision::Drop, Decision::Reply);
        }
    };
    let snapshot = shard.knowledge.snapshot();
    let Some(client) = snapshot.workload(&pod.uid) else {
        return Decision::Forward;
    };
    let domain = &shard.config.dns.domain;
    let Some(found) = resolve(&snapshot, client, domain, &question, &mut || shard.random()) else {
        return Decision::Forward;
    };
    let Some(reply) = message::answer(query, &found.answer, TTL, transport) else {
        return Decision::Forward;
    };
    let names = &pod.names;
    names.learn(
        &found.host,
        &found.answer.addresses,
        TTL,
        Source::Trusted,
        Instant::now(),
    );
    increment(&shard.counters.dns_answered);
    Decision::Reply(reply)
}

/// Keeps what a name server's answer tells.
fn learn(shard: &Shard, pod: &PodState, server: SocketAddr, response: &[u8]) {
    let Some((host, addresses, ttl)) = message::learned(response) else {
        return;
    };
    let source = if shard.config.dns.trusted.contains(&server.ip()) {
        Source::Trusted
    } else {
        Source::Elsewhere
    };
    pod.names.learn(&host, &addresses, ttl, source, Instant::now());
}

/// That a name server did not answer; none where that would not be an answer to anything.
fn servfail(query: &[u8]) -> Vec<u8> {
    message::failure(query, ResponseCode::ServFail)
}

/// One query that is with a name server, counted.
struct Forwarding<'a>(&'a PodState);

impl<'a> Forwarding<'a> {
    /// None: there are too many.
    fn begin(pod: &'a PodState, limit: usize) -> Option<Self> {
        let now = pod.dns.forwarding.get();
        if now >= limit {
            return None;
        }
        pod.dns.forwarding.set(now + 1);
        Some(Self(pod))
    }
}

impl Drop for Forwarding<'_> {
    fn drop(&mut self) {
        let dns = &self.0.dns;
        dns.forwarding.set(dns.forwarding.get() - 1);
        if dns.is_idle() {
            self.0.idle.notify_waiters();
        }
    }
}

/// For fuzzing: does all that is done to a message without a network. Whether it has an answer of ours.
#[doc(hidden)]
pub fn try_message(bytes: &[u8]) -> bool {
    let answer = message::Answer {
        canonical: Some("web.shop.svc.cluster.local".to_owned()),
        addresses: (0..200).map(|last| IpAddr::from([10, 0, 0, last])).collect(),
    };
    let _ = message::learned(bytes);
    let _ = message::failure(bytes, ResponseCode::ServFail);
    let transports = [Transport::Udp, Transport::Tcp];
    matches!(message::read(bytes), Read::Address(_))
        && transports
            .into_iter()
            .all(|transport| message::answer(bytes, &answer, TTL, transport).is_some_and(|reply| reply.len() >= 12))
}
