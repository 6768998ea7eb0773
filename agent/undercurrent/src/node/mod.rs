//! The node role: capture, knowledge, identities and the L4 proxy of one node, wired together.
//!
//! ```text
//! source: a static file, or ─► mesh ─┬─► pods: what is captured ◄─ cmdadd, cmddel (agent.sock), the Kubernetes API, a timer
//! the control plane by xDS           │        │ capture                │ listeners, sockets
//!                                    └─► l4 proxy (shards) ◄───────────┘        identities ◄─ an authority in files, or the CA
//! ```
//! Under failure: without capture the role ends and says why; without a usable file, or before the control plane said
//! anything, it runs, is not ready, and refuses;
//! SIGTERM drains and leaves capture in place, so that pods wait for the next agent instead of going out in plaintext; how
//! one agent follows another, and what becomes of a crash, is in [`handover`].
//! `undercurrent uninstall` takes capture down.

mod agent;
mod config;
mod dns;
mod dump;
mod handover;
mod kube_source;
#[cfg(test)]
mod kube_tests;
mod lead;
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
mod watched;
mod why;

use std::sync::Arc;

use anyhow::{Context, bail};
use capture::{Capabilities, Capture};
use telemetry::AccessLog;

pub use config::NodeArgs;
use config::{AccessLogMode, CaptureMode};
use handover::{Attached, Former};
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

/// Runs the role until it is told to end, or another agent has taken over: as the holder of a worker, or as that worker.
pub fn run(args: NodeArgs) -> anyhow::Result<()> {
    let log_level = logging::start()?;
    raise_file_limit();
    if !args.worker {
        let holder = handover::HolderConfig {
            socket: args.state_dir.join("handover.sock"),
            drain: args.drain,
        };
        std::process::exit(handover::hold(holder)?);
    }
    let attached = handover::attach()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("agent")
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(serve(args, attached, log_level))
}

async fn serve(mut args: NodeArgs, attached: Attached, log_level: logging::LogLevel) -> anyhow::Result<()> {
    // Who can't capture says so before anything else.
    let way = Way::choose(args.capture)?;
    let capture = match attached.former {
        Former::InCharge => None,
        Former::Finishes => Some(way.start(&args, true)?),
        Former::Gone => Some(way.start(&args, false)?),
    };
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
    // The configuration is shown as it is in force.
    args.realtime = config.set_urgent.is_some();
    let proxy = l4::Proxy::start(config, knowledge.clone(), identities.clone(), access_log.clone())
        .context("cannot start the proxy")?;
    let life = lead::Start {
        args,
        attached,
        way,
        capture,
        knowledge,
        identities: identities.clone(),
        oracle,
        board,
        source,
        access_log,
        metrics,
        log_level,
        proxy: Arc::new(proxy),
    };
    tokio::select! {
        ended = lead::run(life) => ended,
        () = background.run() => bail!("the watches of the cluster ended"),
        () = identities.rotate() => bail!("the rotation of certificates ended"),
    }
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
    if let Some(shards) = args.shards_per_pod {
        config.shards_per_pod = shards.max(1);
    }
    if args.realtime {
        match capture::allow_urgency() {
            Ok(()) => config.set_urgent = Some(set_urgent),
            Err(error) => tracing::warn!(
                "pods that ask for little may have to wait for noisy ones when processors are scarce: threads of the agent \
                 cannot be urgent: {error} (it needs CAP_SYS_NICE; --realtime false if this is meant)"
            ),
        }
    }
    config
}

/// How this node's pods are captured, and why so.
struct Way {
    ebpf: bool,
    why: String,
    /// What the kernel has for the capture by eBPF.
    capabilities: Capabilities,
}

impl Way {
    /// The way that is set, or that this kernel can do. Only what the kernel lacks chooses: another failure of the better
    /// way must not lead to the weaker.
    fn choose(mode: CaptureMode) -> anyhow::Result<Self> {
        let capabilities = capture::probe();
        let lacking = capabilities.lacking();
        let why = match (mode, lacking.is_empty()) {
            (CaptureMode::Auto, true) => "chosen: the kernel has all that eBPF needs".to_owned(),
            (CaptureMode::Auto, false) => format!("chosen: eBPF can't capture here: {}", lacking.join("; ")),
            (CaptureMode::Ebpf | CaptureMode::Iptables, _) => "as set".to_owned(),
        };
        let ebpf = mode == CaptureMode::Ebpf || (mode == CaptureMode::Auto && lacking.is_empty());
        if ebpf && !capabilities.can_capture() {
            bail!(
                "this kernel lacks what capture by eBPF needs; nothing is captured, so the agent ends \
                 (--capture iptables needs less):\n{capabilities}"
            );
        }
        Ok(Self {
            ebpf,
            why,
            capabilities,
        })
    }

    /// `takes_over`: another agent still finishes its connections.
    fn start(&self, args: &NodeArgs, takes_over: bool) -> anyhow::Result<Capture> {
        let why = &self.why;
        if !self.ebpf {
            let node = capture::IptablesNode::start(&args.pin_dir).context("cannot capture with iptables")?;
            if args.capture == CaptureMode::Auto {
                tracing::warn!(
                    "capture by iptables, {why}; nothing keeps a pod to it that has CAP_NET_ADMIN or CAP_NET_RAW"
                );
            } else {
                tracing::info!("capture by iptables, {why}");
            }
            return Ok(Capture::Iptables(node));
        }
        tracing::info!("capture by eBPF, {why}");
        let config = capture::NodeConfig {
            node: args.node.clone(),
            pin_dir: args.pin_dir.clone(),
            pods_cgroup: args.pods_cgroup.clone(),
            agent_cgroup: None,
            object: &EBPF_OBJECT.0,
            capabilities: self.capabilities.clone(),
            kernel_log: args.ebpf_log,
            takes_over,
        };
        capture::Node::start(config)
            .map(Capture::Ebpf)
            .context("cannot capture")
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

/// False: it can't be done any more, though it could at the start.
fn set_urgent(urgent: bool) -> bool {
    capture::set_urgent(urgent)
        .inspect_err(|error| tracing::warn!(urgent, "a thread's scheduling cannot be changed: {error}"))
        .is_ok()
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
