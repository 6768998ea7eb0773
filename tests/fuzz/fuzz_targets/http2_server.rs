//! libFuzzer over `fuzz::http2_server`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::http2_server(data));
