//! The holder's process: a loop over a handful of descriptors, that does what [`super::machine`] decides.
//!
//! It keeps no more than duplicates of the listeners that its worker opened, and so outlives what the worker dies of. It has
//! one thread, no runtime, and waits for nobody longer than [`super::wire::PATIENCE`], but at
//! its start for an agent that is there ([`super::store`]).

use std::{
    fs,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};
use socket2::Socket;

use super::{
    machine::{Action, Event, Machine},
    store::{Store, greet, join, keep, listen, pass_on, tell_all},
    wire::{Channel, Former, Message, Packet},
};

/// What a holder is told.
#[derive(Clone, Debug)]
pub struct HolderConfig {
    /// Where successors find it.
    pub socket: PathBuf,
    /// How long its worker may drain.
    pub drain: Duration,
}

struct Worker {
    pid: Pid,
    /// None once it is closed.
    channel: Option<Channel>,
}

struct Holder {
    config: HolderConfig,
    machine: Machine,
    held: Store,
    worker: Option<Worker>,
    listener: Option<Socket>,
    successor: Option<Channel>,
    predecessor: Option<Channel>,
    signals: SignalFd,
}

/// Holds the listeners and keeps a worker alive, until it is told to end or a successor has taken over. The exit code.
pub fn run(config: HolderConfig) -> anyhow::Result<i32> {
    let found = join(&config.socket);
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
        mask.add(signal);
    }
    mask.thread_block().context("cannot block signals")?;
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    let signals = SignalFd::with_flags(&mask, flags).context("cannot wait for signals")?;
    let (predecessor, held) = found.map_or((None, Store::new()), |(channel, held)| (Some(channel), held));
    let mut holder = Holder {
        machine: Machine::new(predecessor.is_some(), config.drain, lingers()),
        config,
        held,
        worker: None,
        listener: None,
        successor: None,
        predecessor,
        signals,
    };
    let first = holder.machine.former();
    holder.spawn(first).context("cannot start the agent's worker")?;
    loop {
        if let Some(code) = holder.turn()? {
            return Ok(code);
        }
    }
}

/// A container that ended is started again by its kubelet: a retired agent must wait until its pod is deleted.
fn lingers() -> bool {
    std::process::id() == 1 || std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// Who said something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Signals,
    Worker,
    Successor,
    Predecessor,
    Listener,
}

impl Holder {
    /// Waits for one thing to happen and does what is to be done then.
    fn turn(&mut self) -> anyhow::Result<Option<i32>> {
        let ready = self.wait()?;
        let due = self.machine.tick(Instant::now());
        if let Some(code) = self.act(due)? {
            return Ok(Some(code));
        }
        for from in ready {
            for event in self.read(from)? {
                let actions = self.machine.on(event, Instant::now());
                if let Some(code) = self.act(actions)? {
                    return Ok(Some(code));
                }
            }
        }
        Ok(None)
    }

    fn wait(&self) -> anyhow::Result<Vec<From>> {
        let worker = self.worker.as_ref().and_then(|worker| worker.channel.as_ref());
        let listener = self.listener.as_ref().filter(|_| self.machine.takes_successor());
        let sources: Vec<(From, BorrowedFd<'_>)> = [
            Some((From::Signals, self.signals.as_fd())),
            worker.map(|channel| (From::Worker, channel.as_fd())),
            self.successor
                .as_ref()
                .map(|channel| (From::Successor, channel.as_fd())),
            self.predecessor
                .as_ref()
                .map(|channel| (From::Predecessor, channel.as_fd())),
            listener.map(|listener| (From::Listener, listener.as_fd())),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut polled: Vec<PollFd<'_>> = sources
            .iter()
            .map(|(_, source)| PollFd::new(*source, PollFlags::POLLIN))
            .collect();
        let left = self
            .machine
            .next_date()
            .map(|date| date.saturating_duration_since(Instant::now()));
        // A little late, so that what is due is due.
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait"),
        }
        let happened = |polled: &PollFd<'_>| polled.any().unwrap_or(false);
        let ready = sources.iter().zip(&polled).filter(|(_, polled)| happened(polled));
        Ok(ready.map(|((from, _), _)| *from).collect())
    }

    fn read(&mut self, from: From) -> anyhow::Result<Vec<Event>> {
        Ok(match from {
            From::Signals => self.signalled()?,
            From::Listener => self.admit().into_iter().collect(),
            From::Worker => self.hear_worker().into_iter().collect(),
            From::Successor => {
                let received = self.successor.as_ref().map(Channel::receive);
                match received {
                    Some(Ok(Some(packet))) => vec![Event::Successor(packet.message)],
                    Some(_) => {
                        self.successor = None;
                        vec![Event::SuccessorGone]
                    }
                    None => Vec::new(),
                }
            }
            From::Predecessor => {
                let received = self.predecessor.as_ref().map(Channel::receive);
                match received {
                    Some(Ok(Some(packet))) => self.hear_predecessor(packet).into_iter().collect(),
                    Some(_) => {
                        self.predecessor = None;
                        let answers = Channel::connect(&self.config.socket).is_ok();
                        vec![Event::PredecessorGone { answers }]
                    }
                    None => Vec::new(),
                }
            }
        })
    }

