//! The control plane.

mod ca;
pub mod resources;
pub mod xds;
