//! What is done to a pod: captured and served, released, or only known. One attempt each; the reconciler decides.

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use capture::{CapturedPod, PodSpec};
use identity::Identities;
use mesh::Knowledge;
use model::{Identity, NamespacedName, OriginalDst, PeerAddr, PodSettings, WorkloadUid};
use socket2::SockRef;

use super::expectation::{Expected, Oracle, Trouble};
use crate::node::{handover::Link, records::PodRecord, redirection::Board};

/// What the reconciler works with.
pub struct Parts {
    pub oracle: Oracle,
    /// Whether the agent is the name server of pods that do not say.
    pub dns_capture: bool,
    pub capture: capture::Capture,
    pub knowledge: Knowledge,
    pub identities: Identities,
    pub proxy: Arc<l4::Proxy>,
    /// Who keeps the listeners when this process does not.
    pub link: Link,
    /// Where the pods' annotations are put up to be written.
    pub board: Board,
    /// Where the runtime keeps network namespaces under names.
    pub netns_dir: PathBuf,
}

impl Parts {
    /// A pod that starts must be able to talk at once: the mesh known, and its certificate there.
    pub(super) fn may_start(&self, identity: &Identity) -> Result<(), Trouble> {
        self.identities.want(identity);
        if !self.knowledge.snapshot().ready() {
            return Err(Trouble::Waiting("nothing is known of the mesh yet".to_owned()));
        }
        if self.identities.cached(identity).is_some() {
            return Ok(());
        }
        let why = self.identities.last_error(identity);
        let why = why.map_or_else(|| "it is being fetched".to_owned(), |error| error.to_string());
        Err(Trouble::Waiting(format!("no certificate for {identity} yet: {why}")))
    }

    /// Whether peers may still dial the pod through the mesh, as far as can be told from here.
    pub(super) fn may_be_dialled(&self, pod: &NamespacedName, uid: &WorkloadUid) -> bool {
        let Oracle::Cluster(pods) = &self.oracle else {
            return false;
        };
        let annotated = pods.cluster.redirection(pod).is_some();
        let snapshot = self.knowledge.snapshot();
        annotated || snapshot.workload(uid).is_some_and(|workload| workload.is_captured())
    }

    /// Whether what comes to the pod without an identity may be refused.
    pub(super) fn is_restricted(&self, uid: &WorkloadUid) -> bool {
        let snapshot = self.knowledge.snapshot();
        snapshot
            .workload(uid)
            .is_some_and(|workload| snapshot.restricts(workload))
    }

    pub(super) async fn know(&self, record: &PodRecord, uid: &WorkloadUid) -> Result<(), Trouble> {
        self.capture.know(spec(record, uid)).await.map_err(failed)
    }

    pub(super) async fn release(&self, record: &PodRecord, uid: &WorkloadUid) -> Result<(), Trouble> {
        self.capture.release(uid).await.map_err(failed)?;
        self.proxy.retire_pod(uid);
        self.link.release(&uid.0);
        tracing::info!(pod = %record.pod, "not captured any more");
        Ok(())
    }

    /// What came of a capture that failed half way is taken back; who waits at listeners that were held is refused.
    pub(super) async fn abandon(&self, uid: &WorkloadUid) {
        // Unknown, if it failed before it was captured.
        let _ = self.capture.release(uid).await;
        self.proxy.retire_pod(uid);
        self.link.release(&uid.0);
    }

    /// A pod is gone.
    pub(super) async fn forget(&self, uid: &WorkloadUid) {
        self.proxy.remove_pod(uid);
        self.capture.forget(uid).await;
        self.link.release(&uid.0);
    }

    /// Whether the agent is to be the name server of a captured pod.
    pub(super) fn answers_dns(&self, settings: &PodSettings) -> bool {
        settings.dns_capture.unwrap_or(self.dns_capture)
    }

    /// Captures and serves a pod that is expected to be so. With `served` it is already, and other settings hold.
    pub(super) async fn take(&self, record: &PodRecord, expected: &Expected, served: bool) -> Result<(), Trouble> {
        let Expected::Captured {
            uid,
            identity,
            settings,
        } = expected
        else {
            return Ok(());
        };
        self.identities.want(identity);
        self.capture(record, uid, settings.clone(), served).await
    }

    async fn capture(
        &self,
        record: &PodRecord,
        uid: &WorkloadUid,
        settings: PodSettings,
        served: bool,
    ) -> Result<(), Trouble> {
        let dns = self.answers_dns(&settings);
        let inherited = self.link.claim(&uid.0);
        if !inherited.is_empty() {
            self.capture.offer(uid.clone(), inherited);
        }
        let captured = self.capture.capture(spec(record, uid), settings).await;
        let handle = captured.map_err(|error| {
            if !served {
                // Nobody accepts from what was held, and the next attempt needs its ports.
                self.link.release(&uid.0);
            }
            failed(error)
        })?;
        // It can do without: then its queries go where it sends them, and names that only the mesh knows are not found.
        let queries = self.capture.set_dns(uid, dns).await.unwrap_or_else(|error| {
            tracing::error!(pod = %record.pod, %error, "the agent is not the pod's name server");
            None
        });
        if served {
            self.proxy.set_dns(uid, queries);
            return Ok(());
        }
        // Before anything is accepted: a crash from now on loses no listener.
        let held = handle.sockets().map_err(failed)?;
        self.link.hold(&uid.0, &held);
        drop(held);
        let listeners = handle.listeners().map_err(failed)?;
        let pod = l4::Pod {
            uid: uid.clone(),
            sockets: Arc::new(Sockets(handle)),
            dns: queries,
            listeners: l4::PodListeners {
                outbound: listeners.outbound,
                inbound: listeners.inbound,
                hbone: listeners.hbone,
            },
        };
        let taken = self.proxy.add_pod(pod);
        taken.map_err(|error| failed(format!("the proxy does not take the pod: {error}")))?;
        tracing::info!(pod = %record.pod, "captured");
        Ok(())
    }
}

fn failed(error: impl ToString) -> Trouble {
    Trouble::Failed(error.to_string())
}

fn spec(record: &PodRecord, uid: &WorkloadUid) -> PodSpec {
    PodSpec {
        uid: uid.clone(),
        netns: record.netns.clone(),
        addresses: record.addresses.clone(),
    }
}

/// Capture's handle, as the proxy wants it.
struct Sockets(CapturedPod);

impl l4::PodSockets for Sockets {
    fn original_destination(&self, accepted: SockRef<'_>, peer: PeerAddr, local: SocketAddr) -> Option<OriginalDst> {
        self.0.original_destination(accepted, peer, local)
    }

    fn inbound_destination(&self, accepted: SockRef<'_>, local: SocketAddr) -> OriginalDst {
        self.0.inbound_destination(accepted, local)
    }

    fn datagram_socket(&self, target: SocketAddr) -> std::io::Result<socket2::Socket> {
        self.0.datagram_socket(target)
    }

    fn name_server(&self, slot: usize, client: SocketAddr) -> Option<SocketAddr> {
        self.0.name_server(slot, client)
    }

    fn outbound_socket(&self, target: SocketAddr) -> std::io::Result<socket2::Socket> {
        self.0.outbound_socket(target)
    }

    fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> std::io::Result<socket2::Socket> {
        self.0.inbound_socket(target, source)
    }
}
