//! The client's socket: opened with a time limit, and asked for its addresses.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use tokio::net::{TcpStream, lookup_host};

use super::report::{Called, canonical};

/// What a URL says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Url {
    pub scheme: String,
    /// `host:port`.
    pub authority: String,
    pub path: String,
}

impl std::str::FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text.split_once("://").ok_or("expected SCHEME://HOST[:PORT][/PATH]")?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let default = match scheme {
            "http" | "h2c" | "grpc" | "ws" => Some(80),
            "tcp" | "udp" => None,
            _ => return Err(format!("{scheme}: is not http, h2c, grpc, ws, tcp or udp")),
        };
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(host, port)| port.parse::<u16>().is_ok() && !host.ends_with(':'))
            && (!authority.starts_with('[') || authority.contains("]:"));
        let authority = match (has_port, default) {
            (true, _) => authority.to_owned(),
            (false, Some(port)) => format!("{authority}:{port}"),
            (false, None) => return Err(format!("{scheme} needs a port")),
        };
        Ok(Self {
            scheme: scheme.to_owned(),
            authority,
            path: if path.is_empty() {
                "/".to_owned()
            } else {
                path.to_owned()
            },
        })
    }
}

/// Resolves a name; the first address of the wanted version.
pub(super) async fn resolve(authority: &str) -> Result<Vec<SocketAddr>> {
    let found: Vec<_> = lookup_host(authority)
        .await
        .with_context(|| format!("cannot resolve {authority}"))?
        .collect();
    anyhow::ensure!(!found.is_empty(), "{authority} has no address");
    Ok(found)
}

/// Opens a connection, and notes the socket's own view of it.
pub(super) async fn connect(authority: &str, timeout: Duration, called: &mut Called) -> Result<TcpStream> {
    let addresses = resolve(authority).await?;
    let connecting = TcpStream::connect(&addresses[..]);
    let connected = tokio::time::timeout(timeout, connecting)
        .await
        .context("connect: no answer in time")?;
    let stream = connected.with_context(|| format!("connect to {authority}"))?;
    stream.set_nodelay(true).context("cannot set TCP_NODELAY")?;
    called.peer = stream.peer_addr().ok().map(canonical);
    called.local = stream.local_addr().ok().map(canonical);
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let of = |text: &str| text.parse::<Url>().map(|url| (url.authority, url.path));
        assert_eq!(of("http://web/a?b"), Ok(("web:80".into(), "/a?b".into())));
        assert_eq!(of("tcp://[fd00::1]:9"), Ok(("[fd00::1]:9".into(), "/".into())));
        assert_eq!(of("http://[fd00::1]"), Ok(("[fd00::1]:80".into(), "/".into())));
        assert_eq!(of("grpc://1.2.3.4:5/"), Ok(("1.2.3.4:5".into(), "/".into())));
        for bad in ["web", "tcp://web", "ftp://web:1", "udp://[::1]"] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }
}
