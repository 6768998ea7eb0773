//! TLS of a tunnel: the handshake by rustls, then records sealed and opened here.
//!
//! The handshake uses rustls' unbuffered API, because the buffered one may read past the peer's Finished and then keeps
//! those bytes. What it leaves are secrets, and perhaps bytes that came right behind.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use identity::{Proof, peer_identity};
use model::Identity;
use rustls::{
    ClientConfig, Error, ExtractedSecrets, ServerConfig,
    client::UnbufferedClientConnection,
    pki_types::ServerName,
    server::UnbufferedServerConnection,
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::{
    error::HandshakeError,
    record::{Key, Opened, Opener, Schedule, Sealer},
    wire::{Flush, Wire},
};

/// The most that a handshake may leave unread; the largest message rustls takes is 64 KiB.
const LARGEST_FLIGHT: usize = 256 << 10;

/// What h2 reads and writes.
pub(crate) struct Transport {
    wire: Wire,
    opener: Opener,
    /// Application data that came with the end of the handshake.
    early: BytesMut,
    /// Opened bytes at the front of the wire's in-buffer, and what follows them up to the next record.
    content: usize,
    rest: usize,
    ended: bool,
    closing: bool,
}

/// Opens: the configuration says who the peer must be.
pub(crate) async fn connect(
    socket: TcpStream,
    address: SocketAddr,
    config: Arc<ClientConfig>,
) -> Result<(Transport, Wire, Proof), HandshakeError> {
    let wire = Wire::new(socket);
    let failed = |error: &Error| HandshakeError::from_tls(error, &wire.first_bytes());
    let name = ServerName::IpAddress(address.ip().into());
    let mut connection = UnbufferedClientConnection::new(config, name).map_err(|error| failed(&error))?;
    let early = shake(&wire, |incoming| {
        let (discard, step) = step(connection.process_tls_records(incoming));
        (discard, step, connection.wants_write())
    })
    .await?;
    if connection.alpn_protocol() != Some(b"h2") {
        return Err(HandshakeError::NotHttp2);
    }
    let proof = Proof::new(connection.peer_certificates().unwrap_or_default());
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(|error| failed(&error))?;
    let schedule = Schedule::Client(Box::new(kernel));
    let transport = Transport::new(&wire, secrets, schedule, early).map_err(|error| failed(&error))?;
    Ok((transport, wire, proof))
}

/// Accepts: answers who the peer is, and what it proved it by.
pub(crate) async fn accept(
    socket: TcpStream,
    config: Arc<ServerConfig>,
    timeout: Duration,
) -> Result<(Transport, Wire, Identity, Proof), HandshakeError> {
    let wire = Wire::new(socket);
    let failed = |error: &Error| HandshakeError::from_tls(error, &wire.first_bytes());
    let mut connection = UnbufferedServerConnection::new(config).map_err(|error| failed(&error))?;
    let handshake = shake(&wire, |incoming| {
        let (discard, step) = step(connection.process_tls_records(incoming));
        (discard, step, connection.wants_write())
    });
    let early = match tokio::time::timeout(timeout, handshake).await {
        Ok(Ok(early)) => early,
        Ok(Err(error)) => {
            if !matches!(error, HandshakeError::Closed | HandshakeError::Io(_)) {
                wire.linger().await;
            }
            return Err(error);
        }
        Err(_elapsed) => return Err(HandshakeError::Timeout(timeout)),
    };
    let certificates = connection.peer_certificates().unwrap_or_default();
    let (peer, proof) = (peer_identity(certificates)?, Proof::new(certificates));
    let (secrets, kernel) = connection
        .dangerous_into_kernel_connection()
        .map_err(|error| failed(&error))?;
    let schedule = Schedule::Server(Box::new(kernel));
    let transport = Transport::new(&wire, secrets, schedule, early).map_err(|error| failed(&error))?;
    Ok((transport, wire, peer, proof))
}

/// What one step of a handshake wants next.
enum Step {
    Again,
    Send(Vec<u8>),
    /// Application data came.
    Early(Vec<u8>),
    Read,
    Done,
}

/// One step, and how many bytes of the input are used up.
fn step<Data>(status: UnbufferedStatus<'_, '_, Data>) -> (usize, Result<Step, Error>) {
    let UnbufferedStatus { discard, state } = status;
    let step = state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut data) => {
            let mut message = Vec::new();
            // The first answer is how much room it needs.
            if let Err(EncodeError::InsufficientSize(size)) = data.encode(&mut message) {
                message.resize(size.required_size, 0);
                data.encode(&mut message)
                    .map_err(|error| Error::General(error.to_string()))?;
            }
            Ok(Step::Send(message))
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Step::Again)
        }
        ConnectionState::ReadTraffic(mut traffic) => {
            let mut early = Vec::new();
            while let Some(record) = traffic.next_record() {
                early.extend_from_slice(record?.payload);
            }
            Ok(Step::Early(early))
        }
        ConnectionState::BlockedHandshake => Ok(Step::Read),
        ConnectionState::WriteTraffic(_) => Ok(Step::Done),
        _ => Err(Error::HandshakeNotComplete),
    });
    (discard, step)
}

