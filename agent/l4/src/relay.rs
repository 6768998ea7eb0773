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
//! (`half_close_passes_both_ways`), a reset as a reset (`a_reset_passes_as_a_reset`), also while the other end does not read
//! (`a_reset_is_seen_while_the_other_end_does_not_read`). Who closed before it reset has said all that it had to say, and that
//! is passed on (`the_last_words_of_who_is_gone_arrive`).
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
    io::{Interest, Ready},
    net::TcpStream,
};

use hbone::{Live, ThrownAway};

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

/// Copies until both ends have closed, one of them fails, or `live` is cut. Where not both have said all, both are reset.
/// What moves is counted in `live`: the client's bytes as those to the peer.
async fn relay(client: TcpStream, server: TcpStream, live: &Live) -> Result<(), RelayError> {
    let (client, server) = (ResetOnDrop::new(client), ResetOnDrop::new(server));
    let (outcome, finished) = {
        let mut up = Half::new(&client, &server);
        let mut down = Half::new(&server, &client);
        let outcome = poll_fn(|cx| {
            if live.poll_cut(cx).is_ready() {
                return Poll::Ready(Err(RelayError::Cut));
            }
            let went_up = up.poll(down.ended, cx);
            let went_down = down.poll(up.ended, cx);
            live.count(std::mem::take(&mut up.bytes), std::mem::take(&mut down.bytes));
            let went_up = went_up.map_err(|failed| failed.of(End::Client, End::Server))?;
            let went_down = went_down.map_err(|failed| failed.of(End::Server, End::Client))?;
            match (went_up, went_down) {
                (Poll::Ready(()), Poll::Ready(())) if up.gone => Poll::Ready(Err(RelayError::Reset(End::Server))),
                (Poll::Ready(()), Poll::Ready(())) if down.gone => Poll::Ready(Err(RelayError::Reset(End::Client))),
                (Poll::Ready(()), Poll::Ready(())) => Poll::Ready(Ok(())),
                _ => Poll::Pending,
            }
        })
        .await;
        (outcome, up.ended && down.ended)
    };
    if finished {
        // A reset would take back what the kernel still has to send.
        drop((client.keep(), server.keep()));
    }
    outcome
}

/// One direction.
struct Half<'s> {
    from: &'s TcpStream,
    to: &'s TcpStream,
    /// Read since they were last counted.
    bytes: u64,
    read_size: usize,
    /// What was read and could not be written yet, from `spilled` on. Empty but while the writer blocks.
    spill: Vec<u8>,
    spilled: usize,
    ended: bool,
    /// Who is written to has closed, and reset what came for it later.
    gone: bool,
    thrown_away: ThrownAway,
    /// Tells of a reset of the end that is not read, while the other blocks.
    watch: Watch<'s>,
}

