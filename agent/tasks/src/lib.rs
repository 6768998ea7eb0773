//! Supervise, drain, back off, take turns: what every part with a task of its own needs.

mod backoff;
mod drain;
pub mod fair;

pub use backoff::Backoff;
pub use drain::{DrainMode, DrainSignal, DrainTrigger, drain_channel};
pub use fair::{Group, Turns};
