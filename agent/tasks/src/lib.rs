//! Supervise, drain, back off, take turns, go first: what every part with a task of its own needs.

mod backoff;
mod drain;
pub mod fair;
pub mod urgency;

pub use backoff::Backoff;
pub use drain::{DrainMode, DrainSignal, DrainTrigger, drain_channel};
pub use fair::{Group, Turns};
pub use urgency::{Allowance, Urgency};
