//! What the local socket asks of this process.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use admin::{
    CapabilityStatus, CaptureStatus, CertificateStatus, Health, IdentityStatus, KnowledgeStatus, Listing, PodAdded,
    PodChecked, PodRemoved, PodStatus, Reply, Scraped, Section, Status, ValidAttachments,
    why::{Arrival, Question, Step, Why},
};
use telemetry::{AccessLog, Metrics, metrics::Exposition};
use tokio::sync::Notify;

use super::{
    dump,
    logging::LogLevel,
    pods::{PodView, Pods, View},
    scrape::Gathered,
    source::{Source, seconds},
    why::Seen,
};

/// Everything that the status is made of.
pub struct NodeAgent {
    pub started: Instant,
    pub node_name: String,
    /// What the kernel has for the capture by eBPF.
    pub capabilities: capture::Capabilities,
    /// Why this way of capture.
    pub capture_why: String,
    pub knowledge: mesh::Knowledge,
    pub source: Source,
    pub identities: identity::Identities,
    pub capture: capture::Capture,
    pub proxy: Arc<l4::Proxy>,
    pub access_log: AccessLog,
    pub pods: Pods,
    pub view: View,
    pub metrics: Metrics,
    pub log_level: LogLevel,
    /// The cluster's.
    pub domain: Arc<str>,
    /// The configuration, as it is shown.
    pub config: serde_json::Value,
    /// Told when somebody wants the agent to end.
    pub quit: Arc<Notify>,
}

impl NodeAgent {
    fn pods_status(
        &self,
        certificates: &[identity::CertificateInfo],
        counters: &capture::GuardCounters,
    ) -> Vec<PodStatus> {
        let pods = self.view.pods().into_iter();
        pods.map(|pod| self.pod_status(pod, certificates, counters)).collect()
    }

    fn capture_status(&self) -> CaptureStatus {
        let hooks = self.capabilities.hooks.iter();
        CaptureStatus {
            mode: self.capture.mode().to_owned(),
            why: self.capture_why.clone(),
            capabilities: hooks
                .map(|hook| CapabilityStatus {
                    name: hook.name.to_owned(),
                    available: hook.support == capture::Support::Available,
                    detail: hook.detail(),
                })
                .collect(),
        }
    }

    /// What the kernel's hooks do, and for whom.
    fn capture_listing(&self) -> Listing {
        let counters = self.capture.counters();
        let pods = self.pods_status(&self.identities.list(), &counters);
        Listing::Value(serde_json::json!({
            "capture": self.capture_status(),
            "counters": named(&counters.total),
            "pods": pods,
        }))
    }

    /// Numbers of this moment.
    fn gather(&self) -> Gathered {
        let mut gathered = Gathered::new();
        let pods = self.view.pods();
        let active = pods.iter().filter(|pod| pod.captured).count();
        let pending = pods.iter().filter(|pod| pod.problem.is_some()).count();
        gathered.gauge(
            "workload_manager_active_proxy_count",
            "Pods that are captured",
            active as u64,
        );
        gathered.gauge(
            "workload_manager_pending_proxy_count",
            "Pods that should be captured and are not",
            pending as u64,
        );
        let counts = self.knowledge.snapshot().counts();
        for (name, help, count) in [
            ("undercurrent_known_workloads", "Workloads known", counts.workloads),
            ("undercurrent_known_services", "Services known", counts.services),
            ("undercurrent_known_policies", "Policies known", counts.policies),
        ] {
            gathered.gauge(name, help, count as u64);
        }
        let ready = u64::from(self.pending().is_empty());
        gathered.gauge("undercurrent_ready", "Whether the agent is ready", ready);
        gathered.certificates(&self.identities.list(), SystemTime::now());
        let hooks = named(&self.capture.counters().total);
        let help = "What the kernel's hooks did, by reason";
        gathered.counters("undercurrent_capture", help, "reason", hooks);
        let counters = self.proxy.counters();
        for (name, help, count) in [
            ("istio_dns_requests", "DNS requests of pods", counters.dns_queries),
            (
                "istio_dns_upstream_requests",
                "DNS requests that were forwarded",
                counters.dns_forwarded,
            ),
            (
                "istio_dns_upstream_failures",
                "DNS requests that nobody answered",
                counters.dns_failed,
            ),
        ] {
            gathered.counter(name, help, count);
        }
        let help = "Connections by what became of them";
        gathered.counters("undercurrent_connections", help, "what", counters);
        gathered.counter(
            "undercurrent_access_log_dropped",
            "Access-log lines dropped since the output was too slow",
            self.access_log.dropped(),
        );
        self.source.gather(&mut gathered);
        gathered
    }

