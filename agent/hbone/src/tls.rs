//! The TLS handshake of each side, and what went wrong in it.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use identity::peer_identity;
use model::Identity;
use rustls::{ClientConfig, ServerConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use crate::{
    error::HandshakeError,
    wire::{Flush, Wire, WireHandle},
};

/// What h2 reads and writes.
pub(crate) struct Transport {
    tls: TlsStream<Wire>,
    wire: WireHandle,
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.tls).poll_read(cx, buffer);
        if let Poll::Ready(Err(error)) = &read {
            self.wire.note(error);
        }
        read
    }
}

impl AsyncWrite for Transport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(cx)
    }
}

/// Opens: the configuration says who the peer must be.
pub(crate) async fn connect(
    socket: TcpStream,
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> Result<(Transport, WireHandle), HandshakeError> {
    let (wire, handle) = Wire::new(socket);
    let name = ServerName::IpAddress(address.ip().into());
    match TlsConnector::from(config).connect(name, wire).into_fallible().await {
        Ok(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2") => {
            let wire = handle.clone();
            let tls = stream.into();
            Ok((Transport { tls, wire }, handle))
        }
        Ok(_) => Err(HandshakeError::NotHttp2),
        Err((error, _wire)) => {
            // The alert that tells the peer why.
            let _ = poll_fn(|cx| handle.poll_flush(cx)).await;
            Err(HandshakeError::from_io(error, &handle.first_bytes()))
        }
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
            let wire = handle.clone();
            let tls = stream.into();
            return Ok((Transport { tls, wire }, handle, peer));
        }
        Ok(Err((error, _wire))) => HandshakeError::from_io(error, &handle.first_bytes()),
        Err(_elapsed) => return Err(HandshakeError::Timeout(timeout)),
    };
    if !matches!(error, HandshakeError::Closed | HandshakeError::Io(_)) {
        handle.linger().await;
    }
    Err(error)
}
