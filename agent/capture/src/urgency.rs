//! Threads that run before others.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::sys::{self, Scheduling};

/// Microseconds that an urgent thread may run without a rest before the kernel ends the process: long after it should have
/// become usual by itself.
const LONGEST: u64 = 500_000;

/// Nanoseconds that a thread which does much may run at a time. Longer than the kernel's usual one: whoever wakes and asks for
/// less at a time goes before it (Linux 6.12 and newer; older ones have the same for all).
const SLICE: u64 = 20_000_000;

/// Whether threads of this process may be urgent; if so, one that runs and runs ends the process (SIGXCPU), rather than
/// keep others of the node off a processor.
///
/// # Errors
/// The process lacks CAP_SYS_NICE, or its cgroup has no time for it (a kernel with `CONFIG_RT_GROUP_SCHED`).
pub fn allow_urgency() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_RTTIME)?;
    setrlimit(Resource::RLIMIT_RTTIME, LONGEST.min(soft), hard)?;
    set_urgent(true)?;
    set_urgent(false)
}

/// Has this thread run before all that is not urgent (`SCHED_RR`, the lowest priority), or as usual with the nice value that
/// it had, in long slices. Threads that it starts are usual.
///
/// # Errors
/// As of [`allow_urgency`].
pub fn set_urgent(urgent: bool) -> io::Result<()> {
    sys::schedule(if urgent {
        Scheduling::Urgent
    } else {
        Scheduling::Usual { slice: SLICE }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> u64 {
        // The 41st field; the name may have blanks in it.
        let stat = std::fs::read_to_string("/proc/thread-self/stat").unwrap();
        let after_name = stat.rsplit_once(')').unwrap().1;
        after_name.split_whitespace().nth(38).unwrap().parse().unwrap()
    }

    #[test]
    fn a_thread_is_urgent_and_what_it_starts_is_not() {
        if let Err(error) = allow_urgency() {
            println!("not run: no thread may be urgent here: {error}");
            return;
        }
        let (round_robin, other) = (2, 0);
        set_urgent(true).unwrap();
        assert_eq!(policy(), round_robin);
        assert_eq!(std::thread::spawn(policy).join().unwrap(), other);
        set_urgent(false).unwrap();
        assert_eq!(policy(), other);
    }
}
