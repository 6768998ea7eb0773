//! The file: everything that outlives the process.
//!
//! ```text
//! objects: "group/plural/namespace/name" -> JSON        numbers: "revision", "format"
//! ```
//! Knows redb and bytes; not what an object means beyond its labels and its revision.
//!
//! Invariants:
//! - What [`Disk::commit`] answered outlives a kill (`tests/durability.rs`: `a_kill_loses_no_acknowledged_write`).
//! - A file that was altered or torn is repaired or named, and never a panic (`tests/durability.rs`:
//!   `a_torn_or_altered_file_is_read_whole_or_named`).
//! - After a failed write nothing is written before the file was opened and checked again ([`Disk::mend`]).
//! - One process at a time (`a_second_process_is_told_who_is_in_the_way`).

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};
use serde::Deserialize;

use super::object::{Key, Object};
use crate::kinds;

const FILE: &str = "objects.redb";
const OBJECTS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("objects");
const NUMBERS: TableDefinition<'static, &str, u64> = TableDefinition::new("numbers");
/// Raised when the layout of the file changes.
const FORMAT: u64 = 1;
/// All objects are in memory anyway: redb needs only room for the inner pages.
const CACHE: usize = 16 << 20;

/// Why a directory can't be opened, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The directory can't be made or read.
    #[error("cannot use {} as the directory of the store: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process has it open.
    #[error("{} is open in another process: end that one, or give this one another directory", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file is damaged beyond what can be repaired.
    #[error(
        "{} is damaged ({why}): put back a copy of it, or move it away to begin with an empty store",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// The file is of another version of this program.
    #[error("{} has the layout {found}, this program reads {FORMAT}: use the program that wrote it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its layout.
        found: u64,
    },
    /// The file can't be read or written.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What was found at open.
pub(super) struct Loaded {
    pub(super) revision: u64,
    pub(super) objects: Vec<Arc<Object>>,
}

/// The open file.
pub(super) struct Disk {
    /// `None` once it could not be written, until [`Disk::mend`].
    database: Option<Database>,
    path: PathBuf,
}

/// One object's new state; `None` where it is gone.
pub(super) type Row<'a> = (&'a Key, Option<&'a Object>);

impl Disk {
    /// Opens, checks and reads everything.
    pub(super) fn open(directory: &Path) -> Result<(Self, Loaded), OpenError> {
        let in_directory = |source| OpenError::Directory {
            path: directory.to_owned(),
            source,
        };
        let mut builder = fs::DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(in_directory)?;
        let path = directory.join(FILE);
        if !path.exists() {
            Self::make(directory, &path).map_err(|failure| failure.at(&path))?;
            // The name of the file has to outlive a power cut, too.
            fs::File::open(directory)
                .and_then(|directory| directory.sync_all())
                .map_err(in_directory)?;
        }
        let (database, loaded) = Self::read(&path).map_err(|failure| failure.at(&path))?;
        let database = Some(database);
        Ok((Self { database, path }, loaded))
    }