/// Drives a handshake to its end; answers what application data came with it.
async fn shake(
    wire: &Wire,
    mut process: impl FnMut(&mut [u8]) -> (usize, Result<Step, Error>, bool),
) -> Result<BytesMut, HandshakeError> {
    let broken = |error: io::Error| HandshakeError::Io(Arc::new(error));
    let mut early = BytesMut::new();
    loop {
        let (left, step, mut has_more) = {
            let mut incoming = wire.incoming();
            let (discard, step, has_more) = process(&mut incoming);
            incoming.advance(discard);
            (incoming.len(), step, has_more)
        };
        match step {
            Ok(Step::Again) => {}
            Ok(Step::Send(message)) => wire.put(&message),
            Ok(Step::Early(bytes)) => early.extend_from_slice(&bytes),
            Ok(Step::Done) => {
                poll_fn(|cx| wire.poll_flush(cx)).await.map_err(broken)?;
                return Ok(early);
            }
            Ok(Step::Read) => {
                if left > LARGEST_FLIGHT {
                    return Err(HandshakeError::Tls(Error::PeerSentOversizedRecord));
                }
                poll_fn(|cx| wire.poll_flush(cx)).await.map_err(broken)?;
                if poll_fn(|cx| wire.poll_fill(cx)).await.map_err(broken)? == 0 {
                    return Err(HandshakeError::Closed);
                }
            }
            Err(error) => {
                // What is still to be sent ends with the alert that tells the peer why. rustls must not be asked for
                // more than that: it would look at the input again.
                while has_more {
                    let (_, step, more) = process(&mut wire.incoming());
                    if let Ok(Step::Send(message)) = step {
                        wire.put(&message);
                    }
                    has_more = more;
                }
                let _ = poll_fn(|cx| wire.poll_flush(cx)).await;
                return Err(HandshakeError::from_tls(&error, &wire.first_bytes()));
            }
        }
    }
}

impl Transport {
    fn new(wire: &Wire, secrets: ExtractedSecrets, schedule: Schedule, early: BytesMut) -> Result<Self, Error> {
        let sealer = Sealer::new(Key::new(secrets.tx.0, secrets.tx.1)?);
        let opener = Opener::new(Key::new(secrets.rx.0, secrets.rx.1)?);
        wire.seal_with(sealer, schedule);
        Ok(Self {
            wire: wire.clone(),
            opener,
            early,
            content: 0,
            rest: 0,
            ended: false,
            closing: false,
        })
    }

    /// Copies what is opened, record after record, without reading the socket.
    fn take(&mut self, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
        let mut incoming = self.wire.incoming();
        while buffer.remaining() > 0 && !self.ended {
            if self.content > 0 {
                let count = self.content.min(buffer.remaining());
                buffer.put_slice(&incoming[..count]);
                incoming.advance(count);
                self.content -= count;
            }
            if self.content > 0 {
                break;
            }
            incoming.advance(std::mem::take(&mut self.rest));
            match self.wire.open(&mut self.opener, &mut incoming)? {
                Opened::Partial => break,
                Opened::Content { length, rest } => {
                    incoming.advance(Opener::HEADER);
                    (self.content, self.rest) = (length, rest);
                }
                Opened::Nothing(length) | Opened::UpdateRequested(length) => incoming.advance(length),
                Opened::Closed => self.ended = true,
            }
        }
        if incoming.is_empty() {
            Wire::consumed(&mut incoming);
        }
        Ok(())
    }
}

