//! Network namespaces: open, recognise, act inside.
//!
//! A namespace is recognised by its cookie, which the kernel never gives twice until it boots again.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys;

/// A network namespace, held open.
#[derive(Debug, Clone)]
pub(crate) struct Netns {
    file: Arc<File>,
    /// The namespace that this process lives in, to come back to.
    home: Arc<File>,
    path: PathBuf,
    cookie: u64,
}

impl Netns {
    /// The namespace that the calling thread is in.
    pub(crate) fn own() -> io::Result<Self> {
        let path = PathBuf::from("/proc/thread-self/ns/net");
        let file = Arc::new(File::open(&path)?);
        let cookie = cookie_here()?;
        Ok(Self {
            home: file.clone(),
            file,
            path,
            cookie,
        })
    }

    /// The namespace at a path, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
    pub(crate) fn open(&self, path: &Path) -> io::Result<Self> {
        let mut netns = Self {
            file: Arc::new(File::open(path)?),
            home: self.home.clone(),
            path: path.to_owned(),
            cookie: 0,
        };
        netns.cookie = netns.enter(cookie_here)??;
        Ok(netns)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Does something short inside the namespace, on this thread: a few microseconds for a socket.
    pub(crate) fn enter<T>(&self, action: impl FnOnce() -> T) -> io::Result<T> {
        if Arc::ptr_eq(&self.file, &self.home) {
            return Ok(action());
        }
        setns(&self.file, CloneFlags::CLONE_NEWNET)?;
        let _back = Home(&self.home);
        Ok(action())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Brings the thread home, also when the action panics.
struct Home<'a>(&'a File);

impl Drop for Home<'_> {
    fn drop(&mut self) {
        if let Err(error) = setns(self.0, CloneFlags::CLONE_NEWNET) {
            // Going on would do the node's business in a pod's namespace.
            tracing::error!(%error, "can't come back from a pod's network namespace");
            std::process::abort();
        }
    }
}

fn cookie_here() -> io::Result<u64> {
    let socket = Socket::new(Domain::UNIX, Type::DGRAM, None::<Protocol>)?;
    sys::netns_cookie(&socket)
}
