//! libFuzzer over `fuzz::tunnel_socket`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::tunnel_socket(data));
