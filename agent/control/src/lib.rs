//! The control plane.

pub mod resources;
