//! Files that are whole or not there.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

/// Writes a file beside its place and moves it there.
pub(crate) fn write_atomically(path: &Path, text: &str) -> Result<()> {
    let mut fresh = PathBuf::from(path).into_os_string();
    fresh.push(".new");
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(&fresh, text))
        .and_then(|()| fs::rename(&fresh, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Rewrites a file in its place: what is mounted somewhere is the file, not its name.
pub(crate) fn rewrite_in_place(path: &Path, text: &str) -> Result<()> {
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("cannot write {}", path.display()))
}

/// What is not there need not be removed.
pub(crate) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