    fn seen(&self) -> Seen {
        Seen {
            node: self.node_name.clone(),
            capture: self.capture.mode(),
            snapshot: self.knowledge.snapshot(),
            pods: self.view.pods(),
            identities: self.identities.clone(),
            domain: self.domain.clone(),
        }
    }

    fn pod_status(
        &self,
        pod: PodView,
        certificates: &[identity::CertificateInfo],
        counters: &capture::GuardCounters,
    ) -> PodStatus {
        let certificate = pod.identity.as_ref().and_then(|identity| {
            let info = certificates.iter().find(|info| info.identity == *identity)?;
            certificate_status(info)
        });
        PodStatus {
            namespace: pod.pod.namespace.to_string(),
            name: pod.pod.name.to_string(),
            addresses: pod.addresses,
            captured: pod.captured,
            redirection: self.source.redirection(&pod.pod),
            problem: pod
                .problem
                .or_else(|| (!pod.notes.is_empty()).then(|| pod.notes.join("; "))),
            identity: pod.identity.map(|identity| identity.to_string()),
            certificate,
            counters: counters.pods.get(&pod.uid).map(named).unwrap_or_default(),
        }
    }
}

impl Health for NodeAgent {
    fn pending(&self) -> Vec<String> {
        let mut pending = Vec::new();
        if !self.knowledge.snapshot().ready() {
            pending.push(format!("knowledge of the mesh ({})", self.source.awaited()));
        }
        if !self.view.settled() {
            pending.push("the pods that were known before the restart".to_owned());
        }
        pending
    }
}

impl Scraped for NodeAgent {
    fn scrape(&self, accept: &str) -> Reply<(&'static str, String)> {
        let exposition = Exposition::of_accept(accept);
        let (proxy, metrics, gathered) = (self.proxy.clone(), self.metrics.clone(), self.gather());
        Box::pin(async move {
            proxy.count().await;
            // Fails only if a collector does, and none of ours can.
            let text = exposition.write(&gathered.registry(metrics)).unwrap_or_default();
            (exposition.content_type(), text)
        })
    }
}

