//! HBONE: TCP connections as HTTP/2 CONNECT streams in mutual TLS tunnels. Client, server, pool.
//!
//! ```text
//!  application ──TCP── relay ── stream ┐                     ┌ stream ── relay ──TCP── application
//!                                      ├── tunnel ── TLS ────┤
//!  application ──TCP── relay ── stream ┘  (Pool::open)        (serve) └ stream ── relay ──TCP── application
//! ```
//! How a tunnel is framed (the `h2` crate) and encrypted (rustls) is hidden in here: outside there are only [`Pool`],
//! [`ClientStream`], [`serve`] and [`Handler`]. Everything belongs to one thread: one current-thread runtime with a
//! [`LocalSet`](tokio::task::LocalSet), which the tunnels' tasks are spawned on.
//!
//! What it promises, to both applications:
//! - half-close passes each way; a reset is a reset, a refusal a refusal (`tests/relay.rs`);
//! - what was cut short never looks complete: when a tunnel dies, its applications see a reset (`no_truncation`);
//! - who does not read holds back who writes, through HTTP/2's windows, and nothing grows meanwhile;
//! - an idle stream holds no buffer; an idle tunnel holds none either.
//!
//! It does not know who may talk to whom: the [`Handler`] decides, before the application is dialled.
//!
//! Wire: RFC 9113 (8.5 CONNECT), and ztunnel's choices in `reference/ztunnel.md`. Deviations: an application's reset is
//! passed on as `CONNECT_ERROR` and a peer's `CANCEL` before the stream's end is a reset, where ztunnel makes a clean
//! end of both; tunnels with free streams are reused, where ztunnel gives them up once they were full.

mod config;
mod error;
mod keepalive;
mod pool;
mod reason;
mod record;
mod relay;
mod serve;
mod tls;
mod tunnel;
mod wire;

pub use config::Config;
pub use error::{Culprit, HandshakeError, OpenError, RelayError, TunnelError};
pub use pool::{ClientStream, ConnectRequest, Pool, Standing, TunnelInfo, TunnelKey};
pub use reason::LONGEST_REASON;
pub use relay::{Live, RelayEnd, ThrownAway};
#[doc(hidden)]
pub use serve::serve_plain;
pub use serve::{Accepted, Decision, Handler, IncomingRequest, serve};
pub use tasks::{DrainMode, DrainSignal};
