//! File descriptors: connections may not have the last ones.
//!
//! A process has so many (`RLIMIT_NOFILE`). If connections took them all, nobody could ask the agent what is wrong, no pod
//! could be captured and no certificate fetched. So a part is kept, and a connection that would take of it is refused with
//! a reason (`connections_do_not_get_the_last_descriptors`). What lives goes on, and when enough has ended, the next one is
//! served.
//!
//! Nothing is counted: the kernel hands out the lowest number that is free, so the number of a new descriptor says how many
//! are in use at the least. The limit is asked for each time, since `prlimit` may change it while the agent runs.

use std::{io, os::fd::AsRawFd};

use nix::sys::resource::{Resource, getrlimit};

/// At most so many are kept, which is enough for a few pods to be captured (some 40 each).
const KEPT_AT_MOST: u64 = 1024;

/// Connections have as many descriptors as they may.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "the agent has too many open files: of its {limit} (RLIMIT_NOFILE) the last {kept} are not for connections; raise \
     the limit (systemd: LimitNOFILE=, at once: prlimit --nofile), or have fewer connections on the node"
)]
pub struct OutOfDescriptors {
    limit: u64,
    kept: u64,
}

/// Whether a connection may have this descriptor, which was just made.
pub(crate) fn spare(descriptor: &impl AsRawFd) -> Result<(), OutOfDescriptors> {
    // Without a limit that can be read there is none to keep.
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, u64::MAX));
    let used = u64::try_from(descriptor.as_raw_fd()).unwrap_or(0);
    check(used, limit)
}

/// A socket that was made to dial with, if a connection may have it.
pub(crate) fn spared(socket: io::Result<socket2::Socket>) -> io::Result<socket2::Socket> {
    let socket = socket?;
    spare(&socket).map_err(io::Error::other)?;
    Ok(socket)
}

fn check(used: u64, limit: u64) -> Result<(), OutOfDescriptors> {
    let kept = (limit / 4).min(KEPT_AT_MOST);
    match used < limit - kept {
        true => Ok(()),
        false => Err(OutOfDescriptors { limit, kept }),
    }
}

/// Whether this is what becomes of too many open files: ours, or of the whole machine.
pub(crate) fn are_exhausted(error: &io::Error) -> bool {
    use nix::libc::{EMFILE, ENFILE};
    let ours = error.get_ref().is_some_and(|inner| inner.is::<OutOfDescriptors>());
    ours || matches!(error.raw_os_error(), Some(EMFILE | ENFILE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_is_kept_and_of_many_a_thousand() {
        assert_eq!(check(767, 1024), Ok(()));
        assert_eq!(check(768, 1024), Err(OutOfDescriptors { limit: 1024, kept: 256 }));
        assert_eq!(check(1_048_576 - 1025, 1_048_576), Ok(()));
        assert!(check(1_048_576 - 1024, 1_048_576).is_err());
        assert_eq!(check(1 << 40, u64::MAX), Ok(()));
    }
}
