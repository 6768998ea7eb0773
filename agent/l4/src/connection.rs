//! One connection from accept to its record, and the shard's table of those that live.
//!
//! ```text
//! begin ─► (known more and more of) ─► established ─► finish(bytes, outcome) ─► one access-log record
//!    └────────────── dropped without finish: forced end or panic ─────────────► the same, with that as the error
//! ```
//! Whoever handles a connection owns its [`Connection`]; the table holds the shared part, so that a connection can be
//! listed, judged again and told to stop.

use std::{
    cell::{Cell, RefCell},
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    rc::Rc,
    sync::{Arc, atomic::Ordering::Relaxed},
    task::Poll,
    time::Instant,
};

use identity::Proof;
use mesh::Snapshot;
use model::{Identity, OriginalDst, Service, Workload, WorkloadUid, canonical_socket};
use policy::{Facts, Reason, Verdict};
use telemetry::{AccessLog, ConnectionRecord, Direction, Party, ResponseFlag, TraceId};

use crate::{
    counters::increment,
    counting::Counting,
    egress::Left,
    experience::Counted,
    failure::Failure,
    shard::{PodState, Shard},
};

/// The part of a connection that its shard's table shares.
pub(crate) struct Live {
    pub shard: Rc<Shard>,
    pub pod: Rc<PodState>,
    pub direction: Direction,
    pub client: SocketAddr,
    pub started: Instant,
    /// Its counters, and the means to end it.
    pub relay: hbone::Live,
    /// Why it was told to stop.
    pub stopped: RefCell<Option<Box<Failure>>>,
    pub known: RefCell<Known>,
    pub(crate) counting: Counting,
    key: Cell<usize>,
}

/// What is known of a connection; more as it comes to be.
#[derive(Default)]
pub(crate) struct Known {
    /// Outbound: where the client wanted to go, then where that led. Inbound: the address the connection (or its tunnel)
    /// came to.
    pub destination: Option<SocketAddr>,
    /// The CONNECT's target.
    pub hbone_target: Option<SocketAddr>,
    pub source_workload: Option<Arc<Workload>>,
    pub destination_workload: Option<Arc<Workload>>,
    /// The service that was dialled; inbound, as the peer told (`forwarded`), and so only for telemetry.
    pub service: Option<Arc<Service>>,
    pub service_host: Option<Arc<str>>,
    /// Who the peer is: inbound as it proved, outbound as it was demanded.
    pub peer: Option<Identity>,
    /// In a tunnel: what the peer proved itself by.
    pub proof: Option<Arc<Proof>>,
    /// Inbound: what it was judged by, to judge it again.
    pub facts: Option<Facts>,
    /// What allowed it.
    pub rule: Option<Reason>,
    /// What the policies in dry run would have decided.
    pub dry_run: Option<Box<Verdict>>,
    /// Outbound, to what is not in the mesh: what it left by, to judge it again.
    pub exit: Option<Box<Left>>,
    /// The trace that both ends' log lines share.
    pub trace: Option<TraceId>,
    pub established: bool,
}

/// Where an attempt to connect leads, and all that its peer was told: what [`Known`] has of it.
#[derive(Default)]
pub(crate) struct Destination {
    address: Option<SocketAddr>,
    hbone_target: Option<SocketAddr>,
    workload: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    peer: Option<Identity>,
    trace: Option<TraceId>,
}

impl Destination {
    /// Before anything is known of it but what the client dialled.
    pub(crate) fn dialled(OriginalDst(address): OriginalDst) -> Self {
        Self {
            address: Some(address),
            ..Self::default()
        }
    }
}

/// A connection, as its owner holds it.
pub(crate) struct Connection {
    live: Rc<Live>,
    finished: bool,
    weighs: Cell<bool>,
    /// At the endpoint that it leads to.
    counted: RefCell<Option<Counted>>,
}

impl std::ops::Deref for Connection {
    type Target = Live;

    fn deref(&self) -> &Live {
        &self.live
    }
}

impl Connection {
    /// Enters a connection into the shard's table.
    pub(crate) fn begin(shard: &Rc<Shard>, pod: &Rc<PodState>, direction: Direction, client: SocketAddr) -> Self {
        let live = Rc::new(Live {
            shard: shard.clone(),
            pod: pod.clone(),
            direction,
            client: canonical_socket(client),
            started: Instant::now(),
            relay: hbone::Live::default(),
            stopped: RefCell::default(),
            known: RefCell::default(),
            counting: Counting::default(),
            key: Cell::default(),
        });
        let key = shard.connections.borrow_mut().insert(live.clone());
        live.key.set(key);
        if shard.connections.borrow().len() == 1 {
            shard.stirred.notify_waiters();
        }
        pod.connections.set(pod.connections.get() + 1);
        Self {
            live,
            finished: false,
            weighs: Cell::new(false),
            counted: RefCell::default(),
        }
    }

    /// Counts at its endpoint, for as long as it lives.
    pub(crate) fn counts_at(&self, counted: Option<Counted>) {
        self.counted.replace(counted);
    }

