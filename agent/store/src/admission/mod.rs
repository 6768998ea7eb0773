//! What is done to an object before it is kept: defaults, checks, addresses.