impl admin::Agent for NodeAgent {
    fn status(&self) -> Status {
        let snapshot = self.knowledge.snapshot();
        let certificates = self.identities.list();
        let counters = self.capture.counters();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node_name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pending: self.pending(),
            capture: self.capture_status(),
            knowledge: KnowledgeStatus {
                generation: snapshot.generation(),
                workloads: snapshot.counts().workloads,
                rejected: self.source.rejected(),
                source: self.source.status(snapshot.ready()),
            },
            certificates: certificates.iter().map(identity_status).collect(),
            pods: self.pods_status(&certificates, &counters),
            counters: named(&counters.total),
            connections: self
                .proxy
                .counters()
                .into_iter()
                .map(|(name, count)| (name.to_string(), count))
                .collect(),
            access_log_dropped: self.access_log.dropped(),
        }
    }

    fn pod_added(&self, event: PodAdded) -> admin::Answer {
        let pods = self.pods.clone();
        Box::pin(async move { pods.added(event).await })
    }

    fn pod_removed(&self, event: PodRemoved) -> admin::Answer {
        let pods = self.pods.clone();
        Box::pin(async move { pods.removed(event).await })
    }

    fn pod_checked(&self, event: PodChecked) -> admin::Answer {
        let checked = self.view.check(&event);
        Box::pin(std::future::ready(checked))
    }

    fn garbage(&self, valid: ValidAttachments) -> admin::Answer {
        let pods = self.pods.clone();
        Box::pin(async move { pods.garbage(valid).await })
    }

    fn list(&self, section: Section) -> Reply<Listing> {
        let snapshot = self.knowledge.snapshot();
        let listing = match section {
            Section::Workloads => dump::workloads(&snapshot),
            Section::Services => dump::services(&snapshot),
            Section::Policies => dump::policies(&snapshot),
            Section::Certificates => dump::certificates(&self.identities),
            Section::Capture => self.capture_listing(),
            Section::Connections => {
                let proxy = self.proxy.clone();
                return Box::pin(async move { dump::connections(proxy.connections().await) });
            }
            Section::ConfigDump => return self.config_dump(),
        };
        Box::pin(std::future::ready(listing))
    }

    fn logging(&self, change: Option<&str>) -> Result<String, String> {
        match change {
            Some(level) => self.log_level.change(level),
            None => Ok(self.log_level.current()),
        }
    }

    fn why(&self, question: Question) -> Reply<Result<Why, String>> {
        let answer = self.seen().explain(&question);
        Box::pin(std::future::ready(answer))
    }

    fn arrival(&self, arrival: Arrival) -> Result<Vec<Step>, String> {
        self.seen().arrives(&arrival)
    }

    fn profile(&self, during: Duration) -> Reply<Result<Vec<u8>, String>> {
        Box::pin(super::profile::cpu(during))
    }

    fn heap(&self, during: Duration) -> Reply<Result<Vec<u8>, String>> {
        Box::pin(super::profile::heap(during))
    }

    fn memory(&self) -> String {
        super::profile::memory()
    }

    fn quit(&self) {
        tracing::info!("told to end by /quitquitquit");
        self.quit.notify_one();
    }
}

impl NodeAgent {
    fn config_dump(&self) -> Reply<Listing> {
        let snapshot = self.knowledge.snapshot();
        let (proxy, identities, pods) = (self.proxy.clone(), self.identities.clone(), self.view.pods());
        let capture = self.capture_listing();
        let config = self.config.clone();
        Box::pin(async move {
            let connections = proxy.connections().await;
            let version = serde_json::json!({"version": env!("CARGO_PKG_VERSION"), "component": "undercurrent"});
            Listing::Sections(vec![
                ("workloads", dump::workloads(&snapshot)),
                ("services", dump::services(&snapshot)),
                ("policies", dump::policies(&snapshot)),
                ("certificates", dump::certificates(&identities)),
                ("workloadState", dump::workload_state(pods, connections)),
                ("capture", capture),
                ("config", Listing::Value(config)),
                ("version", Listing::Value(version)),
            ])
        })
    }
}

fn named(counts: &BTreeMap<capture::Reason, u64>) -> BTreeMap<String, u64> {
    counts
        .iter()
        .map(|(reason, count)| (reason.label().to_owned(), *count))
        .collect()
}

fn certificate_status(info: &identity::CertificateInfo) -> Option<CertificateStatus> {
    let (serial, _, not_after) = info.held.as_ref()?;
    Some(CertificateStatus {
        serial: serial.clone(),
        not_after: seconds(*not_after),
    })
}

fn identity_status(info: &identity::CertificateInfo) -> IdentityStatus {
    IdentityStatus {
        identity: info.identity.to_string(),
        certificate: certificate_status(info),
        next_fetch: seconds(info.next_fetch),
        last_error: info.last_error.as_ref().map(ToString::to_string),
    }
}
