//! What is pinned, and where: capture outlives the agent because its links and maps are pinned in bpffs.
//!
//! ```text
//! PIN_DIR/maps-vVERSION-SIZES/NAME  maps, under the version of their layouts
//! PIN_DIR/links/NAME                programs of the node: on the pods' and on the agent's cgroup
//! PIN_DIR/pods/COOKIE/steer         sk_lookup in the pod's network namespace
//! PIN_DIR/pods/COOKIE/guard-INDEX   tcx ingress on the host side of its veth
//! PIN_DIR/pods/COOKIE/proof-INDEX   tcx egress there
//! ```

use std::{
    fs, io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::{
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use crate::{
    error::{CaptureError, Tried},
    sys::{self, AttachType, Attached, Target},
};

const DEFAULT_MOUNT: &str = "/sys/fs/bpf";

/// What the name of a link begins with until it takes the place of another.
pub(crate) const UNFINISHED: &str = "new-";

/// The pins of one node agent.
#[derive(Debug, Clone)]
pub(crate) struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Makes the directories, and mounts bpffs at its usual place if that is not done.
    pub(crate) fn prepare(root: &Path) -> Result<Self, CaptureError> {
        if root.as_os_str().as_encoded_bytes().contains(&b'.') {
            return Err(CaptureError::System {
                what: format!("preparing the pin directory {}", root.display()),
                error: io::Error::new(io::ErrorKind::InvalidInput, "bpffs has no names with a dot"),
            });
        }
        mount_bpffs(root)?;
        let pins = Self { root: root.to_owned() };
        for directory in [pins.maps(), pins.links(), pins.pods()] {
            fs::create_dir_all(&directory).tried(|| format!("creating {}", directory.display()))?;
        }
        Ok(pins)
    }

    /// The pins there, without making any.
    pub(crate) fn existing(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    pub(crate) fn maps(&self) -> PathBuf {
        self.root.join(maps_directory())
    }

    pub(crate) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub(crate) fn pods(&self) -> PathBuf {
        self.root.join("pods")
    }

    pub(crate) fn pod(&self, cookie: u64) -> PathBuf {
        self.pods().join(format!("{cookie:016x}"))
    }

    /// The cookies of the pods that have pins.
    pub(crate) fn pod_cookies(&self) -> Vec<u64> {
        names(&self.pods())
            .filter_map(|name| u64::from_str_radix(&name, 16).ok())
            .collect()
    }

    /// Where the maps of other versions are.
    pub(crate) fn other_versions(&self) -> Vec<PathBuf> {
        let current = maps_directory();
        names(&self.root)
            .filter(|name| name.starts_with("maps-v") && *name != current)
            .map(|name| self.root.join(name))
            .collect()
    }
}

fn maps_directory() -> String {
    format!("maps-v{}-{:x}", abi::VERSION, abi::SIZES)
}

/// Makes a program stand at a target, pinned at a path; says whether it was not there before. A link that is there
/// gets the program atomically; one that hangs elsewhere, or on nothing, is replaced.
pub(crate) fn attach(
    path: &Path,
    program: &OwnedFd,
    target: Target<'_>,
    kind: AttachType,
    expected: Attached,
) -> io::Result<bool> {
    let old = sys::pinned(path)?;
    if let Some(link) = &old
        && sys::link_attached(link)? == expected
        && sys::link_update(link, program).is_ok()
    {
        return Ok(false);
    }
    let link = sys::link_create(program, target, kind)?;
    let fresh = path.with_file_name(format!(
        "{UNFINISHED}{}",
        path.file_name().unwrap_or_default().display()
    ));
    let _ = fs::remove_file(&fresh);
    sys::pin(&link, &fresh)?;
    fs::rename(&fresh, path)?;
    if let Some(old) = old {
        // One that hangs on nothing can't be detached, and need not be.
        let _ = sys::link_detach(old);
    }
    Ok(true)
}

/// Detaches what is pinned at a path and unpins it; nothing there is no failure.
pub(crate) fn detach(path: &Path) -> io::Result<()> {
    if let Some(link) = sys::pinned(path)? {
        let _ = sys::link_detach(&link);
        fs::remove_file(path)?;
    }
    Ok(())
}

/// Detaches all links in a directory and removes it.
pub(crate) fn detach_all(directory: &Path) -> io::Result<()> {
    for name in names(directory) {
        detach(&directory.join(name))?;
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn names(directory: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

/// Removes a directory of map pins.
pub(crate) fn remove_tree(directory: &Path) {
    for name in names(directory) {
        let _ = fs::remove_file(directory.join(name));
    }
    let _ = fs::remove_dir(directory);
}

fn mount_bpffs(root: &Path) -> Result<(), CaptureError> {
    if is_bpffs(root) {
        return Ok(());
    }
    let problem = |text: String| {
        Err(CaptureError::System {
            what: format!("preparing the pin directory {}", root.display()),
            error: io::Error::other(text),
        })
    };
    if !root.starts_with(DEFAULT_MOUNT) {
        return problem("it is not on a bpf file system".into());
    }
    let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/mnt"));
    if let (Ok(first), Ok(own)) = (namespace("1"), namespace("self"))
        && first != own
    {
        return problem(format!(
            "{DEFAULT_MOUNT} is not mounted in this private mount namespace (`ip netns exec` makes one; use `nsenter \
             --net`), and a mount made here would not outlive the agent"
        ));
    }
    mount(Some("bpf"), DEFAULT_MOUNT, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(io::Error::from)
        .tried(|| format!("mounting bpffs at {DEFAULT_MOUNT}"))
}

/// Whether the path, or the nearest directory above it that exists, is on bpffs.
fn is_bpffs(path: &Path) -> bool {
    path.ancestors()
        .find_map(|ancestor| statfs(ancestor).ok())
        .is_some_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}
