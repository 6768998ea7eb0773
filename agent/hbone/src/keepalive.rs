//! Notices that a peer has vanished: PINGs it after a silence, gives it up after a longer one.
//!
//! ```text
//!  quiet interval ──> PING ──> anything received within the timeout ──> quiet interval …
//!                       └────> nothing ──> silent: the tunnel is over
//! ```
//! Traffic in the peer's direction proves as much as a PONG, so a busy tunnel sends no PING.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

pub(crate) struct KeepAlive {
    interval: Duration,
    timeout: Duration,
    ping_pong: Option<PingPong>,
    timer: Pin<Box<Sleep>>,
    /// What had been received when the timer was set.
    received: u64,
    pinged: bool,
}

impl KeepAlive {
    pub(crate) fn new(interval: Duration, timeout: Duration, ping_pong: Option<PingPong>) -> Self {
        Self {
            interval,
            timeout,
            ping_pong,
            timer: Box::pin(tokio::time::sleep(interval)),
            received: 0,
            pinged: false,
        }
    }

    /// Ready when the peer is silent for too long. `received` counts what came from it, ever.
    pub(crate) fn poll_silent(&mut self, received: u64, cx: &mut Context<'_>) -> Poll<()> {
        if self.pinged
            && let Some(ping_pong) = &mut self.ping_pong
        {
            // Only so that the next PING may be sent: what counts is below.
            let _ = ping_pong.poll_pong(cx);
        }
        while self.timer.as_mut().poll(cx).is_ready() {
            let heard = received != self.received;
            self.received = received;
            let wait = match (heard, self.pinged) {
                (true, _) => {
                    self.pinged = false;
                    self.interval
                }
                (false, true) => return Poll::Ready(()),
                (false, false) => {
                    self.pinged = true;
                    if let Some(ping_pong) = &mut self.ping_pong {
                        // Fails while an earlier one is on its way, which serves as well.
                        let _ = ping_pong.send_ping(Ping::opaque());
                    }
                    self.timeout
                }
            };
            self.timer.as_mut().reset(Instant::now() + wait);
        }
        Poll::Pending
    }
}
