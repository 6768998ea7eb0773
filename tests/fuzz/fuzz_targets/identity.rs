//! libFuzzer over `fuzz::identity`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::identity(data));
