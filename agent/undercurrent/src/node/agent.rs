//! What the local socket asks of this process.

use std::{collections::BTreeMap, sync::Arc, time::Instant};

use admin::{
    CapabilityStatus, CaptureStatus, CertificateStatus, Health, IdentityStatus, KnowledgeStatus, PodAdded, PodChecked,
    PodRemoved, PodStatus, Status, ValidAttachments,
};
use telemetry::AccessLog;

use super::{
    pods::{PodView, Pods, View},
    source::{Source, seconds},
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
}

impl NodeAgent {
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

impl admin::Agent for NodeAgent {
    fn status(&self) -> Status {
        let snapshot = self.knowledge.snapshot();
        let certificates = self.identities.list();
        let capabilities = self
            .capabilities
            .hooks
            .iter()
            .map(|hook| CapabilityStatus {
                name: hook.name.to_owned(),
                available: hook.support == capture::Support::Available,
                detail: hook.detail(),
            })
            .collect();
        let counters = self.capture.counters();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node_name.clone(),
            pid: std::process::id(),
            uptime_seconds: self.started.elapsed().as_secs(),
            pending: self.pending(),
            capture: CaptureStatus {
                mode: self.capture.mode().to_owned(),
                why: self.capture_why.clone(),
                capabilities,
            },
            knowledge: KnowledgeStatus {
                generation: snapshot.generation(),
                workloads: snapshot.counts().workloads,
                rejected: self.source.rejected(),
                source: self.source.status(snapshot.ready()),
            },
            certificates: certificates.iter().map(identity_status).collect(),
            pods: self
                .view
                .pods()
                .into_iter()
                .map(|pod| self.pod_status(pod, &certificates, &counters))
                .collect(),
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
