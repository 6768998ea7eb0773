//! The wiring of a replica.

use std::{io, net::SocketAddr, path::Path, sync::Arc};

use arc_swap::ArcSwap;
use k8s::live::Kind;
use kube::Client;
use model::NamespacedName;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tasks::{DrainMode, DrainSignal, DrainTrigger, drain_channel};
use tokio::task::JoinSet;

use crate::{
    allot::{self, ServiceEntries},
    auth::{Authenticator, KubePods, KubeReviews, PodFacts, PodView, Tokens, TrustDomains},
    ca::{Authority, CertificateService, Counters, Queue, Secrets},
    config::Config,
    index::{self, Settings},
    leader,
    metrics::Everything,
    serve::{self, Accepting, ListenError, Monitoring, ServerCertificate},
    status::{Board, Reporter},
    trust::{self, Namespaces},
    watch::{self, Health, IndexStep, Indexing, Sink, View},
    xds::{self, Cache, Discovery},
};

/// Why a replica does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No client for the API.
    #[error("cannot make a client for the Kubernetes API: {0}")]
    Client(String),
    /// A port.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A thread.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] io::Error),
    /// TLS.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

/// A client for the API of a kubeconfig, or of the cluster that this process runs in.
pub async fn client(kubeconfig: Option<&Path>) -> Result<Client, StartError> {
    // kube asks the process for its provider of cryptography; that another set it first is as well.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let failed = |error: &dyn std::fmt::Display| StartError::Client(error.to_string());
    let config = match kubeconfig {
        Some(path) => {
            let file = kube::config::Kubeconfig::read_from(path).map_err(|error| failed(&error))?;
            let options = kube::config::KubeConfigOptions::default();
            let config = kube::Config::from_custom_kubeconfig(file, &options).await;
            config.map_err(|error| failed(&error))?
        }
        None => kube::Config::incluster().map_err(|error| failed(&error))?,
    };
    Client::try_from(config).map_err(|error| failed(&error))
}

/// Runs a replica until `shutdown`, then lets its clients go.
pub async fn run(client: Client, config: Config, shutdown: impl Future<Output = ()>) -> Result<(), StartError> {
    let control = Control::start(client, config).await?;
    shutdown.await;
    control.stop().await;
    Ok(())
}

/// A running replica. Dropping it ends everything at once.
#[derive(Debug)]
pub struct Control {
    trigger: DrainTrigger,
    ports: JoinSet<()>,
    xds: SocketAddr,
    plaintext: Option<SocketAddr>,
    monitoring: SocketAddr,
}

/// What the parts share.
struct Parts {
    config: Config,
    client: Client,
    authority: Arc<Authority>,
    authenticator: Arc<Authenticator>,
    cache: Arc<Cache>,
    discovery: Discovery,
    health: Health,
    certificate: Arc<ServerCertificate>,
    counters: Counters,
    board: Arc<Board>,
    namespaces: Arc<Namespaces>,
    service_entries: Arc<ServiceEntries>,
}

impl Control {
    /// Opens the ports, starts the watches. It is ready when `/readyz` says so; before that, streams wait.
    pub async fn start(client: Client, config: Config) -> Result<Self, StartError> {
        let listener = serve::listen(config.xds, "xDS and CA")?;
        let monitoring = serve::listen(config.monitoring, "monitoring")?;
        let plaintext = match config.plaintext {
            Some(address) => Some(serve::listen_plaintext(address)?),
            None => None,
        };
        let (trigger, drain) = drain_channel();
        let mut control = Self {
            xds: listener.local_addr()?,
            plaintext: plaintext
                .as_ref()
                .map(tokio::net::TcpListener::local_addr)
                .transpose()?,
            monitoring: monitoring.local_addr()?,
            trigger,
            ports: JoinSet::new(),
        };
        let (parts, problem) = Parts::start(client, config, &drain)?;
        let tls = parts.certificate.config()?;
        let follow = parts
            .certificate
            .clone()
            .follow(parts.authority.clone(), parts.config.names(), drain.clone());
        tokio::spawn(follow);
        for (listener, tls) in std::iter::once((listener, Some(tls))).chain(plaintext.map(|listener| (listener, None)))
        {
            let accepting = Accepting::new(listener, tls, parts.config.limits);
            let router = xds::transport()
                .add_service(parts.discovery.clone())
                .add_service(parts.certificates());
            control
                .ports
                .spawn(serve::serve(accepting, router, drain.clone(), parts.config.patience));
        }
        tokio::spawn(serve::serve_monitoring(
            monitoring,
            Arc::new(parts.monitoring(problem)),
            drain,
        ));
        tracing::info!(xds = %control.xds, monitoring = %control.monitoring, "control plane started");
        Ok(control)
    }

