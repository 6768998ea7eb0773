//! One thread with its runtime, and everything that lives on it.
//!
//! ```text
//! commands (pods come and go, list, drain) ─┐
//! tunnels handed over by other shards ──────┼─► run ─► accept loops, connections, tunnels: all on this thread
//! the mesh's knowledge changed ─────────────┘
//! ```
//! Nothing here is shared with other shards but the counters (read by others), the number of tunnels, and the channels.
//! A connection's panic ends that connection only: the runtime catches it, and its [`Connection`] records it.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::SocketAddr,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use identity::Identities;
use mesh::{Knowledge, Snapshot};
use model::{Workload, WorkloadUid};
use slab::Slab;
use tasks::{DrainMode, DrainSignal, DrainTrigger, Group, Turns, drain_channel};
use telemetry::{AccessLog, Recorder};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, mpsc, oneshot},
    task::AbortHandle,
};

use crate::{
    accept::accept_all,
    config::Config,
    connection::{ConnectionInfo, Live},
    counters::{ShardCounters, increment},
    counting, distrust, dns,
    experience::Experience,
    failure::Failure,
    half_open::HalfOpen,
    inbound,
    names::Names,
    outbound,
    placement::Lanes,
    pod::{PodListeners, PodSockets},
    rate::Rate,
    recheck, review,
    say::Say,
    stay::{Entry, Stay},
};

/// What a shard is told.
pub(crate) enum Command {
    AddPod(Added),
    SetDns {
        uid: WorkloadUid,
        dns: Option<dns::Sockets>,
    },
    RetirePod {
        uid: WorkloadUid,
    },
    SendTunnelsAway {
        uid: WorkloadUid,
    },
    RemovePod {
        uid: WorkloadUid,
    },
    Connections(oneshot::Sender<Vec<ConnectionInfo>>),
    Count(oneshot::Sender<()>),
    StopAccepting(oneshot::Sender<()>),
    Drain {
        grace: Duration,
    },
}

/// A pod that one of its shards is to serve.
pub(crate) struct Added {
    pub uid: WorkloadUid,
    pub sockets: Arc<dyn PodSockets>,
    pub listeners: PodListeners,
    /// Where it is; this shard is one of them.
    pub lanes: Lanes,
    pub stay: Stay,
    /// Its home's, which accepts.
    pub entry: Option<Entry>,
    pub names: Arc<Names>,
    /// None: its queries are not ours. Only its home gets the sockets.
    pub dns: Option<dns::Sockets>,
}

/// What a listener is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Outbound,
    Plaintext,
    Tunnel,
}

/// An accepted connection on its way to the shard that shall carry it.
pub(crate) struct HandedOver {
    pub entry: Entry,
    pub kind: Kind,
    pub socket: std::net::TcpStream,
    pub peer: SocketAddr,
}

/// What the shards know of each other.
pub(crate) struct Peer {
    /// Tunnels that peers opened and the shard carries. They are balanced apart from connections, since one may carry
    /// many.
    pub tunnels: AtomicUsize,
    /// Connections that the shard accepted itself and carries.
    pub connections: AtomicUsize,
    pub hand_over: mpsc::Sender<HandedOver>,
}

impl Peer {
    /// How many of a kind the shard carries. Read by all, written by the shard's own thread.
    pub(crate) fn load(&self, kind: Kind) -> &AtomicUsize {
        match kind {
            Kind::Tunnel => &self.tunnels,
            Kind::Outbound | Kind::Plaintext => &self.connections,
        }
    }
}

/// Everything of one shard that its tasks need.
pub(crate) struct Shard {
    pub index: usize,
    pub config: Config,
    pub hbone: Rc<hbone::Config>,
    pub knowledge: Knowledge,
    pub identities: Identities,
    pub log: AccessLog,
    pub recorder: Recorder,
    pub counters: Arc<ShardCounters>,
    pub experience: Arc<Experience>,
    pub peers: Arc<[Peer]>,
    pub connections: RefCell<Slab<Rc<Live>>>,
    /// There is a connection where there was none.
    pub stirred: Notify,
    pub pods: RefCell<HashMap<WorkloadUid, Rc<PodState>>>,
    /// Pods that take nothing new and still have connections.
    pub retired: RefCell<Vec<Rc<PodState>>>,
    pub refusals: Say,
    pub accept_errors: Say,
    pub hand_overs: Rate,
    /// Between pods.
    pub turns: Turns,
    /// Where datagrams are read into, one at a time.
    pub datagram: RefCell<Vec<u8>>,
    pub random_state: Cell<u64>,
}

