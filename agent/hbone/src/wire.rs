//! The tunnel's TCP socket and its two buffers: few large reads, few large writes.
//!
//! ```text
//!  h2 ── Transport ── Wire ── socket     reads:  up to 256 KiB at once, into a buffer lent by the thread
//!                                        writes: gathered, sent by `Flush` after each turn of the tunnel's task
//! ```
//! Buffers are the thread's, lent to a wire while bytes wait in it.

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
    record::{Opened, Opener, Schedule, Sealer},
    relay::read_some,
};

/// What one read of the socket takes at most, and what is gathered before a write does not wait for the flush.
const LARGEST: usize = 256 << 10;
/// Enough to tell HTTP from TLS.
const FIRST_BYTES: usize = 8;

/// Drives out what was gathered, and counts what came in.
pub(crate) trait Flush {
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
    first_bytes: Cell<[u8; FIRST_BYTES]>,
    tls_error: RefCell<Option<rustls::Error>>,
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

    /// Gathers what is to be sealed; waits while too much is gathered already.
    pub(crate) fn poll_write(&self, cx: &mut Context<'_>, slices: &[IoSlice<'_>]) -> Poll<io::Result<usize>> {
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

    /// Reads more behind what is in the in-buffer; ready with 0 at the end.
    pub(crate) fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let state = &*self.0;
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
    fn count(&self, incoming: &[u8], count: usize) {
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
