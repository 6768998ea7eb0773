//! The proxy: its shards' threads, and what they are told.

use std::{
    cell::{Cell, RefCell},
    hash::{BuildHasher, RandomState},
    io,
    num::NonZeroUsize,
    panic::AssertUnwindSafe,
    rc::Rc,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Duration,
};

use identity::Identities;
use mesh::Knowledge;
use model::WorkloadUid;
use slab::Slab;
use tasks::{Allowance, Turns, Urgency};
use telemetry::{AccessLog, Recorder};
use tokio::{
    runtime::{Builder, LocalOptions},
    sync::{mpsc, oneshot, watch},
};

use crate::{
    config::Config,
    connection::ConnectionInfo,
    counters::{Counters, ShardCounters},
    dns,
    experience::Experience,
    names::Names,
    placement::Placement,
    pod::{Pod, PodListeners},
    rate::Rate,
    say::Say,
    shard::{self, Added, Command, HandedOver, Peer, Shard},
    socket::prepare_listener,
    stay,
};

/// Tunnels that may wait to be taken over by another shard; more stay where they were accepted.
const HAND_OVER_QUEUE: usize = 1024;

/// Connections that a shard hands over in a second at most: half a per cent of its time.
const HAND_OVERS_A_SECOND: u32 = 500;

/// A shard's thread ended although nobody told it to: a bug. What
/// lived on it is lost and its pods are no longer served: whoever runs the proxy should end the process, so that it is
/// started anew.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("shard {shard} of the proxy died: {cause}")]
pub struct ShardFailure {
    /// Which.
    pub shard: usize,
    /// The panic's message.
    pub cause: String,
}

/// The L4 proxy of a node. Dropped without [`Proxy::drain`], it ends at once and resets what lives.
pub struct Proxy {
    shards: Vec<ShardHandle>,
    failure: watch::Receiver<Option<ShardFailure>>,
    placement: Placement,
    /// How many stays of pods have begun.
    stays: AtomicU64,
}

