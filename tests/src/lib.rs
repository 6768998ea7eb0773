//! The harness for scenarios on real network namespaces.
