//! The API over HTTPS, in the shape and the words of kube-apiserver.
//!
//! ```text
//! serve (TLS, connections) ─► dispatch ─┬─► read, watch, write, subresource, reviews ─► engine
//!                                       └─► discovery, openapi
//!              pure: route, query, accept, selector, form, shape
//! ```
//! What it does not do, of what kube-apiserver does: answers in protobuf, and CBOR (JSON and YAML; bodies may be
//! protobuf), lists of a past revision (410; but for the pages of one list), proxying, logs and
//! exec, priorities and fairness (connections, streams and watches are bounded instead), audit.
//!
//! Invariants: nothing is told to who may not ask; a body is bounded and read only after that (`tests/hostile`); a stream
//! of events is without a gap from the revision it began with, or ends saying so.

mod accept;
mod answer;
mod call;
mod discovery;
mod dispatch;
mod form;
mod openapi;
mod pages;
mod protobuf;
mod query;
mod read;
mod reviews;
mod route;
mod selector;
mod serve;
mod shape;
mod subresource;
mod watch;
mod write;

pub use call::read_body;
pub use dispatch::check_target;
pub use serve::{Config, Front, FrontError, Limits};
