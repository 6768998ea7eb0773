//! Copies plain TCP both ways.
//!
//! ```text
//!         ┌── read into the thread's scratch buffer ──► write ──┐
//!  client │   (the writer blocks: the rest waits in a spill,    │ server      and the same the other way
//!         └──  nothing is read until it is written)             ┘
//!   EOF ─► shutdown(write) of the other      reset ─► reset of both
//! ```
//! Nothing is held while a connection is idle: the buffer is the thread's, and a spill lives only while a writer blocks
//! (`a_reader_that_does_not_read_holds_the_writer_back`). Half-close passes in each direction
//! (`half_close_passes_both_ways`), a reset as a reset (`a_reset_passes_as_a_reset`).
//!
//! One poll copies about [`TURN`] each way (`one_poll_copies_no_more_than_a_turn`).
//!
//! Deliberately unknown here: who the two ends are and whether they may talk.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::Shutdown,
    pin::Pin,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use hbone::Live;

use crate::{failure::Failure, socket::ResetOnDrop};

/// The smallest and the first read; doubled while reads come full, so that a chatty connection stays in the cache.
const FIRST_READ: usize = 16 * 1024;
/// The largest read.
const LARGEST_READ: usize = 128 * 1024;
/// Bytes one poll moves each way before the shard's other tasks get their turn: about as long as a turn of a pod
/// ([`tasks::fair::TURN`]).
const TURN: usize = 128 * 1024;

thread_local! {
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; LARGEST_READ].into_boxed_slice());
}

/// One of the two ends of a relay.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    /// Who dialled.
    Client,
    /// Who was dialled.
    Server,
}

/// How a relay ended other than by both ends closing.
#[derive(Debug)]
pub(crate) enum RelayError {
    /// This end reset the connection.
    Reset(End),
    /// This end's socket failed.
    Io(End, io::Error),
    /// It was told to stop.
    Cut,
}

/// A relay under way; resolves to what went wrong, if anything did. On the heap, and no larger than it needs: there are
/// thousands of them.
pub(crate) type Relaying = Pin<Box<dyn Future<Output = Option<Failure>>>>;

/// Joins two plain connections. Both have TCP_NODELAY.
pub(crate) fn relay_plain(client: TcpStream, server: TcpStream, live: Live) -> Relaying {
    Box::pin(async move { relay(client, server, &live).await.err().and_then(Failure::of_relay) })
}

/// Copies until both ends have closed, one of them fails, or `live` is cut. Any end but the first resets both. What
/// moves is counted in `live`: the client's bytes as those to the peer.
async fn relay(client: TcpStream, server: TcpStream, live: &Live) -> Result<(), RelayError> {
    let (mut client, mut server) = (ResetOnDrop::new(client), ResetOnDrop::new(server));
    let mut up = Half::new();
    let mut down = Half::new();
    let outcome = poll_fn(|cx| {
        if live.poll_cut(cx).is_ready() {
            return Poll::Ready(Err(RelayError::Cut));
        }
        let went_up = up.poll(&mut client, &mut server, cx);
        let went_down = down.poll(&mut server, &mut client, cx);
        live.count(std::mem::take(&mut up.bytes), std::mem::take(&mut down.bytes));
        let up = went_up.map_err(|failed| failed.of(End::Client, End::Server))?;
        let down = went_down.map_err(|failed| failed.of(End::Server, End::Client))?;
        match (up, down) {
            (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
            _ => Poll::Pending,
        }
    })
    .await;
    if outcome.is_ok() {
        drop((client.keep(), server.keep()));
    }
    outcome
}

/// One direction.
struct Half {
    /// Read since they were last counted.
    bytes: u64,
    read_size: usize,
    /// What was read and could not be written yet, from `spilled` on. Empty but while the writer blocks.
    spill: Vec<u8>,
    spilled: usize,
    ended: bool,
}

enum Failed {
    Reading(io::Error),
    Writing(io::Error),
}

impl Failed {
    fn of(self, reader: End, writer: End) -> RelayError {
        let (end, error) = match self {
            Self::Reading(error) => (reader, error),
            Self::Writing(error) => (writer, error),
        };
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected => {
                RelayError::Reset(end)
            }
            _ => RelayError::Io(end, error),
        }
    }
}