enum Watch<'s> {
    /// It was not needed yet.
    Not,
    Under(Pin<Box<dyn Future<Output = io::Result<Ready>> + 's>>),
    /// It has told what there is to tell.
    Over,
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

impl<'s> Half<'s> {
    fn new(from: &'s TcpStream, to: &'s TcpStream) -> Self {
        Self {
            from,
            to,
            bytes: 0,
            read_size: FIRST_READ,
            spill: Vec::new(),
            spilled: 0,
            ended: false,
            gone: false,
            thrown_away: ThrownAway::default(),
            watch: Watch::Not,
        }
    }

    /// `answered`: the other direction has ended.
    fn poll(&mut self, answered: bool, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        let mut moved = 0;
        while !self.ended {
            match self.poll_spill(cx) {
                Poll::Ready(written) => written.or_else(|error| self.note(error))?,
                Poll::Pending => return self.poll_watch(cx),
            }
            if moved >= TURN {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            moved += ready!(SCRATCH.with_borrow_mut(|scratch| self.poll_copy(answered, scratch, cx)))?;
        }
        Poll::Ready(Ok(()))
    }

    /// A failure to write. EPIPE is of a socket whose other end closed before it reset: all that it said is there to be
    /// passed on, though nothing more can be said to it.
    fn note(&mut self, error: io::Error) -> Result<(), Failed> {
        if !matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::NotConnected) {
            return Err(Failed::Writing(error));
        }
        self.gone = true;
        self.spill = Vec::new();
        self.spilled = 0;
        Ok(())
    }

    fn poll_watch(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failed>> {
        if matches!(self.watch, Watch::Not) {
            self.watch = Watch::Under(Box::pin(self.from.ready(Interest::ERROR)));
        }
        let Watch::Under(watch) = &mut self.watch else {
            return Poll::Pending;
        };
        let _ = ready!(watch.as_mut().poll(cx));
        self.watch = Watch::Over;
        match self.from.take_error() {
            // What it said before is complete.
            Ok(Some(error)) if error.kind() != io::ErrorKind::BrokenPipe => Poll::Ready(Err(Failed::Reading(error))),
            _ => Poll::Pending,
        }
    }

    /// Writes what waits; ready when nothing does.
    fn poll_spill(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.spilled < self.spill.len() {
            let written = ready!(poll_write(self.to, &self.spill[self.spilled..], cx))?;
            self.spilled += written;
        }
        if !self.spill.is_empty() {
            self.spill = Vec::new();
            self.spilled = 0;
        }
        Poll::Ready(Ok(()))
    }

    /// One read and one write; what the writer does not take becomes the spill.
    fn poll_copy(&mut self, answered: bool, scratch: &mut [u8], cx: &mut Context<'_>) -> Poll<Result<usize, Failed>> {
        let count = ready!(poll_read(self.from, &mut scratch[..self.read_size], cx)).map_err(Failed::Reading)?;
        let read = &scratch[..count];
        if count == 0 {
            self.ended = true;
            if !self.gone {
                let ended = SockRef::from(self.to).shutdown(Shutdown::Write);
                ended.or_else(|error| self.note(error))?;
            }
            return Poll::Ready(Ok(0));
        }
        if self.gone {
            return match self.thrown_away.is_too_much(count, answered) {
                true => Poll::Ready(Err(Failed::Writing(io::ErrorKind::BrokenPipe.into()))),
                false => Poll::Ready(Ok(count)),
            };
        }
        self.bytes += count as u64;
        self.read_size = if count == self.read_size {
            (self.read_size * 2).min(LARGEST_READ)
        } else if count < self.read_size / 4 {
            (self.read_size / 2).max(FIRST_READ)
        } else {
            self.read_size
        };
        match poll_write(self.to, read, cx) {
            Poll::Ready(Ok(written)) if written == count => {}
            Poll::Ready(Ok(written)) => self.spill = read[written..].to_vec(),
            Poll::Ready(Err(error)) => self.note(error)?,
            Poll::Pending => self.spill = read.to_vec(),
        }
        Poll::Ready(Ok(count))
    }
}

/// Reads once. Where that shows that the socket holds no more, tokio is told so: the next wait then needs no read that
/// fails.
fn poll_read(socket: &TcpStream, into: &mut [u8], cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_read_ready(cx))?;
        let mut read = Err(io::ErrorKind::WouldBlock.into());
        let _ = socket.try_io(Interest::READABLE, || {
            read = socket.try_read(into);
            match &read {
                Ok(count) if *count > 0 && *count < into.len() => Err(io::ErrorKind::WouldBlock.into()),
                _ => Ok(()),
            }
        });
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            read => return Poll::Ready(read),
        }
    }
}