struct ShardHandle {
    commands: mpsc::UnboundedSender<Command>,
    counters: Arc<ShardCounters>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Proxy {
    /// Starts the shards' threads.
    pub fn start(config: Config, knowledge: Knowledge, identities: Identities, log: AccessLog) -> io::Result<Self> {
        let count = config.shards.max(1);
        let placement = Placement::new(count, config.shards_per_pod);
        let (peers, hand_overs): (Vec<Peer>, Vec<_>) = (0..count)
            .map(|_| {
                let (hand_over, handed_over) = mpsc::channel(HAND_OVER_QUEUE);
                (
                    Peer {
                        tunnels: AtomicUsize::default(),
                        connections: AtomicUsize::default(),
                        hand_over,
                    },
                    handed_over,
                )
            })
            .unzip();
        let peers: Arc<[Peer]> = peers.into();
        let (failed, failure) = watch::channel(None);
        let experience = Arc::<Experience>::default();
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        let allowance = Allowance::of(cores);
        let mut shards = Vec::with_capacity(count);
        for (index, handed_over) in hand_overs.into_iter().enumerate() {
            let start = Start {
                index,
                config: config.clone(),
                knowledge: knowledge.clone(),
                identities: identities.clone(),
                log: log.clone(),
                peers: peers.clone(),
                experience: experience.clone(),
                allowance: allowance.clone(),
                handed_over,
                failed: failed.clone(),
            };
            shards.push(start.spawn()?);
        }
        Ok(Self {
            shards,
            failure,
            placement,
            stays: AtomicU64::default(),
        })
    }

    /// Serves a pod. Told again with the same uid, the earlier one is retired first ([`Proxy::retire_pod`]): a pod that comes
    /// back into the mesh keeps the connections that it had.
    ///
    /// # Errors
    /// Its sockets are not listeners. Nothing is served then.
    pub fn add_pod(&self, pod: Pod) -> io::Result<()> {
        let Pod {
            uid,
            sockets,
            listeners,
            dns,
        } = pod;
        let PodListeners {
            outbound,
            inbound,
            hbone,
        } = &listeners;
        for listener in outbound.iter().chain(inbound).chain(hbone) {
            prepare_listener(listener)?;
        }
        let names = Arc::new(Names::default());
        let lanes = self.placement.place(&uid);
        let (home, others) = (lanes.home(), lanes.others());
        let (entry, stay) = stay::begin(uid.clone(), self.stays.fetch_add(1, Relaxed));
        for (index, shard) in self.shards.iter().enumerate() {
            if others.contains(&index) {
                shard.tell(Command::AddPod(Added {
                    uid: uid.clone(),
                    sockets: sockets.clone(),
                    listeners: PodListeners::default(),
                    lanes: lanes.clone(),
                    stay: stay.clone(),
                    entry: None,
                    names: names.clone(),
                    dns: dns.as_ref().map(|_| Vec::new()),
                }));
            } else if index != home {
                // Where an earlier one of that uid may be.
                shard.tell(Command::RetirePod { uid: uid.clone() });
            }
        }
        // Last: what it accepts may be handed over to the others.
        self.shards[home].tell(Command::AddPod(Added {
            uid,
            sockets,
            listeners,
            lanes,
            stay,
            entry: Some(entry),
            names,
            dns,
        }));
        Ok(())
    }

    /// Begins or ends to be a pod's name server, with these sockets in place of those before.
    pub fn set_dns(&self, uid: &WorkloadUid, dns: Option<dns::Sockets>) {
        let Some(lanes) = self.placement.of(uid) else {
            return;
        };
        for other in lanes.others() {
            let (uid, dns) = (uid.clone(), dns.as_ref().map(|_| Vec::new()));
            self.shards[*other].tell(Command::SetDns { uid, dns });
        }
        self.shards[lanes.home()].tell(Command::SetDns { uid: uid.clone(), dns });
    }

    /// Takes nothing new for a pod; what lives goes on until it ends by itself. For a pod that left the mesh and lives.
    pub fn retire_pod(&self, uid: &WorkloadUid) {
        self.placement.leave(uid);
        for shard in &self.shards {
            shard.tell(Command::RetirePod { uid: uid.clone() });
        }
    }

    /// Tells the peers of a pod (GOAWAY) that the tunnels that they have to it take no more streams; what lives in them goes
    /// on, and new tunnels are taken. For a pod that is on its way out: who learns late that it is loses nothing.
    pub fn send_tunnels_away(&self, uid: &WorkloadUid) {
        for shard in &self.shards {
            shard.tell(Command::SendTunnelsAway { uid: uid.clone() });
        }
    }

    /// Ends everything of a pod now, a retired one's too. For a pod that is gone.
    pub fn remove_pod(&self, uid: &WorkloadUid) {
        self.placement.leave(uid);
        for shard in &self.shards {
            shard.tell(Command::RemovePod { uid: uid.clone() });
        }
    }

    /// What lives now.
    pub async fn connections(&self) -> Vec<ConnectionInfo> {
        let mut connections = Vec::new();
        for shard in &self.shards {
            let (answer, answered) = oneshot::channel();
            shard.tell(Command::Connections(answer));
            // A shard that died has none.
            connections.extend(answered.await.unwrap_or_default());
        }
        connections
    }

    /// Brings [`Config::metrics`] up to date: the bytes of connections that live are counted when somebody asks.
    pub async fn count(&self) {
        for shard in &self.shards {
            let (answer, answered) = oneshot::channel();
            shard.tell(Command::Count(answer));
            // A shard that died counts nothing more.
            let _ = answered.await;
        }
    }

    /// What was counted since the start.
    pub fn counters(&self) -> Counters {
        Counters::sum(self.shards.iter().map(|shard| &*shard.counters))
    }

    /// Resolves when a shard has died, which it never should. Pends for ever otherwise.
    pub async fn failed(&self) -> ShardFailure {
        let mut failure = self.failure.clone();
        match failure.wait_for(Option::is_some).await.map(|failure| failure.clone()) {
            Ok(Some(failure)) => failure,
            _ => std::future::pending().await,
        }
    }

    /// Accepts nothing more, on any shard; what was accepted is carried. The listeners are closed and not shut down: what
    /// waits in their queues is for whoever holds duplicates, and is reset if nobody does. Resolves when all shards have
    /// stopped, with nothing under way from one to another but what they will find in their queues.
    pub async fn stop_accepting(&self) {
        let mut stopped = Vec::with_capacity(self.shards.len());
        for shard in &self.shards {
            let (answer, answered) = oneshot::channel();
            shard.tell(Command::StopAccepting(answer));
            stopped.push(answered);
        }
        for shard in stopped {
            // A shard that died accepts nothing.
            let _ = shard.await;
        }
    }

    /// Takes nothing new, tells the peers (GOAWAY), and waits until what lives has ended; after `grace` it is reset.
    /// Afterwards the proxy serves nothing and takes no more pods. What was accepted before is no less served for it: it
    /// still opens its tunnels, and a peer's stream that was under way is still answered.
    pub async fn drain(&self, grace: Duration) {
        self.stop_accepting().await;
        for shard in &self.shards {
            shard.tell(Command::Drain { grace });
        }
        let threads: Vec<_> = self.shards.iter().filter_map(ShardHandle::take_thread).collect();
        let (ended, all_ended) = oneshot::channel();
        // Joining blocks, and this may be a current-thread runtime.
        std::thread::spawn(move || {
            for thread in threads {
                // A shard's panic was caught and reported by itself.
                let _ = thread.join();
            }
            let _ = ended.send(());
        });
        let _ = all_ended.await;
    }
}

impl ShardHandle {
    fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn tell(&self, command: Command) {
        // Fails only when the shard has died, which `Proxy::failed` tells.
        let _ = self.commands.send(command);
    }
}

/// What a shard's thread takes along.
struct Start {
    index: usize,
    config: Config,
    knowledge: Knowledge,
    identities: Identities,
    log: AccessLog,
    peers: Arc<[Peer]>,
    experience: Arc<Experience>,
    allowance: Arc<Allowance>,
    handed_over: mpsc::Receiver<HandedOver>,
    failed: watch::Sender<Option<ShardFailure>>,
}

impl Start {
    fn spawn(self) -> io::Result<ShardHandle> {
        let counters = Arc::new(ShardCounters::default());
        let (commands, commanded) = mpsc::unbounded_channel();
        let counted = counters.clone();
        let runtime = Builder::new_current_thread();
        let thread = std::thread::Builder::new()
            .name(format!("shard-{}", self.index))
            .spawn(move || self.run(runtime, counted, commanded))?;
        Ok(ShardHandle {
            commands,
            counters,
            thread: Mutex::new(Some(thread)),
        })
    }

