//! What the process tells about traffic: the access log.
//!
//! Deliberately unknown here: where a record goes (the caller gives a [`std::io::Write`]) and what decided (texts come
//! in as [`std::fmt::Display`]).

mod access_log;

pub use access_log::{AccessLog, ConnectionRecord, Direction, Format, Party};
