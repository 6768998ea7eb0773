//! The agent's local socket: status out, pod events in; readiness.