    /// Where xDS and CA are served over TLS.
    pub fn xds(&self) -> SocketAddr {
        self.xds
    }

    /// Where they are served in plaintext.
    pub fn plaintext(&self) -> Option<SocketAddr> {
        self.plaintext
    }

    /// Where monitoring is served.
    pub fn monitoring(&self) -> SocketAddr {
        self.monitoring
    }

    /// Tells clients to go, waits for them as long as the settings say, and ends.
    pub async fn stop(mut self) {
        self.trigger.drain(DrainMode::Graceful);
        while self.ports.join_next().await.is_some() {}
        self.trigger.drain(DrainMode::Immediate);
    }
}

type Problem = tokio::sync::watch::Receiver<Option<Arc<str>>>;

impl Parts {
    fn start(client: Client, config: Config, drain: &DrainSignal) -> Result<(Self, Problem), StartError> {
        let queue = Queue::start(config.signing)?;
        let authority = Authority::new(queue, config.lifetimes, config.clock.clone());
        let secrets = Secrets::new(
            client.clone(),
            &config.root_namespace,
            authority.clone(),
            config.trust_domain.as_str(),
            config.root_overlap,
        );
        let problem = secrets.problem();
        tokio::spawn(secrets.run(drain.clone()));
        let view = Arc::new(PodView::default());
        let trust_domains = Arc::new(ArcSwap::from_pointee(TrustDomains::from(config.trust_domain.clone())));
        let reviews = KubeReviews::new(client.clone(), config.audiences.clone());
        let authenticator = Arc::new(Authenticator::new(
            Tokens::new(reviews, config.clock.clone()),
            view.clone(),
            KubePods(client.clone()),
            config.node_accounts.iter().cloned(),
            trust_domains.clone(),
        ));
        let cache = Arc::new(Cache::new());
        let authenticate: Arc<dyn xds::Authenticate> = authenticator.clone();
        let discovery = Discovery::start(cache.clone(), authenticate, config.discovery.clone(), drain.clone());
        let (board, namespaces) = (Arc::new(Board::default()), Arc::new(Namespaces::default()));
        let sink = ToCache {
            cache: cache.clone(),
            board: board.clone(),
            trust_domains,
        };
        let indexing = Indexing::new(
            index::Config {
                cluster: config.cluster.clone(),
                trust_domain: config.trust_domain.clone(),
                root_namespace: config.root_namespace.clone(),
                network: config.network.clone(),
                domain: config.domain.clone(),
            },
            sink,
        );
        let service_entries = Arc::new(ServiceEntries::default());
        let views: Arc<[Arc<dyn View>]> =
            Arc::new([view as Arc<dyn View>, namespaces.clone(), service_entries.clone()]);
        let health = watch::start(&client, indexing, views, drain)?;
        let parts = Self {
            config,
            client,
            authority,
            authenticator,
            cache,
            discovery,
            health,
            certificate: Arc::default(),
            counters: Counters::default(),
            board,
            namespaces,
            service_entries,
        };
        parts.write(drain);
        Ok((parts, problem))
    }

    /// What only the replica that leads does.
    fn write(&self, drain: &DrainSignal) {
        let (client, config) = (self.client.clone(), &self.config);
        let leads = leader::start(client.clone(), &config.root_namespace, &config.replica, drain.clone());
        let bundle = self.authority.bundle();
        tokio::spawn(trust::run(
            client.clone(),
            self.namespaces.clone(),
            bundle,
            leads.clone(),
            drain.clone(),
        ));
        let (entries, leading) = (self.service_entries.clone(), leads.clone());
        tokio::spawn(allot::run(client.clone(), entries, leading, drain.clone()));
        let reporter = Reporter {
            client,
            board: self.board.clone(),
            acknowledged: self.discovery.acknowledged().clone(),
            replica: config.replica.clone(),
        };
        tokio::spawn(reporter.run(leads, drain.clone()));
    }

    fn certificates(
        &self,
    ) -> proto::ca::istio_certificate_service_server::IstioCertificateServiceServer<CertificateService> {
        CertificateService::server(
            self.authority.clone(),
            self.authenticator.clone(),
            self.counters.clone(),
        )
    }

