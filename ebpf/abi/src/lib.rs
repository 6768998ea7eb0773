//! Map and event layouts shared by the eBPF programs and agent/capture.
#![no_std]