    /// Makes an empty store under another name first: so a file of the right name is whole, or damaged, but never new.
    fn make(directory: &Path, path: &Path) -> Result<(), Failure> {
        let unfinished = directory.join(format!("{FILE}.new"));
        match fs::remove_file(&unfinished) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(Failure::Io(error)),
            _ => {}
        }
        let mut disk = Self {
            database: Some(Database::builder().set_cache_size(CACHE).create(&unfinished)?),
            path: unfinished.clone(),
        };
        disk.commit(0, &[]).map_err(|why| Failure::Io(io::Error::other(why)))?;
        drop(disk);
        fs::rename(unfinished, path).map_err(Failure::Io)
    }

    fn read(path: &Path) -> Result<(Database, Loaded), Failure> {
        // redb promises not to panic on an altered file when it checks it; a bug there shall not end the process either.
        let opened = catch_unwind(AssertUnwindSafe(|| Self::try_read(path)));
        opened.unwrap_or_else(|_| Err(Failure::Damaged("the file makes no sense".to_owned())))
    }

    fn try_read(path: &Path) -> Result<(Database, Loaded), Failure> {
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
        let database = builder.open(path)?;
        let transaction = database
            .begin_read()
            .map_err(|error| Failure::Damaged(error.to_string()))?;
        let mut loaded = Loaded {
            revision: 0,
            objects: Vec::new(),
        };
        let numbers = match transaction.open_table(NUMBERS) {
            Ok(numbers) => numbers,
            Err(error) => return Err(Failure::Damaged(error.to_string())),
        };
        let number = |name| numbers.get(name).map(|found| found.map_or(0, |guard| guard.value()));
        let format = number("format")?;
        if format != FORMAT {
            return Err(Failure::Format(format));
        }
        loaded.revision = number("revision")?;
        let objects = match transaction.open_table(OBJECTS) {
            Ok(objects) => objects,
            Err(error) => return Err(Failure::Damaged(error.to_string())),
        };
        for row in objects.iter()? {
            let (path, json) = row?;
            let object = read_object(path.value(), json.value()).map_err(Failure::Damaged)?;
            loaded.revision = loaded.revision.max(object.revision);
            loaded.objects.push(Arc::new(object));
        }
        drop((numbers, objects, transaction));
        Ok((database, loaded))
    }

    /// Writes rows and the revision in one transaction; when it returns, they are on the disk. After a failure nothing
    /// is written before [`Disk::mend`]: redb itself trusts the file no more.
    pub(super) fn commit(&mut self, revision: u64, rows: &[Row<'_>]) -> Result<(), String> {
        let Some(database) = &self.database else {
            return Err(format!("cannot write {}: an earlier write failed", self.path.display()));
        };
        let written = catch_unwind(AssertUnwindSafe(|| write(database, revision, rows)));
        let written = written.unwrap_or_else(|_| Err("the file makes no sense".into()));
        written.map_err(|error| {
            self.close();
            format!("cannot write {}: {error}", self.path.display())
        })
    }

    /// Opens the file again after a failure, repaired where that is needed, and says which revision it is at: that of
    /// the failed write if it reached the disk after all, or else the one before.
    pub(super) fn mend(&mut self) -> Result<u64, String> {
        self.close();
        let (database, loaded) = Self::read(&self.path).map_err(|failure| failure.at(&self.path).to_string())?;
        self.database = Some(database);
        Ok(loaded.revision)
    }

    fn close(&mut self) {
        let database = self.database.take();
        // It says so itself if it can't write its last words.
        let _ = catch_unwind(AssertUnwindSafe(|| drop(database)));
    }
}

fn write(database: &Database, revision: u64, rows: &[Row<'_>]) -> Result<(), Box<dyn std::error::Error>> {
    let transaction = database.begin_write()?;
    {
        let mut objects = transaction.open_table(OBJECTS)?;
        for (key, object) in rows {
            let path = path_of(key);
            match object {
                Some(object) => objects.insert(path.as_str(), object.json.as_ref())?,
                None => objects.remove(path.as_str())?,
            };
        }
        let mut numbers = transaction.open_table(NUMBERS)?;
        numbers.insert("format", FORMAT)?;
        numbers.insert("revision", revision)?;
    }
    transaction.commit()?;
    Ok(())
}

enum Failure {
    InUse,
    Io(io::Error),
    Damaged(String),
    Format(u64),
}

impl Failure {
    fn at(self, path: &Path) -> OpenError {
        let path = path.to_owned();
        match self {
            Self::InUse => OpenError::InUse { path },
            Self::Io(source) => OpenError::Io { path, source },
            Self::Damaged(why) => OpenError::Damaged { path, why },
            Self::Format(found) => OpenError::Format { path, found },
        }
    }
}

impl From<DatabaseError> for Failure {
    fn from(error: DatabaseError) -> Self {
        match error {
            DatabaseError::DatabaseAlreadyOpen => Self::InUse,
            DatabaseError::Storage(error) => error.into(),
            other => Self::Damaged(other.to_string()),
        }
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        match error {
            // A file that is no redb file, or that ends early.
            StorageError::Io(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Self::Damaged(error.to_string())
            }
            StorageError::Io(error) => Self::Io(error),
            other => Self::Damaged(other.to_string()),
        }
    }
}

fn path_of(key: &Key) -> String {
    let Key { kind, namespace, name } = key;
    format!("{}/{}/{namespace}/{name}", kind.group, kind.plural)
}

/// What an [`Object`] has beside its JSON.
#[derive(Deserialize)]
struct Head {
    metadata: HeadMetadata,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct HeadMetadata {
    resource_version: String,
    #[serde(default)]
    labels: BTreeMap<String, String>,
}

fn read_object(path: &str, json: &[u8]) -> Result<Object, String> {
    let mut parts = path.splitn(4, '/');
    let mut next = || parts.next().unwrap_or_default();
    let (group, plural, namespace, name) = (next(), next(), next(), next());
    let kind = kinds::by_plural(group, plural).ok_or_else(|| format!("{path}: a kind that is not known"))?;
    let head: Head = serde_json::from_slice(json).map_err(|error| format!("{path}: {error}"))?;
    let revision = head.metadata.resource_version.parse();
    Ok(Object {
        key: Key::new(kind, namespace, name),
        revision: revision.map_err(|error| format!("{path}: metadata.resourceVersion: {error}"))?,
        labels: head.metadata.labels,
        json: Bytes::copy_from_slice(json),
    })
}
