//! What would become of a connection, and why: question and answer as JSON.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// A connection that somebody asks about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Question {
    /// `namespace/pod`, or a workload's uid or address.
    pub source: String,
    /// `namespace/pod`, a service's host name (short as in the source's namespace), or an address.
    pub destination: String,
    /// The port that is dialled.
    pub port: u16,
}

/// What a step came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Outcome {
    /// It goes on.
    Passes,
    /// It goes on, and a person should know this.
    Notable,
    /// It ends here.
    Refused,
}

/// One step of a connection's way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Which: `capture`, `destination`, `route`, `egress`, `certificate`, `policy`.
    pub stage: String,
    /// What it came to.
    pub outcome: Outcome,
    /// In words.
    pub text: String,
    /// The object behind it, such as `Service shop/web.shop.svc.cluster.local`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
}

/// The whole way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Why {
    /// The node whose agent says so.
    pub node: String,
    /// Whose connection.
    pub source: String,
    /// To what.
    pub destination: String,
    /// Step by step; a refusal is the last.
    pub steps: Vec<Step>,
    /// Whether it may be.
    pub allowed: bool,
    /// What to ask the destination's agent, where there is one: it decides by what *it* knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrival: Option<Arrival>,
}

/// A connection as it would come to the destination's agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Arrival {
    /// The node that the destination runs on.
    pub node: String,
    /// The destination's uid.
    pub workload: String,
    /// Who comes, where that is proved; none in plaintext.
    pub identity: Option<String>,
    /// From where.
    pub source: std::net::IpAddr,
    /// To what address and port of it.
    pub target: SocketAddr,
}
