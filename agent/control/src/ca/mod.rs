//! The certificate authority: who gets which certificate, signed by what, and whom to trust.
//!
//! ```text
//! Secrets ──► secrets ──rotation (pure)──► Authority in force ──► bundle ──► ConfigMaps (trust), responses
//!                                               ▲
//! CreateCertificate ──► service ──auth──► queue ─┘ csr (the key, nothing else) ──► leaf
//! ```
//! The signing key never leaves this room: [`Authority`] signs, and nothing answers with a key or its bytes but what is
//! written to the Secret it came from. Who may have what is asked of [`crate::auth`].

mod authority;
mod csr;
mod generate;
mod leaf;
mod material;
mod pem;
mod queue;
mod rotation;
mod secrets;
mod service;
mod source;

pub use authority::Authority;
pub use leaf::Lifetimes;
pub use queue::{Bounds, Queue};
pub use secrets::Secrets;
pub use service::{CertificateService, Counters};
