//! The control plane.

mod auth;
mod ca;
pub mod index;
pub mod resources;
mod serve;
pub mod wire;
pub mod xds;
