//! The client: connects, again and again, and takes what it is told.

use std::{
    hash::{BuildHasher, RandomState},
    net::SocketAddr,
    time::SystemTime,
};

use identity::ControlAddress;
use mesh::{Delta, Demands, Wanted, Writer};
use prost::Message as _;
use proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use tasks::Backoff;
use tokio::{sync::watch, task::JoinHandle, time::Instant};

use crate::{
    books::{Books, NotAskedFor, Type},
    config::Config,
    connection::{Connection, ConnectionError},
    state::{self, Change, Header, Keeper, StateWriter},
    status::{Connected, LISTED, Source, Status},
};

/// The client, as its task owns it.
pub struct Client {
    pub(crate) config: Config,
    pub(crate) books: Books,
    pub(crate) demands: Demands,
    writer: Writer,
    disk: Option<StateWriter>,
    /// For the disk, once everything is there that must be.
    held_back: Vec<Change>,
    status: watch::Sender<Status>,
}

/// The running client. Dropped, it ends.
#[derive(Debug)]
pub struct Handle {
    task: JoinHandle<()>,
    status: watch::Receiver<Status>,
    keeper: Option<Keeper>,
}

impl Handle {
    /// Whether this agent keeps the last good state on the disk: of two that follow each other on a node only one may. When
    /// this returns after false was said, nothing is being written. What changes meanwhile is kept when it may again.
    pub fn keep(&self, keeps: bool) {
        if let Some(keeper) = &self.keeper {
            keeper.keep(keeps);
        }
    }

