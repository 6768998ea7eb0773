//! What was seen, as JSON.

use std::{collections::BTreeMap, io::Write, net::SocketAddr, time::SystemTime};

use serde::{Deserialize, Serialize};

/// What a server saw of a connection or a request.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Seen {
    pub protocol: String,
    /// The server's socket: `getpeername`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    /// The server's socket: `getsockname`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pod: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    pub bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Seen {
    pub fn new(protocol: &str, peer: SocketAddr, local: SocketAddr) -> Self {
        let env = |name| std::env::var(name).unwrap_or_default();
        let pod = match env("POD_NAME") {
            name if name.is_empty() => name,
            name => format!("{}/{name}", env("POD_NAMESPACE")),
        };
        Self {
            protocol: protocol.to_owned(),
            peer: Some(canonical(peer)),
            local: Some(canonical(local)),
            pod,
            node: env("NODE_NAME"),
            ..Self::default()
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    /// One line on standard output.
    pub fn log(&self) {
        let time = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .as_secs_f64();
        let mut line = serde_json::to_value(self).unwrap_or_default();
        if let Some(object) = line.as_object_mut() {
            object.insert("time".to_owned(), time.into());
        }
        // A closed standard output must not end the server.
        let _ = writeln!(std::io::stdout(), "{line}");
    }
}

/// `::ffff:a.b.c.d`, which a dual-stack socket reports, as `a.b.c.d`.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    model::canonical_socket(address)
}

/// What a client saw of a call.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Called {
    pub url: String,
    pub ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The client's socket: `getpeername`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peer: Option<SocketAddr>,
    /// The client's socket: `getsockname`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<u16>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    /// Whether what came back has the hash of what was sent, where that was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_matches: Option<bool>,
    /// What the server said that it saw.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<Seen>,
    /// What came back, if it is text and not a report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub received: Option<String>,
    pub milliseconds: f64,
}

impl Called {
    /// Takes what came back: a server's report, or text.
    pub fn take(&mut self, bytes: &[u8]) {
        const SHOWN: usize = 64 << 10;
        match serde_json::from_slice::<Seen>(bytes) {
            Ok(seen) if !seen.protocol.is_empty() => self.server = Some(seen),
            _ => self.received = Some(String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN)]).into_owned()),
        }
    }

    /// For a person.
    pub fn text(&self) -> String {
        let mut lines = Vec::new();
        let outcome = match &self.error {
            Some(error) => format!("failed: {error}"),
            None => self.status.map_or("ok".to_owned(), |status| format!("status {status}")),
        };
        lines.push(format!("{}  {outcome}  ({:.1} ms)", self.url, self.milliseconds));
        let address = |address: Option<SocketAddr>| address.map_or("?".to_owned(), |address| address.to_string());
        if self.peer.is_some() {
            lines.push(format!(
                "  client socket: {} -> {}",
                address(self.local),
                address(self.peer)
            ));
        }
        lines.push(format!(
            "  bytes: {} sent, {} received",
            self.bytes_sent, self.bytes_received
        ));
        if let Some(matches) = self.hash_matches {
            lines.push(format!("  hash: {}", if matches { "equal" } else { "DIFFERENT" }));
        }
        if let Some(seen) = &self.server {
            let pod = if seen.pod.is_empty() { "server" } else { &seen.pod };
            lines.push(format!(
                "  {pod} saw: {} from {} at {}",
                seen.protocol,
                address(seen.peer),
                address(seen.local)
            ));
            lines.extend(seen.headers.iter().map(|(name, value)| format!("    {name}: {value}")));
            lines.extend(seen.body.iter().map(|body| format!("    body: {body}")));
        }
        lines.extend(
            self.received
                .iter()
                .filter(|text| !text.is_empty())
                .map(|text| format!("  received: {text}")),
        );
        lines.join("\n")
    }
}
