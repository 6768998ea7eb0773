//! What can go wrong, named after who must act: the kernel, the node's configuration, the pod, or us.

use std::{io, net::IpAddr, path::PathBuf};

use crate::capabilities::Capabilities;

/// Why capture could not be set up, changed or removed.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// The kernel lacks what eBPF capture needs.
    #[error("this kernel can't capture with eBPF:\n{0}")]
    Unsupported(Capabilities),
    /// The kernel refused a program. The text has the verifier's whole log.
    #[error("the kernel refused the eBPF program {program}: {error}")]
    Verifier {
        /// The program.
        program: &'static str,
        /// With the verifier's output.
        error: Box<aya::programs::ProgramError>,
    },
    /// The eBPF object can't be loaded, or is not of this build.
    #[error("the eBPF object can't be loaded: {0}")]
    Object(#[source] Box<aya::EbpfError>),
    /// The eBPF object has no such program or map.
    #[error("the eBPF object has no {0}: it is of another build")]
    Missing(&'static str),
    /// A map refused an operation.
    #[error("map {map}: {error}")]
    Map {
        /// The map.
        map: &'static str,
        /// What aya says.
        error: Box<aya::maps::MapError>,
    },
    /// The node's cgroups are not as they must be.
    #[error("cgroup {path}: {problem}")]
    Cgroup {
        /// The cgroup.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The pod's network namespace does not hold the pod's addresses: capturing it would give it another pod's identity.
    #[error("the network namespace {netns} does not hold {missing}, which is said to be the pod's: refused")]
    AddressNotThere {
        /// Where the namespace was found.
        netns: PathBuf,
        /// The address that is not there.
        missing: IpAddr,
    },
    /// Another pod of this node has the address.
    #[error("{address} already belongs to {owner}: refused")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// The other pod.
        owner: String,
    },
    /// A pod needs one address, or one of each family.
    #[error("a pod has one address of each family at the most, and one at least; given: {0:?}")]
    Addresses(Vec<IpAddr>),
    /// The pod's interface is not a veth whose other end is in the node's network namespace.
    #[error("{interface} of {netns} is not a veth that ends on this node: it can't be guarded ({problem})")]
    NoVeth {
        /// Where the namespace was found.
        netns: PathBuf,
        /// The interface.
        interface: String,
        /// What it is instead.
        problem: String,
    },
    /// The pod's network namespace is the node's.
    #[error("{0} is the node's own network namespace: host-network pods are not captured")]
    HostNetwork(PathBuf),
    /// A pod that was not told of.
    #[error("{0} is not known here")]
    UnknownPod(model::WorkloadUid),
    /// A system call failed.
    #[error("{what}: {error}")]
    System {
        /// What was tried.
        what: String,
        /// What the kernel said.
        error: io::Error,
    },
    /// The capture by iptables needs a program that is not installed.
    #[error("the program {0} is not installed, which capture by iptables needs (Debian: apt install iptables)")]
    MissingProgram(&'static str),
    /// A program of iptables failed.
    #[error("{program} in {netns}: {said}")]
    Iptables {
        /// The program.
        program: String,
        /// In which network namespace.
        netns: PathBuf,
        /// What it, or the kernel, said.
        said: String,
    },
    /// A process of the pod listens on a port that the rules redirect to.
    #[error("{port} is taken in {netns}: a pod that is captured by iptables can't use it")]
    PortTaken {
        /// The pod's namespace.
        netns: PathBuf,
        /// The port.
        port: u16,
    },
    /// The node is captured by eBPF, and not as this version does it.
    #[error("{0} holds the pins of a capture by eBPF of another version: take it down first (undercurrent uninstall)")]
    OtherCapture(PathBuf),
    /// A task of ours ended before its time.
    #[error("the capture task was cancelled")]
    Cancelled,
}

/// Names what was tried when the kernel says no.
pub(crate) trait Tried<T> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, CaptureError>;
}

impl<T> Tried<T> for io::Result<T> {
    fn tried(self, what: impl FnOnce() -> String) -> Result<T, CaptureError> {
        self.map_err(|error| CaptureError::System { what: what(), error })
    }
}

/// Names the map that refused.
pub(crate) fn map_error(map: &'static str) -> impl Fn(aya::maps::MapError) -> CaptureError {
    move |error| CaptureError::Map {
        map,
        error: Box::new(error),
    }
}
