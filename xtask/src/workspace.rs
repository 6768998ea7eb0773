//! Where things are: the repository, what is built from it, and where logs go.

use std::path::{Path, PathBuf};

/// Paths of this checkout; all absolute.
#[derive(Debug, Clone)]
pub struct Workspace {
    root: PathBuf,
    target: PathBuf,
}

impl Workspace {
    /// The checkout that this xtask was compiled from.
    pub fn here() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .unwrap_or(Path::new("."))
            .to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(target) => root.join(target),
            None => root.join("target"),
        };
        Workspace { root, target }
    }

    /// The repository.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A path in the repository.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.root.join(relative)
    }

    /// A path below Cargo's target directory.
    pub fn target(&self, relative: &str) -> PathBuf {
        self.target.join(relative)
    }

    /// The release binary.
    pub fn binary(&self) -> PathBuf {
        self.target("release/undercurrent")
    }

    /// The compiled eBPF programs. agent/undercurrent/build.rs looks here, too.
    pub fn ebpf_object(&self) -> PathBuf {
        self.path("ebpf/target/bpfel-unknown-none/release/undercurrent")
    }

    /// Where setup puts kubectl, if the machine has none.
    pub fn kubectl(&self) -> PathBuf {
        self.target("tools/kubectl/bin/kubectl")
    }

    /// Envoy, as setup installs it: the wheel unpacked into a directory of ours.
    pub fn envoy(&self) -> PathBuf {
        self.target("tools/envoy/envoy/_bin/envoy")
    }
}
