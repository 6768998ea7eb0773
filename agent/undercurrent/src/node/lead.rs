//! An agent's life from its start to its last connection: when it is in charge of the node, and when another is.
//!
//! ```text
//! (another is in charge) ─► prepared: Ready ─► Yielded ─┐
//! (nobody is) ──────────────────────────────────────────┴─► in charge ◄── Resume ── yielded: serves on
//!                                                             │   └───── Yield ────────►│
//!                                                             └── SIGTERM ──► drains ◄──┴── Drain, SIGTERM
//! ```
//! See [`super::handover`] for the whole.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    future::pending,
    io,
    net::{SocketAddr, TcpListener},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, anyhow};
use capture::Capture;
use identity::Identities;
use mesh::Knowledge;
use telemetry::{AccessLog, Metrics};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc},
    task::JoinHandle,
};

use super::{
    Way,
    agent::NodeAgent,
    config::NodeArgs,
    handover::{Attached, Link, Message, Order},
    logging::LogLevel,
    pods::{self, Oracle, Parts},
    redirection::Board,
    source::Source,
};

/// The key of what is the node's and not a pod's, among what the holder keeps; no pod's uid.
const NODE: &str = "node";

/// What a life begins with.
pub struct Start {
    pub args: NodeArgs,
    pub attached: Attached,
    pub way: Way,
    /// None: another agent is in charge.
    pub capture: Option<Capture>,
    pub knowledge: Knowledge,
    pub identities: Identities,
    pub oracle: Oracle,
    pub board: Board,
    pub source: Source,
    pub access_log: AccessLog,
    pub metrics: Metrics,
    pub log_level: LogLevel,
    pub proxy: Arc<l4::Proxy>,
}

/// Why an agent is not in charge any more.
enum End {
    /// Another is about to be.
    Yield,
    /// It is to end, with its last connection.
    Drain,
}

/// Those who tell an agent what to do.
struct Orders {
    link: Link,
    given: mpsc::Receiver<Order>,
    terminate: Signal,
    interrupt: Signal,
    /// By whoever may ask over HTTP.
    quit: Arc<Notify>,
}

impl Orders {
    fn new(link: Link, given: mpsc::Receiver<Order>) -> anyhow::Result<Self> {
        Ok(Self {
            link,
            given,
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            quit: Arc::default(),
        })
    }

    /// The next order; none: to end.
    async fn next(&mut self) -> Option<Order> {
        tokio::select! {
            order = self.given.recv() => order,
            _ = self.terminate.recv() => None,
            _ = self.interrupt.recv() => None,
            () = self.quit.notified() => None,
        }
    }
}

/// Runs until the agent was told to end and its last connection has ended.
pub async fn run(mut start: Start) -> anyhow::Result<()> {
    let (link, given) = (start.attached.link.clone(), start.attached.orders);
    let mut orders = Orders::new(link.clone(), given)?;
    let directory = start.args.state_dir.join("pods");
    let capture = match start.capture.take() {
        Some(capture) => capture,
        None => {
            let prepared = pods::prepare(&start.oracle, &start.knowledge, &start.identities, &directory);
            if !take_over(&mut orders, prepared).await? {
                return Ok(());
            }
            start.way.start(&start.args, true)?
        }
    };
    start.source.keep(true);
    let parts = Parts {
        oracle: start.oracle,
        dns_capture: start.args.dns.dns_capture,
        capture: capture.clone(),
        knowledge: start.knowledge.clone(),
        identities: start.identities.clone(),
        proxy: start.proxy.clone(),
        link: link.clone(),
        board: start.board,
        netns_dir: start.args.netns_dir.clone(),
    };
    let (pods, view, reconciler) = pods::start(parts, &directory)?;
    let endpoints = Endpoints::open(&start.args, &link)?;
    let agent = Arc::new(NodeAgent {
        started: std::time::Instant::now(),
        node_name: start.args.node.clone(),
        capabilities: start.way.capabilities,
        capture_why: start.way.why,
        knowledge: start.knowledge,
        source: start.source,
        identities: start.identities,
        capture,
        proxy: start.proxy,
        access_log: start.access_log,
        pods,
        view,
        metrics: start.metrics,
        domain: start.args.dns.cluster_domain.as_str().into(),
        log_level: start.log_level,
        config: start.args.shown(),
        quit: orders.quit.clone(),
    });
    let socket = start.args.state_dir.join("agent.sock");
    tracing::info!(
        node = start.args.node,
        version = env!("CARGO_PKG_VERSION"),
        socket = %socket.display(),
        "agent started"
    );
    live(&start.args, &agent, endpoints, reconciler, &mut orders).await
}

/// In charge, and not, and in charge again, until the end.
async fn live(
    args: &NodeArgs,
    agent: &Arc<NodeAgent>,
    endpoints: Endpoints,
    reconciler: JoinHandle<()>,
    orders: &mut Orders,
) -> anyhow::Result<()> {
    let link = orders.link.clone();
    let mut background = pin!(background(agent, reconciler, link));
    loop {
        let end = tokio::select! {
            fault = &mut background => return Err(fault),
            end = in_charge(args, agent, &endpoints, orders) => end?,
        };
        if matches!(end, End::Drain) {
            // A successor that comes while this one drains is in charge at once.
            agent.pods.pause().await;
            agent.source.keep(false);
            break;
        }
        tracing::info!("another agent takes over: serving on until it does");
        let followed = async {
            agent.pods.pause().await;
            agent.source.keep(false);
            orders.link.say(Message::Yielded);
            is_followed(orders).await
        };
        let followed = tokio::select! {
            fault = &mut background => return Err(fault),
            followed = followed => followed,
        };
        if followed {
            break;
        }
        tracing::warn!("the agent that was to take over is gone: in charge again");
        agent.source.keep(true);
        agent.pods.resume().await;
    }
    // What waits in their queues is for the other agent.
    drop(endpoints);
    tokio::select! {
        fault = &mut background => Err(fault),
        () = drain(args, agent) => Ok(()),
    }
}

