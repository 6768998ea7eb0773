//! Connections: outbound, inbound, passthrough, on shards.