    fn monitoring(&self, problem: Problem) -> Monitoring {
        let mut registry = Registry::default();
        self.counters.register(&mut registry);
        registry.register_collector(Box::new(Everything {
            acknowledged: self.discovery.acknowledged().clone(),
            cache: self.cache.clone(),
            authority: self.authority.clone(),
            health: self.health.clone(),
        }));
        let (health, cache, certificate) = (self.health.clone(), self.cache.clone(), self.certificate.clone());
        let (acknowledged, states) = (self.discovery.acknowledged().clone(), self.cache.clone());
        let (broken, trouble) = (problem.clone(), self.health.clone());
        let replica = self.config.replica.clone();
        Monitoring {
            registry,
            waits_for: Box::new(move || waits_for(&health, &cache, &certificate, &problem)),
            syncz: Box::new(move || {
                json!({
                    "replica": replica,
                    "generation": states.snapshot().generation(),
                    "clients": clients(&acknowledged),
                    "refusals": acknowledged.refusals().iter().map(|it| refusal(it, &it.resources)).collect::<Vec<_>>(),
                    "certificateAuthority": broken.borrow().as_deref().unwrap_or("ok"),
                    "inputs": inputs(&trouble),
                    "watches": trouble.troubles(),
                })
            }),
        }
    }
}

fn waits_for(health: &Health, cache: &Cache, certificate: &ServerCertificate, problem: &Problem) -> Option<String> {
    let missing: Vec<_> = health.missing().iter().map(|kind| kind.name()).collect();
    if !missing.is_empty() {
        return Some(format!("not listed yet: {}", missing.join(", ")));
    }
    if cache.snapshot().generation() == 0 {
        return Some("the first state of the mesh is being made".into());
    }
    if !certificate.is_there() {
        let why = problem.borrow();
        return Some(
            why.as_deref()
                .unwrap_or("the certificate authority is being set up")
                .to_owned(),
        );
    }
    None
}

/// What the state was made of: how many objects of each kind, and up to which revision of the API.
fn inputs(health: &Health) -> Value {
    let told = |(kind, tally): (&'static str, watch::Tally)| {
        (
            kind.to_owned(),
            json!({"count": tally.count, "revision": tally.revision}),
        )
    };
    Value::Object(health.applied().into_iter().map(told).collect())
}

fn clients(acknowledged: &xds::Acknowledged) -> Vec<Value> {
    let clients = acknowledged.clients();
    let told = clients.iter().map(|client| {
        let refused = client.refused.iter().flatten();
        let refused = refused.map(|(name, it)| refusal(it, std::slice::from_ref(name)));
        json!({
            "node": client.node,
            "caller": client.caller,
            "peer": client.peer.map(|peer| peer.to_string()),
            "acknowledged": client.acknowledged,
            "refused": refused.collect::<Vec<_>>(),
        })
    });
    told.collect()
}

fn refusal(refusal: &xds::Refusal, resources: &[Arc<str>]) -> Value {
    json!({
        "node": refusal.node,
        "type": refusal.view.url(),
        "generation": refusal.generation,
        "resources": resources,
        "message": refusal.message,
    })
}

/// From the index into the cache.
struct ToCache {
    cache: Arc<Cache>,
    board: Arc<Board>,
    trust_domains: Arc<ArcSwap<TrustDomains>>,
}

impl Sink for ToCache {
    fn apply(&mut self, step: IndexStep, settings: &Settings) {
        let (own, aliases) = (&settings.trust_domain, &settings.trust_domain_aliases);
        let before = self.trust_domains.load();
        if (&before.own, &before.aliases) != (own, aliases) {
            tracing::info!(trust_domain = %own, ?aliases, "the mesh configuration sets the trust domain");
            self.trust_domains.store(Arc::new(TrustDomains {
                own: own.clone(),
                aliases: aliases.clone(),
            }));
        }
        let generation = self.cache.apply(step.changes);
        self.board.note(step.seen, step.findings, generation);
    }
}

impl View for PodView {
    fn put(&self, kind: Kind, namespace: &str, name: &str, object: &Value) {
        if kind == Kind::Pod {
            self.put(NamespacedName::new(namespace, name), PodFacts::of(object));
        }
    }

    fn gone(&self, kind: Kind, namespace: &str, name: &str) {
        if kind == Kind::Pod {
            self.remove(&NamespacedName::new(namespace, name));
        }
    }
}
