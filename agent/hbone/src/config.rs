//! Limits and times of tunnels; the defaults are ztunnel's where it has them.

use std::time::Duration;

/// Limits and times of tunnels.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes that a peer may send on one stream before the application has taken them. 4 MiB.
    pub stream_window: u32,
    /// The same for all streams of a tunnel together. 16 MiB.
    pub connection_window: u32,
    /// The largest frame a peer may send. 1 MiB. What we send is cut into pieces of at most 64 KiB, so that one stream
    /// does not hold up the others.
    pub max_frame_size: u32,
    /// The largest list of headers a peer may send, decoded. 64 KiB; a longer one is answered with 431.
    pub max_header_list_size: u32,
    /// Streams that a peer may have open in one tunnel to us. 200.
    pub max_concurrent_streams: u32,
    /// Streams that we open in one tunnel, or fewer where the peer allows fewer; then another tunnel is opened. 100.
    pub streams_per_tunnel: u32,
    /// Bytes of one stream that may wait for the tunnel's socket. 256 KiB.
    pub send_buffer: usize,
    /// From the TCP connection to the end of the TLS and HTTP/2 handshakes. 10 s.
    pub handshake_timeout: Duration,
    /// For the TCP connection of a new tunnel. 10 s.
    pub connect_timeout: Duration,
    /// From a CONNECT to its answer, in which the peer has dialled the application. 30 s.
    pub response_timeout: Duration,
    /// After this much silence of the peer a PING is sent. 10 s.
    pub ping_interval: Duration,
    /// After this much silence since that PING, the tunnel is given up. 20 s.
    pub ping_timeout: Duration,
    /// A client's tunnel without a stream is closed after this. 5 min.
    pub idle_timeout: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            stream_window: 4 << 20,
            connection_window: 16 << 20,
            max_frame_size: 1 << 20,
            max_header_list_size: 64 << 10,
            max_concurrent_streams: 200,
            streams_per_tunnel: 100,
            send_buffer: 256 << 10,
            handshake_timeout: Duration::from_secs(10),
            connect_timeout: Duration::from_secs(10),
            response_timeout: Duration::from_secs(30),
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle_timeout: Duration::from_secs(300),
        }
    }
}

/// Bytes that one poll of a tunnel's task reads or writes, and one of a stream's task copies each way, before the thread's
/// other tasks have their turn. About as long as a turn of [`tasks::Group`]: what a poll does can't be interrupted.
pub(crate) const TURN: usize = 128 << 10;

/// h2 counts small DATA frames that wait to be taken, and gives the tunnel up beyond a budget. Ours are taken at once
/// (see `relay`), so this only has to cover what one read of the socket can bring.
pub(crate) const DATA_FRAME_BUDGET: usize = 64 << 20;

/// h2's limits on resets are of a whole tunnel: beyond them it ends all streams of it, or takes late DATA of one stream
/// for an attack. So they are above what connections that come and go bring about.
///
/// Streams that we reset are remembered, for DATA to them that was under way: for as long as a full connection window
/// takes at 25 Mbit/s, and 800 in each second of that. About 350 bytes each.
const RESETS_REMEMBERED: (usize, Duration) = (4096, Duration::from_secs(5));

/// Frames of one tunnel, ever, that are answered with a reset of their own: those to streams that are forgotten
/// nevertheless, and mistakes. A peer that makes them and doesn't read those resets has us hold them, so this is
/// bounded: all together are about 16 MiB, as a connection window's DATA.
const FRAMES_ANSWERED_WITH_RESETS: usize = 32 << 10;

/// CONNECTs that the peer gave up before we saw them, in one read: those of as many streams as it may have open, a few
/// times over while we stood still. More in one [`TURN`] are a flood (`a_flood_of_resets_ends_the_tunnel`).
const CONNECTS_GIVEN_UP_UNSEEN: usize = 1024;

impl Config {
    pub(crate) fn client(&self) -> h2::client::Builder {
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame_size)
            .max_header_list_size(self.max_header_list_size)
            .max_send_buffer_size(self.send_buffer)
            .initial_max_send_streams(self.streams_per_tunnel as usize)
            .data_frame_budget(DATA_FRAME_BUDGET)
            .max_concurrent_reset_streams(RESETS_REMEMBERED.0)
            .reset_stream_duration(RESETS_REMEMBERED.1)
            .max_local_error_reset_streams(Some(FRAMES_ANSWERED_WITH_RESETS))
            .enable_push(false);
        builder
    }

    pub(crate) fn server(&self) -> h2::server::Builder {
        let mut builder = h2::server::Builder::new();
        builder
            .initial_window_size(self.stream_window)
            .initial_connection_window_size(self.connection_window)
            .max_frame_size(self.max_frame_size)
            .max_header_list_size(self.max_header_list_size)
            .max_concurrent_streams(self.max_concurrent_streams)
            .max_send_buffer_size(self.send_buffer)
            .data_frame_budget(DATA_FRAME_BUDGET)
            .max_concurrent_reset_streams(RESETS_REMEMBERED.0)
            .reset_stream_duration(RESETS_REMEMBERED.1)
            .max_local_error_reset_streams(Some(FRAMES_ANSWERED_WITH_RESETS))
            .max_pending_accept_reset_streams(CONNECTS_GIVEN_UP_UNSEEN);
        builder
    }
}
