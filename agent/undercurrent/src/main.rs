//! Undercurrent: a service mesh without sidecars, in one binary.
fn main() {}
