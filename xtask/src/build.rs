//! `build-ebpf` and `build`: the eBPF programs by a compiler of their own, then the binary that carries them.
//!
//! Cargo itself decides whether anything is to be done; a second run takes no time.

use std::process::Command;

use anyhow::{Result, bail};

use crate::setup::machine::{SYSTEM_CARGO, SYSTEM_RUSTC, ebpf_compiler, find};
use crate::setup::{EbpfCompiler, Purpose};
use crate::step::Steps;
use crate::workspace::Workspace;

/// Compiles `ebpf/` to the object that the binary embeds.
pub fn ebpf(workspace: &Workspace) -> Result<()> {
    let mut cargo = match ebpf_compiler(find("rustup").is_some()) {
        Some(EbpfCompiler::System) => {
            let mut cargo = Command::new(SYSTEM_CARGO);
            cargo.env("RUSTC", SYSTEM_RUSTC);
            cargo
        }
        Some(EbpfCompiler::Nightly) => {
            let mut rustup = Command::new("rustup");
            rustup.args(["run", "nightly", "cargo"]);
            rustup
        }
        None => bail!("nothing here compiles eBPF programs: run `cargo xtask setup`"),
    };
    // This process was started by a Cargo of another toolchain, whose marks must not reach this one.
    for inherited in [
        "CARGO",
        "RUSTUP_TOOLCHAIN",
        "RUSTDOC",
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(inherited);
    }
    // Target, flags and where the object goes are in ebpf/.cargo/config.toml.
    cargo.args(["build", "--release", "--locked"]);
    cargo.current_dir(workspace.path("ebpf")).env("RUSTC_BOOTSTRAP", "1");
    Steps::new(workspace).run("build-ebpf", "compile the eBPF programs", &mut cargo)?;
    let object = workspace.ebpf_object();
    if !object.exists() {
        bail!("the build went through but left no {}", object.display());
    }
    Ok(())
}

/// The release binary.
pub fn binary(workspace: &Workspace) -> Result<()> {
    let mut cargo = cargo(workspace);
    cargo.args(["build", "--release", "--locked", "--package", "undercurrent"]);
    Steps::new(workspace).run("build", "build undercurrent", &mut cargo)
}

/// Everything from nothing to the binary.
pub fn all(workspace: &Workspace, purposes: &[Purpose]) -> Result<()> {
    crate::setup::run(workspace, purposes)?;
    ebpf(workspace)?;
    binary(workspace)
}

/// Cargo on this workspace, with the eBPF object where the binary's build script expects it.
pub fn cargo(workspace: &Workspace) -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(workspace.root());
    cargo
}
