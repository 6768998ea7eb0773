//! HBONE: CONNECT over mutual TLS and HTTP/2: client, server, pool.
