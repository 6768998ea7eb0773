//! libFuzzer over `fuzz::store_target`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::store_target(data));
