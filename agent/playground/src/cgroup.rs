//! Control groups (version 2): who belongs to a node's agent, its kubelet, its pods; and a way to end a group as a whole.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use crate::files::absent_is_fine;

/// A cgroup by its directory.
#[derive(Clone, Debug)]
pub(crate) struct Cgroup(pub PathBuf);

/// Where cgroup2 is mounted: at /sys/fs/cgroup, or beside the old controllers.
pub(crate) fn mount() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mut fields = mounts.lines().map(|line| line.split(' '));
    fields.find_map(|mut fields| {
        let (_, path, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// The group of everything of ours.
pub(crate) fn root() -> Result<Cgroup> {
    let mount = mount().context("no cgroup2 file system is mounted (see /proc/mounts)")?;
    Ok(Cgroup(mount.join("undercurrent")))
}

impl Cgroup {
    pub fn child(&self, name: &str) -> Self {
        Self(self.0.join(name))
    }

    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.0).with_context(|| format!("cannot create the cgroup {}", self.0.display()))
    }

    /// Ends every process of the group and of those below it, and waits until none is left.
    pub fn kill(&self) -> Result<()> {
        let kill = self.0.join("cgroup.kill");
        if !kill.exists() {
            return Ok(());
        }
        fs::write(&kill, "1").with_context(|| format!("cannot write {}", kill.display()))?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.is_populated() {
            if Instant::now() > deadline {
                bail!("processes in {} do not end", self.0.display());
            }
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Whether a process is in it or below it.
    pub fn is_populated(&self) -> bool {
        fs::read_to_string(self.0.join("cgroup.events")).is_ok_and(|events| events.contains("populated 1"))
    }

    /// Ends everything in it and removes it with those below it.
    pub fn remove(&self) -> Result<()> {
        self.kill()?;
        remove_tree(&self.0).with_context(|| format!("cannot remove the cgroup {}", self.0.display()))
    }

    /// The groups right below.
    pub fn children(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        directories
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Removes it if nothing is in it.
    pub fn remove_if_empty(&self) {
        // Not empty means that somebody else uses it.
        let _ = fs::remove_dir(&self.0);
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    // A group that just became empty may be busy for a moment.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match absent_is_fine(fs::remove_dir(path)) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                sleep(Duration::from_millis(5));
            }
            other => return other,
        }
    }
}
