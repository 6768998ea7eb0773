//! The control plane's ports: 15012 (TLS: xDS and CA), 15010 (the same in plaintext, only when asked for and only on
//! loopback), 15014 (monitoring).
//!
//! ```text
//! accept ─► handshake (bounded, timed) ─► HTTP/2 (tonic) ─► xDS, CA
//! ```
//! Knows nothing of what the services do. Bounded: connections, handshakes under way, streams of a connection, header and
//! message sizes; a peer that is silent is asked and then closed. Drain: no new connections, GOAWAY to those there are, and
//! after a while their end. Tokens travel here, so plaintext beyond loopback is refused
//! (`plaintext_is_refused_beyond_loopback`).

mod accept;
mod certificate;
mod monitoring;

use std::{io, net::SocketAddr, time::Duration};

use tasks::{DrainMode, DrainSignal};
use tokio::net::TcpListener;
use tonic::{service::Routes, transport::Server};

pub use accept::{Accepting, Limits};
pub use certificate::ServerCertificate;
pub use monitoring::{Monitoring, serve as serve_monitoring};

/// Where a request comes from; in its extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer(pub SocketAddr);

/// Why a port is not served.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The system says no.
    #[error("cannot listen on {address} ({what}): {error}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What for.
        what: &'static str,
        /// Why.
        error: io::Error,
    },
    /// Tokens would be readable by everybody on the way.
    #[error("plaintext xDS on {0} would show tokens to the network: only a loopback address is allowed, such as 127.0.0.1:15010")]
    PlaintextBeyondLoopback(SocketAddr),
}

/// Opens a port.
pub async fn listen(address: SocketAddr, what: &'static str) -> Result<TcpListener, ListenError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| ListenError::Bind { address, what, error })
}

/// Opens a port for plaintext.
pub async fn listen_plaintext(address: SocketAddr) -> Result<TcpListener, ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::PlaintextBeyondLoopback(address));
    }
    listen(address, "plaintext xDS").await
}

/// Serves gRPC on what is accepted until drained; then until its clients are gone, or `patience` has passed.
pub async fn serve(accepting: Accepting, routes: Routes, mut drain: DrainSignal, patience: Duration) {
    let limits = accepting.limits();
    let mut server = Server::builder()
        .max_concurrent_streams(limits.streams)
        .http2_max_header_list_size(64 * 1024)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_pending_accept_reset_streams(Some(64))
        .initial_stream_window_size(1 << 20)
        .initial_connection_window_size(4 << 20);
    let (draining, drained) = (drain.clone(), async move {
        drain.reached(DrainMode::Graceful).await;
    });
    let serving = server.add_routes(routes).serve_with_incoming_shutdown(accepting.start(draining.clone()), drained);
    tokio::pin!(serving);
    let mut draining = draining;
    let gone = async {
        draining.reached(DrainMode::Graceful).await;
        tokio::select! {
            () = tokio::time::sleep(patience) => {}
            _ = draining.reached(DrainMode::Immediate) => {}
        }
    };
    tokio::select! {
        ended = &mut serving => if let Err(error) = ended {
            tracing::error!(%error, "the gRPC server ended");
        },
        () = gone => tracing::info!("clients that were still connected are closed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn plaintext_is_refused_beyond_loopback() {
        let refused = listen_plaintext(SocketAddr::from(([0, 0, 0, 0], 0))).await;
        assert!(matches!(refused, Err(ListenError::PlaintextBeyondLoopback(_))));
        assert!(listen_plaintext(SocketAddr::from(([127, 0, 0, 1], 0))).await.is_ok());
    }
}
