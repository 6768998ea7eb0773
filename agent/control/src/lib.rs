//! The control plane.

mod auth;
mod ca;
pub mod resources;
mod serve;
pub mod xds;
