//! What the machine has, asked quickly: a complete one is recognised in a fraction of a second.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::tools;
use crate::workspace::Workspace;

/// Which system's packages can be installed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum System {
    /// Debian: its packages include a recent Rust compiler with the library source that matches it.
    Debian,
    /// Has apt, and other packages than Debian's.
    AptBased,
    /// Anything else.
    Other,
}

/// The facts that [`super::plan::plan`] decides on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// May install packages.
    pub root: bool,
    /// See [`System`].
    pub system: System,
    /// `rustup` is there.
    pub rustup: bool,
    /// `pip` for some Python 3 is there.
    pub pip: bool,
    /// Something that compiles the eBPF programs is there.
    pub ebpf_compiler: Option<EbpfCompiler>,
    /// Programs of [`tools::TOOLS`] that were found.
    pub programs: BTreeSet<&'static str>,
    /// `bpf-linker` is there and runs.
    pub bpf_linker: bool,
    /// `cargo-deny` is there.
    pub cargo_deny: bool,
    /// kubectl is there, or under target/tools.
    pub kubectl: bool,
    /// Envoy is unpacked under target/tools.
    pub envoy: bool,
}

/// A compiler with the source of its standard library, as `-Zbuild-std` wants it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EbpfCompiler {
    /// The system's own, from Debian's packages `rustc-web`, `cargo-web`, `rust-web-src`.
    System,
    /// rustup's `nightly` with the component `rust-src`.
    Nightly,
}

impl Machine {
    /// Looks at this machine.
    pub fn inspect(workspace: &Workspace) -> Self {
        let rustup = find("rustup").is_some();
        Machine {
            root: is_root(),
            system: system(),
            rustup,
            pip: succeeds(Command::new("python3").args(["-c", "import pip"])),
            ebpf_compiler: ebpf_compiler(rustup),
            programs: tools::TOOLS
                .iter()
                .map(|tool| tool.program)
                .filter(|program| find(program).is_some())
                .collect(),
            bpf_linker: succeeds(Command::new("bpf-linker").arg("--version")),
            cargo_deny: find("cargo-deny").is_some(),
            kubectl: find("kubectl").is_some() || workspace.kubectl().exists(),
            envoy: workspace.envoy().exists(),
        }
    }
}

/// Whether this process has root's rights; its /proc entry belongs to the effective user.
pub fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|entry| entry.uid() == 0)
}

/// The compiler to use: the system's where it has the library source, else rustup's nightly.
pub fn ebpf_compiler(rustup: bool) -> Option<EbpfCompiler> {
    let system = sysroot(Command::new(SYSTEM_RUSTC)).is_some_and(|root| has_library_source(&root));
    if system && Path::new(SYSTEM_CARGO).exists() {
        return Some(EbpfCompiler::System);
    }
    let mut nightly = Command::new("rustup");
    nightly.args(["run", "nightly", "rustc"]);
    let nightly = rustup && sysroot(nightly).is_some_and(|root| has_library_source(&root));
    nightly.then_some(EbpfCompiler::Nightly)
}

/// Where Debian's packages put the compiler.
pub const SYSTEM_RUSTC: &str = "/usr/bin/rustc";
/// Where Debian's packages put Cargo.
pub const SYSTEM_CARGO: &str = "/usr/bin/cargo";

fn has_library_source(sysroot: &Path) -> bool {
    sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
}

fn sysroot(mut rustc: Command) -> Option<PathBuf> {
    let output = rustc
        .args(["--print", "sysroot"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn system() -> System {
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    if find("apt-get").is_none() {
        System::Other
    } else if release.lines().any(|line| line.trim() == "ID=debian") {
        System::Debian
    } else {
        System::AptBased
    }
}

/// A program's path. Root's programs are looked for, too, when the user's search path leaves them out.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

fn succeeds(command: &mut Command) -> bool {
    let quiet = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    quiet.status().is_ok_and(|status| status.success())
}