/// A pod, as one shard serves it.
pub(crate) struct PodState {
    pub uid: WorkloadUid,
    pub sockets: Arc<dyn PodSockets>,
    lanes: Lanes,
    stay: Stay,
    /// What it learned by DNS; the same on every shard.
    pub names: Arc<Names>,
    pub dns: dns::PodDns,
    pub pool: hbone::Pool,
    /// What is done for it takes turns with what is done for others.
    pub group: Group,
    pub half_open: HalfOpen,
    /// Of the tunnels that are accepted now.
    drain: RefCell<DrainSignal>,
    /// Live connections and the tunnels that peers opened, finished handshakes or not; and the wake-up when there are
    /// none of either.
    pub connections: Cell<usize>,
    pub tunnels: Cell<usize>,
    pub idle: Notify,
    /// The newest snapshot that a connection of it was judged by.
    pub judged: Cell<u64>,
    /// Of the tunnels accepted now, last; before it those of tunnels that were told to go away.
    triggers: RefCell<Vec<DrainTrigger>>,
    /// Of the accept loops: they take what waits, and end.
    close: DrainTrigger,
    accepting: RefCell<Vec<AbortHandle>>,
    baggage: RefCell<Option<(Arc<Workload>, String)>>,
}

impl Shard {
    /// A random number; not for secrets. (splitmix64)
    pub(crate) fn random(&self) -> u64 {
        let state = self.random_state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random_state.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Carries an accepted connection, here or, where another one of the pod's shards carries fewer, there.
    ///
    /// A pod's listeners are polled by one shard, its home: were they polled by all, each connection would wake all, and
    /// all but one for nothing (45 % more CPU for each new connection with two shards). So the home shares out. That
    /// costs a little too, and only what lives long is worth it, so in a storm of connections the rest stays here.
    fn take(self: &Rc<Self>, pod: &Rc<PodState>, entry: &Entry, kind: Kind, socket: TcpStream, peer: SocketAddr) {
        match kind {
            Kind::Outbound => increment(&self.counters.outbound),
            Kind::Plaintext => increment(&self.counters.inbound_plaintext),
            Kind::Tunnel => increment(&self.counters.inbound_tunnels),
        }
        let other = self.less_loaded_lane(pod, kind);
        let Some(permit) = other.and_then(|other| other.hand_over.try_reserve().ok()) else {
            return self.carry(pod, kind, socket, peer);
        };
        // Fails only if the socket can't be taken off this shard's poll, and then it is of no use.
        if let Ok(socket) = socket.into_std() {
            permit.send(HandedOver {
                entry: entry.clone(),
                kind,
                socket,
                peer,
            });
        }
    }

    fn carry(self: &Rc<Self>, pod: &Rc<PodState>, kind: Kind, socket: TcpStream, peer: SocketAddr) {
        match kind {
            Kind::Outbound => outbound::carry(self, pod, socket, peer),
            Kind::Plaintext => inbound::carry_plaintext(self, pod, socket, peer),
            Kind::Tunnel => inbound::carry_tunnel(self, pod, socket, peer),
        }
    }

    /// The other one of the pod's shards that carries fewer of a kind than this one, if there is one and handing over is
    /// not too frequent.
    fn less_loaded_lane(&self, pod: &PodState, kind: Kind) -> Option<&Peer> {
        let own = self.peers[self.index].load(kind).load(Relaxed);
        let load = |peer: &&Peer| peer.load(kind).load(Relaxed);
        let lanes = pod.lanes.all().iter().map(|lane| &self.peers[*lane]);
        let least = lanes.min_by_key(load)?;
        (load(&least) < own && self.hand_overs.may()).then_some(least)
    }

    /// Waits until there is a connection.
    pub(crate) async fn first_connection(&self) {
        while self.connections.borrow().is_empty() {
            // Nothing comes between the look and the wait: all of it is on one thread.
            self.stirred.notified().await;
        }
    }

    /// Neither tunnels to others nor a connection that could open one.
    pub(crate) fn has_no_tunnels(&self) -> bool {
        self.connections.borrow().is_empty() && self.all_pods().iter().all(|pod| pod.pool.is_empty())
    }

    /// Those that are served, and those that take nothing new.
    pub(crate) fn all_pods(&self) -> Vec<Rc<PodState>> {
        let (pods, retired) = (self.pods.borrow(), self.retired.borrow());
        pods.values().chain(retired.iter()).cloned().collect()
    }

    fn pod(&self, uid: &WorkloadUid) -> Option<Rc<PodState>> {
        self.pods.borrow().get(uid).cloned()
    }

    fn add_pod(self: &Rc<Self>, added: Added) {
        let Added {
            uid,
            sockets,
            listeners,
            lanes,
            stay,
            entry,
            names,
            dns,
        } = added;
        self.retire_pod(&uid);
        let (trigger, drain) = drain_channel();
        let (close, closing) = drain_channel();
        let group = self.turns.group();
        let pod = Rc::new(PodState {
            uid: uid.clone(),
            sockets,
            lanes,
            stay,
            names,
            dns: dns::PodDns::default(),
            pool: hbone::Pool::fair(self.hbone.clone(), group.clone()),
            group,
            half_open: HalfOpen::new(self.config.half_open),
            drain: RefCell::new(drain),
            connections: Cell::default(),
            tunnels: Cell::default(),
            idle: Notify::new(),
            judged: Cell::default(),
            triggers: RefCell::new(vec![trigger]),
            close,
            accepting: RefCell::default(),
            baggage: RefCell::default(),
        });
        if let Some(entry) = entry {
            self.listen(&pod, &entry, &closing, listeners.outbound, Kind::Outbound);
            self.listen(&pod, &entry, &closing, listeners.inbound, Kind::Plaintext);
            self.listen(&pod, &entry, &closing, listeners.hbone, Kind::Tunnel);
        }
        pod.dns.set(self, &pod, dns);
        self.pods.borrow_mut().insert(uid, pod);
    }

    fn listen(
        self: &Rc<Self>,
        pod: &Rc<PodState>,
        entry: &Entry,
        closing: &DrainSignal,
        listeners: Vec<std::net::TcpListener>,
        kind: Kind,
    ) {
        for listener in listeners {
            let listener = match TcpListener::from_std(listener) {
                Ok(listener) => listener,
                Err(error) => {
                    tracing::error!(pod = %pod.uid, ?kind, "a listener can't be polled, so nothing is served: {error}");
                    continue;
                }
            };
            let (shard, served, entry) = (self.clone(), pod.clone(), entry.clone());
            let accepting = accept_all(self.clone(), listener, closing.clone(), move |socket, peer| {
                shard.take(&served, &entry, kind, socket, peer);
            });
            pod.accepting
                .borrow_mut()
                .push(tokio::task::spawn_local(pod.group.fair(accepting)).abort_handle());
        }
    }

    /// Carries what another shard accepted, for a pod that has left the mesh meanwhile, too. One that was removed takes
    /// nothing: the socket closes.
    fn receive(self: &Rc<Self>, one: HandedOver) {
        let HandedOver {
            entry,
            kind,
            socket,
            peer,
        } = one;
        let pod = self.pod(&entry.pod).filter(|pod| pod.stay.is_entered_by(&entry));
        let left = || {
            let retired = self.retired.borrow();
            retired.iter().find(|pod| pod.stay.is_entered_by(&entry)).cloned()
        };
        let Some(pod) = pod.or_else(left) else {
            let pod = &entry.pod;
            self.refusals
                .say(|| tracing::info!(%pod, %peer, "a connection that was just accepted is closed: the pod is gone"));
            return;
        };
        if let Ok(socket) = TcpStream::from_std(socket) {
            self.carry(&pod, kind, socket, peer);
        }
        // Only now: until then the pod stays.
        drop(entry);
    }

    /// Takes nothing new for this pod once what waits is taken; what lives goes on. The pool too: a connection that was
    /// accepted just before still needs a tunnel. Its tunnels close when the last connection has ended and the pod's state
    /// with it.
    fn retire_pod(self: &Rc<Self>, uid: &WorkloadUid) {
        let Some(pod) = self.pods.borrow_mut().remove(uid) else {
            return;
        };
        pod.dns.leave(self, &pod);
        pod.close.drain(DrainMode::Graceful);
        pod.drain_tunnels(DrainMode::Graceful);
        self.retired.borrow_mut().push(pod.clone());
        let shard = self.clone();
        tokio::task::spawn_local(async move {
            pod.wait_over().await;
            shard.retired.borrow_mut().retain(|retired| !Rc::ptr_eq(retired, &pod));
        });
    }

    fn remove_pod(self: &Rc<Self>, uid: &WorkloadUid) {
        let retired = self
            .retired
            .borrow()
            .iter()
            .filter(|pod| pod.uid == *uid)
            .cloned()
            .collect::<Vec<_>>();
        for pod in self.pods.borrow_mut().remove(uid).into_iter().chain(retired) {
            pod.stop_accepting(self);
            let shard = self.clone();
            tokio::task::spawn_local(async move { shard.end_pod(&pod, || Failure::PodRemoved).await });
        }
    }

    /// Ends everything of a pod now.
    async fn end_pod(&self, pod: &Rc<PodState>, why: fn() -> Failure) {
        pod.half_open.abort_all();
        let live: Vec<Rc<Live>> = self
            .connections
            .borrow()
            .iter()
            .map(|(_, live)| live)
            .filter(|live| Rc::ptr_eq(&live.pod, pod))
            .cloned()
            .collect();
        for live in live {
            live.stop(why());
        }
        // What was told to stop gets its turn to reset its streams, and their tunnels theirs to send that.
        for _ in 0..3 {
            tokio::task::yield_now().await;
        }
        pod.drain_tunnels(DrainMode::Immediate);
        pod.pool.close();
        tokio::task::yield_now().await;
    }

    /// What was accepted, by this shard or one that handed it over, is carried to its end, and judged like all that lives.
    async fn drain(self: &Rc<Self>, grace: Duration, handed_over: &mut mpsc::Receiver<HandedOver>) {
        let uids: Vec<WorkloadUid> = self.pods.borrow().keys().cloned().collect();
        uids.iter().for_each(|uid| self.retire_pod(uid));
        let receiving = async {
            while let Some(one) = handed_over.recv().await {
                self.receive(one);
            }
        };
        let retired = self.all_pods();
        let all_over = futures_util::future::join_all(retired.iter().map(|pod| pod.wait_over()));
        let ended = async {
            tokio::select! {
                _ = all_over => {}
                // This shard holds a sender of its own queue: it never ends.
                () = receiving => {}
            }
        };
        // Over time or not: what is left is ended.
        let _ = tokio::time::timeout(grace, ended).await;
        for pod in &retired {
            pod.stop_accepting(self);
            self.end_pod(pod, || Failure::Drained).await;
        }
    }
}

impl PodState {
    fn stop_accepting(self: &Rc<Self>, shard: &Rc<Shard>) {
        self.dns.leave(shard, self);
        for accepting in self.accepting.borrow_mut().drain(..) {
            accepting.abort();
        }
    }