impl Half {
    fn new() -> Self {
        Self {
            bytes: 0,
            read_size: FIRST_READ,
            spill: Vec::new(),
            spilled: 0,
            ended: false,
        }
    }

    fn poll(&mut self, from: &mut TcpStream, to: &mut TcpStream, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        let mut moved = 0;
        while !self.ended {
            ready!(self.poll_spill(to, cx)).map_err(Failed::Writing)?;
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            moved += ready!(SCRATCH.with_borrow_mut(|scratch| self.poll_copy(from, to, scratch, cx)))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what waits; ready when nothing does.
    fn poll_spill(&mut self, to: &mut TcpStream, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.spilled < self.spill.len() {
            let written = ready!(Pin::new(&mut *to).poll_write(cx, &self.spill[self.spilled..]))?;
            self.spilled += written;
        }
        if !self.spill.is_empty() {
            self.spill = Vec::new();
            self.spilled = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// One read and one write; what the writer does not take becomes the spill.
    fn poll_copy(
        &mut self,
        from: &mut TcpStream,
        to: &mut TcpStream,
        scratch: &mut [u8],
        cx: &mut Context<'_>,
    ) -> Poll<Result<usize, Failed>> {
        let mut buffer = ReadBuf::new(&mut scratch[..self.read_size]);
        ready!(Pin::new(from).poll_read(cx, &mut buffer)).map_err(Failed::Reading)?;
        let read = buffer.filled();
        if read.is_empty() {
            self.ended = true;
            SockRef::from(&*to).shutdown(Shutdown::Write).map_err(Failed::Writing)?;
            return Poll::Ready(Ok(0));
        }
        self.bytes += read.len() as u64;
        self.read_size = if read.len() == self.read_size {
            (self.read_size * 2).min(LARGEST_READ)
        } else if read.len() < self.read_size / 4 {
            (self.read_size / 2).max(FIRST_READ)
        } else {
            self.read_size
        };
        let written = match Pin::new(to).poll_write(cx, read) {
            Poll::Ready(written) => written.map_err(Failed::Writing)?,
            Poll::Pending => 0,
        };
        if written < read.len() {
            self.spill = read[written..].to_vec();
        }
        Poll::Ready(Ok(read.len()))
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
        task::{JoinHandle, spawn_local},
    };

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (dialled, listener.accept().await.unwrap().0)
    }

    /// A client and a server with a relay between them.
    async fn joined() -> (TcpStream, TcpStream, JoinHandle<Result<(), RelayError>>, Live) {
        let ((client, from_client), (to_server, server)) = (pair().await, pair().await);
        let live = Live::default();
        let watched = live.clone();
        let relayed = spawn_local(async move { relay(from_client, to_server, &watched).await });
        (client, server, relayed, live)
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count)
            .map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8)
            .collect()
    }

    #[tokio::test(flavor = "local")]
    async fn everything_arrives_both_ways_at_once() {
        let (client, server, relayed, live) = joined().await;
        let sent = bytes(20_000_000);
        let both = |socket: TcpStream, sent: Vec<u8>| async move {
            let (mut reader, mut writer) = socket.into_split();
            let writing = spawn_local(async move {
                writer.write_all(&sent).await.unwrap();
                writer.shutdown().await.unwrap();
            });
            let mut received = Vec::new();
            reader.read_to_end(&mut received).await.unwrap();
            writing.await.unwrap();
            received
        };
        let (at_client, at_server) = tokio::join!(both(client, sent.clone()), both(server, sent.clone()));
        assert!(at_client == sent && at_server == sent);
        assert!(relayed.await.unwrap().is_ok());
        assert_eq!((live.to_peer(), live.from_peer()), (20_000_000, 20_000_000));
    }

    #[tokio::test(flavor = "local")]
    async fn one_poll_copies_no_more_than_a_turn() {
        let ((mut client, mut from_client), (mut to_server, mut server)) = (pair().await, pair().await);
        SockRef::from(&from_client).set_recv_buffer_size(4 * TURN).unwrap();
        SockRef::from(&to_server).set_send_buffer_size(4 * TURN).unwrap();
        let writing = spawn_local(async move { client.write_all(&bytes(4 * TURN)).await });
        let mut peeked = vec![0; TURN];
        while from_client.peek(&mut peeked).await.unwrap() < TURN {
            tokio::task::yield_now().await;
        }
        let mut half = Half::new();
        let polled = half.poll(
            &mut from_client,
            &mut to_server,
            &mut Context::from_waker(Waker::noop()),
        );
        assert!(polled.is_pending());
        let copied = half.bytes as usize;
        assert!((TURN..TURN + LARGEST_READ).contains(&copied), "{copied}");
        // It is awake for the next turns: nobody else polls it.
        let copying = poll_fn(|cx| half.poll(&mut from_client, &mut to_server, cx));
        let mut got = vec![0; 4 * TURN];
        let (copied, read) = tokio::join!(copying, server.read_exact(&mut got));
        assert!(copied.is_ok() && read.is_ok() && got == bytes(4 * TURN));
        writing.await.unwrap().unwrap();
    }

    #[tokio::test(flavor = "local")]
    async fn half_close_passes_both_ways() {
        for client_first in [true, false] {
            let (client, server, relayed, _) = joined().await;
            let (mut one, mut other) = if client_first {
                (client, server)
            } else {
                (server, client)
            };
            one.write_all(b"all I have").await.unwrap();
            one.shutdown().await.unwrap();
            let mut received = Vec::new();
            other.read_to_end(&mut received).await.unwrap();
            assert_eq!(received, b"all I have");
            other.write_all(b"an answer").await.unwrap();
            other.shutdown().await.unwrap();
            received.clear();
            one.read_to_end(&mut received).await.unwrap();
            assert_eq!(received, b"an answer");
            assert!(relayed.await.unwrap().is_ok());
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_reset_passes_as_a_reset() {
        for client_resets in [true, false] {
            let (client, server, relayed, _) = joined().await;
            let (one, mut other) = if client_resets {
                (client, server)
            } else {
                (server, client)
            };
            one.set_zero_linger().unwrap();
            drop(one);
            let error = other.read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            let expected = if client_resets { End::Client } else { End::Server };
            assert!(matches!(relayed.await.unwrap(), Err(RelayError::Reset(end)) if end == expected));
        }
    }

    #[tokio::test(flavor = "local")]
    async fn a_reader_that_does_not_read_holds_the_writer_back() {
        let (client, mut server, relayed, _) = joined().await;
        // Until the kernel's buffers are full and the relay holds what it read.
        let mut sent = 0;
        let chunk = vec![7; 1 << 20];
        let mut quiet = 0;
        while quiet < 1000 {
            match client.try_write(&chunk) {
                Ok(count) => {
                    sent += count;
                    quiet = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => quiet += 1,
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
        assert!(sent < 64 << 20, "{sent} bytes were taken though nobody reads");
        drop(client);
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        assert_eq!(received.len(), sent);
        drop(server);
        assert!(relayed.await.unwrap().is_ok());
    }

    #[tokio::test(flavor = "local")]
    async fn told_to_stop_it_resets_both() {
        let (mut client, mut server, relayed, live) = joined().await;
        client.write_all(b"x").await.unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'x');
        live.cut();
        assert!(matches!(relayed.await.unwrap(), Err(RelayError::Cut)));
        for socket in [&mut client, &mut server] {
            let error = socket.read_to_end(&mut Vec::new()).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
    }
}
