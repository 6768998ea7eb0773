//! Fair turns for the tasks of one thread: between groups of tasks, not between tasks.
//!
//! ```text
//!             a turn left, nobody of the group waits                a round ends when the thread has nothing else to do
//! task woken ───────────────────────────────────────► polled ◄────────────────────────────┐ and has looked at its sockets
//!      └─ its group had its turn in this round ─► waits, in the group's order ─► released ─┘
//! ```
//! An executor polls its tasks in the order in which they were woken: a group with a thousand busy tasks has a thousand
//! turns for one of a group with a single task. Here a group whose tasks took more than [`TURN`] of a round waits for the
//! next one; a round is short, since every group has at most a turn in it, and between rounds the thread polls its sockets
//! (`a_quiet_group_is_polled_after_one_turn_of_a_noisy_one`). A group that was alone on the thread for [`ALONE`] never waits.
//!
//! One poll can't be cut short: what a single task does in one poll is bounded by itself. Nothing is lost when a task that
//! waits is dropped; without [`Turns::run`] nobody ever waits.

use std::{
    cell::{Cell, RefCell},
    collections::VecDeque,
    future::{Future, poll_fn},
    pin::Pin,
    rc::Rc,
    sync::OnceLock,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use pin_project_lite::pin_project;

use crate::Urgency;

/// What a group's tasks may take of a round, together.
pub const TURN: Duration = Duration::from_micros(100);

/// After this long without work of another group there is nobody to be fair to.
pub const ALONE: Duration = Duration::from_secs(10);

thread_local! {
    /// When this thread last began to work, or ended a poll.
    static LAST: Cell<u64> = const { Cell::new(0) };
}

/// To be called whenever a thread wakes that has nothing to do: the time it slept is nobody's.
pub fn thread_woke() {
    LAST.set(now());
}

/// Nanoseconds of a clock that never goes back.
fn now() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The turns of one thread. Cheap to clone.
#[derive(Clone)]
pub struct Turns(Rc<Inner>);

struct Inner {
    clock: fn() -> u64,
    round: Cell<u64>,
    /// Whether somebody ends rounds.
    paced: Cell<bool>,
    pacer: RefCell<Option<Waker>>,
    /// Groups with tasks that wait.
    contended: RefCell<VecDeque<Group>>,
    /// The group that was polled last, by its number, and since when no other was.
    polled: Cell<u64>,
    since: Cell<u64>,
    groups: Cell<u64>,
    urgency: Option<Urgency>,
}

/// Tasks that share their turns. Cheap to clone; [`Group::default`] is one of no thread's turns, whose tasks never wait.
#[derive(Clone)]
pub struct Group(Rc<GroupInner>);

struct GroupInner {
    turns: Rc<Inner>,
    id: u64,
    round: Cell<u64>,
    /// Nanoseconds, in that round.
    used: Cell<u64>,
    /// What a poll takes, smoothed.
    usual: Cell<u64>,
    waiting: RefCell<VecDeque<Waker>>,
    /// Whoever waits has a number; those below this one need not any more.
    released: Cell<u64>,
    numbers: Cell<u64>,
}

impl Default for Turns {
    fn default() -> Self {
        Self::with(now, None)
    }
}

impl Turns {
    /// On a thread that is urgent while its groups together do little.
    pub fn urgent(urgency: Urgency) -> Self {
        Self::with(now, Some(urgency))
    }

    fn with(clock: fn() -> u64, urgency: Option<Urgency>) -> Self {
        Self(Rc::new(Inner {
            clock,
            round: Cell::new(0),
            paced: Cell::new(false),
            pacer: RefCell::default(),
            contended: RefCell::default(),
            polled: Cell::new(0),
            since: Cell::new(0),
            groups: Cell::new(0),
            urgency,
        }))
    }

    /// A new group.
    pub fn group(&self) -> Group {
        let id = self.0.groups.get() + 1;
        self.0.groups.set(id);
        Group(Rc::new(GroupInner {
            turns: self.0.clone(),
            id,
            round: Cell::new(0),
            used: Cell::new(0),
            usual: Cell::new(0),
            waiting: RefCell::default(),
            released: Cell::new(0),
            numbers: Cell::new(0),
        }))
    }

    /// Ends rounds, for as long as it is polled. To be spawned once on the thread; it costs nothing while nobody waits.
    pub async fn run(self) {
        self.0.paced.set(true);
        LAST.set((self.0.clock)());
        loop {
            poll_fn(|cx| match self.0.contended.borrow().is_empty() {
                true => {
                    *self.0.pacer.borrow_mut() = Some(cx.waker().clone());
                    Poll::Pending
                }
                false => Poll::Ready(()),
            })
            .await;
            // The executor runs dry, looks at its sockets, and comes back here last.
            tokio::task::yield_now().await;
            self.0.next_round();
        }
    }
}

impl Inner {
    fn next_round(&self) {
        self.round.set(self.round.get() + 1);
        let contended = std::mem::take(&mut *self.contended.borrow_mut());
        for group in contended {
            if group.release() {
                self.contended.borrow_mut().push_back(group);
            }
        }
    }
}

impl Default for Group {
    fn default() -> Self {
        Turns::default().group()
    }
}

impl Group {
    /// The future as one of this group's tasks.
    pub fn fair<F: Future>(&self, future: F) -> Fair<F> {
        Fair {
            group: self.clone(),
            number: None,
            future,
        }
    }

    /// Lets as many go on as will use up about a turn. True if others still wait.
    fn release(&self) -> bool {
        let group = &self.0;
        let usual = group.usual.get().max(1);
        let turns = (TURN.as_nanos() as u64 / usual).max(1);
        let mut waiting = group.waiting.borrow_mut();
        let count = turns.min(waiting.len() as u64);
        group.released.set(group.released.get() + count);
        let woken: Vec<Waker> = waiting.drain(..count as usize).collect();
        let left = !waiting.is_empty();
        drop(waiting);
        woken.into_iter().for_each(Waker::wake);
        left
    }

    /// Whether one more has to wait.
    fn has_had_its_turn(&self) -> bool {
        let (group, turns) = (&self.0, &self.0.turns);
        let alone =
            group.id == turns.polled.get() && LAST.get().saturating_sub(turns.since.get()) > ALONE.as_nanos() as u64;
        if !turns.paced.get() || alone {
            return false;
        }
        self.enter_round();
        group.used.get() >= TURN.as_nanos() as u64 || !group.waiting.borrow().is_empty()
    }

    fn enter_round(&self) {
        let (group, turns) = (&self.0, &self.0.turns);
        if group.round.replace(turns.round.get()) != turns.round.get() {
            group.used.set(0);
        }
    }

    fn wait(&self, cx: &Context<'_>) -> u64 {
        let group = &self.0;
        let mut waiting = group.waiting.borrow_mut();
        if waiting.is_empty() {
            let turns = &group.turns;
            turns.contended.borrow_mut().push_back(self.clone());
            if let Some(pacer) = turns.pacer.borrow_mut().take() {
                pacer.wake();
            }
        }
        waiting.push_back(cx.waker().clone());
        let number = group.numbers.get();
        group.numbers.set(number + 1);
        number
    }

    fn charge(&self) {
        let (group, turns) = (&self.0, &self.0.turns);
        let now = (turns.clock)();
        let took = now.saturating_sub(LAST.replace(now));
        if let Some(urgency) = &turns.urgency {
            urgency.worked(now, took);
        }
        self.enter_round();
        group.used.set(group.used.get() + took);
        let usual = group.usual.get();
        group.usual.set(usual - usual / 8 + took / 8);
        if turns.polled.replace(group.id) != group.id {
            turns.since.set(now);
        }
    }
}

pin_project! {
    /// A future that takes its group's turns: a whole task's, so that it is always woken by the same waker.
    #[must_use = "futures do nothing unless polled"]
    pub struct Fair<F> {
        group: Group,
        number: Option<u64>,
        #[pin]
        future: F,
    }
}

impl<F: Future> Future for Fair<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        match *this.number {
            // Woken by something else: its place is kept.
            Some(number) if number >= this.group.0.released.get() => return Poll::Pending,
            Some(_) => *this.number = None,
            None if this.group.has_had_its_turn() => {
                *this.number = Some(this.group.wait(cx));
                return Poll::Pending;
            }
            None => {}
        }
        let polled = this.future.poll(cx);
        this.group.charge();
        polled
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::task::spawn_local;

    use super::*;

    thread_local! {
        static TIME: Cell<u64> = const { Cell::new(0) };
        /// Polls of the noisy group so far.
        static POLLS: Cell<u64> = const { Cell::new(0) };
    }

    const POLL: Duration = Duration::from_micros(20);

    fn take(time: Duration) {
        TIME.set(TIME.get() + time.as_nanos() as u64);
    }

    /// Always has something to do.
    async fn busy(polls: u64, mut each: impl FnMut()) {
        let mut left = polls;
        poll_fn(|cx| {
            take(POLL);
            each();
            left -= 1;
            cx.waker().wake_by_ref();
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn on_a_thread<T>(test: impl AsyncFnOnce(Turns) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build_local(tokio::runtime::LocalOptions::default())
            .unwrap();
        runtime.block_on(async {
            let turns = Turns::with(|| TIME.get(), None);
            spawn_local(turns.clone().run());
            tokio::task::yield_now().await;
            test(turns).await
        })
    }

    /// How many polls of a noisy group come between something for a quiet one and its poll, at worst.
    fn longest_wait(fair: bool) -> u64 {
        on_a_thread(async |turns| {
            let (near, far) = UnixStream::pair().unwrap();
            near.set_nonblocking(true).unwrap();
            far.set_nonblocking(true).unwrap();
            let (noisy, quiet) = match fair {
                true => (turns.group(), turns.group()),
                false => (Group::default(), Group::default()),
            };
            let sent = Rc::new(RefCell::new(VecDeque::new()));
            for task in 0..64 {
                let (sent, near) = (sent.clone(), near.try_clone().unwrap());
                let each = move || {
                    POLLS.set(POLLS.get() + 1);
                    if task == 0 && sent.borrow().is_empty() {
                        sent.borrow_mut().push_back(POLLS.get());
                        assert_eq!(std::io::Write::write(&mut &near, b"x").unwrap(), 1);
                    }
                };
                spawn_local(noisy.fair(busy(200, each)));
            }
            let far = tokio::net::UnixStream::from_std(far).unwrap();
            let waiting = quiet.fair(async move {
                let mut longest = 0;
                for _ in 0..50 {
                    while far.try_read(&mut [0]).is_err() {
                        far.readable().await.unwrap();
                    }
                    let at = sent.borrow_mut().pop_front().unwrap();
                    longest = longest.max(POLLS.get() - at);
                }
                longest
            });
            spawn_local(waiting).await.unwrap()
        })
    }

    #[test]
    fn a_quiet_group_is_polled_after_one_turn_of_a_noisy_one() {
        let a_turn = (TURN.as_nanos() / POLL.as_nanos()) as u64;
        let waited = longest_wait(true);
        assert!(waited <= a_turn + 1, "{waited}");
        // And without turns it would not be.
        POLLS.set(0);
        let waited = longest_wait(false);
        assert!(waited > 2 * a_turn, "{waited}");
    }

    #[test]
    fn groups_share_alike_however_many_tasks_they_have() {
        let (one, many) = on_a_thread(async |turns| {
            let counts = [Rc::new(Cell::new(0u64)), Rc::new(Cell::new(0u64))];
            let [single, crowd] = [turns.group(), turns.group()];
            let spawn = |group: &Group, polls, count: &Rc<Cell<u64>>| {
                let count = count.clone();
                spawn_local(group.fair(busy(polls, move || count.set(count.get() + 1))))
            };
            for _ in 0..100 {
                spawn(&crowd, 1000, &counts[1]);
            }
            spawn(&single, 5000, &counts[0]).await.unwrap();
            (counts[0].get(), counts[1].get())
        });
        assert!(many < one * 12 / 10 && many > one * 8 / 10, "{one} to {many}");
    }

    #[test]
    fn a_task_that_is_dropped_while_it_waits_holds_up_nobody() {
        on_a_thread(async |turns| {
            let (a, b) = (turns.group(), turns.group());
            let spawn = |group: &Group| spawn_local(group.fair(busy(1000, || ())));
            let dropped: Vec<_> = (0..50).map(|_| spawn(&a)).collect();
            let (rival, last) = (spawn(&b), spawn(&a));
            tokio::task::yield_now().await;
            dropped.iter().for_each(|task| task.abort());
            rival.await.unwrap();
            last.await.unwrap();
        });
    }

    #[test]
    fn who_is_alone_never_waits() {
        let rounds = on_a_thread(async |turns| {
            let (alone, other) = (turns.group(), turns.group());
            spawn_local(other.fair(busy(1, || ()))).await.unwrap();
            spawn_local(alone.fair(busy(1, || take(ALONE)))).await.unwrap();
            spawn_local(alone.fair(busy(1, || take(ALONE)))).await.unwrap();
            let before = turns.0.round.get();
            let tasks: Vec<_> = (0..50).map(|_| spawn_local(alone.fair(busy(100, || ())))).collect();
            for task in tasks {
                task.await.unwrap();
            }
            turns.0.round.get() - before
        });
        assert_eq!(rounds, 0);
    }
}