    /// Drains the tunnels that peers have to the pod.
    fn drain_tunnels(&self, mode: DrainMode) {
        for trigger in &*self.triggers.borrow() {
            trigger.drain(mode);
        }
    }

    /// Tells peers (GOAWAY) that the tunnels that they have take no more streams; a tunnel that one opens from now on is
    /// none of these.
    fn send_tunnels_away(&self) {
        self.drain_tunnels(DrainMode::Graceful);
        let (trigger, drain) = drain_channel();
        let mut triggers = self.triggers.borrow_mut();
        // Those whose tunnels have ended.
        triggers.retain(|trigger| !trigger.has_ended());
        triggers.push(trigger);
        self.drain.replace(drain);
    }

    /// A connection is judged by this snapshot.
    pub(crate) fn judged_by(&self, snapshot: &Snapshot) {
        self.judged.set(self.judged.get().max(snapshot.generation()));
    }

    /// What ends a tunnel that is accepted now.
    pub(crate) fn drain_signal(&self) -> DrainSignal {
        self.drain.borrow().clone()
    }

    /// Nothing lives, and nothing more can come.
    async fn wait_over(&self) {
        self.stay.complete().await;
        self.wait_idle().await;
    }

    /// Queries are answered, too. A tunnel without streams ends once its peer has heard of the drain: a stream that it sent
    /// before is still carried.
    async fn wait_idle(&self) {
        while self.connections.get() > 0 || self.tunnels.get() > 0 || !self.dns.is_idle() {
            // Nothing comes between the look and the wait: all of it is on one thread.
            self.idle.notified().await;
        }
    }

