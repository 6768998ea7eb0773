//! The certificate authority.
mod csr;
mod generate;
mod leaf;
mod material;
mod pem;
mod rotation;
mod queue;
