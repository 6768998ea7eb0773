//! Who allocated what is in use: the C library's allocator, of which samples are taken while somebody asks for them.
//!
//! ```text
//! alloc ─► System ─► off: nothing more (one relaxed load)
//!                └─► on: about one in INTERVAL bytes is a sample: its call stack, until it is freed
//! ```
//! A profile is of a span of time: what was allocated within it and was still in use at its end. What was there before is
//! not in it, since nothing is recorded while nobody asks; what grows shows.
//!
//! Under failure: one profile at a time. What allocates while a sample is recorded is not recorded itself (`BUSY`), so that
//! recording can't meet itself, nor wait for a lock that its own thread holds. At most [`MOST`] samples are kept; what is
//! beyond is counted as dropped. A sample that was freed by a thread that was recording just then stays in the profile.

#![allow(
    unsafe_code,
    reason = "an allocator is made of unsafe functions; all they do is to call that of the system"
)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// A sample stands for about so many bytes.
pub const INTERVAL: usize = 64 << 10;

/// Samples that are kept at once: 4 GiB of small allocations.
const MOST: usize = 1 << 16;

/// Frames of a call stack.
const DEPTH: usize = 64;

/// Whether samples are taken.
static ON: AtomicBool = AtomicBool::new(false);
/// Whether somebody has a [`Sampling`].
static TAKEN: AtomicBool = AtomicBool::new(false);
static KEPT: AtomicUsize = AtomicUsize::new(0);
static DROPPED: AtomicUsize = AtomicUsize::new(0);

const TABLES: usize = 16;
/// Samples by address, in several tables so that threads do not wait for each other.
static SAMPLES: [Mutex<BTreeMap<usize, Sample>>; TABLES] = [const { Mutex::new(BTreeMap::new()) }; TABLES];

thread_local! {
    /// Bytes until the next sample.
    static LEFT: Cell<usize> = const { Cell::new(INTERVAL) };
    /// Whether this thread is recording.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// An allocation that stands for others like it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// How many allocations it stands for.
    pub count: usize,
    /// Their bytes.
    pub bytes: usize,
    /// The call stack, as addresses of instructions, the innermost first.
    pub stack: Vec<usize>,
}

/// The allocator of the system, of which samples can be taken. To be made the `#[global_allocator]`.
#[derive(Debug)]
pub struct Sampled;

// SAFETY: all is done by the system's allocator, with the caller's own promises; what is added looks at numbers.
unsafe impl GlobalAlloc for Sampled {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises.
        let pointer = unsafe { System.alloc(layout) };
        allocated(pointer, layout.size());
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promises.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        allocated(pointer, layout.size());
        pointer
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // Before another thread can be given the same address.
        freed(pointer);
        // SAFETY: the caller's promises.
        unsafe { System.dealloc(pointer, layout) };
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        freed(pointer);
        // SAFETY: the caller's promises.
        let new = unsafe { System.realloc(pointer, layout, size) };
        allocated(new, size);
        new
    }
}

#[inline(always)]
fn allocated(pointer: *mut u8, size: usize) {
    if ON.load(Ordering::Relaxed) {
        count(pointer as usize, size);
    }
}

#[inline(always)]
fn freed(pointer: *mut u8) {
    if ON.load(Ordering::Relaxed) {
        forget(pointer as usize);
    }
}

#[cold]
fn count(address: usize, size: usize) {
    // Neither is there when a thread ends: then nothing is counted.
    let _ = LEFT.try_with(|left| {
        if address == 0 || BUSY.try_with(Cell::get) != Ok(false) {
            return;
        }
        match left.get().checked_sub(size) {
            Some(rest) if rest > 0 => left.set(rest),
            _ => {
                left.set(INTERVAL);
                while_busy(|| record(address, size));
            }
        }
    });
}

#[cold]
fn forget(address: usize) {
    if KEPT.load(Ordering::Relaxed) > 0 && BUSY.try_with(Cell::get) == Ok(false) {
        while_busy(|| {
            if table(address).remove(&address).is_some() {
                KEPT.fetch_sub(1, Ordering::Relaxed);
            }
        });
    }
}

fn while_busy(does: impl FnOnce()) {
    let _ = BUSY.try_with(|busy| {
        busy.set(true);
        does();
        busy.set(false);
    });
}

