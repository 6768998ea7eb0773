//! The tunnel's TCP socket, below TLS: few large reads, few large writes.
//!
//! ```text
//!  h2 ── TLS ── Wire ── socket        reads:  up to 256 KiB at once, into a buffer lent by the thread while bytes wait
//!                                     writes: gathered, sent by `Flush` after each turn of the tunnel's task
//! ```
//! h2 flushes after every DATA frame; here a flush does nothing once the handshake is over. Whoever drives the tunnel
//! calls [`Flush::poll_flush`] when h2 has nothing more to do.

use std::{
    cell::{Cell, RefCell},
    io::{self, IoSlice},
    net::Shutdown,
    pin::Pin,
    rc::Rc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, BytesMut};
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

use crate::relay::read_some;

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

/// The socket as TLS sees it.
pub(crate) struct Wire(Rc<WireState>);

/// The same socket as the tunnel's driver sees it.
#[derive(Clone)]
pub(crate) struct WireHandle(Rc<WireState>);

struct WireState {
    socket: TcpStream,
    incoming: RefCell<BytesMut>,
    outgoing: RefCell<BytesMut>,
    /// Whether writes wait for the driver's flush.
    gathers: Cell<bool>,
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
    pub(crate) fn new(socket: TcpStream) -> (Self, WireHandle) {
        // An error here shows at the first read, too.
        let _ = socket.set_nodelay(true);
        let state = Rc::new(WireState {
            socket,
            incoming: RefCell::default(),
            outgoing: RefCell::default(),
            gathers: Cell::new(false),
            received: Cell::new(0),
            first_bytes: Cell::default(),
            tls_error: RefCell::default(),
        });
        (Self(state.clone()), WireHandle(state))
    }
}

impl WireHandle {
    /// From now on writes wait for [`Flush::poll_flush`].
    pub(crate) fn gather(&self) {
        self.0.gathers.set(true);
    }

    /// Keeps what a read of TLS failed with.
    pub(crate) fn note(&self, error: &io::Error) {
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        if let Some(tls) = tls {
            self.0.tls_error.replace(Some(tls.clone()));
        }
    }

    /// The first bytes that the peer sent.
    pub(crate) fn first_bytes(&self) -> [u8; FIRST_BYTES] {
        self.0.first_bytes.get()
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
}

impl WireState {
    /// Fills `incoming`; ready with 0 at the end.
    fn poll_fill(&self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.poll_read_ready(cx))?;
            let mut incoming = self.incoming.borrow_mut();
            if incoming.capacity() < LARGEST {
                *incoming = lend();
            }
            match read_some(&self.socket, &mut incoming, LARGEST) {
                Ok(count) => {
                    self.count(&incoming, count);
                    return Poll::Ready(Ok(count));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => give_back(&mut incoming),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

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

    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.outgoing.borrow_mut();
        while outgoing.has_remaining() {
            match self.socket.try_write(&outgoing) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => outgoing.advance(count),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(self.socket.poll_write_ready(cx))?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        give_back(&mut outgoing);
        Poll::Ready(Ok(()))
    }
}

impl Flush for WireHandle {
    fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.poll_send(cx)
    }

    fn received(&self) -> u64 {
        self.0.received.get()
    }

    fn take_tls_error(&self) -> Option<rustls::Error> {
        self.0.tls_error.take()
    }
}

impl AsyncRead for Wire {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let state = &self.0;
        if state.incoming.borrow().is_empty() && ready!(state.poll_fill(cx))? == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut incoming = state.incoming.borrow_mut();
        let count = incoming.len().min(buffer.remaining());
        buffer.put_slice(&incoming[..count]);
        incoming.advance(count);
        if incoming.is_empty() {
            give_back(&mut incoming);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    /// Takes all of it: an alert at the end of a failed handshake is offered only once.
    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let state = &self.0;
        if state.outgoing.borrow().len() >= LARGEST {
            ready!(state.poll_send(cx))?;
        }
        let mut outgoing = state.outgoing.borrow_mut();
        let before = outgoing.len();
        if outgoing.capacity() == 0 {
            *outgoing = lend();
        }
        for slice in slices {
            outgoing.extend_from_slice(slice);
        }
        Poll::Ready(Ok(outgoing.len() - before))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.0.gathers.get() {
            return Poll::Ready(Ok(()));
        }
        self.0.poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.0.poll_send(cx))?;
        Poll::Ready(SockRef::from(&self.0.socket).shutdown(Shutdown::Write))
    }
}
