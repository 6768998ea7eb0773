//! The way to the control plane: gRPC over TLS to one of several addresses, checked against the roots file as that is now.
//!
//! ```text
//! call ─► Channel (tonic; connects again by itself) ─► next address ─► TCP ─► TLS: roots file, server name ─► HTTP/2
//! ```
//! Knows nothing of what is asked there. It is shared by the certificate client and by discovery.
//!
//! Invariants: plaintext only to a loopback address and only where `http://` says so (`only_loopback_may_be_plaintext`);
//! each new connection reads the roots file anew, so a rotated root needs no restart; each connection begins with the
//! address that last took one, and tries them all. A connection that says nothing for 20 s is given up.

use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::{ClientConfig, crypto::aws_lc_rs::default_provider};
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, ToSocketAddrs},
};
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint};

use crate::trust::{parse_bundle, store};

/// Istio's port for discovery and certificates over TLS.
const DEFAULT_PORT: u16 = 15012;
/// For one address: TCP and TLS together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a control plane listens: `host:port`, `https://host:port`, or `http://127.0.0.1:port` for plaintext.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlAddress {
    host: String,
    port: u16,
    plaintext: bool,
}

/// Why a text is not the address of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// It is not of the form.
    #[error("{0:?} is not an address of a control plane: expected host, host:port, or https://host:port")]
    Form(String),
    /// Plaintext would carry a token over the network.
    #[error("{0:?}: plaintext is for loopback addresses only, since the node's token goes with each request")]
    Plaintext(String),
}

impl FromStr for ControlAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let form = || AddressError::Form(text.to_owned());
        let (plaintext, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (true, rest),
            (None, Some(rest)) => (false, rest),
            (None, None) => (false, text),
        };
        let rest = rest.trim_end_matches('/');
        let (host, port) = match (rest.strip_prefix('['), rest.rsplit_once(':')) {
            (Some(bracketed), _) => {
                let (host, after) = bracketed.split_once(']').ok_or_else(form)?;
                (host, after.strip_prefix(':'))
            }
            // More than one colon and no brackets: IPv6 without a port.
            (None, Some((host, port))) if !host.contains(':') => (host, Some(port)),
            (None, _) => (rest, None),
        };
        let port = port.map_or(Ok(DEFAULT_PORT), str::parse).map_err(|_| form())?;
        if ServerName::try_from(host).is_err() || port == 0 {
            return Err(form());
        }
        let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if plaintext && !loopback {
            return Err(AddressError::Plaintext(text.to_owned()));
        }
        Ok(Self {
            host: host.to_owned(),
            port,
            plaintext,
        })
    }
}

impl fmt::Display for ControlAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, plaintext } = self;
        let scheme = if *plaintext { "http" } else { "https" };
        if host.contains(':') {
            write!(f, "{scheme}://[{host}]:{port}")
        } else {
            write!(f, "{scheme}://{host}:{port}")
        }
    }
}

/// How to reach the control plane, and whom to believe that they are it.
#[derive(Clone, Debug)]
pub struct Upstream {
    /// Tried in turn; at least one.
    pub addresses: Vec<ControlAddress>,
    /// The roots (PEM) that its certificate must chain to; read for each new connection.
    pub roots_file: PathBuf,
}

impl Upstream {
    /// A channel that connects when it is first used, and again whenever its connection is lost. Needs a tokio runtime.
    pub fn channel(&self) -> Channel {
        let upstream = Arc::new(self.clone());
        let last = Arc::new(AtomicUsize::new(0));
        endpoint(self.addresses.first()).connect_with_connector_lazy(tower::service_fn(move |_| {
            let (upstream, last) = (upstream.clone(), last.clone());
            async move { upstream.connect(&last).await.map(TokioIo::new) }
        }))
    }

    /// Every address that the names have now, in the order in which they were given; one that has none is passed over
    /// where another has some.
    ///
    /// # Errors
    /// None has any: says so of each.
    pub async fn resolve(&self) -> io::Result<Vec<(ControlAddress, SocketAddr)>> {
        let (mut found, mut failures) = (Vec::new(), Vec::new());
        for name in &self.addresses {
            let looking_up = tokio::net::lookup_host((name.host.as_str(), name.port));
            match tokio::time::timeout(CONNECT_TIMEOUT, looking_up).await {
                Ok(Ok(addresses)) => found.extend(addresses.map(|address| (name.clone(), address))),
                Ok(Err(error)) => failures.push(format!("{name}: {error}")),
                Err(_elapsed) => failures.push(format!("{name}: no answer to its name")),
            }
        }
        if found.is_empty() {
            return Err(io::Error::other(failures.join("; ")));
        }
        Ok(found)
    }

