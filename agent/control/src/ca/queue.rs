//! Work that takes a processor, on a few threads of its own, fairly shared among those who ask.
//!
//! Each caller has a line; the threads take from the lines in turn, so that a node with a thousand requests does not hold
//! up another's one (`a_caller_with_many_jobs_does_not_hold_up_another`). Bounded in all and for each caller
//! (`what_is_over_the_bounds_is_refused_at_once`). When all is full, a caller with less than its share is still heard: the
//! longest line loses its last. Dropping the queue ends the threads; jobs that wait are dropped, which their callers see.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use tokio::sync::oneshot;

/// How much.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Threads.
    pub threads: usize,
    /// Jobs that wait, in all.
    pub waiting: usize,
    /// Jobs that wait, of one caller.
    pub waiting_per_caller: usize,
}

impl Default for Bounds {
    /// A thread for each core up to four; some seconds of work.
    fn default() -> Self {
        Self {
            threads: thread::available_parallelism().map_or(1, |cores| cores.get().min(4)),
            waiting: 8192,
            waiting_per_caller: 1024,
        }
    }
}

/// The line is full; later it may not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// This caller's own.
    #[error("{0} requests of this caller wait already")]
    Caller(usize),
    /// Everybody's.
    #[error("{0} requests wait already")]
    All(usize),
}

type Job = Box<dyn FnOnce() + Send>;

/// The lines and the threads that serve them.
pub struct Queue {
    shared: Arc<Shared>,
    bounds: Bounds,
}

struct Shared {
    lines: Mutex<Lines>,
    more: Condvar,
}

#[derive(Default)]
struct Lines {
    by_caller: HashMap<Arc<str>, VecDeque<Job>>,
    /// Whose turn it is: each caller that has a line, once.
    turns: VecDeque<Arc<str>>,
    waiting: usize,
    closed: bool,
}

