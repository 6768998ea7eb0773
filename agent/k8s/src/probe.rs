//! Probes: how a kubelet asks a container whether it is well.

use serde::{Deserialize, Serialize};

use crate::{
    Container, IntOrString, Problem,
    meta::null_is_empty,
    pod::{FieldProblem, invalid},
};

/// How a container is asked whether it is well. Exactly one of the three ways.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Probe {
    /// 200 to 399 is well.
    #[serde(default)]
    pub http_get: Option<HttpGet>,
    /// A connection is well.
    #[serde(default)]
    pub tcp_socket: Option<TcpSocket>,
    /// Exit code 0 is well.
    #[serde(default)]
    pub exec: Option<Exec>,
    /// Seconds before the first.
    #[serde(default)]
    pub initial_delay_seconds: u64,
    /// Seconds between two.
    #[serde(default = "ten")]
    pub period_seconds: u64,
    /// Seconds until it counts as failed.
    #[serde(default = "one")]
    pub timeout_seconds: u64,
    /// In a row, to be well.
    #[serde(default = "one_u32")]
    pub success_threshold: u32,
    /// In a row, to be unwell.
    #[serde(default = "three")]
    pub failure_threshold: u32,
}

/// A request that is sent from the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpGet {
    /// Path and query.
    #[serde(default = "slash")]
    pub path: String,
    /// Number or name.
    pub port: IntOrString,
    /// `HTTP`; nothing else is supported.
    #[serde(default)]
    pub scheme: Option<String>,
    /// Further headers.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub http_headers: Vec<HttpHeader>,
}

/// A header.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HttpHeader {
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: String,
}

/// A connection that is opened from the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpSocket {
    /// Number or name.
    pub port: IntOrString,
}

/// A program that is run in the container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub command: Vec<String>,
}

fn slash() -> String {
    "/".to_owned()
}
fn ten() -> u64 {
    10
}
fn one() -> u64 {
    1
}
fn one_u32() -> u32 {
    1
}
fn three() -> u32 {
    3
}

impl Probe {
    pub(crate) fn check(&self, container: &Container, at: &str) -> Result<(), FieldProblem> {
        let ways = [self.http_get.is_some(), self.tcp_socket.is_some(), self.exec.is_some()];
        if ways.into_iter().filter(|way| *way).count() != 1 {
            return Err(invalid(at, "exactly one of httpGet, tcpSocket and exec must be given"));
        }
        if self.period_seconds == 0 || self.timeout_seconds == 0 {
            return Err(invalid(at, "periodSeconds and timeoutSeconds must be at least 1"));
        }
        if let Some(exec) = &self.exec
            && exec.command.is_empty()
        {
            return Err(invalid(&format!("{at}.exec.command"), "must be given"));
        }
        if let Some(get) = &self.http_get {
            if get.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
                let problem = Problem::Unsupported("a scheme other than HTTP".to_owned());
                return Err((format!("{at}.httpGet.scheme"), problem));
            }
            let breaks = |text: &str| text.contains(['\r', '\n', '\0']);
            let headers = get.http_headers.iter();
            if breaks(&get.path) || headers.clone().any(|h| breaks(&h.name) || breaks(&h.value)) {
                return Err(invalid(&format!("{at}.httpGet"), "holds a line break"));
            }
        }
        let port = self.http_get.as_ref().map(|get| &get.port);
        match port.or(self.tcp_socket.as_ref().map(|tcp| &tcp.port)) {
            Some(port) if container.port(port).is_none_or(|number| number == 0) => {
                Err(invalid(at, &format!("the container has no port {port}")))
            }
            _ => Ok(()),
        }
    }
}
