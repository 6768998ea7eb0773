//! What the process tells about traffic: the access log, and Istio's counters.
//!
//! Deliberately unknown here: where a record goes (the caller gives a [`std::io::Write`]), who scrapes, and what decided
//! (texts come in as [`std::fmt::Display`]).

mod access_log;
pub mod metrics;
mod trace;

pub use access_log::{AccessLog, ConnectionRecord, Direction, Format, Party};
pub use metrics::{Metrics, Recorder, ResponseFlag, Series, Traffic};
pub use trace::TraceId;
