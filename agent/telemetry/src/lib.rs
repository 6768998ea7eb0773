//! What the process tells about itself: access log and counters.