/// Says that this agent serves once it does, and then watches what must not end; resolves when it did.
async fn background(agent: &NodeAgent, reconciler: JoinHandle<()>, link: Link) -> anyhow::Error {
    let serving = async {
        agent.view.attempted().await;
        link.say(Message::Serving);
        pending::<Infallible>().await
    };
    tokio::select! {
        failure = agent.proxy.failed() => anyhow!("the proxy failed: {failure}"),
        ended = reconciler => anyhow!("the pods' reconciler ended: {ended:?}"),
        ended = kernel_log(&agent.capture) => anyhow!("the eBPF programs' log ended: {ended:?}"),
        never = serving => match never {},
    }
}

/// Prepares, and waits for the node. False: told to end before.
async fn take_over(orders: &mut Orders, prepared: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<bool> {
    let mut prepared = pin!(prepared);
    let mut ready = false;
    loop {
        tokio::select! {
            result = &mut prepared, if !ready => {
                result?;
                ready = true;
                tracing::info!("ready to take over");
                orders.link.say(Message::Ready);
            }
            order = orders.next() => match order {
                Some(Order::Inherit(key, sockets)) => orders.link.inherit(key, sockets),
                Some(Order::Yielded) => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            }
        }
    }
}

/// Answers pod events and whoever else asks, until another agent is to.
async fn in_charge(
    args: &NodeArgs,
    agent: &Arc<NodeAgent>,
    endpoints: &Endpoints,
    orders: &mut Orders,
) -> anyhow::Result<End> {
    let socket = args.state_dir.join("agent.sock");
    let ordered = async {
        loop {
            match orders.next().await {
                Some(Order::Yield) => return End::Yield,
                Some(Order::Drain) | None => return End::Drain,
                Some(Order::Gone) => {
                    tracing::info!("the agent before this one has ended");
                    if let Err(error) = agent.capture.forget_former().await {
                        tracing::error!(%error, "the former agent's cgroup still counts as an agent's");
                    }
                }
                Some(Order::Inherit(key, sockets)) => orders.link.inherit(key, sockets),
                Some(Order::Yielded | Order::Resume) => {}
            }
        }
    };
    let Endpoints { admin, metrics, health } = endpoints.try_clone().context("the agent's endpoints")?;
    // A probe that comes in the middle of a take-over waits, and is not told that the pods are not there yet.
    let healthy = async {
        agent.view.attempted().await;
        admin::serve_health(health, agent.clone()).await
    };
    tokio::select! {
        never = admin::serve_socket(&socket, agent.clone()) => match never.context("the local socket")? {},
        never = admin::serve_admin(admin, agent.clone()) => match never.context("the admin endpoint")? {},
        never = admin::serve_metrics(metrics, agent.clone()) => match never.context("the metrics endpoint")? {},
        never = healthy => match never.context("the readiness endpoint")? {},
        end = ordered => Ok(end),
    }
}

/// Whether the other agent serves. False: it is gone.
async fn is_followed(orders: &mut Orders) -> bool {
    loop {
        match orders.next().await {
            Some(Order::Drain) | None => return true,
            Some(Order::Resume) => return false,
            Some(_) => {}
        }
    }
}

async fn drain(args: &NodeArgs, agent: &NodeAgent) {
    agent.proxy.stop_accepting().await;
    let live = agent.proxy.connections().await.len();
    let seconds = args.drain.as_secs();
    tracing::info!(live, seconds, "draining; pods stay captured");
    agent.proxy.drain(args.drain).await;
    agent.access_log.flush(Duration::from_secs(1));
    tracing::info!("drained");
}

/// Where the agent is asked over TCP.
struct Endpoints {
    admin: TcpListener,
    metrics: TcpListener,
    health: TcpListener,
}

impl Endpoints {
    /// Those of the agent before, where they are the same, so that they always answer.
    fn open(args: &NodeArgs, link: &Link) -> anyhow::Result<Self> {
        let mut inherited: BTreeMap<String, TcpListener> = link
            .claim(NODE)
            .into_iter()
            .map(|(kind, socket)| (kind, TcpListener::from(socket)))
            .collect();
        let mut one = |kind: &str, address: SocketAddr| {
            let inherited = inherited.remove(kind);
            let same =
                inherited.filter(|listener| listener.local_addr().is_ok_and(|at| tasks::is_same_place(at, address)));
            same.map_or_else(|| admin::listen(address), Ok)
                .with_context(|| format!("the {kind} endpoint"))
        };
        let endpoints = Self {
            admin: one("admin", args.admin)?,
            metrics: one("metrics", args.metrics)?,
            health: one("readiness", args.health)?,
        };
        let Self { admin, metrics, health } = endpoints.try_clone()?;
        let held = [("admin", admin), ("metrics", metrics), ("readiness", health)];
        link.hold(NODE, &held.map(|(kind, listener)| (kind, listener.into())));
        Ok(endpoints)
    }

    fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            admin: self.admin.try_clone()?,
            metrics: self.metrics.try_clone()?,
            health: self.health.try_clone()?,
        })
    }
}

/// What the eBPF programs log, where that was asked for.
async fn kernel_log(node: &Capture) -> std::io::Result<()> {
    match node.kernel_log() {
        Some(log) => log.run().await,
        None => pending().await,
    }
}
