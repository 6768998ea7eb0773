//! The TLS handshake of each side, and what went wrong in it.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use identity::peer_identity;
use model::Identity;
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::{
    error::HandshakeError,
    wire::{Wire, WireHandle},
};

/// What h2 reads and writes.
pub(crate) type Transport = TlsStream<Wire>;

/// Opens: the configuration says who the peer must be.
pub(crate) async fn connect(
    socket: TcpStream,
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> Result<(Transport, WireHandle), HandshakeError> {
    let (wire, handle) = Wire::new(socket);
    let name = ServerName::IpAddress(address.ip().into());
    match TlsConnector::from(config).connect(name, wire).into_fallible().await {
        Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => Ok((stream.into(), handle)),
        Ok(_) => Err(HandshakeError::NotHttp2),
        Err((error, _wire)) => Err(HandshakeError::from_io(error, &handle.first_bytes())),
    }
}

/// Accepts: answers who the peer is.
pub(crate) async fn accept(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    timeout: Duration,
) -> Result<(Transport, WireHandle, Identity), HandshakeError> {
    let (wire, handle) = Wire::new(socket);
    let handshake = TlsAcceptor::from(config).accept(wire).into_fallible();
    let error = match tokio::time::timeout(timeout, handshake).await {
        Ok(Ok(stream)) => {
            let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default();
            let peer = peer_identity(certificates)?;
            return Ok((stream.into(), handle, peer));
        }
        Ok(Err((error, _wire))) => HandshakeError::from_io(error, &handle.first_bytes()),
        Err(_elapsed) => return Err(HandshakeError::Timeout(timeout)),
    };
    if !matches!(error, HandshakeError::Closed | HandshakeError::Io(_)) {
        handle.linger().await;
    }
    Err(error)
}