    /// It leads there; where it led until now.
    pub(crate) fn lead_to(&self, destination: Destination) -> Destination {
        let mut known = self.known.borrow_mut();
        Destination {
            address: std::mem::replace(&mut known.destination, destination.address),
            hbone_target: std::mem::replace(&mut known.hbone_target, destination.hbone_target),
            workload: std::mem::replace(&mut known.destination_workload, destination.workload),
            service: std::mem::replace(&mut known.service, destination.service),
            peer: std::mem::replace(&mut known.peer, destination.peer),
            trace: std::mem::replace(&mut known.trace, destination.trace),
        }
    }

    /// Counts toward the shard's load, for as long as it lives.
    pub(crate) fn weigh(&self) {
        self.weighs.set(true);
        let load = &self.shard.peers[self.shard.index].connections;
        load.store(load.load(Relaxed) + 1, Relaxed);
    }

    /// What the connection's task was doing, unless the connection is told to stop meanwhile.
    pub(crate) async fn unless_stopped<F: Future + Unpin>(&self, mut doing: F) -> Option<F::Output> {
        poll_fn(|cx| match self.relay.poll_cut(cx) {
            Poll::Ready(()) => Poll::Ready(None),
            Poll::Pending => Pin::new(&mut doing).poll(cx).map(Some),
        })
        .await
    }

    /// Where it goes.
    pub(crate) fn learn_destination(
        &self,
        workload: Arc<Workload>,
        service: Option<Arc<Service>>,
        hbone_target: Option<SocketAddr>,
    ) {
        let mut known = self.known.borrow_mut();
        known.destination_workload = Some(workload);
        known.service = service;
        known.hbone_target = hbone_target;
    }

    /// Inbound: the tunnel it came in.
    pub(crate) fn learn_tunnel(&self, at: SocketAddr, peer: &Identity, service_host: Option<Arc<str>>) {
        let mut known = self.known.borrow_mut();
        known.destination = Some(at);
        known.peer = Some(peer.clone());
        known.service_host = service_host;
    }

    /// Outbound: who must answer, and where.
    pub(crate) fn learn_peer(&self, address: SocketAddr, peer: Identity) {
        let mut known = self.known.borrow_mut();
        known.destination = Some(address);
        known.peer = Some(peer);
    }

    /// Who opened it, by its address: for telemetry only.
    pub(crate) fn learn_source(&self, snapshot: &Snapshot) {
        self.known.borrow_mut().source_workload = snapshot.workload_by_ip(self.client.ip()).cloned();
    }

    /// The service that the peer said was dialled, if the workload is an endpoint of it: telemetry should not have names
    /// that a peer made up.
    pub(crate) fn claimed_service(&self, snapshot: &Snapshot, workload: &Workload) -> Option<Arc<Service>> {
        let known = self.known.borrow();
        let host = known.service_host.as_deref()?;
        let mut services = workload.services.keys();
        let key = services.find(|service| *service.name == *host)?;
        snapshot.service(key).cloned()
    }

    /// Begins the connection's trace.
    pub(crate) fn begin_trace(&self) -> TraceId {
        let trace = TraceId::new(self.shard.random(), self.shard.random());
        self.known.borrow_mut().trace = Some(trace);
        trace
    }

    /// The two ends are joined.
    pub(crate) fn establish(&self) {
        self.known.borrow_mut().established = true;
        increment(&self.shard.counters.established);
        self.count_opened();
        if self.shard.log.tells_opening() {
            self.log(None, |log, record| log.opened(record));
        }
    }

    /// The connection ended. When it was told to stop, that is what it ended by.
    pub(crate) fn finish(mut self, failure: Option<Failure>) {
        self.finished = true;
        self.record(failure);
    }

    fn record(&self, failure: Option<Failure>) {
        let failure = self.stopped.take().map(|failure| *failure).or(failure);
        match &failure {
            Some(failure) => self.shard.counters.fail(failure.kind()),
            None => increment(&self.shard.counters.completed),
        }
        self.count_closed(failure.as_ref().map_or(ResponseFlag::None, Failure::flag));
        if self.shard.log.is_on() {
            self.log(failure.as_ref(), |log, record| log.record(record));
        } else if let Some(failure) = failure.as_ref().filter(|failure| failure.is_refusal()) {
            let direction = self.direction.as_str();
            self.shard.refusals.say(|| {
                tracing::info!(pod = %self.pod.uid, client = %self.client, direction, "refused: {failure}");
            });
        }
    }