    fn run(self, mut runtime: Builder, counters: Arc<ShardCounters>, commands: mpsc::UnboundedReceiver<Command>) {
        let (index, failed) = (self.index, self.failed.clone());
        let ran = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let runtime = runtime
                .enable_all()
                .on_thread_unpark(tasks::fair::thread_woke)
                .build_local(LocalOptions::default())
                .map_err(|error| error.to_string())?;
            runtime.block_on(async move {
                let Self {
                    index,
                    config,
                    knowledge,
                    identities,
                    log,
                    peers,
                    experience,
                    allowance,
                    handed_over,
                    failed: _,
                } = self;
                let turns = match config.set_urgent {
                    Some(set) => Turns::urgent(Urgency::new(allowance, set)),
                    None => Turns::default(),
                };
                let shard = Rc::new(Shard {
                    index,
                    hbone: Rc::new(config.hbone.clone()),
                    recorder: Recorder::new(config.metrics.clone()),
                    config,
                    knowledge,
                    identities,
                    log,
                    counters,
                    experience,
                    peers,
                    connections: RefCell::new(Slab::new()),
                    stirred: tokio::sync::Notify::new(),
                    pods: RefCell::default(),
                    retired: RefCell::default(),
                    hand_overs: Rate::a_second(HAND_OVERS_A_SECOND),
                    turns,
                    refusals: Say::at_most(10),
                    accept_errors: Say::at_most(1),
                    datagram: RefCell::default(),
                    random_state: Cell::new(RandomState::new().hash_one(index)),
                });
                shard::run(shard, commands, handed_over).await;
            });
            Ok::<(), String>(())
        }));
        let cause = match ran {
            Ok(Ok(())) => return,
            Ok(Err(error)) => format!("its runtime could not be made: {error}"),
            Err(panic) => panic_message(&*panic),
        };
        tracing::error!(shard = index, "a shard of the proxy died: {cause}");
        failed.send_replace(Some(ShardFailure { shard: index, cause }));
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic".to_owned())
}

#[cfg(test)]
mod tests;