fn table(address: usize) -> MutexGuard<'static, BTreeMap<usize, Sample>> {
    // Allocations begin at multiples of 16.
    let table = &SAMPLES[(address >> 4) % TABLES];
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

fn record(address: usize, size: usize) {
    if KEPT.load(Ordering::Relaxed) >= MOST {
        DROPPED.fetch_add(1, Ordering::Relaxed);
        return;
    }
    let mut stack = Vec::with_capacity(DEPTH);
    backtrace::trace(|frame| {
        stack.push(frame.ip() as usize);
        stack.len() < DEPTH
    });
    // A large one stands for itself.
    let count = (INTERVAL / size.max(1)).max(1);
    let sample = Sample {
        count,
        bytes: count * size,
        stack,
    };
    if table(address).insert(address, sample).is_none() {
        KEPT.fetch_add(1, Ordering::Relaxed);
    }
}

/// Samples are taken until it is ended or dropped.
#[derive(Debug)]
pub struct Sampling(());

impl Sampling {
    /// None: somebody else is at it.
    pub fn start() -> Option<Self> {
        if TAKEN.swap(true, Ordering::AcqRel) {
            return None;
        }
        DROPPED.store(0, Ordering::Relaxed);
        // One that was recorded while the last was ending.
        take();
        ON.store(true, Ordering::Release);
        Some(Self(()))
    }

    /// What was allocated since, and is in use; and how many samples were dropped, there being too many.
    pub fn end(self) -> (Vec<Sample>, usize) {
        ON.store(false, Ordering::Release);
        let samples = take();
        (samples, DROPPED.load(Ordering::Relaxed))
    }
}

impl Drop for Sampling {
    fn drop(&mut self) {
        ON.store(false, Ordering::Release);
        take();
        TAKEN.store(false, Ordering::Release);
    }
}

fn take() -> Vec<Sample> {
    let mut samples = Vec::new();
    for table in &SAMPLES {
        while_busy(|| {
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = std::mem::take(&mut *table);
            KEPT.fetch_sub(taken.len(), Ordering::Relaxed);
            samples.extend(taken.into_values());
        });
    }
    samples
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;

    use super::*;

    #[global_allocator]
    static ALLOCATOR: Sampled = Sampled;

    #[inline(never)]
    fn grows() -> Vec<Vec<u8>> {
        (0..1000).map(|_| black_box(vec![1; 4096])).collect()
    }

    fn of_grows(samples: &[Sample]) -> usize {
        let is_of = |sample: &&Sample| {
            sample.stack.iter().any(|address| {
                let mut found = false;
                backtrace::resolve(*address as *mut _, |symbol| {
                    found |= symbol.name().is_some_and(|name| name.to_string().contains("grows"));
                });
                found
            })
        };
        samples.iter().filter(is_of).map(|sample| sample.bytes).sum()
    }

    // One test: there is one allocator.
    #[test]
    fn what_grows_is_seen_and_what_is_freed_is_not() {
        let sampling = Sampling::start().unwrap();
        assert!(Sampling::start().is_none(), "one at a time");
        let kept = grows();
        drop(grows());
        let others: Vec<_> = (0..4)
            .map(|_| std::thread::spawn(|| (0..10_000).map(|size| black_box(vec![0_u8; size]).len()).sum::<usize>()))
            .collect();
        for other in others {
            other.join().unwrap();
        }
        let (samples, dropped) = sampling.end();
        assert_eq!(dropped, 0);
        let (bytes, all) = (of_grows(&samples), 1000 * 4096);
        assert!(bytes > all * 8 / 10 && bytes < all * 12 / 10, "{bytes} of {all}");
        drop(kept);

        // And nothing is left for the next one, which sees what was reallocated, and at its last size.
        let sampling = Sampling::start().unwrap();
        let mut large: Vec<u8> = Vec::with_capacity(INTERVAL * 2);
        large.reserve_exact(INTERVAL * 64);
        let (samples, _) = sampling.end();
        let largest = samples.iter().map(|sample| sample.bytes).max();
        assert_eq!(largest, Some(INTERVAL * 64));
        assert!(!samples.iter().any(|sample| sample.bytes == INTERVAL * 2));
        drop(large);
        drop(Sampling::start().unwrap());
        assert_eq!(KEPT.load(Ordering::Relaxed), 0);
    }
}
