//! The index, object by object.
