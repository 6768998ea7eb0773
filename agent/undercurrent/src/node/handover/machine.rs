//! What a holder does next: its decisions, without sockets, processes or a clock.
//!
//! ```text
//!  a predecessor?         worker: Ready ──► predecessor ──► Yielded ──► worker: Serving
//!   yes ─► Joining ──────────────────────────────────────────────────────────┐
//!   no ──► InCharge ◄────────────────────────────────────────────────────────┘
//!            │ successor: Ready        ▲ the successor is gone, or says nothing for too long
//!            ▼                         │
//!          Yielding ── worker: Yielded, or silent ─► Yielded ── successor: Serving ─► Retired ── worker ended ─► (end)
//! ```
//! Every wait has an end: see the constants. Properties: the tests below.

use std::time::{Duration, Instant};

use super::wire::{Former, Message};

/// A worker that does not yield in this time hangs: the successor goes ahead, and the worker is ended after its drain.
const YIELD_WITHIN: Duration = Duration::from_secs(10);
/// A worker that was given the node and does not serve it in this time is ended, and the node goes back.
const SERVE_WITHIN: Duration = Duration::from_secs(60);
/// The same, as the predecessor sees it: a little later, for then something is wrong with the successor's holder, too.
const TAKEN_WITHIN: Duration = Duration::from_secs(90);
/// How long a holder that is told to end waits for a successor that is about to take over.
const END_WITHIN: Duration = Duration::from_secs(30);
/// A worker that drains and has not ended this long after its time is killed.
const DRAIN_LATE: Duration = Duration::from_secs(10);
/// Crashes in a row, each before the worker had served, after which the holder ends: whoever started it may do better.
const CRASHES: u32 = 6;
const FIRST_RESTART: Duration = Duration::from_millis(50);
const LAST_RESTART: Duration = Duration::from_secs(5);
/// A worker that served this long had not failed to start.
const PROVEN: Duration = Duration::from_secs(30);

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Worker(Message),
    /// With its exit code; none: by a signal.
    WorkerEnded(Option<i32>),
    SuccessorJoined,
    Successor(Message),
    SuccessorGone,
    Predecessor(Message),
    /// And whether somebody answers at its socket all the same.
    PredecessorGone {
        answers: bool,
    },
    /// SIGTERM or SIGINT.
    Terminate,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    ToWorker(Message),
    ToSuccessor(Message),
    ToPredecessor(Message),
    /// And tell the worker what the agent before it does.
    Spawn(Former),
    /// SIGTERM.
    TellWorkerToEnd,
    /// SIGKILL.
    KillWorker,
    /// Be found by successors.
    Listen,
    /// Be found no more, and let go of all sockets.
    LetGo,
    CloseSuccessor,
    Exit(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    /// The predecessor is in charge; since when our worker has its word that the node is ours.
    Joining(Option<Instant>),
    InCharge,
    Yielding(Instant),
    Yielded(Instant),
    Retired(Instant),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Worker {
    Starting,
    Serving(Instant),
    /// It crashed, and is started again then.
    Crashed(Instant),
    Ended,
}

/// The holder's state.
#[derive(Debug)]
pub struct Machine {
    role: Role,
    worker: Worker,
    /// Whether its agent lives.
    predecessor: bool,
    successor: bool,
    listening: bool,
    /// When it was told to end, and whether the worker was, too.
    ending: Option<Instant>,
    worker_told: bool,
    crashes: u32,
    has_served: bool,
    drain: Duration,
    lingers: bool,
}

impl Machine {
    /// With a worker that is about to be started. `lingers`: once retired, it waits to be told to end.
    pub fn new(predecessor: bool, drain: Duration, lingers: bool) -> Self {
        Self {
            role: if predecessor {
                Role::Joining(None)
            } else {
                Role::InCharge
            },
            worker: Worker::Starting,
            predecessor,
            successor: false,
            listening: false,
            ending: None,
            worker_told: false,
            crashes: 0,
            has_served: false,
            drain,
            lingers,
        }
    }

    /// What a worker that is started now is told of the agent before it.
    pub fn former(&self) -> Former {
        match self.role {
            _ if !self.predecessor => Former::Gone,
            Role::Joining(_) => Former::InCharge,
            _ => Former::Finishes,
        }
    }

    /// Whether one more successor could be talked to.
    pub fn takes_successor(&self) -> bool {
        !self.successor && self.role == Role::InCharge
    }

    /// Decides on what happened.
    pub fn on(&mut self, event: Event, now: Instant) -> Vec<Action> {
        match event {
            Event::Worker(message) => self.on_worker(&message, now),
            Event::WorkerEnded(code) => self.on_worker_ended(code, now),
            Event::SuccessorJoined => {
                self.successor = true;
                Vec::new()
            }
            Event::Successor(message) => self.on_successor(&message, now),
            Event::SuccessorGone => self.on_successor_gone(now),
            Event::Predecessor(Message::Yielded) if matches!(self.role, Role::Joining(_)) => {
                self.role = Role::Joining(Some(now));
                vec![Action::ToWorker(Message::Yielded)]
            }
            Event::Predecessor(_) => Vec::new(),
            Event::PredecessorGone { answers } => self.on_predecessor_gone(answers),
            Event::Terminate => self.on_terminate(now),
        }
    }

    fn on_predecessor_gone(&mut self, answers: bool) -> Vec<Action> {
        self.predecessor = false;
        match self.role {
            // It does not trust us any more, and is in charge.
            Role::Joining(_) if answers => vec![Action::KillWorker, Action::Exit(1)],
            Role::Joining(_) => {
                self.role = Role::InCharge;
                vec![Action::ToWorker(Message::Yielded), Action::ToWorker(Message::Gone)]
            }
            Role::Retired(_) if self.worker == Worker::Ended => self.finished(),
            _ => vec![Action::ToWorker(Message::Gone)],
        }
    }

    fn spawn(&mut self) -> Action {
        self.worker = Worker::Starting;
        Action::Spawn(self.former())
    }

    fn on_worker(&mut self, message: &Message, now: Instant) -> Vec<Action> {
        match (message, self.role) {
            (Message::Ready, Role::Joining(_)) => vec![Action::ToPredecessor(Message::Ready)],
            (Message::Serving, _) => {
                self.worker = Worker::Serving(now);
                self.has_served = true;
                let mut actions = Vec::new();
                if matches!(self.role, Role::Joining(_)) {
                    self.role = Role::InCharge;
                    actions.push(Action::ToPredecessor(Message::Serving));
                }
                if !self.listening {
                    self.listening = true;
                    actions.push(Action::Listen);
                }
                actions
            }
            (Message::Yielded, Role::Yielding(_)) => self.yielded(now),
            _ => Vec::new(),
        }
    }

    fn yielded(&mut self, now: Instant) -> Vec<Action> {
        self.role = Role::Yielded(now);
        vec![Action::ToSuccessor(Message::Yielded)]
    }

    fn on_worker_ended(&mut self, code: Option<i32>, now: Instant) -> Vec<Action> {
        self.worker = Worker::Ended;
        let exit = code.unwrap_or(1);
        match self.role {
            Role::Retired(_) => self.finished(),
            Role::Yielding(_) => self.yielded(now),
            Role::Yielded(_) => Vec::new(),
            _ if self.worker_told => vec![Action::Exit(exit)],
            Role::Joining(_) => vec![Action::Exit(exit)],
            // It does not start, or it ended in peace: not ours to repair.
            Role::InCharge if !self.has_served || code == Some(0) => vec![Action::Exit(exit)],
            Role::InCharge => {
                self.crashes += 1;
                if self.crashes > CRASHES {
                    return vec![Action::Exit(exit)];
                }
                let wait = (FIRST_RESTART * 2_u32.pow(self.crashes - 1)).min(LAST_RESTART);
                self.worker = Worker::Crashed(now + wait);
                Vec::new()
            }
        }
    }

    /// The successor hears that the agents before it have ended when this holder closes its channel: not while the one before
    /// this still has connections, for what it needs is taken away then.
    fn finished(&mut self) -> Vec<Action> {
        if self.predecessor {
            return Vec::new();
        }
        let mut actions = vec![Action::CloseSuccessor];
        if self.ending.is_some() || !self.lingers {
            actions.push(Action::Exit(0));
        }
        actions
    }

    fn on_successor(&mut self, message: &Message, now: Instant) -> Vec<Action> {
        match (message, self.role) {
            (Message::Ready, Role::InCharge) => match self.worker {
                Worker::Serving(_) if !self.worker_told => {
                    self.role = Role::Yielding(now);
                    vec![Action::ToWorker(Message::Yield)]
                }
                // It drains, and is in charge of nothing.
                Worker::Serving(_) | Worker::Ended => self.yielded(now),
                // It crashed: the successor is the better repair.
                Worker::Starting | Worker::Crashed(_) => {
                    let mut actions = self.yielded(now);
                    match self.worker {
                        Worker::Starting => actions.push(Action::KillWorker),
                        _ => self.worker = Worker::Ended,
                    }
                    actions
                }
            },
            (Message::Serving, Role::Yielding(_) | Role::Yielded(_)) => {
                self.role = Role::Retired(now);
                let mut actions = vec![Action::LetGo];
                match self.worker {
                    Worker::Ended => actions.extend(self.on_worker_ended(Some(0), now)),
                    _ => actions.push(Action::ToWorker(Message::Drain)),
                }
                actions
            }
            _ => Vec::new(),
        }
    }

    fn on_successor_gone(&mut self, now: Instant) -> Vec<Action> {
        self.successor = false;
        let mut actions = Vec::new();
        if matches!(self.role, Role::Yielding(_) | Role::Yielded(_)) {
            self.role = Role::InCharge;
            match self.worker {
                Worker::Ended if self.ending.is_none() => {
                    actions.push(self.spawn());
                }
                Worker::Ended => actions.push(Action::Exit(0)),
                _ => actions.push(Action::ToWorker(Message::Resume)),
            }
        }
        if self.ending.is_some() && self.role == Role::InCharge {
            actions.extend(self.end_worker(now));
        }
        actions
    }

    fn on_terminate(&mut self, now: Instant) -> Vec<Action> {
        let again = self.ending.replace(now).is_some();
        match (self.role, self.worker) {
            (Role::Retired(_), Worker::Ended) if self.predecessor && !again => Vec::new(),
            (Role::Retired(_), Worker::Ended) => vec![Action::Exit(0)],
            // It drains already.
            (Role::Retired(_), _) => Vec::new(),
            _ if self.successor && !again => Vec::new(),
            _ => self.end_worker(now),
        }
    }

    fn end_worker(&mut self, _now: Instant) -> Vec<Action> {
        match self.worker {
            Worker::Starting | Worker::Serving(_) => {
                self.worker_told = true;
                vec![Action::TellWorkerToEnd]
            }
            Worker::Crashed(_) | Worker::Ended => vec![Action::Exit(0)],
        }
    }

    /// When [`Self::tick`] has something to do next.
    pub fn next_date(&self) -> Option<Instant> {
        let role = match self.role {
            Role::Joining(Some(granted)) => Some(granted + SERVE_WITHIN),
            Role::Yielding(since) => Some(since + YIELD_WITHIN),
            Role::Yielded(since) => Some(since + TAKEN_WITHIN),
            Role::Retired(since) if self.worker != Worker::Ended || self.predecessor => {
                Some(since + self.drain + DRAIN_LATE)
            }
            _ => None,
        };
        let worker = match self.worker {
            Worker::Crashed(again) => Some(again),
            Worker::Serving(since) if self.crashes > 0 => Some(since + PROVEN),
            _ => None,
        };
        let waits = self.successor && !self.worker_told && !matches!(self.role, Role::Retired(_));
        let ending = self.ending.filter(|_| waits).map(|since| since + END_WITHIN);
        [role, worker, ending].into_iter().flatten().min()
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Instant) -> Vec<Action> {
        if self.next_date().is_none_or(|date| date > now) {
            return Vec::new();
        }
        match self.worker {
            Worker::Crashed(again) if again <= now => {
                return vec![self.spawn()];
            }
            Worker::Serving(since) if since + PROVEN <= now => self.crashes = 0,
            _ => {}
        }
        match self.role {
            Role::Joining(Some(granted)) if granted + SERVE_WITHIN <= now => {
                self.role = Role::Joining(None);
                vec![Action::KillWorker]
            }
            Role::Yielding(since) if since + YIELD_WITHIN <= now => self.yielded(now),
            Role::Yielded(since) if since + TAKEN_WITHIN <= now => self.give_up_successor(now),
            Role::Retired(since) if since + self.drain + DRAIN_LATE <= now => {
                self.role = Role::Retired(now);
                if self.worker != Worker::Ended {
                    return vec![Action::KillWorker];
                }
                // It had as long as this one, and began before it.
                self.predecessor = false;
                self.finished()
            }
            Role::InCharge | Role::Yielding(_) | Role::Yielded(_)
                if self.successor && self.ending.is_some_and(|since| since + END_WITHIN <= now) =>
            {
                self.give_up_successor(now)
            }
            _ => Vec::new(),
        }
    }

    fn give_up_successor(&mut self, now: Instant) -> Vec<Action> {
        let mut actions = vec![Action::CloseSuccessor];
        actions.extend(self.on_successor_gone(now));
        actions
    }
}

#[cfg(test)]
mod tests;
