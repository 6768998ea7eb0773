//! Where the node role's knowledge comes from: files, or a control plane with the Kubernetes API beside it. Wiring only.
//!
//! ```text
//!               the mesh                     this node's pods          certificates
//! static        static_file ─► mesh          the mesh itself           LocalAuthority (--ca-cert, --ca-key)
//! control plane discovery ───► mesh ◄─ locals ◄─ kube_source           CaClient (--ca), roots file followed
//! ```

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use admin::SourceStatus;
use anyhow::Context;
use identity::{CaClient, CaClientConfig, Clock, Identities, Kept, LocalAuthority, Trust, Upstream};
use kube::config::{KubeConfigOptions, Kubeconfig};
use mesh::Knowledge;
use model::{MeshSettings, NamespacedName};

use super::{
    config::{ControlArgs, NodeArgs},
    kube_source::{Cluster, Rules},
    outbound_source::OutboundSource,
    pods::{Oracle, PodsOfCluster},
    redirection::{self, Board},
    scrape::Gathered,
    static_source::{self, Problems},
};

/// Where the certificates and keys of this node's pods are, in the state directory.
pub const CERTIFICATES: &str = "certificates";
/// Where the last good state of the mesh is, in the state directory.
pub const KNOWLEDGE: &str = "mesh";

/// What everything else is made of.
pub struct Sources {
    pub knowledge: Knowledge,
    pub identities: Identities,
    pub oracle: Oracle,
    pub board: Board,
    pub source: Source,
    /// Runs beside the agent, until dropped.
    pub background: Background,
}

/// Where knowledge comes from, for the status.
pub enum Source {
    Static {
        file: PathBuf,
        problems: Problems,
    },
    Control {
        addresses: String,
        discovery: discovery::Handle,
        cluster: Cluster,
        outbound: OutboundSource,
    },
}

/// What has to run beside the agent.
pub enum Background {
    Nothing,
    Control {
        cluster: Cluster,
        outbound: OutboundSource,
        board: Board,
        node: String,
        trust: Trust,
        roots: PathBuf,
    },
}

impl Background {
    /// Until dropped.
    pub async fn run(self) {
        match self {
            Self::Nothing => std::future::pending().await,
            Self::Control {
                cluster,
                outbound,
                board,
                node,
                trust,
                roots,
            } => {
                let annotations = redirection::run(cluster.clone(), board, node);
                tokio::join!(cluster.run(), outbound.run(), annotations, trust.follow_bundle(&roots));
            }
        }
    }
}

/// Starts what the arguments name.
pub async fn start(args: &NodeArgs) -> anyhow::Result<Sources> {
    match (&args.fixed.static_file, &args.fixed.ca_cert, &args.fixed.ca_key) {
        (Some(file), Some(cert), Some(key)) => start_static(args, file, cert, key),
        _ => start_control(args, &args.control).await,
    }
}

fn start_static(args: &NodeArgs, file: &Path, cert: &Path, key: &Path) -> anyhow::Result<Sources> {
    let (writer, knowledge) = mesh::new();
    let problems = static_source::follow(file.to_owned(), writer).context("cannot follow the static file")?;
    let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()));
    let authority = LocalAuthority::from_pem(&read(cert)?, &read(key)?)
        .with_context(|| format!("{} and {}", cert.display(), key.display()))?;
    let trust = Trust::from(knowledge.snapshot().settings().trust_domain.clone());
    Ok(Sources {
        identities: Identities::new(Arc::new(authority), trust, Clock::system()),
        knowledge,
        oracle: Oracle::Mesh {
            node: args.node.as_str().into(),
        },
        board: Board::default(),
        source: Source::Static {
            file: file.to_owned(),
            problems,
        },
        background: Background::Nothing,
    })
}

async fn start_control(args: &NodeArgs, control: &ControlArgs) -> anyhow::Result<Sources> {
    let client = kube_client(control.kubeconfig.as_deref()).await?;
    let rules = Rules {
        excluded_namespaces: args.exclude_namespaces.clone(),
        exclusions: args.allow_exclusions,
    };
    let cluster = Cluster::new(client, &args.node, rules);
    let scope = if control.xds_on_demand {
        mesh::Scope::OnDemand
    } else {
        mesh::Scope::Everything
    };
    let (writer, knowledge, demands) = mesh::with(&control.network, scope);
    let locals = writer.locals();
    let outbound = OutboundSource::new(
        cluster.client().clone(),
        &control.root_namespace,
        &control.mesh_config,
        &args.state_dir,
        writer.outbound(),
    );
    // Once this agent is in charge of the node.
    outbound.keep(false);
    let discovery = discovery::Client::start(discovery_config(args, control), writer, demands);
    let trust = Trust::new(control.trust_domain.clone(), control.trust_domain_aliases.clone());
    if let Err(error) = trust.read_bundle(&control.roots) {
        tracing::warn!(%error, "no roots yet: nothing can be trusted before they are there");
    }
    let authority = CaClient::new(CaClientConfig {
        upstream: upstream(control.ca(), &control.roots),
        token_file: control.token.clone(),
        cluster: control.cluster().into(),
        clock: Clock::system(),
    });
    let certificates = args.state_dir.join(CERTIFICATES);
    let authority = Kept::new(authority, &certificates, &control.roots, Clock::system())
        .with_context(|| format!("cannot keep certificates in {}", certificates.display()))?;
    let board = Board::default();
    Ok(Sources {
        knowledge,
        identities: Identities::new(Arc::new(authority), trust.clone(), Clock::system()),
        oracle: Oracle::Cluster(PodsOfCluster {
            cluster: cluster.clone(),
            locals,
            cluster_id: control.cluster().into(),
            network: control.network.as_str().into(),
            trust_domain: control.trust_domain.clone(),
            node: args.node.as_str().into(),
        }),
        board: board.clone(),
        source: Source::Control {
            addresses: control
                .xds
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(", "),
            discovery,
            cluster: cluster.clone(),
            outbound: outbound.clone(),
        },
        background: Background::Control {
            cluster,
            outbound,
            board,
            node: args.node.clone(),
            trust,
            roots: control.roots.clone(),
        },
    })
}