    /// The `baggage` header of the pod, made once for each version of its workload.
    pub(crate) fn baggage(&self, workload: &Arc<Workload>) -> String {
        let mut cached = self.baggage.borrow_mut();
        match &*cached {
            Some((of, baggage)) if Arc::ptr_eq(of, workload) => baggage.clone(),
            _ => cached
                .insert((workload.clone(), crate::headers::baggage(workload)))
                .1
                .clone(),
        }
    }
}

/// Runs a shard until it is told to drain or its proxy is gone.
pub(crate) async fn run(
    shard: Rc<Shard>,
    mut commands: mpsc::UnboundedReceiver<Command>,
    mut handed_over: mpsc::Receiver<HandedOver>,
) {
    // They take their turns, too, whoever they concern.
    let for_all = shard.turns.group();
    let rechecking = tokio::task::spawn_local(for_all.fair(recheck::run(shard.clone())));
    let reviewing = tokio::task::spawn_local(for_all.fair(review::run(shard.clone())));
    let distrusting = tokio::task::spawn_local(for_all.fair(distrust::run(shard.clone())));
    let sweeping = tokio::task::spawn_local(for_all.fair(counting::sweep(shard.clone())));
    let taking_turns = tokio::task::spawn_local(shard.turns.clone().run());
    loop {
        tokio::select! {
            // Commands first: what is handed over may be for a pod that was added just before.
            biased;
            command = commands.recv() => match command {
                Some(Command::AddPod(added)) => shard.add_pod(added),
                Some(Command::SetDns { uid, dns }) => {
                    if let Some(pod) = shard.pod(&uid) {
                        pod.dns.set(&shard, &pod, dns);
                    }
                }
                Some(Command::RetirePod { uid }) => shard.retire_pod(&uid),
                Some(Command::SendTunnelsAway { uid }) => {
                    if let Some(pod) = shard.pod(&uid) {
                        pod.send_tunnels_away();
                    }
                }
                Some(Command::RemovePod { uid }) => shard.remove_pod(&uid),
                Some(Command::Connections(answer)) => {
                    let connections = shard.connections.borrow().iter().map(|(_, live)| live.info()).collect();
                    // Whoever asked may have gone away.
                    let _ = answer.send(connections);
                }
                Some(Command::Count(counted)) => {
                    shard.count_all();
                    let _ = counted.send(());
                }
                Some(Command::StopAccepting(answer)) => {
                    shard.pods.borrow().values().for_each(|pod| pod.stop_accepting(&shard));
                    let _ = answer.send(());
                }
                Some(Command::Drain { grace }) => {
                    shard.drain(grace, &mut handed_over).await;
                    break;
                }
                // The proxy was dropped.
                None => {
                    shard.drain(Duration::ZERO, &mut handed_over).await;
                    break;
                }
            },
            Some(one) = handed_over.recv() => shard.receive(one),
        }
    }
    rechecking.abort();
    reviewing.abort();
    distrusting.abort();
    sweeping.abort();
    taking_turns.abort();
}
