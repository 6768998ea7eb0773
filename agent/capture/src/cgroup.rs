//! The node's cgroups (version 2): who is the agent, who is a pod.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Component, Path, PathBuf},
};

use crate::error::{CaptureError, Tried};

/// A cgroup: its id, as the kernel's programs see it, and its depth below the root, whose depth is 0.
#[derive(Debug)]
pub(crate) struct Cgroup {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    pub(crate) id: u64,
    pub(crate) level: u32,
}

/// The cgroup namespace that the kernel starts with always has this number (`PROC_CGROUP_INIT_INO`).
const FIRST_NAMESPACE: &str = "cgroup:[4026531835]";

/// Depths are counted from the mount's root, and the kernel counts them from the true one: they are the same only in
/// the first cgroup namespace. In another the guard would take the agent for a stranger and drop all it sends.
pub(crate) fn require_first_namespace() -> Result<(), CaptureError> {
    let link = Path::new("/proc/self/ns/cgroup");
    let namespace = fs::read_link(link).tried(|| "reading /proc/self/ns/cgroup".into())?;
    if namespace == Path::new(FIRST_NAMESPACE) {
        return Ok(());
    }
    Err(CaptureError::Cgroup {
        path: link.to_owned(),
        problem: "is a private cgroup namespace; the agent has to run in the host's".into(),
    })
}

impl Cgroup {
    pub(crate) fn open(path: &Path) -> Result<Self, CaptureError> {
        let problem = |problem: &str| CaptureError::Cgroup {
            path: path.to_owned(),
            problem: problem.to_owned(),
        };
        let mount = mount_point()?;
        let below = path
            .strip_prefix(&mount)
            .map_err(|_| problem(&format!("not below the cgroup2 mount {}", mount.display())))?;
        if below.components().any(|part| !matches!(part, Component::Normal(_))) {
            return Err(problem("not a plain path"));
        }
        let level = below.components().count() as u32;
        if level == 0 {
            return Err(problem("is the root cgroup; a cgroup of its own is needed"));
        }
        let file = File::open(path).tried(|| format!("opening the cgroup {}", path.display()))?;
        let metadata = file
            .metadata()
            .tried(|| format!("reading the cgroup {}", path.display()))?;
        Ok(Self {
            path: path.to_owned(),
            // On 64-bit machines a cgroup's id is its inode number.
            id: metadata.ino(),
            file,
            level,
        })
    }

    /// The cgroup that this process is in.
    pub(crate) fn own() -> Result<Self, CaptureError> {
        let text = fs::read_to_string("/proc/self/cgroup").tried(|| "reading /proc/self/cgroup".into())?;
        let path = text
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .ok_or_else(|| CaptureError::Cgroup {
                path: "/proc/self/cgroup".into(),
                problem: "has no line for cgroup version 2".into(),
            })?;
        Self::open(&mount_point()?.join(path))
    }

    /// Whether this one is the other or contains it.
    pub(crate) fn contains(&self, other: &Self) -> bool {
        other.path.starts_with(&self.path)
    }
}

/// Where cgroup version 2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside version 1.
pub fn mount_point() -> Result<PathBuf, CaptureError> {
    let mounts = fs::read_to_string("/proc/mounts").tried(|| "reading /proc/mounts".into())?;
    mount_of_type(&mounts, "cgroup2").ok_or_else(|| CaptureError::System {
        what: "looking for the cgroup2 mount".into(),
        error: io::Error::new(io::ErrorKind::NotFound, "cgroup version 2 is not mounted"),
    })
}

fn mount_of_type(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ');
        let (_, path, found) = (fields.next()?, fields.next()?, fields.next()?);
        (found == kind).then(|| PathBuf::from(path))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_beside_version_1() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(mount_of_type(mounts, "cgroup2"), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_of_type(mounts, "bpf"), None);
    }
}