fn upstream(addresses: &[identity::ControlAddress], roots: &Path) -> Upstream {
    Upstream {
        addresses: addresses.to_vec(),
        roots_file: roots.to_owned(),
    }
}

fn discovery_config(args: &NodeArgs, control: &ControlArgs) -> discovery::Config {
    let account = control.service_account.iter();
    discovery::Config {
        upstream: upstream(&control.xds, &control.roots),
        token_file: Some(control.token.clone()),
        node: discovery::NodeId {
            ip: control.instance_ip,
            pod: control.pod_name.clone(),
            namespace: control.pod_namespace.clone(),
            node: args.node.clone(),
            metadata: account
                .map(|account| ("SERVICE_ACCOUNT".to_owned(), account.clone()))
                .collect(),
        },
        cluster: control.cluster(),
        network: control.network.clone(),
        mode: if control.xds_on_demand {
            discovery::Mode::OnDemand
        } else {
            discovery::Mode::Wildcard
        },
        settings: MeshSettings {
            trust_domain: control.trust_domain.clone(),
            ..MeshSettings::default()
        },
        state_dir: Some(args.state_dir.join(KNOWLEDGE)),
        // Once this agent is in charge of the node.
        keeps: false,
        limits: discovery::Limits::default(),
    }
}

async fn kube_client(file: Option<&Path>) -> anyhow::Result<kube::Client> {
    let Some(file) = file else {
        let config = kube::Config::incluster().context(
            "the Kubernetes API names this node's pods: give --kubeconfig FILE, or run as a pod of the cluster",
        )?;
        return kube::Client::try_from(config).context("the Kubernetes API cannot be asked");
    };
    let kubeconfig = Kubeconfig::read_from(file).with_context(|| file.display().to_string())?;
    client_of(kubeconfig).await.with_context(|| file.display().to_string())
}

pub async fn client_of(kubeconfig: Kubeconfig) -> anyhow::Result<kube::Client> {
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(kube::Client::try_from(config)?)
}

impl Source {
    /// Whether this agent keeps on the disk what it learns, which the one in charge of the node does.
    pub fn keep(&self, keeps: bool) {
        if let Self::Control {
            discovery, outbound, ..
        } = self
        {
            discovery.keep(keeps);
            outbound.keep(keeps);
        }
    }

    /// What could not be taken over, and why.
    pub fn rejected(&self) -> Vec<String> {
        match self {
            Self::Static { problems, .. } => problems.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            Self::Control {
                discovery, outbound, ..
            } => {
                let status = discovery.status();
                let rejected = status.rejected.iter().map(|rejected| {
                    let kind = rejected.type_url.rsplit('.').next().unwrap_or_default();
                    format!("{kind} {}: {}", rejected.name, rejected.reason)
                });
                let all = rejected.chain(status.conflicts).chain(status.disk);
                all.chain(outbound.problems()).collect()
            }
        }
    }

    /// What discovery has counted, in ztunnel's names.
    pub fn gather(&self, gathered: &mut Gathered) {
        let Self::Control { discovery, .. } = self else { return };
        let traffic = discovery.status().traffic;
        let help = "Responses of the control plane, by type";
        gathered.counters("istio_xds_message", help, "url", traffic.messages);
        let help = "Bytes of the control plane's responses, by type";
        gathered.counters("istio_xds_message_bytes", help, "url", traffic.bytes);
        let help = "Connections to the control plane that ended, by why";
        gathered.counters(
            "istio_xds_connection_terminations",
            help,
            "reason",
            traffic.terminations,
        );
    }

    /// What a pod's annotation says, where there is an API that has it.
    pub fn redirection(&self, pod: &NamespacedName) -> Option<String> {
        match self {
            Self::Static { .. } => None,
            Self::Control { cluster, .. } => cluster.redirection(pod),
        }
    }

    /// Why nothing is known yet, in words.
    pub fn awaited(&self) -> String {
        match self {
            Self::Static { .. } => self.rejected().join("; "),
            Self::Control { addresses, .. } => {
                let why = self.status(false).last_error;
                why.unwrap_or_else(|| format!("nothing was heard from {addresses} yet"))
            }
        }
    }

    /// For the status; `ready` is whether anything is known.
    pub fn status(&self, ready: bool) -> SourceStatus {
        match self {
            Self::Static { file, .. } => SourceStatus {
                kind: "static".to_owned(),
                address: file.display().to_string(),
                connected: ready,
                synced: ready,
                ..SourceStatus::default()
            },
            Self::Control {
                addresses,
                discovery,
                cluster,
                ..
            } => {
                let status = discovery.status();
                let connected = status.connected.as_ref();
                let ended = status.last_error.as_ref().map(|(when, _)| *when);
                SourceStatus {
                    kind: "xds".to_owned(),
                    address: connected.map_or_else(|| addresses.clone(), |to| format!("{} ({})", to.name, to.address)),
                    connected: connected.is_some(),
                    since: connected.map(|to| to.since).or(ended).map_or(0, seconds),
                    synced: status.source == discovery::Source::ControlPlane,
                    resources: status.addresses + status.policies,
                    last_error: status.last_error.map(|(_, why)| why),
                    pods_from: Some(cluster.status()),
                }
            }
        }
    }
}

pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
