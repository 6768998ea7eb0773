//! libFuzzer over `fuzz::dns_message`, which says what must hold.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::dns_message(data));
