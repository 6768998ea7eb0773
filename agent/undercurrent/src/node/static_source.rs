//! The static file as a source of knowledge: read at start and whenever it changes.
//!
//! ```text
//! inotify on the file's directory (a thread) ─► reread ─► parse ─► mesh::Writer
//! ```
//! A file that can't be read or used changes nothing: what was known stays in force, and the log and the status say why.
//! The directory is watched, not the file, since a ConfigMap or an editor replaces the file by renaming.

use std::{
    ffi::OsString,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use mesh::{Rejected, Writer, static_file};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// What is wrong with the file now, for the status; empty when nothing is.
pub type Problems = Arc<Mutex<Vec<String>>>;

/// Reads the file, then follows it in a thread of its own for as long as the process lives.
pub fn follow(path: PathBuf, writer: Writer) -> io::Result<Problems> {
    let directory = match path.parent() {
        Some(directory) if !directory.as_os_str().is_empty() => directory.to_owned(),
        _ => PathBuf::from("."),
    };
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
    let changes = AddWatchFlags::IN_CLOSE_WRITE | AddWatchFlags::IN_MOVED_TO | AddWatchFlags::IN_CREATE;
    inotify
        .add_watch(&directory, changes)
        .map_err(|error| io::Error::other(format!("cannot watch {}: {error}", directory.display())))?;
    let problems = Problems::default();
    let mut source = Source {
        path,
        writer,
        last: None,
        problems: problems.clone(),
    };
    source.reread();
    thread::Builder::new()
        .name("static-file".to_owned())
        .spawn(move || source.run(&inotify))?;
    Ok(problems)
}

struct Source {
    path: PathBuf,
    writer: Writer,
    last: Option<String>,
    problems: Problems,
}

impl Source {
    fn run(&mut self, inotify: &Inotify) {
        loop {
            match inotify.read_events() {
                // `..data` is what a ConfigMap volume swaps.
                Ok(events) if events.iter().any(|event| self.concerns(event.name.as_ref())) => self.reread(),
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(file = %self.path.display(), %error, "cannot follow the static file any more");
                    return;
                }
            }
        }
    }

    fn concerns(&self, name: Option<&OsString>) -> bool {
        name.is_none_or(|name| Some(name.as_os_str()) == self.path.file_name() || name == "..data")
    }

    fn reread(&mut self) {
        let problems = match read(&self.path) {
            Ok(text) if self.last.as_ref() == Some(&text) => return,
            Ok(text) => self.publish(text),
            Err(error) => {
                tracing::error!(%error, "the static file is not used; what was known before stays in force");
                vec![error]
            }
        };
        *self.problems.lock().unwrap_or_else(PoisonError::into_inner) = problems;
    }

    fn publish(&mut self, text: String) -> Vec<String> {
        let (contents, mut rejected): (_, Vec<Rejected>) = match static_file::parse(&text) {
            Ok(parsed) => parsed,
            Err(error) => {
                let error = format!("{}: {error}", self.path.display());
                tracing::error!(%error, "the static file is not used; what was known before stays in force");
                return vec![error];
            }
        };
        let counts = (
            contents.workloads.len(),
            contents.services.len(),
            contents.policies.len(),
        );
        rejected.extend(self.writer.replace(contents, &rejected));
        for object in &rejected {
            tracing::warn!(file = %self.path.display(), "not taken over: {object}");
        }
        let (workloads, services, policies) = counts;
        tracing::info!(file = %self.path.display(), workloads, services, policies, rejected = rejected.len(), "mesh known");
        self.last = Some(text);
        rejected.iter().map(ToString::to_string).collect()
    }
}

fn read(path: &Path) -> Result<String, String> {
    fs::read_to_string(path).map_err(|error| format!("cannot read {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "workloads:\n- {uid: u, name: a, namespace: n, workloadIps: [10.0.0.1]}\n";

    #[test]
    fn a_changed_file_is_reread_and_a_bad_one_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("mesh.yaml");
        fs::write(&path, GOOD).unwrap();
        let (writer, knowledge) = mesh::new();
        let problems = follow(path.clone(), writer).unwrap();
        assert_eq!(knowledge.snapshot().generation(), 1);

        fs::write(&path, "policies: [{name: broken}]").unwrap();
        while problems.lock().unwrap().is_empty() {
            thread::yield_now();
        }
        assert_eq!(knowledge.snapshot().generation(), 1);
        assert!(
            knowledge
                .snapshot()
                .workload_by_ip("10.0.0.1".parse().unwrap())
                .is_some()
        );

        fs::write(directory.path().join("new"), GOOD.replace("10.0.0.1", "10.0.0.2")).unwrap();
        fs::rename(directory.path().join("new"), &path).unwrap();
        while knowledge.snapshot().generation() == 1 {
            thread::yield_now();
        }
        assert!(
            knowledge
                .snapshot()
                .workload_by_ip("10.0.0.2".parse().unwrap())
                .is_some()
        );
        // Said after the snapshot is out.
        while !problems.lock().unwrap().is_empty() {
            thread::yield_now();
        }
    }
}
