//! The node role: capture, knowledge, identities and the L4 proxy of one node, wired together.
//!
//! ```text
//! source: a static file, or ─► mesh ─┬─► pods: what is captured ◄─ cmdadd, cmddel (agent.sock), the Kubernetes API, a timer
//! the control plane by xDS           │        │ capture                │ listeners, sockets
//!                                    └─► l4 proxy (shards) ◄───────────┘        identities ◄─ an authority in files, or the CA
//! ```
//! Under failure: without capture the role ends and says why; without a usable file, or before the control plane said
//! anything, it runs, is not ready, and refuses;
//! SIGTERM drains and leaves capture in place, so that pods wait for the next agent instead of going out in plaintext.
//! `undercurrent uninstall` takes capture down.

mod agent;
mod config;
mod dns;
mod dump;
mod kube_source;
#[cfg(test)]
mod kube_tests;
pub mod logging;
mod outbound_source;
#[cfg(test)]
mod outbound_tests;
mod pods;
mod profile;
mod records;
mod redirection;
mod resolver;
mod scrape;
mod source;
mod static_source;
mod why;

use std::{sync::Arc, time::Duration};

use anyhow::{Context, bail};
use capture::Capture;
use telemetry::AccessLog;
use tokio::signal::unix::{SignalKind, signal};

pub use config::NodeArgs;
use config::{AccessLogMode, CaptureMode};
pub use outbound_source::KEPT as OUTBOUND;
pub use records::Records;
pub use source::{CERTIFICATES, KNOWLEDGE};

/// The eBPF programs, aligned as their loader wants them.
static EBPF_OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("UNDERCURRENT_EBPF")));

#[repr(C, align(8))]
struct Aligned<T: ?Sized>(T);

/// Seconds since 1970.
pub fn now() -> u64 {
    source::seconds(std::time::SystemTime::now())
}

/// Runs the role until it is told to end.
pub fn run(args: NodeArgs) -> anyhow::Result<()> {
    let log_level = logging::start()?;
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("agent")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(args, log_level))
}

