//! The last good state on the disk, so that an agent that starts while the control plane is away serves at once, and is
//! told only what changed when it comes back.
//!
//! ```text
//! responses ─► pending changes (by name: the newest) ─ a thread, once a second ─► appended record ─► rewritten when half is waste
//! start ─► records, in order ─► resources with their versions
//! ```
//! A record holds whole responses and counts only if it is whole. A last record that is cut short is what a crash leaves:
//! the state before it is used. Any other damage makes the file unusable: it is put aside by name, and the agent begins
//! without (`damage_is_noticed_and_never_a_panic`). A file of another mesh, mode or version is not used either.
//!
//! The contents are public keys to nothing: names, addresses and policies; the file is readable by its owner only.
//!
//! Bounds: one write a second, of what changed last; pending changes are at most one per resource; the file is at most
//! about twice what it says, plus [`SLACK`]. A disk that fails is told in the log and in the status, and the agent goes on.

mod format;
mod writer;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;

pub(crate) use format::Header;
pub(crate) use writer::{Keeper, StateWriter};

use crate::books::Type;

/// Waste that is not worth a rewriting.
const SLACK: u64 = 1 << 20;
const FILE: &str = "discovery.state";

/// What became of one resource.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    type_: Type,
    name: Arc<str>,
    /// The version and the encoded message; none if it is gone.
    put: Option<(Box<str>, Bytes)>,
}

impl Change {
    pub(crate) fn put(type_: Type, name: Arc<str>, version: Box<str>, message: Bytes) -> Self {
        Self {
            type_,
            name,
            put: Some((version, message)),
        }
    }

    pub(crate) fn remove(type_: Type, name: Arc<str>) -> Self {
        Self { type_, name, put: None }
    }
}

/// What the disk holds, by type: name, version, message.
pub(crate) type Resources = BTreeMap<Type, Vec<(String, String, Vec<u8>)>>;

/// Why the state on the disk is not used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    #[error("{file}: {source}")]
    Io {
        file: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{file} is of another mesh, mode or version: {found:?} and not {expected:?}")]
    OfAnother {
        file: PathBuf,
        found: String,
        expected: String,
    },
    #[error("{file} is damaged at byte {at}")]
    Damaged { file: PathBuf, at: usize },
}

/// Reads the state of a directory: what it holds and how much of the file is good. Nothing if there is none.
pub(crate) fn load(directory: &Path, header: &Header) -> Result<Option<(Resources, usize)>, LoadError> {
    let file = directory.join(FILE);
    let bytes = match fs::read(&file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(LoadError::Io { file, source }),
    };
    let (latest, good) = format::read(&bytes, header).map_err(|error| error.of(file))?;
    let mut resources = Resources::new();
    for ((type_, name), (version, message)) in latest {
        let of_type = resources.entry(type_).or_default();
        of_type.push((name.to_owned(), version.to_owned(), message.to_owned()));
    }
    Ok(Some((resources, good)))
}

type Latest<'a> = HashMap<(Type, &'a str), (&'a str, &'a [u8])>;

#[cfg(test)]
mod tests;
