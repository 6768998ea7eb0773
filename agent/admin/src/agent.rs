//! What is asked of the agent; the binary answers.

use std::{future::Future, pin::Pin, time::Duration};

use crate::{
    listing::Listing,
    status::{PodAdded, PodChecked, PodRemoved, Status, ValidAttachments},
    why::{Arrival, Question, Step, Why},
};

/// An answer, when it is there.
pub type Reply<T> = Pin<Box<dyn Future<Output = T> + Send>>;
/// The answer to a pod event.
pub type Answer = Reply<Result<(), String>>;

/// The answer of an agent that is being followed by another: the question was not wrong, and is for the other. Told with
/// status 503.
pub const ASK_AGAIN: &str = "another agent takes over this node: ask again";

/// Whether the process can do its work.
pub trait Health: Send + Sync + 'static {
    /// What is pending; nothing when it is ready.
    fn pending(&self) -> Vec<String>;
}

/// What a scraper asks of the agent.
pub trait Scraped: Send + Sync + 'static {
    /// All metrics in the format that the `Accept` header asks for: its content type, and the text.
    fn scrape(&self, accept: &str) -> Reply<(&'static str, String)>;
}

/// A part of what the agent knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Section {
    /// Everything, in ztunnel's form.
    ConfigDump,
    /// Workloads.
    Workloads,
    /// Services, with their endpoints.
    Services,
    /// Policies.
    Policies,
    /// Certificates; never keys.
    Certificates,
    /// Live connections.
    Connections,
    /// What the kernel's hooks do, and for whom.
    Capture,
}

impl Section {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ConfigDump,
        Self::Workloads,
        Self::Services,
        Self::Policies,
        Self::Certificates,
        Self::Connections,
        Self::Capture,
    ];

    /// Its path, without the slash.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConfigDump => "config_dump",
            Self::Workloads => "workloads",
            Self::Services => "services",
            Self::Policies => "policies",
            Self::Certificates => "certificates",
            Self::Connections => "connections",
            Self::Capture => "capture",
        }
    }
}

/// What the socket asks of the agent.
pub trait Agent: Health + Scraped {
    /// What it is and does.
    fn status(&self) -> Status;
    /// A pod is about to start: resolves once it is captured, or known not to be.
    fn pod_added(&self, event: PodAdded) -> Answer;
    /// A pod is gone.
    fn pod_removed(&self, event: PodRemoved) -> Answer;
    /// Whether a pod is captured, or known not to be.
    fn pod_checked(&self, event: PodChecked) -> Answer;
    /// Pods of other sandboxes than these are gone.
    fn garbage(&self, valid: ValidAttachments) -> Answer;
    /// What it knows. No secret is among it.
    fn list(&self, section: Section) -> Reply<Listing>;
    /// What is logged, after the change where there is one; an empty change is a return to what it was at the start.
    ///
    /// # Errors
    /// The change can't be understood.
    fn logging(&self, change: Option<&str>) -> Result<String, String>;
    /// What would become of a connection, and why.
    fn why(&self, question: Question) -> Reply<Result<Why, String>>;
    /// What would become of a connection that comes to a pod of this node.
    ///
    /// # Errors
    /// The pod is none of this node.
    fn arrival(&self, arrival: Arrival) -> Result<Vec<Step>, String>;
    /// Where the CPU goes for a while, in pprof's form (protobuf, not compressed).
    fn profile(&self, during: Duration) -> Reply<Result<Vec<u8>, String>>;
    /// Who allocated what is in use, of what was allocated for a while, in pprof's form; or why not.
    fn heap(&self, during: Duration) -> Reply<Result<Vec<u8>, String>>;
    /// What memory is used for, as text.
    fn memory(&self) -> String;
    /// Ends the agent as SIGTERM does.
    fn quit(&self);
}