impl Queue {
    /// Starts the threads.
    pub fn start(bounds: Bounds) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            lines: Mutex::default(),
            more: Condvar::new(),
        });
        for number in 0..bounds.threads.max(1) {
            let shared = shared.clone();
            thread::Builder::new()
                .name(format!("sign-{number}"))
                .spawn(move || shared.serve())?;
        }
        Ok(Self { shared, bounds })
    }

    /// Has a job done; the receiver answers when it is, or fails if it never will be. A job whose receiver is gone is
    /// skipped.
    pub fn submit<T: Send + 'static>(
        &self,
        caller: &Arc<str>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<oneshot::Receiver<T>, Full> {
        let (done, result) = oneshot::channel();
        let job = move || {
            if !done.is_closed() {
                // Who no longer waits does not need the answer.
                let _ = done.send(job());
            }
        };
        let mut lines = self.shared.lock();
        let displaced = lines.make_room(caller, &self.bounds)?;
        lines.push(caller, Box::new(job));
        drop(lines);
        drop(displaced);
        self.shared.more.notify_one();
        Ok(result)
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        let mut lines = self.shared.lock();
        lines.closed = true;
        let left = std::mem::take(&mut lines.by_caller);
        drop(lines);
        drop(left);
        self.shared.more.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Lines> {
        // No job runs under the lock, so nothing there can be half done.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        while let Some(job) = self.next() {
            // A panic is a fault of ours; it costs that request and not a thread.
            if std::panic::catch_unwind(std::panic::AssertUnwindSafe(job)).is_err() {
                tracing::error!("a request of the certificate authority's queue panicked");
            }
        }
    }

    fn next(&self) -> Option<Job> {
        let mut lines = self.lock();
        loop {
            if lines.closed {
                return None;
            }
            if let Some(job) = lines.take() {
                return Some(job);
            }
            lines = self.more.wait(lines).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Lines {
    fn push(&mut self, caller: &Arc<str>, job: Job) {
        let line = self.by_caller.entry(caller.clone()).or_default();
        if line.is_empty() {
            self.turns.push_back(caller.clone());
        }
        line.push_back(job);
        self.waiting += 1;
    }

    fn take(&mut self) -> Option<Job> {
        let caller = self.turns.pop_front()?;
        let line = self.by_caller.get_mut(&caller)?;
        let job = line.pop_front()?;
        self.waiting -= 1;
        if line.is_empty() {
            self.by_caller.remove(&caller);
        } else {
            self.turns.push_back(caller);
        }
        Some(job)
    }

    /// Room for one more of this caller; what had to go for it is handed back to be dropped outside the lock.
    fn make_room(&mut self, caller: &Arc<str>, bounds: &Bounds) -> Result<Option<Job>, Full> {
        let own = self.by_caller.get(caller).map_or(0, VecDeque::len);
        if own >= bounds.waiting_per_caller {
            return Err(Full::Caller(own));
        }
        if self.waiting < bounds.waiting {
            return Ok(None);
        }
        let longest = self.by_caller.iter().max_by_key(|(_, line)| line.len());
        let Some(longest) = longest
            .filter(|(_, line)| line.len() > own + 1)
            .map(|(name, _)| name.clone())
        else {
            return Err(Full::All(self.waiting));
        };
        let displaced = self.by_caller.get_mut(&longest).and_then(VecDeque::pop_back);
        self.waiting -= usize::from(displaced.is_some());
        Ok(displaced)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn one_thread(waiting: usize, waiting_per_caller: usize) -> Queue {
        Queue::start(Bounds {
            threads: 1,
            waiting,
            waiting_per_caller,
        })
        .unwrap()
    }

    /// Keeps the thread busy until the sender is dropped.
    fn block(queue: &Queue) -> mpsc::Sender<()> {
        let (release, blocked) = mpsc::channel::<()>();
        let (started, starts) = mpsc::channel();
        let _running = queue.submit(&"blocker".into(), move || {
            started.send(()).unwrap();
            blocked.recv().unwrap_err();
        });
        starts.recv().unwrap();
        release
    }

    #[tokio::test]
    async fn a_caller_with_many_jobs_does_not_hold_up_another() {
        let queue = one_thread(100, 100);
        // The blocker's receiver is gone, but it runs already.
        let (order, seen) = mpsc::channel();
        let (release, blocked) = mpsc::channel::<()>();
        let first = queue.submit(&"greedy".into(), move || blocked.recv().is_err()).unwrap();
        let job = |name: &'static str| {
            let order = order.clone();
            move || order.send(name).unwrap()
        };
        let greedy: Vec<_> = (0..20)
            .map(|_| queue.submit(&"greedy".into(), job("greedy")).unwrap())
            .collect();
        let modest = queue.submit(&"modest".into(), job("modest")).unwrap();
        drop(release);
        first.await.unwrap();
        modest.await.unwrap();
        for done in greedy {
            done.await.unwrap();
        }
        let order: Vec<_> = seen.try_iter().collect();
        assert!(
            order.iter().position(|name| *name == "modest").unwrap() <= 2,
            "{order:?}"
        );
    }

    #[tokio::test]
    async fn what_is_over_the_bounds_is_refused_at_once() {
        let queue = one_thread(8, 5);
        let (release, blocked) = mpsc::channel::<()>();
        let (started, starts) = mpsc::channel();
        let first = queue.submit(&"x".into(), move || {
            started.send(()).unwrap();
            blocked.recv().is_err()
        });
        starts.recv().unwrap();
        let submit = |name: &str| queue.submit(&name.into(), || ());
        let a: Vec<_> = (0..5).map(|_| submit("a").unwrap()).collect();
        assert_eq!(submit("a").unwrap_err(), Full::Caller(5));
        let b: Vec<_> = (0..3).map(|_| submit("b").unwrap()).collect();
        assert_eq!(queue.waiting(), 8);
        // b and c are below the share of a, which gives way; then everybody has as much.
        let c = submit("c").unwrap();
        assert_eq!(queue.waiting(), 8);
        drop(release);
        first.unwrap().await.unwrap();
        let mut lost = 0;
        for done in a {
            lost += usize::from(done.await.is_err());
        }
        assert_eq!(lost, 1);
        for done in b {
            done.await.unwrap();
        }
        c.await.unwrap();
        assert_eq!(queue.waiting(), 0);
    }

    #[tokio::test]
    async fn a_job_that_panics_costs_itself_only() {
        let queue = one_thread(8, 8);
        assert!(
            queue
                .submit(&"a".into(), || panic!("on purpose"))
                .unwrap()
                .await
                .is_err()
        );
        assert_eq!(queue.submit(&"a".into(), || 5).unwrap().await, Ok(5));
    }

    #[tokio::test]
    async fn dropping_the_queue_answers_those_who_wait() {
        let queue = one_thread(8, 8);
        let release = block(&queue);
        let waits = queue.submit(&"a".into(), || ()).unwrap();
        drop(queue);
        assert!(waits.await.is_err());
        drop(release);
    }
}
