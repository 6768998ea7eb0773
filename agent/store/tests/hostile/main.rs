//! What clients should not do: the server bounds it, says what was wrong, and goes on.
#![allow(clippy::unwrap_used)]

mod garbage;
mod limits;
mod raw;
