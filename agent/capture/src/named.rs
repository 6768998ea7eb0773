//! The network namespaces that a container runtime keeps under a name: a directory of mounts, one file each.

use std::{
    collections::HashSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use crate::{
    error::{CaptureError, Tried},
    interfaces,
    netns::Netns,
};

/// A network namespace that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedNetns {
    /// Where it is mounted.
    pub path: PathBuf,
    /// The addresses of its interfaces.
    pub addresses: Vec<IpAddr>,
}

/// The network namespaces of a directory, each once, but for the caller's own and those at the paths `taken`. What is no
/// network namespace, or is gone meanwhile, is left out.
///
/// Blocks, and must be called in the node's network namespace.
pub fn named_netns(directory: &Path, taken: &[PathBuf]) -> Result<Vec<NamedNetns>, CaptureError> {
    let home = Netns::own().tried(|| "opening the node's network namespace".into())?;
    let mut seen = HashSet::from([home.cookie()]);
    seen.extend(taken.iter().filter_map(|path| Some(home.open(path).ok()?.cookie())));
    let mut paths = files(directory).tried(|| format!("looking through {}", directory.display()))?;
    paths.sort();
    let mut found = Vec::new();
    for path in paths {
        let Ok(netns) = home.open(&path) else { continue };
        if !seen.insert(netns.cookie()) {
            continue;
        }
        match interfaces::addresses(&netns) {
            Ok(addresses) => found.push(NamedNetns { path, addresses }),
            Err(error) => tracing::debug!(netns = %path.display(), %error, "its interfaces cannot be looked at"),
        }
    }
    Ok(found)
}

/// A mount of a namespace is a file as others are; of what is not, opening might wait.
fn files(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let paths = fs::read_dir(directory)?.map(|entry| Ok(entry?.path()));
    let paths = paths.collect::<io::Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_file()).collect())
}
