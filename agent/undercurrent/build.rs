//! Finds the compiled eBPF programs that the binary embeds, and names them to it as `UNDERCURRENT_EBPF`.
//!
//! `cargo xtask build-ebpf` makes them; another place can be given by the variable of the same name. The code embeds
//! them by `aya::include_bytes_aligned!(env!("UNDERCURRENT_EBPF"))`: an ELF parser wants 8-byte alignment.

use std::path::PathBuf;

const VARIABLE: &str = "UNDERCURRENT_EBPF";
const BUILT: &str = "../../ebpf/target/bpfel-unknown-none/release/undercurrent";

fn main() {
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    let object = match std::env::var_os(VARIABLE) {
        Some(given) => PathBuf::from(given),
        // Of this build, and not of that in which the script was compiled: worktrees may share their target directory.
        None => PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default()).join(BUILT),
    };
    println!("cargo::rerun-if-changed={}", object.display());
    match object.canonicalize() {
        Ok(found) => println!("cargo::rustc-env={VARIABLE}={}", found.display()),
        Err(error) => println!(
            "cargo::error=no eBPF programs at {} ({error}): run `cargo xtask build-ebpf`",
            object.display()
        ),
    }
}