    /// What the client is at.
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// Wakes when the status changes.
    pub fn changed(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Ends the client; afterwards the disk has what was known.
    pub async fn stop(mut self) {
        self.task.abort();
        // An error says that it was aborted, which it was to be.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    /// Reads what an earlier run left on the disk, so that it is known when this returns, and starts the client's task on
    /// the current tokio runtime. `writer` and `demands` are of one [`mesh::with`], for the same network and mode.
    pub fn start(config: Config, writer: Writer, demands: Demands) -> Handle {
        let (status, receiver) = watch::channel(Status::default());
        let mut client = Self {
            books: Books::new(config.mode, config.settings.clone()),
            config,
            demands,
            writer,
            disk: None,
            held_back: Vec::new(),
            status,
        };
        client.restore();
        Handle {
            keeper: client.disk.as_ref().map(StateWriter::keeper),
            task: tokio::spawn(client.run()),
            status: receiver,
        }
    }

    fn restore(&mut self) {
        let Some(directory) = self.config.state_dir.clone() else {
            return;
        };
        let header = Header::new(self.config.mode.as_str(), &self.config.network, &self.config.cluster);
        let good = match state::load(&directory, &header) {
            Ok(Some((resources, good))) => {
                if !resources.is_empty() {
                    let delta = self.books.restore(resources);
                    self.apply(delta);
                    let (addresses, policies) = self.counts();
                    tracing::info!(addresses, policies, "the mesh is known from the disk");
                    self.status.send_modify(|status| status.source = Source::Disk);
                }
                Some(good)
            }
            Ok(None) => None,
            Err(error) => {
                tracing::warn!(%error, "the state on the disk is not used: the mesh is not known before the control plane tells it");
                None
            }
        };
        match StateWriter::start(&directory, header, good, self.config.keeps) {
            Ok(disk) => self.disk = Some(disk),
            Err(error) => {
                let problem = format!("{}: {error}", directory.display());
                tracing::warn!("the state of the mesh is not kept on the disk: {problem}");
                self.status.send_modify(|status| status.disk = Some(problem));
            }
        }
        self.tell();
    }

    async fn run(mut self) {
        let limits = self.config.limits.clone();
        let mut backoff = Backoff::new(limits.first_wait, limits.longest_wait);
        let random = RandomState::new();
        // Agents that start together begin with different replicas.
        let mut turn = random.hash_one(0) as usize;
        for attempt in 1.. {
            self.status.send_modify(|status| status.attempts = attempt);
            let began = Instant::now();
            let error = self.attempt(turn).await;
            tracing::warn!("discovery: {error}; what is known stays in force");
            self.status.send_modify(|status| {
                status.connected = None;
                status.last_error = Some((SystemTime::now(), error));
            });
            turn = turn.wrapping_add(1);
            if began.elapsed() >= limits.settled {
                backoff.reset();
            }
            tokio::time::sleep(backoff.next(random.hash_one(attempt))).await;
        }
    }

    /// One connection, until it ends; and why.
    async fn attempt(&mut self, turn: usize) -> String {
        let addresses = match self.config.upstream.resolve().await {
            Ok(addresses) => addresses,
            Err(error) => return error.to_string(),
        };
        // There is at least one.
        let (name, address) = &addresses[turn % addresses.len()];
        let (error, termination) = match self.connect(name, *address).await {
            Ok(connection) => {
                tracing::info!("discovery: connected to {name} at {address}");
                let connected = Connected {
                    name: name.to_string(),
                    address: *address,
                    since: SystemTime::now(),
                    synchronised: false,
                };
                self.status.send_modify(|status| status.connected = Some(connected));
                match connection.serve(self).await {
                    error @ ConnectionError::Ended => (error, "Complete"),
                    error => (error, "Error"),
                }
            }
            Err(error) => (error, "ConnectionError"),
        };
        self.status
            .send_modify(|status| *status.traffic.terminations.entry(termination).or_default() += 1);
        format!("{name} ({address}): {error}")
    }

    async fn connect(&mut self, name: &ControlAddress, address: SocketAddr) -> Result<Connection, ConnectionError> {
        let channel = self.config.upstream.channel_to(name, address);
        let node = self.config.node.message(&self.config.cluster);
        let waiting: Vec<_> = std::iter::from_fn(|| self.demands.try_next()).collect();
        // What is wanted is among the first requests, and what the node runs always is.
        let locals = self.writer.locals().workloads();
        let locals = locals.iter().map(|workload| Wanted::Workload(workload.uid.clone()));
        self.books.want(waiting.into_iter().chain(locals));
        let first = self.books.open(&node);
        Connection::open(&self.config, channel, first).await
    }

    /// Takes a response; what is to be answered. It is in force when this returns.
    pub(crate) fn take(&mut self, response: DeltaDiscoveryResponse) -> Result<Vec<DeltaDiscoveryRequest>, NotAskedFor> {
        self.count(&response);
        let step = self.books.response(response)?;
        if let Some(delta) = step.delta {
            self.apply(delta);
        }
        self.held_back.extend(step.changes);
        if self.books.is_ready() {
            let changes = std::mem::take(&mut self.held_back);
            if let Some(disk) = &self.disk {
                disk.record(changes);
            }
        }
        let refused = step.requests.iter().find_map(|request| request.error_detail.as_ref());
        if let Some(refused) = refused {
            tracing::warn!(
                "discovery: refused, and what was known before stays: {}",
                refused.message
            );
        }
        self.tell();
        Ok(step.requests)
    }

    fn apply(&mut self, delta: Delta) {
        let new = self.writer.apply(delta);
        for conflict in new.iter().take(LISTED) {
            tracing::warn!("discovery: {conflict}; it waits until that is free");
        }
        if !new.is_empty() || !self.status.borrow().conflicts.is_empty() {
            let conflicts = self.writer.conflicts();
            let conflicts = conflicts.iter().take(LISTED).map(ToString::to_string).collect();
            self.status.send_modify(|status| status.conflicts = conflicts);
        }
    }

    fn count(&self, response: &DeltaDiscoveryResponse) {
        // One that was not asked for ends the connection.
        let Some(type_) = Type::of_url(&response.type_url) else {
            return;
        };
        self.status.send_modify(|status| {
            *status.traffic.messages.entry(type_.url()).or_default() += 1;
            *status.traffic.bytes.entry(type_.url()).or_default() += response.encoded_len() as u64;
        });
    }

    fn counts(&self) -> (usize, usize) {
        (self.books.count(Type::Address), self.books.count(Type::Authorization))
    }

    fn tell(&self) {
        let (addresses, policies) = self.counts();
        self.status.send_modify(|status| {
            status.addresses = addresses;
            status.policies = policies;
            status.rejected = self.books.rejected(LISTED);
            if let Some(disk) = &self.disk {
                status.disk = disk.problem();
            }
            if let Some(connected) = &mut status.connected {
                status.last_heard = Some(SystemTime::now());
                connected.synchronised = self.books.is_synchronised();
                if self.books.is_ready() && connected.synchronised {
                    status.source = Source::ControlPlane;
                }
            }
        });
    }
}
