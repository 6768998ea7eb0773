//! The pump: one application's TCP connection and one stream of a tunnel, copied both ways in one future.
//!
//! ```text
//!            to the peer:   Open ──FIN──> Closed (END_STREAM sent)
//!   wait until readable ─> reserve capacity ─> read no more than that ─> DATA
//!
//!            to the application:   Open ──END_STREAM──> Ending ──spill written──> Closed (FIN sent)
//!   take DATA ─> write ─> release capacity      (blocked: it spills, and the peer's window closes)
//! ```
//! Holds nothing while idle: reads go into a buffer of the thread, and the spill exists only while the application
//! blocks. The spill takes over all that arrives, so that h2 holds nothing and counts nothing against the peer; it is
//! bounded by the stream's window, since capacity is released only for what is written.
//!
//! One poll copies about [`TURN`] each way, and waits, awake, for the next (`one_poll_copies_no_more_than_a_turn_to_the_peer`,
//! `one_poll_copies_no_more_than_a_turn_to_the_application`).
//!
//! Whatever ends it but two clean ends, being dropped included, is a reset of both sides: RST_STREAM(CONNECT_ERROR) to
//! the peer, a TCP reset to the application. But an application that had closed before it reset what still came for it
//! (EPIPE) has said all it would: that is passed on to its end, and what comes for it is thrown away, up to
//! a bound ([`ThrownAway`]; `the_last_words_of_an_application_that_is_gone_arrive`).

mod thrown_away;

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::poll_fn,
    io::{self, IoSlice},
    net::Shutdown,
    pin::{Pin, pin},
    rc::Rc,
    task::{Context, Poll, Waker},
};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use socket2::SockRef;
use tokio::{
    io::{Interest, Ready},
    net::TcpStream,
};

pub use self::thrown_away::ThrownAway;
use crate::{config::TURN, error::RelayError};

/// The first read of a stream, and its least.
const SMALLEST_READ: usize = 4 << 10;
/// The largest read, and so the largest DATA frame: more would hold up the tunnel's other streams.
const LARGEST_READ: usize = 64 << 10;
/// Pieces written to the application at once.
const BATCH: usize = 16;
/// So many spilled pieces are made into one, if together they are no more than [`LARGEST_READ`].
const CROWD: usize = 64;

/// What a relay moved, and how it ended.
#[derive(Clone, Debug)]
pub struct RelayEnd {
    /// Bytes taken from the application and given to the tunnel.
    pub to_peer: u64,
    /// Bytes written to the application.
    pub from_peer: u64,
    /// Both ends closed cleanly, or why not.
    pub outcome: Result<(), RelayError>,
}

/// A relay seen from outside, while it runs: its counters, and the means to cut it. Cheap to clone.
#[derive(Clone, Default, Debug)]
pub struct Live(Rc<LiveState>);

