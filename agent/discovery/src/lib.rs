//! Knowledge in: the xDS client.
mod decode;
