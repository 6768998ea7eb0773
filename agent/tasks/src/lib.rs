//! Supervise, drain, back off.
