//! The thread that writes.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use super::{Change, FILE, Header, SLACK, format};
use crate::books::Type;

/// Between two writes.
const PACE: Duration = Duration::from_secs(1);
/// Of a rewritten file.
const RECORD: usize = 1 << 20;

/// Keeps what changed and has it written. Dropped, it writes what is pending and ends.
///
/// Of two agents of one node only the one in charge writes ([`Keeper`]): the other collects what changes, and appends it
/// when it is in charge (`only_one_of_two_writes_and_nothing_is_missed`).
pub(crate) struct StateWriter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// The way to say who writes.
#[derive(Clone)]
pub(crate) struct Keeper(Arc<Shared>);

impl Keeper {
    /// Whether to write. When this returns after false was said, nothing is being written.
    pub(crate) fn keep(&self, keeps: bool) {
        let mut pending = self.0.lock();
        pending.held = !keeps;
        if keeps {
            self.0.more.notify_one();
            return;
        }
        pending.reopen = true;
        while pending.writing {
            pending = self.0.idle.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Keeper").finish_non_exhaustive()
    }
}

struct Shared {
    pending: Mutex<Pending>,
    more: Condvar,
    idle: Condvar,
}

#[derive(Default)]
struct Pending {
    changes: BTreeMap<(Type, Arc<str>), Change>,
    ended: bool,
    /// Another agent writes.
    held: bool,
    /// Another has written since.
    reopen: bool,
    writing: bool,
    /// What is wrong with the disk.
    problem: Option<String>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StateWriter {
    /// Appends to the file after its first `good` bytes, or begins a new one; at once, or when it is told to.
    pub(crate) fn start(directory: &Path, header: Header, good: Option<usize>, keeps: bool) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let mut log = Log {
            path: directory.join(FILE),
            header,
            file: None,
            length: 0,
            is_new: good.is_none(),
            rewritten: 0,
        };
        if keeps {
            log.open(good)?;
        }
        let pending = Pending {
            held: !keeps,
            reopen: !keeps,
            ..Pending::default()
        };
        let shared = Arc::new(Shared {
            pending: Mutex::new(pending),
            more: Condvar::new(),
            idle: Condvar::new(),
        });
        let of_thread = shared.clone();
        let run = move || run(&of_thread, &mut log);
        let thread = std::thread::Builder::new()
            .name("discovery-state".to_owned())
            .spawn(run)?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(crate) fn keeper(&self) -> Keeper {
        Keeper(self.shared.clone())
    }

    /// Takes the changes of a response: they are written together or not at all.
    pub(crate) fn record(&self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let mut pending = self.shared.lock();
        for change in changes {
            match pending.changes.entry((change.type_, change.name.clone())) {
                Entry::Occupied(mut entry) => {
                    entry.insert(change);
                }
                Entry::Vacant(entry) => {
                    entry.insert(change);
                }
            }
        }
        self.shared.more.notify_one();
    }

    /// What is wrong with the disk, if something is.
    pub(crate) fn problem(&self) -> Option<String> {
        self.shared.lock().problem.clone()
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.more.notify_one();
        if let Some(thread) = self.thread.take() {
            // It panicked: nothing is lost but what was pending.
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared, log: &mut Log) {
    loop {
        let mut pending = shared.lock();
        while (pending.changes.is_empty() || pending.held) && !pending.ended {
            pending = shared.more.wait(pending).unwrap_or_else(PoisonError::into_inner);
        }
        if pending.held {
            // It is for the other to write.
            return;
        }
        let (changes, ended) = (std::mem::take(&mut pending.changes), pending.ended);
        let reopen = std::mem::take(&mut pending.reopen);
        pending.writing = true;
        drop(pending);
        let begun = Instant::now();
        let opened = if reopen { log.reopen() } else { Ok(()) };
        let result = opened.and_then(|()| log.append(&changes));
        let mut pending = shared.lock();
        pending.writing = false;
        shared.idle.notify_all();
        pending.problem = match result {
            Ok(()) => None,
            Err(error) => Some(log.failed(&error, pending.problem.is_none())),
        };
        while !ended && !pending.ended && begun.elapsed() < PACE {
            let left = PACE.saturating_sub(begun.elapsed());
            let waited = shared.more.wait_timeout(pending, left);
            pending = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if ended {
            return;
        }
    }
}

/// The file.
struct Log {
    path: PathBuf,
    header: Header,
    /// None after a failure: it holds less than is known, and is not written to any more.
    file: Option<File>,
    length: u64,
    /// Nothing but the header is in it.
    is_new: bool,
    /// Its length when it was rewritten last.
    rewritten: u64,
}

fn damaged() -> io::Error {
    io::Error::other("it can not be read back")
}

impl Log {
    fn open(&mut self, good: Option<usize>) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).mode(0o600);
        let mut file = match good {
            Some(_) => options.open(&self.path)?,
            None => {
                // Whatever it was, it is of no use: moved aside for whoever wants to know.
                match fs::rename(&self.path, self.path.with_extension("state.unusable")) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => options.open(&self.path)?,
                }
            }
        };
        match good {
            Some(good) => file.set_len(good as u64)?,
            None => file.write_all(&self.header.line())?,
        }
        // How much of it is waste nobody knows: it is rewritten once, when something is appended.
        self.length = file.metadata()?.len();
        self.rewritten = 0;
        self.file = Some(file);
        Ok(())
    }

    /// Goes on with what another agent has left. Where there is nothing to go on with, only an agent that knew nothing
    /// from the disk has all that is known still to write.
    fn reopen(&mut self) -> io::Result<()> {
        let good = match fs::read(&self.path) {
            Ok(bytes) => Some(format::read(&bytes, &self.header).map_err(|_| damaged())?.1),
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.is_new => None,
            Err(error) => return Err(error),
        };
        self.is_new = good.is_none();
        self.open(good)
    }

    fn append(&mut self, changes: &BTreeMap<(Type, Arc<str>), Change>) -> io::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let Some(file) = &mut self.file else {
            return Err(io::Error::other("an earlier write failed"));
        };
        self.length += format::write_record(changes, file)?;
        if std::mem::take(&mut self.is_new) {
            // There is no waste in it.
            self.rewritten = self.length;
        }
        if self.length > 2 * self.rewritten + SLACK {
            self.rewrite()?;
        }
        Ok(())
    }

    /// Only the latest of each resource, in a new file that takes the old one's place at once.
    fn rewrite(&mut self) -> io::Result<()> {
        let bytes = fs::read(&self.path)?;
        let (latest, _) = format::read(&bytes, &self.header).map_err(|_| damaged())?;
        let new = self.path.with_extension("state.new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        let mut file = options.create_new(true).append(true).mode(0o600).open(&new)?;
        file.write_all(&self.header.line())?;
        format::write_records(&latest, RECORD, &mut file)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)?;
        self.length = file.metadata()?.len();
        self.rewritten = self.length;
        self.file = Some(file);
        Ok(())
    }

    /// A file that misses something must not be used by the next run.
    fn failed(&mut self, error: &io::Error, first: bool) -> String {
        let problem = format!("{}: {error}", self.path.display());
        if first {
            tracing::warn!("the state of the mesh is not kept on the disk any more: {problem}");
            self.file = None;
            let _ = fs::remove_file(&self.path);
        }
        problem
    }
}
