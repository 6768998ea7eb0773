//! Supervise, drain, back off: what every part with a task of its own needs.

mod backoff;
mod drain;

pub use backoff::Backoff;
pub use drain::{DrainMode, DrainSignal, DrainTrigger, drain_channel};
