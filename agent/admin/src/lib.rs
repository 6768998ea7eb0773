//! The agent's local socket: its status for a person, pod events from a CNI plugin, readiness for a kubelet.
//!
//! ```text
//! STATE_DIR/agent.sock (only root can open it)         127.0.0.1 / node address :15021
//!   GET  /status         → Status as JSON                GET /healthz/ready → 200 or 500 with what is pending
//!   GET  /healthz/ready  → 200 or 500 with why
//!   POST /cmdadd         PodAdded  → 200 once captured
//!   POST /cmddel         PodRemoved → 200
//!   POST /cmdcheck       PodChecked → 200 if captured, or not to be
//!   POST /gc             ValidAttachments → 200 once the pods of other sandboxes are gone
//! ```
//! `cmdadd` is what Istio's CNI plugin sends to its agent. Deliberately unknown here: how any of it is done; the binary
//! hands in an [`Agent`].

mod client;
mod server;
mod status;

pub use client::{ClientError, get, post, within};
pub use server::{Agent, Answer, Health, ServeError, serve_health, serve_socket};
pub use status::{
    CapabilityStatus, CaptureStatus, CertificateStatus, IdentityStatus, KnowledgeStatus, PodAdded, PodChecked, PodIp,
    PodRemoved, PodSourceStatus, PodStatus, SourceStatus, Status, ValidAttachments,
};
