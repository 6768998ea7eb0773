//! Supervise, drain, back off, take turns, go first, listen, give out places: what every part with a task of its own needs.

mod backoff;
mod drain;
pub mod fair;
mod listen;
mod places;
pub mod urgency;

pub use backoff::Backoff;
pub use drain::{DrainMode, DrainSignal, DrainTrigger, drain_channel};
pub use fair::{Group, Turns};
pub use listen::{is_same_place, listen};
pub use places::Places;
pub use urgency::{Allowance, Urgency};
