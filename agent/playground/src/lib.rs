//! A whole mesh on one Linux machine.