fn poll_write(socket: &TcpStream, bytes: &[u8], cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
    loop {
        ready!(socket.poll_write_ready(cx))?;
        match socket.try_write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            written => return Poll::Ready(written),
        }
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
        let ((mut client, from_client), (to_server, mut server)) = (pair().await, pair().await);
        SockRef::from(&from_client).set_recv_buffer_size(4 * TURN).unwrap();
        SockRef::from(&to_server).set_send_buffer_size(4 * TURN).unwrap();
        let writing = spawn_local(async move { client.write_all(&bytes(4 * TURN)).await });
        let mut peeked = vec![0; TURN];
        while from_client.peek(&mut peeked).await.unwrap() < TURN {
            tokio::task::yield_now().await;
        }
        let mut half = Half::new(&from_client, &to_server);
        let polled = half.poll(false, &mut Context::from_waker(Waker::noop()));
        assert!(polled.is_pending());
        let copied = half.bytes as usize;
        assert!((TURN..TURN + LARGEST_READ).contains(&copied), "{copied}");
        // It is awake for the next turns: nobody else polls it.
        let copying = poll_fn(|cx| half.poll(false, cx));
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

    /// Writes until the kernel's buffers are full and the relay holds what it read; how much that was.
    async fn fill(socket: &TcpStream) -> usize {
        let (chunk, mut sent, mut quiet) = (vec![7; 1 << 20], 0, 0);
        while quiet < 1000 {
            match socket.try_write(&chunk) {
                Ok(count) => {
                    sent += count;
                    quiet = 0;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => quiet += 1,
                Err(error) => panic!("{error}"),
            }
            tokio::task::yield_now().await;
        }
        sent
    }

    #[tokio::test(flavor = "local")]
    async fn a_reader_that_does_not_read_holds_the_writer_back() {
        let (client, mut server, relayed, _) = joined().await;
        let sent = fill(&client).await;
        assert!(sent < 64 << 20, "{sent} bytes were taken though nobody reads");
        drop(client);
        let mut received = Vec::new();
        server.read_to_end(&mut received).await.unwrap();
        assert_eq!(received.len(), sent);
        drop(server);
        assert!(relayed.await.unwrap().is_ok());
    }

    #[tokio::test(flavor = "local")]
    async fn a_reset_is_seen_while_the_other_end_does_not_read() {
        let (client, server, relayed, _) = joined().await;
        fill(&client).await;
        client.set_zero_linger().unwrap();
        drop(client);
        assert!(matches!(relayed.await.unwrap(), Err(RelayError::Reset(End::Client))));
        drop(server);
    }

    /// A server that answers, closes, and does not care for what comes after; the client reads when all of that is over.
    #[tokio::test(flavor = "local")]
    async fn the_last_words_of_who_is_gone_arrive() {
        for more in [&b""[..], b"more", &[7; 1 << 20]] {
            let (mut client, mut server, relayed, _) = joined().await;
            SockRef::from(&server).set_send_buffer_size(1 << 16).unwrap();
            let answered = fill(&server).await;
            let mut received = vec![0; 1 << 20];
            client.read_exact(&mut received).await.unwrap();
            // Makes room for what the server's kernel still has, which a reset would take back.
            for _ in 0..1000 {
                tokio::task::yield_now().await;
            }
            server.shutdown().await.unwrap();
            drop(server);
            client.write_all(more).await.unwrap();
            client.write_all(more).await.unwrap();
            client.read_to_end(&mut received).await.unwrap();
            assert_eq!(received.len(), answered, "{}", more.len());
            drop(client);
            assert_eq!(relayed.await.unwrap().is_ok(), more.is_empty());
        }
    }

    #[tokio::test(flavor = "local")]
    async fn who_goes_on_sending_to_who_is_gone_is_told() {
        let (mut client, mut server, relayed, _) = joined().await;
        server.write_all(b"enough").await.unwrap();
        server.shutdown().await.unwrap();
        drop(server);
        let mut received = Vec::new();
        client.read_to_end(&mut received).await.unwrap();
        assert_eq!(received, b"enough");
        let chunk = vec![7; 1 << 20];
        let error = loop {
            if let Err(error) = client.write_all(&chunk).await {
                break error;
            }
        };
        assert!(matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ));
        assert!(matches!(relayed.await.unwrap(), Err(RelayError::Reset(End::Server))));
    }

    /// As one that sends events now and then, and notices a client that is gone by that alone.
    #[tokio::test(flavor = "local")]
    async fn who_says_little_to_who_is_gone_is_told_after_a_while() {
        let (client, mut server, relayed, _) = joined().await;
        drop(client);
        assert_eq!(server.read(&mut [0]).await.unwrap(), 0);
        tokio::time::pause();
        let error = loop {
            if let Err(error) = server.write_all(b"event").await {
                break error;
            }
            tokio::time::advance(ThrownAway::TIME / 2).await;
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        assert!(matches!(
            error.kind(),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
        ));
        assert!(matches!(relayed.await.unwrap(), Err(RelayError::Reset(End::Client))));
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