    /// A channel to one of the addresses that [`Upstream::resolve`] told, for whoever chooses among them.
    pub fn channel_to(&self, name: &ControlAddress, address: SocketAddr) -> Channel {
        let (upstream, name) = (Arc::new(self.clone()), name.clone());
        endpoint(Some(&name)).connect_with_connector_lazy(tower::service_fn(move |_| {
            let (upstream, name) = (upstream.clone(), name.clone());
            async move {
                let connecting = upstream.connect_to(&name, address);
                match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                    Ok(connected) => connected.map(TokioIo::new),
                    Err(_elapsed) => Err(io::Error::other(format!(
                        "no answer within {} s",
                        CONNECT_TIMEOUT.as_secs()
                    ))),
                }
            }
        }))
    }

    /// One connection, to the first address that takes it, beginning with the one that did last.
    async fn connect(&self, last: &AtomicUsize) -> io::Result<Box<dyn Stream>> {
        let mut failures = Vec::new();
        let (first, count) = (last.load(Relaxed), self.addresses.len());
        for at in (first..first + count).map(|at| at % count) {
            let address = &self.addresses[at];
            let connecting = self.connect_to(address, (address.host.as_str(), address.port));
            let failure = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(Ok(stream)) => {
                    last.store(at, Relaxed);
                    return Ok(stream);
                }
                Ok(Err(error)) => error.to_string(),
                Err(_elapsed) => format!("no answer within {} s", CONNECT_TIMEOUT.as_secs()),
            };
            failures.push(format!("{address}: {failure}"));
        }
        Err(io::Error::other(failures.join("; ")))
    }

    async fn connect_to(&self, name: &ControlAddress, to: impl ToSocketAddrs) -> io::Result<Box<dyn Stream>> {
        let tls = if name.plaintext { None } else { Some(self.tls()?) };
        let socket = TcpStream::connect(to).await?;
        socket.set_nodelay(true)?;
        let Some(tls) = tls else {
            return Ok(Box::new(socket));
        };
        let name = ServerName::try_from(name.host.clone()).map_err(io::Error::other)?;
        let stream = TlsConnector::from(tls).connect(name, socket).await?;
        if stream.get_ref().1.alpn_protocol() != Some(b"h2") {
            return Err(io::Error::other("it does not speak HTTP/2 (ALPN)"));
        }
        Ok(Box::new(stream))
    }

    fn tls(&self) -> io::Result<Arc<ClientConfig>> {
        let named = |error: &dyn fmt::Display| io::Error::other(format!("{}: {error}", self.roots_file.display()));
        let pem = std::fs::read(&self.roots_file).map_err(|error| named(&error))?;
        let roots = parse_bundle(&pem)
            .and_then(|roots| store(&roots).map_err(|error| crate::BundleError::Malformed(error.to_string())))
            .map_err(|error| named(&error))?;
        let mut config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}

/// The connector does TLS itself, and chooses the address: this one is never dialled.
fn endpoint(name: Option<&ControlAddress>) -> Endpoint {
    let origin = name.and_then(|name| name.to_string().parse().ok()).unwrap_or_default();
    Endpoint::from_static("http://control")
        .origin(origin)
        .http2_keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PING_TIMEOUT)
        .keep_alive_while_idle(true)
        .tcp_nodelay(true)
}

/// TLS or, on loopback, plain TCP.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_istio_writes_them() {
        for (text, expected) in [
            ("istiod.istio-system.svc", "https://istiod.istio-system.svc:15012"),
            ("istiod.istio-system.svc:15012", "https://istiod.istio-system.svc:15012"),
            ("https://istiod:443/", "https://istiod:443"),
            ("10.0.0.1:1", "https://10.0.0.1:1"),
            ("[fd00::1]:15012", "https://[fd00::1]:15012"),
            ("fd00::1", "https://[fd00::1]:15012"),
            ("http://127.0.0.1:15010", "http://127.0.0.1:15010"),
            ("http://localhost:15010", "http://localhost:15010"),
        ] {
            assert_eq!(text.parse::<ControlAddress>().unwrap().to_string(), expected, "{text}");
        }
        for bad in [
            "",
            "https://",
            "a b",
            "host:port",
            "host:0",
            "host:70000",
            "[fd00::1",
            "ftp://host",
        ] {
            assert!(bad.parse::<ControlAddress>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_loopback_may_be_plaintext() {
        for bad in [
            "http://istiod:15010",
            "http://10.0.0.1:15010",
            "http://127.0.0.1.example.com",
        ] {
            let error = bad.parse::<ControlAddress>().unwrap_err();
            assert_eq!(error, AddressError::Plaintext(bad.to_owned()));
        }
    }
}