    fn signalled(&mut self) -> anyhow::Result<Vec<Event>> {
        let mut events = Vec::new();
        while let Some(signal) = self.signals.read_signal().context("cannot read a signal")? {
            if signal.ssi_signo != Signal::SIGCHLD as u32 {
                events.push(Event::Terminate);
            }
        }
        // As the first process of a container it is everybody's parent.
        loop {
            let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, Some(code)),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    tracing::debug!(%pid, %signal, "a process was ended");
                    (pid, None)
                }
                Ok(WaitStatus::StillAlive) | Err(_) => break,
                Ok(_) => continue,
            };
            if self.worker.as_ref().is_some_and(|worker| worker.pid == pid) {
                // Its last words came before its end.
                while self.worker_says_more() {
                    events.extend(self.hear_worker());
                }
                self.worker = None;
                tracing::info!(%pid, code, "the agent's worker ended");
                events.push(Event::WorkerEnded(code));
            }
        }
        Ok(events)
    }

    fn worker_says_more(&self) -> bool {
        let Some(channel) = self.worker.as_ref().and_then(|worker| worker.channel.as_ref()) else {
            return false;
        };
        let mut polled = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    fn hear_worker(&mut self) -> Option<Event> {
        let worker = self.worker.as_mut()?;
        let packet = match worker.channel.as_ref()?.receive() {
            Ok(Some(packet)) => packet,
            Ok(None) | Err(_) => {
                // Its end is told by the kernel.
                worker.channel = None;
                return None;
            }
        };
        if let Some(successor) = &self.successor
            && let Err(error) = pass_on(successor, &packet)
        {
            tracing::warn!(%error, "a successor does not take what it is told");
        }
        keep(&mut self.held, packet).map(Event::Worker)
    }

    fn hear_predecessor(&mut self, packet: Packet) -> Option<Event> {
        if let Some(channel) = self.worker.as_ref().and_then(|worker| worker.channel.as_ref())
            && let Err(error) = pass_on(channel, &packet)
        {
            tracing::warn!(%error, "the worker does not take what the agent before it told");
        }
        keep(&mut self.held, packet).map(Event::Predecessor)
    }

    /// Lets a successor in: it is told all that is held.
    fn admit(&mut self) -> Option<Event> {
        let (socket, _) = self.listener.as_ref()?.accept().ok()?;
        match greet(socket, &self.held) {
            Ok(Some(channel)) => {
                tracing::info!(held = self.held.len(), "a new agent is here to take over");
                self.successor = Some(channel);
                Some(Event::SuccessorJoined)
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "a new agent could not be told what is held");
                None
            }
        }
    }

    fn act(&mut self, actions: Vec<Action>) -> anyhow::Result<Option<i32>> {
        for action in actions {
            tracing::debug!(?action, "holder");
            match action {
                Action::ToWorker(message) => {
                    let channel = self.worker.as_ref().and_then(|worker| worker.channel.as_ref());
                    tell(channel, &message);
                }
                Action::ToSuccessor(message) => tell(self.successor.as_ref(), &message),
                Action::ToPredecessor(message) => tell(self.predecessor.as_ref(), &message),
                Action::Spawn(former) => self.spawn(former).context("cannot start the agent's worker again")?,
                Action::TellWorkerToEnd => self.signal(Signal::SIGTERM),
                Action::KillWorker => self.signal(Signal::SIGKILL),
                Action::Listen => {
                    let path = &self.config.socket;
                    match listen(path) {
                        Ok(listener) => self.listener = Some(listener),
                        Err(error) => {
                            let socket = path.display();
                            tracing::error!(%socket, %error, "no new agent can take over from this one");
                        }
                    }
                }
                Action::LetGo => {
                    self.listener = None;
                    self.held.clear();
                    tracing::info!("a new agent serves; this one finishes its connections");
                }
                Action::CloseSuccessor => self.successor = None,
                Action::Exit(code) => return Ok(Some(code)),
            }
        }
        Ok(None)
    }

    fn signal(&self, signal: Signal) {
        if let Some(worker) = &self.worker {
            // It may have ended by itself, which is told next.
            let _ = kill(worker.pid, signal);
        }
    }

    /// Starts a worker, and tells it all that is held.
    fn spawn(&mut self, former: Former) -> anyhow::Result<()> {
        let (own, theirs) = Channel::pair()?;
        let mut command = Command::new(executable());
        let mut words = std::env::args_os();
        if let Some(name) = words.next() {
            command.arg0(name);
        }
        command
            .args(words)
            .arg("--worker")
            .stdin(Stdio::from(theirs.into_socket()));
        let child = command.spawn()?;
        let pid = Pid::from_raw(i32::try_from(child.id())?);
        drop(command);
        let told = tell_all(&own, &self.held, former);
        self.worker = Some(Worker {
            pid,
            channel: Some(own),
        });
        if let Err(error) = told {
            tracing::error!(%error, "the worker does not listen");
            self.signal(Signal::SIGKILL);
        }
        Ok(())
    }
}

/// The program that runs, also when its file was replaced meanwhile.
fn executable() -> PathBuf {
    let running = PathBuf::from("/proc/self/exe");
    let number = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    match std::env::current_exe() {
        Ok(path) if number(&path) == number(&running) => path,
        _ => running,
    }
}

fn tell(channel: Option<&Channel>, message: &Message) {
    if let Some(channel) = channel
        && let Err(error) = channel.send(message, &[])
    {
        // Whoever is gone is told by the end of its socket.
        tracing::debug!(%error, ?message, "not told");
    }
}