impl AsyncRead for Transport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if !self.early.is_empty() {
            let count = self.early.len().min(buffer.remaining());
            buffer.put_slice(&self.early.split_to(count));
            return Poll::Ready(Ok(()));
        }
        loop {
            self.take(buffer)?;
            if buffer.filled().len() > before || self.ended || buffer.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            // An end without close_notify is one for h2 too: streams that had not ended are broken.
            if ready!(self.wire.poll_fill(cx))? == 0 {
                self.ended = true;
            }
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.wire.poll_write(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.wire.poll_write(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing: h2 flushes after every DATA frame, the tunnel's driver when h2 has nothing more to do.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.wire.poll_close(cx, &mut this.closing)
    }
}

#[cfg(test)]
mod tests {
    //! Against rustls' own record layer.

    use identity::{Authority as _, Clock, Credentials, LocalAuthority, generate_root};
    use model::TrustDomain;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };
    use tokio_rustls::TlsConnector;

    use crate::{config::TURN, wire::tests::turn};

    use super::*;

    type Peer = tokio_rustls::client::TlsStream<TcpStream>;

    /// Our server and a client of rustls.
    async fn pair() -> (Transport, Wire, Peer) {
        let domain = TrustDomain::default();
        let (certificate, key) = generate_root(&domain).unwrap();
        let authority = LocalAuthority::from_pem(&certificate, &key).unwrap();
        let identity: Identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
        let issued = authority.issue(&identity).await.unwrap();
        let credentials = Credentials::new(identity.clone(), &domain, issued, &Clock::system()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = async {
            let socket = TcpStream::connect(address).await.unwrap();
            let config = credentials.client_config(std::slice::from_ref(&identity));
            let name = ServerName::IpAddress(address.ip().into());
            TlsConnector::from(config).connect(name, socket).await.unwrap()
        };
        let server = async {
            let socket = listener.accept().await.unwrap().0;
            accept(socket, credentials.server_config(), Duration::from_secs(10))
                .await
                .unwrap()
        };
        let (client, (transport, wire, peer, _proof)) = tokio::join!(client, server);
        assert_eq!(peer, identity);
        (transport, wire, client)
    }

    async fn send(transport: &mut Transport, wire: &Wire, bytes: &[u8]) {
        transport.write_all(bytes).await.unwrap();
        poll_fn(|cx| wire.poll_flush(cx)).await.unwrap();
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|n| (n * 31 + n / 251) as u8).collect()
    }

    async fn exchange(transport: &mut Transport, wire: &Wire, peer: &mut Peer, length: usize) {
        let sent = pattern(length);
        let ours = async {
            send(transport, wire, &sent).await;
            let mut got = vec![0; length];
            transport.read_exact(&mut got).await.unwrap();
            assert!(got == sent);
        };
        let (mut reads, mut writes) = tokio::io::split(peer);
        let theirs_sent = async {
            writes.write_all(&sent).await.unwrap();
            writes.flush().await.unwrap();
        };
        let theirs_read = async {
            let mut got = vec![0; length];
            reads.read_exact(&mut got).await.unwrap();
            assert!(got == sent);
        };
        tokio::join!(ours, theirs_sent, theirs_read);
    }

    #[tokio::test]
    async fn records_of_all_lengths_are_those_of_rustls() {
        let (mut transport, wire, mut peer) = pair().await;
        for length in [1, 2, 100, 16383, 16384, 16385, 40_000, 3 << 20] {
            exchange(&mut transport, &wire, &mut peer, length).await;
        }
    }

    #[tokio::test]
    async fn keys_are_updated_by_each_side() {
        let (mut transport, wire, mut peer) = pair().await;
        for _ in 0..5 {
            // rustls asks for ours, too.
            peer.get_mut().1.refresh_traffic_keys().unwrap();
            exchange(&mut transport, &wire, &mut peer, 50_000).await;
        }
        wire.limit_key(2);
        for _ in 0..20 {
            exchange(&mut transport, &wire, &mut peer, 50_000).await;
        }
    }

    #[tokio::test]
    async fn one_poll_writes_no_more_than_a_turn() {
        let (mut transport, wire, mut peer) = pair().await;
        let sent = 2 << 20;
        let reading = tokio::spawn(async move {
            let mut got = vec![0; sent];
            peer.read_exact(&mut got).await.unwrap();
            got
        });
        let (content, mut written) = (pattern(sent), 0);
        while written < sent {
            let before = written;
            let awake = turn(&wire, |cx| {
                let piece = &content[written..sent.min(written + (16 << 10))];
                let polled = Pin::new(&mut transport).poll_write(cx, piece).map(Result::unwrap);
                polled.map(|count| written += count).is_ready() && written < sent
            });
            assert!(written - before <= TURN, "{}", written - before);
            assert!(awake || written == sent, "it would wait for ever");
            poll_fn(|cx| wire.poll_flush(cx)).await.unwrap();
        }
        assert!(reading.await.unwrap() == content);
    }

    #[tokio::test]
    async fn a_close_is_told_each_way() {
        let (mut transport, _wire, mut peer) = pair().await;
        transport.shutdown().await.unwrap();
        // Not `UnexpectedEof`, which rustls says when there was no close_notify.
        assert_eq!(peer.read(&mut [0]).await.unwrap(), 0);
        peer.shutdown().await.unwrap();
        assert_eq!(transport.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn what_is_no_record_is_an_error() {
        for bytes in [
            &b"GET / HTTP/1.1\r\n\r\n"[..],
            &[23, 3, 3, 0, 0],
            &[23, 3, 3, 0xff, 0xff],
            &[
                23, 3, 3, 0, 17, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17,
            ],
            &[20, 3, 3, 0, 1, 1],
            &[21, 3, 3, 0, 2, 1, 0],
        ] {
            let (mut transport, wire, mut peer) = pair().await;
            peer.get_mut().0.write_all(bytes).await.unwrap();
            let error = transport.read(&mut [0; 10]).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{bytes:?}");
            assert!(wire.take_tls_error().is_some());
        }
    }
}
