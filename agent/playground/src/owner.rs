//! One playground to a machine: its names (namespaces, cgroups, pins) are the same wherever its state is kept, so a
//! second one with another state directory would take the first one apart.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::{files::absent_is_fine, layout::Layout};

const DIRECTORY: &str = "/run/undercurrent";

fn marker() -> PathBuf {
    Path::new(DIRECTORY).join("playground.owner")
}

/// Held while the machine's playground changes. Given up when dropped.
pub(crate) struct Held(#[expect(dead_code, reason = "held for its lock")] Flock<File>);

/// Takes the machine's playground for this state directory, or says whose it is.
pub(crate) fn hold(layout: &Layout) -> Result<Held> {
    fs::create_dir_all(DIRECTORY).with_context(|| format!("cannot create {DIRECTORY}"))?;
    let path = Path::new(DIRECTORY).join("playground.lock");
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| anyhow::anyhow!("another playground command is at work ({}: {error})", path.display()))?;
    let owner = fs::read_to_string(marker()).unwrap_or_default();
    let ours = layout.root.to_string_lossy();
    if !owner.is_empty() && owner != ours && Layout::new(owner.clone().into()).state().exists() {
        bail!(
            "a playground with its state in {owner} is up on this machine, and there can be only one; take it down: \
             undercurrent playground --state {owner} down"
        );
    }
    fs::write(marker(), ours.as_bytes()).with_context(|| format!("cannot write {}", marker().display()))?;
    Ok(Held(lock))
}

/// Gives the machine's playground up: there is none any more.
pub(crate) fn release(held: Held) -> Result<()> {
    absent_is_fine(fs::remove_file(marker())).with_context(|| format!("cannot remove {}", marker().display()))?;
    drop(held);
    absent_is_fine(fs::remove_file(Path::new(DIRECTORY).join("playground.lock"))).context("cannot remove the lock")?;
    // Only if nobody else keeps something there.
    let _ = fs::remove_dir(DIRECTORY);
    Ok(())
}
