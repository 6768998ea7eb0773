//! libFuzzer over `fuzz::peer_certificate`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::peer_certificate(data));
