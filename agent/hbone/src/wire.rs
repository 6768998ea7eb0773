//! The tunnel's TCP socket and its two buffers: few large reads, few large writes.
//!
//! ```text
//!  h2 ── Transport ── Wire ── socket     reads:  up to 128 KiB at once, into a buffer lent by the thread
//!                                        writes: gathered, sent by `Flush` after each turn of the tunnel's task
//! ```
//! Buffers are the thread's, lent to a wire while bytes wait in it.
//!
//! One poll of the tunnel's task reads no more than [`TURN`], and writes no more: then it waits, awake, for the next
//! (`one_poll_reads_no_more_than_a_turn`, `one_poll_writes_no_more_than_a_turn`).

use std::{
    cell::{Cell, RefCell, RefMut},
    io::{self, IoSlice},
    net::Shutdown,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::{
    config::TURN,
    record::{Opened, Opener, Schedule, Sealer},
    relay::read_some,
};

/// What one read of the socket takes at most, and what is gathered before a write does not wait for the flush.
const LARGEST: usize = TURN;
/// Enough to tell HTTP from TLS.
const FIRST_BYTES: usize = 8;

/// Drives out what was gathered, and counts what came in.
pub(crate) trait Flush {
    /// A poll of the tunnel's task begins: it may read and write for one turn.
    fn begin_turn(&self);
    /// Ready once everything is with the kernel.
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
    /// Bytes that the peer has sent so far.
    fn received(&self) -> u64;
    /// What TLS failed with.
    fn take_tls_error(&self) -> Option<rustls::Error>;
}

/// The socket, its buffers, and the key that seals what is sent. Shared by h2's transport and the tunnel's driver.
#[derive(Clone)]
pub(crate) struct Wire(Rc<WireState>);

struct WireState {
    socket: TcpStream,
    incoming: RefCell<BytesMut>,
    outgoing: RefCell<BytesMut>,
    /// There once the handshake is over.
    sealing: RefCell<Option<(Sealer, Schedule)>>,
    received: Cell<u64>,
    /// None before the first turn: a handshake is bounded by its size.
    turn: Cell<Option<Turn>>,
    first_bytes: Cell<[u8; FIRST_BYTES]>,
    tls_error: RefCell<Option<rustls::Error>>,
}

/// Bytes of this poll of the tunnel's task.
#[derive(Clone, Copy, Default)]
struct Turn {
    read: usize,
    written: usize,
}

thread_local! {
    /// Buffers of this thread that no tunnel has bytes waiting in: one each for reading and writing is enough unless
    /// sockets block. Kept, since giving memory of this size back to the kernel and faulting it in again costs as much
    /// as the encryption.
    static LENT: RefCell<Vec<BytesMut>> = const { RefCell::new(Vec::new()) };
}

/// How many are kept.
const MOST_LENT: usize = 2;

/// An empty buffer with room for [`LARGEST`].
fn lend() -> BytesMut {
    let mut buffer = LENT.with_borrow_mut(Vec::pop).unwrap_or_default();
    // What a partial read has cut off its front is there again.
    buffer.clear();
    if !buffer.try_reclaim(LARGEST) {
        buffer = BytesMut::with_capacity(2 * LARGEST);
    }
    buffer
}

fn give_back(buffer: &mut BytesMut) {
    let buffer = std::mem::take(buffer);
    if buffer.capacity() > 0 {
        LENT.with_borrow_mut(|lent| {
            if lent.len() < MOST_LENT {
                lent.push(buffer);
            }
        });
    }
}

impl Wire {
    pub(crate) fn new(socket: TcpStream) -> Self {
        // An error here shows at the first read, too.
        let _ = socket.set_nodelay(true);
        Self(Rc::new(WireState {
            socket,
            incoming: RefCell::default(),
            outgoing: RefCell::default(),
            sealing: RefCell::default(),
            received: Cell::new(0),
            turn: Cell::default(),
            first_bytes: Cell::default(),
            tls_error: RefCell::default(),
        }))
    }

    /// From now on what is written is sealed.
    pub(crate) fn seal_with(&self, sealer: Sealer, schedule: Schedule) {
        self.0.sealing.replace(Some((sealer, schedule)));
    }

    /// Updates the key after so many records.
    #[cfg(test)]
    pub(crate) fn limit_key(&self, records: u64) {
        if let Some((sealer, _)) = &mut *self.0.sealing.borrow_mut() {
            sealer.limit = records;
        }
    }

    /// The first bytes that the peer sent.
    pub(crate) fn first_bytes(&self) -> [u8; FIRST_BYTES] {
        self.0.first_bytes.get()
    }

    /// What was read and not consumed.
    pub(crate) fn incoming(&self) -> RefMut<'_, BytesMut> {
        self.0.incoming.borrow_mut()
    }

    /// Gives the in-buffer back to the thread; it must be empty.
    pub(crate) fn consumed(incoming: &mut BytesMut) {
        give_back(incoming);
    }

    /// Opens the record at the front of the in-buffer, and answers a request for a new key.
    pub(crate) fn open(&self, opener: &mut Opener, incoming: &mut BytesMut) -> io::Result<Opened> {
        let mut sealing = self.0.sealing.borrow_mut();
        let Some((sealer, schedule)) = &mut *sealing else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        let opened = opener.open(incoming, schedule);
        let opened = match opened {
            Ok(Opened::UpdateRequested(_)) => sealer.update(schedule, &mut self.outgoing()).and(opened),
            opened => opened,
        };
        opened.map_err(|error| self.failed(error))
    }

    /// Gathers plaintext, as it is, before there is a key.
    pub(crate) fn put(&self, bytes: &[u8]) {
        self.outgoing().extend_from_slice(bytes);
    }

    /// Gathers what is to be sealed; waits while too much is gathered already, and for the next turn.
    pub(crate) fn poll_write(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx, |turn| turn.written));
        if self.0.outgoing.borrow().len() >= LARGEST {
            ready!(self.poll_flush(cx))?;
        }
        let mut sealing = self.0.sealing.borrow_mut();
        let Some((sealer, _)) = &mut *sealing else {
            return Poll::Ready(Err(io::ErrorKind::NotConnected.into()));
        };
        let mut outgoing = self.outgoing();
        let mut written = 0;
        for slice in slices {
            sealer.write(slice, &mut outgoing).map_err(|error| self.failed(error))?;
            written += slice.len();
        }
        self.0.spend(|turn| turn.written += written);
        Poll::Ready(Ok(written))
    }

    /// Tells the peer that nothing more comes, sends all, and closes this direction.
    pub(crate) fn poll_close(&self, cx: &mut Context<'_>, told: &mut bool) -> Poll<io::Result<()>> {
        if !std::mem::replace(told, true)
            && let Some((sealer, _)) = &mut *self.0.sealing.borrow_mut()
        {
            sealer.close(&mut self.outgoing()).map_err(|error| self.failed(error))?;
        }
        ready!(self.poll_flush(cx))?;
        match SockRef::from(&self.0.socket).shutdown(Shutdown::Write) {
            // The peer was faster.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }

    /// Pending, and woken at once, when this turn's bytes are used up.
    fn poll_turn(&self, cx: &Context<'_>, used: impl Fn(Turn) -> usize) -> Poll<()> {
        if self.0.turn.get().map_or(0, used) < TURN {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn outgoing(&self) -> RefMut<'_, BytesMut> {
        let mut outgoing = self.0.outgoing.borrow_mut();
        if outgoing.capacity() == 0 {
            *outgoing = lend();
        }
        outgoing
    }

    fn failed(&self, error: rustls::Error) -> io::Error {
        self.0.tls_error.replace(Some(error.clone()));
        io::Error::new(io::ErrorKind::InvalidData, error)
    }

    /// Lets the peer read what was sent last, such as an alert, before the socket is closed with bytes unread: closing
    /// at once would be a reset, which discards it.
    pub(crate) async fn linger(&self) {
        const PATIENCE: std::time::Duration = std::time::Duration::from_millis(500);
        const MOST_BYTES: usize = 64 << 10;
        let socket = &self.0.socket;
        let discard = async {
            std::future::poll_fn(|cx| self.poll_flush(cx)).await?;
            SockRef::from(socket).shutdown(Shutdown::Write)?;
            let mut scrap = BytesMut::with_capacity(4 << 10);
            let mut discarded = 0;
            while discarded < MOST_BYTES {
                socket.readable().await?;
                scrap.clear();
                match socket.try_read_buf(&mut scrap) {
                    Ok(0) => break,
                    Ok(count) => discarded += count,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        };
        let _: Result<io::Result<()>, _> = tokio::time::timeout(PATIENCE, discard).await;
    }

    /// Reads more behind what is in the in-buffer, if not in the next turn; ready with 0 at the end.
    pub(crate) fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let state = &*self.0;
        ready!(self.poll_turn(cx, |turn| turn.read));
        loop {
            if state.socket.poll_read_ready(cx)?.is_pending() {
                shrink(&mut state.incoming.borrow_mut());
                return Poll::Pending;
            }
            let mut incoming = state.incoming.borrow_mut();
            if !incoming.try_reclaim(LARGEST) {
                let mut larger = lend();
                larger.extend_from_slice(&incoming);
                *incoming = larger;
            }
            match read_some(&state.socket, &mut incoming, LARGEST) {
                Ok(count) => {
                    state.count(&incoming, count);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl WireState {
    fn spend(&self, what: impl FnOnce(&mut Turn)) {
        if let Some(mut turn) = self.turn.get() {
            what(&mut turn);
            self.turn.set(Some(turn));
        }
    }

    fn count(&self, incoming: &[u8], count: usize) {
        self.spend(|turn| turn.read += count);
        let before = self.received.get();
        if before == 0 {
            let mut first = [0; FIRST_BYTES];
            let length = incoming.len().min(FIRST_BYTES);
            first[..length].copy_from_slice(&incoming[..length]);
            self.first_bytes.set(first);
        }
        self.received.set(before + count as u64);
    }

    /// Seals what is gathered.
    fn seal(&self, outgoing: &mut BytesMut) -> Result<(), rustls::Error> {
        if let Some((sealer, schedule)) = &mut *self.sealing.borrow_mut()
            && sealer.finish(outgoing)?
        {
            sealer.update(schedule, outgoing)?;
        }
        Ok(())
    }
}

/// Keeps a part of a record in a buffer of its size, until the rest comes.
fn shrink(incoming: &mut BytesMut) {
    if incoming.capacity() > 2 * incoming.len() {
        let mut whole = std::mem::take(incoming);
        if !whole.is_empty() {
            *incoming = BytesMut::from(&whole[..]);
        }
        give_back(&mut whole);
    }
}

impl Flush for Wire {
    fn begin_turn(&self) {
        self.0.turn.set(Some(Turn::default()));
    }

    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let state = &*self.0;
        let mut outgoing = state.outgoing.borrow_mut();
        state.seal(&mut outgoing).map_err(|error| self.failed(error))?;
        while outgoing.has_remaining() {
            match state.socket.try_write(&outgoing) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => outgoing.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(state.socket.poll_write_ready(cx))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        give_back(&mut outgoing);
        Poll::Ready(Ok(()))
    }

    fn received(&self) -> u64 {
        self.0.received.get()
    }

    fn take_tls_error(&self) -> Option<rustls::Error> {
        self.0.tls_error.take()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        future::poll_fn,
        sync::{
            Arc,
            atomic::{AtomicBool, Ordering::Relaxed},
        },
        task::Wake,
    };

    use tokio::{io::AsyncWriteExt, net::TcpListener};

    use super::*;

    /// Whether it was woken.
    #[derive(Default)]
    pub(crate) struct Woken(AtomicBool);

    impl Woken {
        pub(crate) fn is_set(&self) -> bool {
            self.0.load(Relaxed)
        }
    }

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.store(true, Relaxed);
        }
    }

    /// One turn of a tunnel's task: polls for as long as it is told to go on. Whether it is awake for the next.
    pub(crate) fn turn(wire: &Wire, mut poll: impl FnMut(&mut Context<'_>) -> bool) -> bool {
        let woken = Arc::new(Woken::default());
        let waker = woken.clone().into();
        wire.begin_turn();
        while poll(&mut Context::from_waker(&waker)) {}
        woken.is_set()
    }

    #[tokio::test]
    async fn one_poll_reads_no_more_than_a_turn() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let socket = listener.accept().await.unwrap().0;
        SockRef::from(&socket).set_recv_buffer_size(4 * TURN).unwrap();
        let sent = 16 * TURN;
        let sending = tokio::spawn(async move { peer.write_all(&vec![7; sent]).await.unwrap() });
        // More than a turn is there to be read.
        let mut peeked = vec![0; TURN + 1];
        while socket.peek(&mut peeked).await.unwrap() <= TURN {
            tokio::task::yield_now().await;
        }
        let (wire, mut received) = (Wire::new(socket), 0);
        let fill = |received: &mut usize, cx: &mut Context<'_>| match wire.poll_fill(cx) {
            Poll::Ready(count) => {
                *received += count.unwrap();
                wire.incoming().clear();
                true
            }
            Poll::Pending => false,
        };
        assert!(turn(&wire, |cx| fill(&mut received, cx)), "it would wait for ever");
        assert_eq!(received, TURN);
        // The next turns bring the rest.
        while received < sent {
            poll_fn(|cx| wire.0.socket.poll_read_ready(cx)).await.unwrap();
            turn(&wire, |cx| received < sent && fill(&mut received, cx));
            tokio::task::yield_now().await;
        }
        assert_eq!(received, sent);
        sending.await.unwrap();
    }
}
