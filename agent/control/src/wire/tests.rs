//! The messages, byte by byte.
