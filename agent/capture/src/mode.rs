//! Either way of capturing, with the same operations.

use std::{io, net::SocketAddr, os::fd::OwnedFd};

use model::{OriginalDst, PeerAddr, PodSettings, WorkloadUid};
use socket2::{SockRef, Socket};

use crate::{
    CaptureError, DnsQueries, GuardCounters, IptablesNode, IptablesPodHandle, KernelLog, Node, PodHandle, PodListeners,
    PodSpec,
    iptables::{redirected_from, rerouted_from},
};

/// A node's capture; see [`Node`] and [`IptablesNode`] for what the operations do.
#[derive(Clone)]
pub enum Capture {
    /// By eBPF programs.
    Ebpf(Node),
    /// By iptables rules in each pod.
    Iptables(IptablesNode),
}

impl Capture {
    /// Its name, in the status and on the command line.
    pub fn mode(&self) -> &'static str {
        match self {
            Self::Ebpf(_) => "ebpf",
            Self::Iptables(_) => "iptables",
        }
    }

    /// A pod exists and is not captured.
    pub async fn know(&self, spec: PodSpec) -> Result<(), CaptureError> {
        match self {
            Self::Ebpf(node) => node.know(spec).await,
            Self::Iptables(node) => node.know(spec).await,
        }
    }

    /// Captures a pod.
    pub async fn capture(&self, spec: PodSpec, settings: PodSettings) -> Result<CapturedPod, CaptureError> {
        match self {
            Self::Ebpf(node) => node.capture(spec, settings).await.map(CapturedPod::Ebpf),
            Self::Iptables(node) => node.capture(spec, settings).await.map(CapturedPod::Iptables),
        }
    }

    /// Whether the agent is the name server of a captured pod; then with its sockets.
    pub async fn set_dns(&self, uid: &WorkloadUid, on: bool) -> Result<Option<DnsQueries>, CaptureError> {
        match self {
            Self::Ebpf(node) => node.set_dns(uid, on).await,
            Self::Iptables(node) => node.set_dns(uid, on).await,
        }
    }

    /// Ends a pod's capture; the pod stays known.
    pub async fn release(&self, uid: &WorkloadUid) -> Result<(), CaptureError> {
        match self {
            Self::Ebpf(node) => node.release(uid).await,
            Self::Iptables(node) => node.release(uid).await,
        }
    }

    /// A pod is gone.
    pub async fn forget(&self, uid: &WorkloadUid) {
        match self {
            Self::Ebpf(node) => node.forget(uid).await,
            Self::Iptables(node) => node.forget(uid).await,
        }
    }

    /// Repairs what is not as it should be, and says what that was.
    pub async fn reconcile(&self) -> Result<Vec<String>, CaptureError> {
        match self {
            Self::Ebpf(node) => node.reconcile().await,
            Self::Iptables(node) => node.reconcile().await,
        }
    }

    /// Sockets that another process opened in a pod, to be used when it is captured.
    pub fn offer(&self, uid: WorkloadUid, sockets: Vec<(String, OwnedFd)>) {
        match self {
            Self::Ebpf(node) => node.offer(uid, sockets),
            Self::Iptables(node) => node.offer(uid, sockets),
        }
    }

    /// The agents before this one have ended. With iptables a mark says who is an agent, and nothing is to be forgotten.
    pub async fn forget_former(&self) -> Result<(), CaptureError> {
        match self {
            Self::Ebpf(node) => node.forget_former().await,
            Self::Iptables(_) => Ok(()),
        }
    }

    /// Forgets the pods that this agent was not told of.
    pub async fn forget_untold(&self) -> Result<(), CaptureError> {
        match self {
            Self::Ebpf(node) => node.forget_untold().await,
            Self::Iptables(node) => node.forget_untold().await,
        }
    }

    /// What the guard decided; iptables has none.
    pub fn counters(&self) -> GuardCounters {
        match self {
            Self::Ebpf(node) => node.counters(),
            Self::Iptables(_) => GuardCounters::default(),
        }
    }

    /// The log of the eBPF programs, once, if it was asked for.
    pub fn kernel_log(&self) -> Option<KernelLog> {
        match self {
            Self::Ebpf(node) => node.kernel_log(),
            Self::Iptables(_) => None,
        }
    }
}

/// A captured pod, as the proxy uses it.
#[derive(Clone, Debug)]
pub enum CapturedPod {
    /// By eBPF programs.
    Ebpf(PodHandle),
    /// By iptables rules.
    Iptables(IptablesPodHandle),
}

impl CapturedPod {
    /// Duplicates of the agent's listeners in the pod.
    pub fn listeners(&self) -> io::Result<PodListeners> {
        match self {
            Self::Ebpf(pod) => pod.listeners(),
            Self::Iptables(pod) => pod.listeners(),
        }
    }

    /// Duplicates of the agent's listeners in the pod, by what they are for: to be handed over.
    pub fn sockets(&self) -> io::Result<Vec<(&'static str, OwnedFd)>> {
        match self {
            Self::Ebpf(pod) => pod.sockets(),
            Self::Iptables(pod) => pod.sockets(),
        }
    }

    /// Where an accepted connection of the pod was meant to go; none if it was made to the capture port itself.
    pub fn original_destination(
        &self,
        accepted: SockRef<'_>,
        peer: PeerAddr,
        local: SocketAddr,
    ) -> Option<OriginalDst> {
        match self {
            Self::Ebpf(pod) => pod
                .original_destination(peer, local)
                .or_else(|| rerouted_from(accepted, local)),
            Self::Iptables(pod) => pod.original_destination(accepted, local),
        }
    }

    /// Where an accepted plaintext connection to the pod was meant to go. Steered by eBPF, a socket has that address.
    pub fn inbound_destination(&self, accepted: SockRef<'_>, local: SocketAddr) -> OriginalDst {
        match self {
            // Rules that an agent before this one left may have sent it, in the moment before they were removed.
            Self::Ebpf(_) => OriginalDst(redirected_from(accepted, local).unwrap_or(local)),
            Self::Iptables(pod) => pod.inbound_destination(accepted, local),
        }
    }

    /// Which name server a client of the pod sent its datagram to, by the number of the DNS socket that it came to.
    pub fn name_server(&self, slot: usize, client: SocketAddr) -> Option<SocketAddr> {
        match self {
            Self::Ebpf(pod) => pod.name_server(slot),
            Self::Iptables(pod) => pod.name_server(client),
        }
    }

    /// A nonblocking datagram socket in the pod's namespace, to ask a name server with.
    pub fn datagram_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        match self {
            Self::Ebpf(pod) => pod.datagram_socket(target),
            Self::Iptables(pod) => pod.datagram_socket(target),
        }
    }

    /// A nonblocking socket in the pod's namespace, to dial a peer with.
    pub fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        match self {
            Self::Ebpf(pod) => pod.outbound_socket(target),
            Self::Iptables(pod) => pod.outbound_socket(target),
        }
    }

    /// A nonblocking socket in the pod's namespace, to dial the application with from the client's address and this port.
    /// Port 0: one is chosen when it connects.
    pub fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
        match self {
            Self::Ebpf(pod) => pod.inbound_socket(target, source),
            Self::Iptables(pod) => pod.inbound_socket(target, source),
        }
    }
}
