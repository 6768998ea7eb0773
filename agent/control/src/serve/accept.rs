//! Connections: taken as they come, through the TLS handshake, to the gRPC server.
//!
//! A slow or silent handshake costs one of a bounded number of places for a bounded time, and holds up nobody else
//! (`a_silent_peer_holds_up_nobody`). Over the bound of connections, the next one waits in the kernel's queue.

use std::{
    convert::Infallible,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use rustls::ServerConfig;
use tasks::{DrainMode, DrainSignal};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};

use crate::xds::Connection;

/// How much.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at once, handshakes included.
    pub connections: usize,
    /// How long a handshake may take.
    pub handshake: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 10_000,
            handshake: Duration::from_secs(10),
        }
    }
}

/// A port that connections come from.
pub struct Accepting {
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    limits: Limits,
}

impl Accepting {
    /// With TLS if there is a configuration for it.
    pub fn new(listener: TcpListener, tls: Option<Arc<ServerConfig>>, limits: Limits) -> Self {
        Self {
            listener,
            tls: tls.map(TlsAcceptor::from),
            limits,
        }
    }

    /// Accepts in a task until drained, or until the stream is dropped.
    pub(super) fn start(
        self,
        drain: DrainSignal,
    ) -> impl tokio_stream::Stream<Item = Result<Connection<Io>, Infallible>> + use<> {
        let (ready, accepted) = mpsc::channel(16);
        tokio::spawn(self.run(ready, drain));
        ReceiverStream::new(accepted).map(Ok)
    }

    async fn run(self, ready: mpsc::Sender<Connection<Io>>, mut drain: DrainSignal) {
        let places = Arc::new(Semaphore::new(self.limits.connections));
        loop {
            let accepted = async {
                let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
                let (stream, peer) = self.listener.accept().await?;
                Ok::<_, io::Error>((place, stream, peer))
            };
            let accepted = tokio::select! {
                _ = drain.reached(DrainMode::Graceful) => return,
                () = ready.closed() => return,
                accepted = accepted => accepted,
            };
            match accepted {
                Ok((place, stream, peer)) => {
                    let handshake = handshake(self.tls.clone(), stream, peer, place, self.limits.handshake);
                    let ready = ready.clone();
                    tokio::spawn(async move {
                        if let Some(connection) = handshake.await {
                            // Nobody takes it any more: it is closed.
                            let _ = ready.send(connection).await;
                        }
                    });
                }
                Err(error) => {
                    // Out of file descriptors, most likely: it does not help to try at once.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

async fn handshake(
    tls: Option<TlsAcceptor>,
    stream: TcpStream,
    peer: SocketAddr,
    place: OwnedSemaphorePermit,
    limit: Duration,
) -> Option<Connection<Io>> {
    // A missing option costs latency and nothing else.
    let _ = stream.set_nodelay(true);
    let stream = match tls {
        None => Stream::Plain(stream),
        Some(tls) => match tokio::time::timeout(limit, tls.accept(stream)).await {
            Ok(Ok(stream)) => Stream::Tls(Box::new(stream)),
            Ok(Err(error)) => {
                tracing::debug!(%peer, %error, "a TLS handshake failed");
                return None;
            }
            Err(_) => {
                tracing::debug!(%peer, "a TLS handshake took too long");
                return None;
            }
        },
    };
    Some(Connection::new(Io { stream, _place: place }, peer))
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// A connection that is ready for HTTP/2, and its place.
pub(super) struct Io {
    stream: Stream,
    _place: OwnedSemaphorePermit,
}

impl AsyncRead for Io {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Io {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, buf),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use tasks::drain_channel;
    use tokio::io::AsyncWriteExt;
    use tonic::transport::server::Connected;

    use super::*;

    #[tokio::test]
    async fn a_silent_peer_holds_up_nobody() {
        let root = rcgen::generate_simple_self_signed(vec!["localhost".into()]).unwrap();
        let key = rustls_pki_types::PrivatePkcs8KeyDer::from(root.signing_key.serialize_der()).into();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![root.cert.der().clone()], key)
            .unwrap();
        let mut roots = rustls::RootCertStore::empty();
        roots.add(root.cert.der().clone()).unwrap();
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (_trigger, drain) = drain_channel();
        let accepting = Accepting::new(listener, Some(Arc::new(server)), Limits::default());
        let mut accepted = std::pin::pin!(accepting.start(drain));
        let _silent = TcpStream::connect(address).await.unwrap();
        let mut garbage = TcpStream::connect(address).await.unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let name = "localhost".try_into().unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let own = stream.local_addr().unwrap();
        let (connected, first) = tokio::join!(connector.connect(name, stream), accepted.next());
        connected.unwrap();
        assert_eq!(first.unwrap().unwrap().connect_info().address(), own);
    }
}