async fn serve(args: NodeArgs, log_level: logging::LogLevel) -> anyhow::Result<()> {
    let (node, capture_why) = start_capture(&args)?;
    let source::Sources {
        knowledge,
        identities,
        oracle,
        board,
        source,
        background,
    } = source::start(&args).await?;
    let access_log = start_access_log(&args).context("cannot start the access log")?;
    let metrics = telemetry::Metrics::new(telemetry::metrics::Limits {
        series: args.metrics_series,
        expiry: args.metrics_expiry,
    });
    let config = proxy_config(&args, &metrics);
    let proxy = l4::Proxy::start(config, knowledge.clone(), identities.clone(), access_log.clone())
        .context("cannot start the proxy")?;
    let proxy = Arc::new(proxy);
    let parts = pods::Parts {
        oracle,
        dns_capture: args.dns.dns_capture,
        capture: node.clone(),
        knowledge: knowledge.clone(),
        identities: identities.clone(),
        proxy: proxy.clone(),
        board,
    };
    let (pods, view, reconciler) = pods::start(parts, &args.state_dir.join("pods"))?;
    let quit = Arc::new(tokio::sync::Notify::new());
    let agent = Arc::new(agent::NodeAgent {
        started: std::time::Instant::now(),
        node_name: args.node.clone(),
        capabilities: capture::probe(),
        capture_why,
        knowledge,
        source,
        identities: identities.clone(),
        capture: node.clone(),
        proxy: proxy.clone(),
        access_log: access_log.clone(),
        pods,
        view,
        metrics,
        log_level,
        config: args.shown(),
        quit: quit.clone(),
    });
    let socket = args.state_dir.join("agent.sock");
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tracing::info!(node = args.node, version = env!("CARGO_PKG_VERSION"), socket = %socket.display(), "agent started");
    tokio::select! {
        never = admin::serve_socket(&socket, agent.clone()) => never.map(drop).context("the local socket")?,
        never = admin::serve_admin(args.admin, agent.clone()) => never.map(drop).context("the admin endpoint")?,
        never = admin::serve_metrics(args.metrics, agent.clone()) => never.map(drop).context("the metrics endpoint")?,
        never = admin::serve_health(args.health, agent) => never.map(drop).context("the readiness endpoint")?,
        failure = proxy.failed() => bail!("the proxy failed: {failure}"),
        ended = reconciler => bail!("the pods' reconciler ended: {ended:?}"),
        ended = kernel_log(&node) => bail!("the eBPF programs' log ended: {ended:?}"),
        () = background.run() => bail!("the watches of the cluster ended"),
        () = identities.rotate() => bail!("the rotation of certificates ended"),
        _ = terminate.recv() => {}
        () = quit.notified() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!(
        seconds = args.drain.as_secs(),
        "told to end: draining; pods stay captured until an agent is back"
    );
    proxy.drain(args.drain).await;
    access_log.flush(Duration::from_secs(1));
    Ok(())
}

fn proxy_config(args: &NodeArgs, metrics: &telemetry::Metrics) -> l4::Config {
    let mut config = l4::Config {
        metrics: metrics.clone(),
        lookup: Arc::new(resolver::NodeResolver::new(&args.resolv_conf)),
        dns: args.dns.config(&args.resolv_conf),
        ..l4::Config::default()
    };
    if let Some(shards) = args.shards {
        config.shards = shards.max(1);
    }
    config
}

/// Starts the capture that is set, or that this kernel can do; and says why that one. Only what the kernel lacks chooses:
/// another failure of the better way must not lead to the weaker.
fn start_capture(args: &NodeArgs) -> anyhow::Result<(Capture, String)> {
    let capabilities = capture::probe();
    let lacking = capabilities.lacking();
    let why = match (args.capture, lacking.is_empty()) {
        (CaptureMode::Auto, true) => "chosen: the kernel has all that eBPF needs".to_owned(),
        (CaptureMode::Auto, false) => format!("chosen: eBPF can't capture here: {}", lacking.join("; ")),
        (CaptureMode::Ebpf | CaptureMode::Iptables, _) => "as set".to_owned(),
    };
    if args.capture == CaptureMode::Iptables || (args.capture == CaptureMode::Auto && !lacking.is_empty()) {
        let node = capture::IptablesNode::start(&args.pin_dir).context("cannot capture with iptables")?;
        if args.capture == CaptureMode::Auto {
            tracing::warn!(
                "capture by iptables, {why}; nothing keeps a pod to it that has CAP_NET_ADMIN or CAP_NET_RAW"
            );
        } else {
            tracing::info!("capture by iptables, {why}");
        }
        return Ok((Capture::Iptables(node), why));
    }
    if !capabilities.can_capture() {
        bail!(
            "this kernel lacks what capture by eBPF needs; nothing is captured, so the agent ends \
             (--capture iptables needs less):\n{capabilities}"
        );
    }
    tracing::info!("capture by eBPF, {why}");
    let config = capture::NodeConfig {
        node: args.node.clone(),
        pin_dir: args.pin_dir.clone(),
        pods_cgroup: args.pods_cgroup.clone(),
        agent_cgroup: None,
        takes_over: false,
        object: &EBPF_OBJECT.0,
        kernel_log: args.ebpf_log,
    };
    let node = capture::Node::start(config).context("cannot capture")?;
    Ok((Capture::Ebpf(node), why))
}

/// What the eBPF programs log, where that was asked for.
async fn kernel_log(node: &Capture) -> std::io::Result<()> {
    match node.kernel_log() {
        Some(log) => log.run().await,
        None => std::future::pending().await,
    }
}

fn start_access_log(args: &NodeArgs) -> std::io::Result<AccessLog> {
    let log = match args.access_log {
        AccessLogMode::Off => return Ok(AccessLog::off()),
        AccessLogMode::Text => AccessLog::start(std::io::stdout(), telemetry::Format::Text),
        AccessLogMode::Json => AccessLog::start(std::io::stdout(), telemetry::Format::Json),
    }?;
    Ok(log.with_opening(args.access_log_opening))
}

/// Every connection takes two descriptors: the soft limit is raised to the hard one.
fn raise_file_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
        } else {
            Ok(())
        }
    });
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
