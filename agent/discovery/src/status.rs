//! What the client is at, for the administrator.

use std::{collections::BTreeMap, net::SocketAddr, time::SystemTime};

use crate::RejectedResource;

/// Where what is known comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Source {
    /// Nothing is known yet.
    #[default]
    Nothing,
    /// From the disk: the control plane has not been reached since the start.
    Disk,
    /// From the control plane.
    ControlPlane,
}

/// A connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Connected {
    /// The name or address that was given.
    pub name: String,
    /// What it was resolved to.
    pub address: SocketAddr,
    /// Since when.
    pub since: SystemTime,
    /// Whether it brought a whole state.
    pub synchronised: bool,
}

/// What the client is at.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Status {
    /// To whom it is connected.
    pub connected: Option<Connected>,
    /// How often it tried to connect.
    pub attempts: u64,
    /// Why the last connection failed or ended, and when.
    pub last_error: Option<(SystemTime, String)>,
    /// Where what is known comes from.
    pub source: Source,
    /// When the control plane last said something.
    pub last_heard: Option<SystemTime>,
    /// Workloads and services that are held.
    pub addresses: usize,
    /// Policies that are held.
    pub policies: usize,
    /// What was refused; the first hundred.
    pub rejected: Vec<RejectedResource>,
    /// What waits for an address that is another's, in words; the first hundred.
    pub conflicts: Vec<String>,
    /// What is wrong with the state on the disk.
    pub disk: Option<String>,
    /// What has been counted.
    pub traffic: Traffic,
}

/// What has been counted since the start.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Responses, by the type URL that they are of.
    pub messages: BTreeMap<&'static str, u64>,
    /// Their bytes.
    pub bytes: BTreeMap<&'static str, u64>,
    /// Connections that ended, or did not come to be, in ztunnel's words: `ConnectionError` (none came to be), `Error` (it
    /// failed), `Complete` (the control plane ended it).
    pub terminations: BTreeMap<&'static str, u64>,
}

/// Of what is listed in the status.
pub(crate) const LISTED: usize = 100;
