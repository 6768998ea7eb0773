//! The control plane's ports: 15012 (TLS: xDS and CA), 15010 (the same in plaintext, only when asked for and only on
//! loopback), 15014 (monitoring).
//!
//! ```text
//! accept ─► handshake (bounded, timed) ─► HTTP/2 (tonic) ─► xDS, CA
//! ```
//! Knows nothing of what the services do. Bounded: connections (handshakes too), what a connection may
//! have open; a peer that is silent is asked and then closed. Drain: no new connections, GOAWAY to those there are, and
//! after a while their end. Tokens travel here, so plaintext beyond loopback is refused
//! (`plaintext_is_refused_beyond_loopback`).

mod accept;
mod certificate;
mod monitoring;

use std::{io, net::SocketAddr, time::Duration};

use tasks::{DrainMode, DrainSignal};
use tokio::net::TcpListener;
use tonic::transport::server::Router;

pub use accept::{Accepting, Limits};
pub use certificate::ServerCertificate;
pub use monitoring::{Monitoring, serve as serve_monitoring};

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
    #[error(
        "plaintext xDS on {0} would show tokens to the network: only a loopback address is allowed, such as 127.0.0.1:15010"
    )]
    PlaintextBeyondLoopback(SocketAddr),
}

/// Opens a port.
pub fn listen(address: SocketAddr, what: &'static str) -> Result<TcpListener, ListenError> {
    let bound = tasks::listen(address).and_then(TcpListener::from_std);
    bound.map_err(|error| ListenError::Bind { address, what, error })
}

/// Opens a port for plaintext.
pub fn listen_plaintext(address: SocketAddr) -> Result<TcpListener, ListenError> {
    if !address.ip().is_loopback() {
        return Err(ListenError::PlaintextBeyondLoopback(address));
    }
    listen(address, "plaintext xDS")
}

/// Serves gRPC on what is accepted until drained; then until its clients are gone, or `patience` has passed.
pub async fn serve(accepting: Accepting, router: Router, drain: DrainSignal, patience: Duration) {
    let mut draining = drain.clone();
    let drained = async move {
        draining.reached(DrainMode::Graceful).await;
    };
    let serving = router.serve_with_incoming_shutdown(accepting.start(drain.clone()), drained);
    tokio::pin!(serving);
    let mut draining = drain;
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
        let refused = listen_plaintext(SocketAddr::from(([0, 0, 0, 0], 0)));
        assert!(matches!(refused, Err(ListenError::PlaintextBeyondLoopback(_))));
        assert!(listen_plaintext(SocketAddr::from(([127, 0, 0, 1], 0))).is_ok());
    }
}
