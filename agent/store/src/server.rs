//! The whole server: engine, controllers and HTTP.
