//! libFuzzer over `fuzz::store_patch`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::store_patch(data));
