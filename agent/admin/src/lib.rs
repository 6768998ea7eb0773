//! What the agent is asked from outside, over HTTP: by people, a CNI plugin, a kubelet, a scraper.
//!
//! ```text
//! STATE_DIR/agent.sock (only root can open it)      127.0.0.1:15000   everything below but the pod events
//!   GET  /status, /config_dump, /workloads, /services, /policies, /certificates, /connections, /capture
//!   GET  /debug/pprof/profile, /debug/pprof/heap    node address:15021  GET /healthz/ready → 200, or 500 with what is pending
//!   GET, POST /logging   POST /why, /quitquitquit   node address:15020  GET /stats/prometheus, /metrics
//!   POST /cmdadd         PodAdded  → 200 once captured
//!   POST /cmddel         PodRemoved → 200
//!   POST /cmdcheck       PodChecked → 200 if captured, or not to be
//!   POST /gc             ValidAttachments → 200 once the pods of other sandboxes are gone
//! ```
//! `cmdadd` is what Istio's CNI plugin sends to its agent. What changes something is a POST. Nothing secret is told: no
//! answer has a private key or a token. Over TCP only loopback is served, and no page of another site is
//! (`only_this_machine_and_no_page_may_ask`); the number of connections, their time and the size of requests are bounded,
//! and long answers are written as they are made (`what_is_written_piece_by_piece_is_json`). Deliberately unknown here: how
//! any of it is done; the binary hands in an [`Agent`].

mod agent;
mod client;
mod guard;
mod listing;
mod routes;
mod server;
mod status;
pub mod why;

pub use agent::{ASK_AGAIN, Agent, Answer, Health, Reply, Scraped, Section};
pub use client::{ClientError, get, post, within};
pub use listing::{Entries, Listing, Values};
pub use server::{ServeError, listen, put_in_place, serve_admin, serve_health, serve_metrics, serve_socket};
pub use status::{
    CapabilityStatus, CaptureStatus, CertificateStatus, IdentityStatus, KnowledgeStatus, PodAdded, PodChecked, PodIp,
    PodRemoved, PodSourceStatus, PodStatus, SourceStatus, Status, ValidAttachments,
};
