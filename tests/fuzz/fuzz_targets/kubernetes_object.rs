//! libFuzzer over `fuzz::kubernetes_object`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::kubernetes_object(data));
