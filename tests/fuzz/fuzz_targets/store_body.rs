//! libFuzzer over `fuzz::store_body`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::store_body(data));