#[derive(Default, Debug)]
struct LiveState {
    to_peer: Cell<u64>,
    from_peer: Cell<u64>,
    cut: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Live {
    /// Bytes taken from the application so far.
    pub fn to_peer(&self) -> u64 {
        self.0.to_peer.get()
    }

    /// Bytes written to the application so far.
    pub fn from_peer(&self) -> u64 {
        self.0.from_peer.get()
    }

    /// Ends the relay with a reset of both sides, now or as soon as it starts.
    pub fn cut(&self) {
        self.0.cut.set(true);
        let waker = self.0.waker.borrow_mut().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether it was cut.
    pub fn is_cut(&self) -> bool {
        self.0.cut.get()
    }

    /// Counts what another relay than this crate's moved, so that all connections are watched in one way.
    pub fn count(&self, to_peer: u64, from_peer: u64) {
        self.0.to_peer.set(self.to_peer() + to_peer);
        self.0.from_peer.set(self.from_peer() + from_peer);
    }

    /// Ready once it was cut; wakes the last who asked.
    pub fn poll_cut(&self, cx: &Context<'_>) -> Poll<()> {
        if self.0.cut.get() {
            return Poll::Ready(());
        }
        let mut waker = self.0.waker.borrow_mut();
        if !waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
            *waker = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    pub(crate) fn end(&self, outcome: Result<(), RelayError>) -> RelayEnd {
        RelayEnd {
            to_peer: self.to_peer(),
            from_peer: self.from_peer(),
            outcome,
        }
    }
}

/// Copies until both sides have ended, one of them fails, or `live` is cut.
pub(crate) async fn relay(
    application: TcpStream,
    send: SendStream<Bytes>,
    recv: RecvStream,
    live: &Live,
) -> Result<(), RelayError> {
    let application = Application::new(application);
    let mut pump = Pump::new(send, recv);
    let mut failed = pin!(application.socket.ready(Interest::ERROR));
    let outcome = poll_fn(|cx| pump.poll(&application.socket, failed.as_mut(), live, cx)).await;
    if outcome.is_ok() {
        application.finished.set(true);
        pump.finished = true;
    }
    outcome
}

/// The application's socket, reset when dropped before the relay has finished.
pub(crate) struct Application {
    socket: TcpStream,
    finished: Cell<bool>,
}

impl Application {
    pub(crate) fn new(socket: TcpStream) -> Self {
        Self {
            socket,
            finished: Cell::new(false),
        }
    }
}

impl Drop for Application {
    fn drop(&mut self) {
        if !self.finished.get() {
            let _ = self.socket.set_zero_linger();
        }
    }
}

#[derive(PartialEq, Eq)]
enum ToPeer {
    Open,
    /// The application is readable, the peer's window is closed.
    Blocked,
    Closed,
}

#[derive(PartialEq, Eq)]
enum ToApplication {
    Open,
    /// The peer has ended; what is spilled is still to be written.
    Ending,
    Closed,
}

struct Pump {
    send: SendStream<Bytes>,
    recv: RecvStream,
    to_peer: ToPeer,
    to_application: ToApplication,
    /// What the application has not taken yet; empty, and without an allocation, unless it blocks.
    spill: VecDeque<Bytes>,
    uncrowded: usize,
    read_size: usize,
    /// The application has closed, and reset what came for it later.
    gone: bool,
    thrown_away: ThrownAway,
    finished: bool,
}

impl Drop for Pump {
    fn drop(&mut self) {
        if !self.finished {
            // What h2 would send by itself, CANCEL, is a clean end to a ztunnel.
            self.send.send_reset(Reason::CONNECT_ERROR);
        }
    }
}

type Polled = Poll<Result<(), RelayError>>;

impl Pump {
    fn new(send: SendStream<Bytes>, recv: RecvStream) -> Self {
        Self {
            send,
            recv,
            to_peer: ToPeer::Open,
            to_application: ToApplication::Open,
            spill: VecDeque::new(),
            uncrowded: 0,
            read_size: SMALLEST_READ,
            gone: false,
            thrown_away: ThrownAway::default(),
            finished: false,
        }
    }

    fn poll(
        &mut self,
        application: &TcpStream,
        failed: Pin<&mut impl Future<Output = io::Result<Ready>>>,
        live: &Live,
        cx: &mut Context<'_>,
    ) -> Polled {
        if live.poll_cut(cx).is_ready() {
            return Poll::Ready(Err(RelayError::Cut));
        }
        if let Poll::Ready(Err(error)) = self.poll_to_application(application, live, cx) {
            return Poll::Ready(Err(error));
        }
        if let Poll::Ready(Err(error)) = self.poll_to_peer(application, live, cx) {
            return Poll::Ready(Err(error));
        }
        if self.to_peer == ToPeer::Closed && self.to_application == ToApplication::Closed {
            // A reset would only discard what h2 still has to send.
            self.finished = true;
            return Poll::Ready(if self.gone {
                Err(RelayError::ApplicationReset)
            } else {
                Ok(())
            });
        }
        // Nobody reads the socket then, so nothing else would tell of its reset.
        if self.to_peer != ToPeer::Open && !self.gone && failed.poll(cx).is_ready() {
            self.take_failure(application)?;
            if self.to_peer == ToPeer::Closed {
                return Poll::Ready(Err(RelayError::ApplicationReset));
            }
        }
        if self.to_application == ToApplication::Closed {
            return self.poll_reset(cx);
        }
        Poll::Pending
    }

    /// Notes that the application is gone; or how it failed otherwise.
    fn take_failure(&mut self, application: &TcpStream) -> Result<(), RelayError> {
        match application.take_error() {
            Ok(Some(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(())
            }
            Ok(Some(error)) => Err(RelayError::from_application(&error)),
            _ => Err(RelayError::ApplicationReset),
        }
    }

    /// After the peer's end nothing more is read from it, so nothing else would tell that it no longer wants our data.
    fn poll_reset(&mut self, cx: &mut Context<'_>) -> Polled {
        match self.send.poll_reset(cx) {
            Poll::Pending => Poll::Pending,
            // Its own data was complete before: that it reads no more is a close, not a failure.
            Poll::Ready(Ok(Reason::NO_ERROR | Reason::CANCEL)) => Poll::Ready(Ok(())),
            Poll::Ready(Ok(reason)) => Poll::Ready(Err(RelayError::PeerReset { code: reason.into() })),
            Poll::Ready(Err(error)) => Poll::Ready(Err(RelayError::from_h2(&error))),
        }
    }

    /// Ready only when this direction is over.
    fn poll_to_application(&mut self, application: &TcpStream, live: &Live, cx: &mut Context<'_>) -> Polled {
        let turn_ends = live.from_peer() + TURN as u64;
        while self.to_application != ToApplication::Closed {
            if self.gone {
                return self.poll_throw_away(cx);
            }
            if live.from_peer() >= turn_ends {
                // h2 is to hold nothing meanwhile.
                self.take_all(cx)?;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let mut batch = [const { Bytes::new() }; BATCH];
            let taken = self.take(&mut batch, cx)?;
            if taken == 0 && self.to_application == ToApplication::Open {
                return Poll::Pending;
            }
            if !self.write(application, &mut batch[..taken], live)? {
                // h2 is to hold nothing while the application blocks.
                self.take_all(cx)?;
                match application.poll_write_ready(cx) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(ready) => ready.map_err(|error| RelayError::from_application(&error))?,
                }
            } else if self.to_application == ToApplication::Ending && self.spill.is_empty() {
                match SockRef::from(application).shutdown(Shutdown::Write) {
                    Err(error) if error.kind() == io::ErrorKind::NotConnected => self.take_failure(application)?,
                    result => result.map_err(|error| RelayError::from_application(&error))?,
                }
                self.to_application = ToApplication::Closed;
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what is for an application that is gone. Ready when the peer has ended.
    fn poll_throw_away(&mut self, cx: &mut Context<'_>) -> Polled {
        let spill = std::mem::take(&mut self.spill);
        let mut bytes = spill.iter().map(Bytes::len).sum();
        let ended = loop {
            match self.poll_piece(cx)? {
                Poll::Ready(Some(piece)) => bytes += piece.len(),
                Poll::Ready(None) => break true,
                Poll::Pending => break false,
            }
        };
        self.release(bytes)?;
        let too_much = self.thrown_away.is_too_much(bytes, self.to_peer == ToPeer::Closed);
        if ended {
            self.to_application = ToApplication::Closed;
            Poll::Ready(Ok(()))
        } else if too_much {
            Poll::Ready(Err(RelayError::ApplicationReset))
        } else {
            Poll::Pending
        }
    }

    /// Lets the peer send so many more bytes.
    fn release(&mut self, bytes: usize) -> Result<(), RelayError> {
        self.recv
            .flow_control()
            .release_capacity(bytes)
            .map_err(|error| RelayError::from_h2(&error))
    }

    /// Moves what waits into the batch, about a turn of it: the spill first, then what h2 has.
    fn take(&mut self, batch: &mut [Bytes; BATCH], cx: &mut Context<'_>) -> Result<usize, RelayError> {
        let (mut taken, mut bytes) = (0, 0);
        while taken < BATCH && bytes < TURN {
            let piece = match self.spill.pop_front() {
                Some(piece) => piece,
                None => match self.poll_piece(cx)? {
                    Poll::Ready(Some(piece)) => piece,
                    _ => break,
                },
            };
            bytes += piece.len();
            batch[taken] = piece;
            taken += 1;
        }
        if self.spill.is_empty() && self.spill.capacity() > 0 {
            self.spill = VecDeque::new();
        }
        Ok(taken)
    }

    /// The next DATA; `None` once the peer has ended.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Result<Poll<Option<Bytes>>, RelayError> {
        while self.to_application == ToApplication::Open {
            match self.recv.poll_data(cx) {
                Poll::Pending => return Ok(Poll::Pending),
                Poll::Ready(Some(Ok(piece))) if piece.is_empty() => {}
                Poll::Ready(Some(Ok(piece))) => return Ok(Poll::Ready(Some(piece))),
                Poll::Ready(Some(Err(error))) => return Err(RelayError::from_h2(&error)),
                Poll::Ready(None) => self.to_application = ToApplication::Ending,
            }
        }
        Ok(Poll::Ready(None))
    }

    fn take_all(&mut self, cx: &mut Context<'_>) -> Result<(), RelayError> {
        while let Poll::Ready(Some(piece)) = self.poll_piece(cx)? {
            self.spill.push_back(piece);
            self.uncrowded += 1;
            if self.uncrowded >= CROWD {
                self.uncrowded = 0;
                self.uncrowd();
            }
        }
        Ok(())
    }

    /// Joins the last pieces if they are small: one-byte frames would cost fifty times their payload.
    fn uncrowd(&mut self) {
        let start = self.spill.len().saturating_sub(CROWD);
        let total: usize = self.spill.range(start..).map(Bytes::len).sum();
        if total > LARGEST_READ {
            return;
        }
        let mut joined = BytesMut::with_capacity(total);
        for piece in self.spill.drain(start..) {
            joined.extend_from_slice(&piece);
        }
        self.spill.push_back(joined.freeze());
    }

    /// Writes a batch; what the application does not take goes back to the front of the spill. False if it blocks.
    fn write(&mut self, application: &TcpStream, batch: &mut [Bytes], live: &Live) -> Result<bool, RelayError> {
        let mut first = 0;
        let mut written = 0;
        let mut blocked = false;
        while first < batch.len() && !blocked {
            let mut slices = [IoSlice::new(&[]); BATCH];
            for (slice, piece) in slices.iter_mut().zip(&batch[first..]) {
                *slice = IoSlice::new(piece);
            }
            match application.try_write_vectored(&slices[..batch.len() - first]) {
                Ok(mut count) => {
                    written += count;
                    while first < batch.len() && count >= batch[first].len() {
                        count -= batch[first].len();
                        batch[first] = Bytes::new();
                        first += 1;
                    }
                    if count > 0 {
                        batch[first].advance(count);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => blocked = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe && self.to_peer != ToPeer::Closed => {
                    self.gone = true;
                    break;
                }
                Err(error) => return Err(RelayError::from_application(&error)),
            }
        }
        for piece in batch[first..].iter_mut().rev() {
            self.spill.push_front(std::mem::take(piece));
        }
        if written > 0 {
            live.0.from_peer.set(live.from_peer() + written as u64);
            self.release(written)?;
        }
        Ok(!blocked)
    }

    /// Ready only when this direction is over.
    fn poll_to_peer(&mut self, application: &TcpStream, live: &Live, cx: &mut Context<'_>) -> Polled {
        let failed = |error: io::Error| RelayError::from_application(&error);
        let turn_ends = live.to_peer() + TURN as u64;
        while self.to_peer != ToPeer::Closed {
            if live.to_peer() >= turn_ends {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // Readable first: an idle stream must not reserve what another could use.
            self.to_peer = ToPeer::Open;
            match application.poll_read_ready(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(ready) => ready.map_err(failed)?,
            }
            let Poll::Ready(capacity) = self.poll_capacity(cx)? else {
                self.to_peer = ToPeer::Blocked;
                return Poll::Pending;
            };
            let size = capacity.min(self.read_size);
            let read = read_shared(application, size);
            match read {
                Ok(data) if data.is_empty() => {
                    self.send_data(data, true)?;
                    self.to_peer = ToPeer::Closed;
                }
                Ok(data) => {
                    let count = data.len();
                    live.0.to_peer.set(live.to_peer() + count as u64);
                    self.send_data(data, false)?;
                    if count < size {
                        self.send.reserve_capacity(0);
                    }
                    self.adapt(count, size);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.send.reserve_capacity(0),
                Err(error) => return Poll::Ready(Err(failed(error))),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// How much the peer takes now, of what the next read wants.
    fn poll_capacity(&mut self, cx: &mut Context<'_>) -> Result<Poll<usize>, RelayError> {
        self.send.reserve_capacity(self.read_size);
        match self.send.capacity() {
            0 => match self.send.poll_capacity(cx) {
                Poll::Pending => Ok(Poll::Pending),
                Poll::Ready(Some(Ok(capacity))) => Ok(Poll::Ready(capacity)),
                Poll::Ready(Some(Err(error))) => Err(RelayError::from_h2(&error)),
                // The stream was reset: the other direction, or `poll_reset`, says why.
                Poll::Ready(None) => Ok(Poll::Pending),
            },
            capacity => Ok(Poll::Ready(capacity)),
        }
    }

    fn send_data(&mut self, data: Bytes, end: bool) -> Result<(), RelayError> {
        self.send
            .send_data(data, end)
            .map_err(|error| RelayError::from_h2(&error))
    }

    fn adapt(&mut self, count: usize, size: usize) {
        if count == self.read_size {
            self.read_size = (self.read_size * 4).min(LARGEST_READ);
        } else if count < size && count < self.read_size / 4 {
            self.read_size = (self.read_size / 4).max(SMALLEST_READ);
        }
    }
}

/// What all streams of this thread read into: small messages share a block, so that none needs one of its own.
///
/// The last is in use; those before are used up, the oldest first, and used again once nobody holds a part of them.
/// Freeing and allocating memory of this size, the kernel may take it away each time and fault it in again.
#[derive(Default)]
struct Blocks(VecDeque<BytesMut>);

/// Blocks that are kept. What is beyond is freed with its last part.
const MOST_BLOCKS: usize = 8;

thread_local! {
    static BLOCKS: RefCell<Blocks> = RefCell::default();
}

impl Blocks {
    /// Room for `size` bytes that nobody holds.
    fn room(&mut self, size: usize) -> &mut BytesMut {
        if self.0.back().is_none_or(|block| block.capacity() < size) {
            let free = self.0.iter_mut().position(|block| block.try_reclaim(LARGEST_READ));
            let block = free.and_then(|index| self.0.remove(index));
            if block.is_none() && self.0.len() == MOST_BLOCKS {
                self.0.pop_front();
            }
            self.0
                .push_back(block.unwrap_or_else(|| BytesMut::with_capacity(LARGEST_READ)));
        }
        self.0.back_mut().expect("one was pushed")
    }
}

/// Reads once. Empty at the end.
fn read_shared(socket: &TcpStream, size: usize) -> io::Result<Bytes> {
    BLOCKS.with_borrow_mut(|blocks| {
        let room = blocks.room(size);
        read_some(socket, room, size)?;
        Ok(room.split().freeze())
    })
}

/// Reads once into the buffer's spare capacity, at most `size`. Where that shows that the socket holds no more, tokio
/// is told so: the next wait then needs no read that fails.
pub(crate) fn read_some(socket: &TcpStream, buffer: &mut BytesMut, size: usize) -> io::Result<usize> {
    let mut result = Err(io::ErrorKind::WouldBlock.into());
    let mut buffer = buffer.limit(size);
    // The room there is, which may be less than `size`: a read that fills it says nothing about what the socket holds.
    let room = buffer.chunk_mut().len();
    let _ = socket.try_io(Interest::READABLE, || {
        result = socket.try_read_buf(&mut buffer);
        match &result {
            Ok(count) if *count > 0 && *count < room => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    });
    result
}

#[cfg(test)]
mod tests;
