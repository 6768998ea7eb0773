//! How much is thrown away for an end that is gone, before whoever sends it is told.

use std::time::Duration;

use tokio::time::Instant;

/// What came for an end that is gone: it had closed, and reset what came later. Who sends it may not have seen that. After
/// so much, or so long, it is to be told by a reset, which takes back what is not sent yet of the other's last words.
#[derive(Default)]
pub struct ThrownAway {
    bytes: usize,
    since: Option<Instant>,
}

impl ThrownAway {
    /// Bytes that may be thrown away.
    const BYTES: usize = 4 << 20;
    /// How long it may go on, once all that the other end said is passed on.
    pub const TIME: Duration = Duration::from_secs(10);

    /// Counts some more; whether that was too much. `answered`: all that the other end said is passed on.
    pub fn is_too_much(&mut self, bytes: usize, answered: bool) -> bool {
        self.bytes += bytes;
        let long = answered && bytes > 0 && self.since.get_or_insert_with(Instant::now).elapsed() > Self::TIME;
        long || self.bytes > Self::BYTES
    }
}
