//! SPIFFE certificates: keys, authority, rotation, TLS configurations.