    fn log(&self, failure: Option<&Failure>, write: impl FnOnce(&AccessLog, &ConnectionRecord<'_>)) {
        let (sent, received) = self.bytes();
        let known = self.known.borrow();
        let own_identity = |workload: &Option<Arc<Workload>>| workload.as_ref().map(|workload| workload.identity());
        let (source_identity, destination_identity) = match self.direction {
            Direction::Outbound => (own_identity(&known.source_workload), known.peer.clone()),
            Direction::Inbound => (known.peer.clone(), own_identity(&known.destination_workload)),
        };
        let record = ConnectionRecord {
            direction: self.direction,
            source: Party {
                address: Some(self.client),
                workload: known.source_workload.as_deref(),
                identity: source_identity.as_ref(),
            },
            destination: Party {
                address: known.destination,
                workload: known.destination_workload.as_deref(),
                identity: destination_identity.as_ref(),
            },
            hbone_target: known.hbone_target,
            service: known
                .service
                .as_ref()
                .map(|service| &*service.hostname)
                .or(known.service_host.as_deref()),
            bytes_sent: sent,
            bytes_received: received,
            duration: self.started.elapsed(),
            rule: failure
                .and_then(Failure::rule)
                .or(known.rule.as_ref())
                .map(|rule| rule as _),
            dry_run: known.dry_run.as_deref().map(|dry_run| &dry_run.reason as _),
            flag: failure.map_or(ResponseFlag::None, Failure::flag),
            trace: known.trace,
            error: failure.map(|failure| failure as _),
        };
        write(&self.shard.log, &record);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.finished {
            let failure = if std::thread::panicking() {
                Failure::Panicked
            } else if self.known.borrow().established || self.direction == Direction::Outbound {
                Failure::Drained
            } else {
                Failure::GivenUp
            };
            self.record(Some(failure));
        }
        if self.weighs.get() {
            let load = &self.shard.peers[self.shard.index].connections;
            load.store(load.load(Relaxed) - 1, Relaxed);
        }
        self.shard.connections.borrow_mut().try_remove(self.key.get());
        let left = self.pod.connections.get() - 1;
        self.pod.connections.set(left);
        if left == 0 {
            self.pod.idle.notify_waiters();
        }
    }
}

impl Live {
    /// Bytes that this agent's pod sent and received. A plaintext client is not the pod, but counts as the relay's first
    /// end; a tunnel's first end is always the pod.
    pub(crate) fn bytes(&self) -> (u64, u64) {
        let (to_peer, from_peer) = (self.relay.to_peer(), self.relay.from_peer());
        match (self.direction, self.known.borrow().hbone_target) {
            (Direction::Inbound, None) => (from_peer, to_peer),
            _ => (to_peer, from_peer),
        }
    }

    /// Tells the connection to stop; the first reason stays.
    pub(crate) fn stop(&self, why: Failure) {
        self.stopped.borrow_mut().get_or_insert_with(|| Box::new(why));
        self.relay.cut();
    }

    /// Counts what policies in dry run would have decided otherwise.
    pub(crate) fn rehearse(&self, allowed: bool, dry_run: Option<Box<Verdict>>) -> Option<Box<Verdict>> {
        match (allowed, dry_run.as_ref()?.allowed) {
            (true, false) => increment(&self.shard.counters.dry_run_denied),
            (false, true) => increment(&self.shard.counters.dry_run_allowed),
            _ => {}
        }
        dry_run
    }

    /// What a person sees of it.
    pub(crate) fn info(&self) -> ConnectionInfo {
        let (sent, received) = self.bytes();
        let known = self.known.borrow();
        ConnectionInfo {
            pod: self.pod.uid.clone(),
            shard: self.shard.index,
            direction: self.direction,
            source: self.client,
            destination: known.destination,
            hbone_target: known.hbone_target,
            service: known.service.as_ref().map(|service| service.hostname.clone()),
            peer: known.peer.clone(),
            established: known.established,
            sent,
            received,
            source_workload: known.source_workload.as_ref().map(|workload| workload.uid.clone()),
            destination_workload: known.destination_workload.as_ref().map(|workload| workload.uid.clone()),
            trace: known.trace,
            age: self.started.elapsed(),
            rule: known.rule.as_ref().map(ToString::to_string),
        }
    }
}

/// A live connection, for people.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// The pod of this node that it is of.
    pub pod: WorkloadUid,
    /// The shard that carries it.
    pub shard: usize,
    /// Which way it goes.
    pub direction: Direction,
    /// Who opened it.
    pub source: SocketAddr,
    /// Outbound: where the client wanted to go, then where that led. Inbound: the address the connection (or its tunnel)
    /// came to.
    pub destination: Option<SocketAddr>,
    /// The CONNECT's target, where there is a tunnel.
    pub hbone_target: Option<SocketAddr>,
    /// The service that was dialled.
    pub service: Option<Arc<str>>,
    /// The other side's identity; none in plaintext.
    pub peer: Option<Identity>,
    /// Whether the two ends are joined.
    pub established: bool,
    /// Bytes that the pod of this node sent so far.
    pub sent: u64,
    /// Bytes that it received.
    pub received: u64,
    /// Who opened it, where that is known.
    pub source_workload: Option<WorkloadUid>,
    /// To whom, where that is known.
    pub destination_workload: Option<WorkloadUid>,
    /// The trace that both ends' log lines share.
    pub trace: Option<TraceId>,
    /// Since accept.
    pub age: std::time::Duration,
    /// What allowed it.
    pub rule: Option<String>,
}
