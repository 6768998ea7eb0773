//! Which state each client has acknowledged, and what it refused: for `/metrics`, `/debug/syncz`, and the status of
//! objects, which may say that a policy is in force when every client that is connected has acknowledged it.
//!
//! A client that has not been synchronised yet counts as having acknowledged nothing, one that is not connected does not
//! count. A refused state counts as acknowledged (it is as much in force as it will be) and the refusal is kept, the last
//! [`REFUSALS`] of them; and for each resource until its client takes it, is told that it is gone, or goes. Invariants:
//! `a_state_is_in_force_when_the_last_has_acknowledged_it`, `a_resource_is_refused_until_it_is_taken_or_gone`.

use std::{
    collections::{BTreeMap, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use tokio::sync::watch;

use super::{View, push::Chunk, session};

/// How many refusals are remembered.
pub const REFUSALS: usize = 256;

/// Who has what.
#[derive(Debug)]
pub struct Acknowledged {
    state: Mutex<State>,
    in_force: watch::Sender<u64>,
    refusing: watch::Sender<u64>,
    /// What was counted.
    pub counters: Counters,
}

/// Counted since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Streams that were let in.
    pub streams: AtomicU64,
    /// Streams that were told to come back later.
    pub turned_away: AtomicU64,
    /// Streams of callers that could not be authenticated.
    pub unauthenticated: AtomicU64,
    /// Streams that were ended because the client did not read or acknowledge.
    pub dropped: AtomicU64,
    /// Responses sent.
    pub responses: AtomicU64,
    /// Bytes of responses sent, without TLS and HTTP.
    pub bytes: AtomicU64,
    /// Responses that were refused.
    pub refusals: AtomicU64,
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64, by: usize) {
        counter.fetch_add(by as u64, Ordering::Relaxed);
    }
}

#[derive(Debug, Default)]
struct State {
    clients: BTreeMap<u64, Client>,
    /// How many clients are at each generation.
    generations: BTreeMap<u64, usize>,
    refusals: VecDeque<Arc<Refusal>>,
}

/// A client that is connected.
#[derive(Clone, Debug)]
pub struct Client {
    /// Who it proved to be.
    pub caller: String,
    /// What it calls itself: the id of the xDS node.
    pub node: String,
    /// Its address.
    pub peer: Option<SocketAddr>,
    /// Since when.
    pub since: SystemTime,
    /// The generation that it has acknowledged; 0 until its first synchronisation is done.
    pub acknowledged: u64,
    /// What it refused of each view and has not taken since, by the resource's name.
    pub refused: [BTreeMap<Arc<str>, Arc<Refusal>>; View::ALL.len()],
}

/// A response that a client refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The client's node id.
    pub node: String,
    /// What the response was about.
    pub view: View,
    /// The newest generation at that time.
    pub generation: u64,
    /// What the client said.
    pub message: String,
    /// The resources that it named, or the first few of the response.
    pub resources: Vec<Arc<str>>,
    /// When.
    pub at: SystemTime,
}

impl Default for Acknowledged {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            in_force: watch::Sender::new(u64::MAX),
            refusing: watch::Sender::new(0),
            counters: Counters::default(),
        }
    }
}

impl Acknowledged {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The clients that are connected, by the number of their stream.
    pub fn clients(&self) -> Vec<Client> {
        self.state().clients.values().cloned().collect()
    }

    /// How many are connected.
    pub fn connected(&self) -> usize {
        self.state().clients.len()
    }

    /// How many have not acknowledged this generation.
    pub fn lagging(&self, generation: u64) -> usize {
        self.state()
            .generations
            .range(..generation)
            .map(|(_, clients)| clients)
            .sum()
    }

    /// The last refusals, newest last.
    pub fn refusals(&self) -> Vec<Arc<Refusal>> {
        self.state().refusals.iter().cloned().collect()
    }

    /// The resources that some client refuses now, each with a refusal.
    pub fn refused(&self, view: View) -> BTreeMap<Arc<str>, Arc<Refusal>> {
        let state = self.state();
        // The oldest is told, so that one that comes and goes changes nothing.
        let clients = state.clients.values().rev();
        let refused = clients.flat_map(|client| &client.refused[view as usize]);
        refused
            .map(|(name, refusal)| (Arc::clone(name), Arc::clone(refusal)))
            .collect()
    }

    /// Changes with what clients refuse.
    pub fn refusing(&self) -> watch::Receiver<u64> {
        self.refusing.subscribe()
    }

    /// The generation that every client has acknowledged; `u64::MAX` while there is none.
    pub fn in_force(&self) -> watch::Receiver<u64> {
        self.in_force.subscribe()
    }

    /// Resolves when every client that is then connected has acknowledged this generation. Bound it in time: a client may
    /// be slow, or new.
    pub async fn wait_in_force(&self, generation: u64) {
        // The sender is ours, so it can't be gone.
        let _ = self.in_force().wait_for(|in_force| *in_force >= generation).await;
    }

    pub(super) fn connect(self: &Arc<Self>, stream: u64, caller: String, peer: Option<SocketAddr>) -> Connected {
        let client = Client {
            caller,
            node: String::new(),
            peer,
            since: SystemTime::now(),
            acknowledged: 0,
            refused: Default::default(),
        };
        let mut state = self.state();
        state.clients.insert(stream, client);
        *state.generations.entry(0).or_default() += 1;
        self.publish(&state);
        Connected {
            acknowledged: Arc::clone(self),
            stream,
        }
    }

    fn publish(&self, state: &State) {
        let lowest = state.generations.keys().next().copied().unwrap_or(u64::MAX);
        self.in_force
            .send_if_modified(|in_force| std::mem::replace(in_force, lowest) != lowest);
    }
}

impl State {
    fn leave(&mut self, generation: u64) {
        if let Some(clients) = self.generations.get_mut(&generation) {
            *clients -= 1;
            if *clients == 0 {
                self.generations.remove(&generation);
            }
        }
    }
}

/// A client's own entry, which goes with it.
#[derive(Debug)]
pub(super) struct Connected {
    acknowledged: Arc<Acknowledged>,
    stream: u64,
}

impl Connected {
    pub(super) fn named(&self, node: &str) {
        if let Some(client) = self.acknowledged.state().clients.get_mut(&self.stream) {
            client.node = node.to_owned();
        }
    }

    /// It has this state.
    pub(super) fn acknowledged(&self, generation: u64) {
        let mut state = self.acknowledged.state();
        let Some(client) = state.clients.get_mut(&self.stream) else {
            return;
        };
        let before = std::mem::replace(&mut client.acknowledged, generation);
        if before != generation {
            state.leave(before);
            *state.generations.entry(generation).or_default() += 1;
            self.acknowledged.publish(&state);
        }
    }

    /// It took a response of this view.
    pub(super) fn accepted(&self, view: View, chunk: &Chunk) {
        let mut state = self.acknowledged.state();
        let Some(client) = state.clients.get_mut(&self.stream) else {
            return;
        };
        let refused = &mut client.refused[view as usize];
        let before = refused.len();
        if before > 0 {
            chunk.names().for_each(|name| drop(refused.remove(name)));
        }
        if refused.len() < before {
            self.acknowledged.refusing.send_modify(|changes| *changes += 1);
        }
    }

    pub(super) fn refused(&self, refusal: session::Refusal, generation: u64) {
        Counters::count(&self.acknowledged.counters.refusals, 1);
        let mut state = self.acknowledged.state();
        let Some(client) = state.clients.get_mut(&self.stream) else {
            return;
        };
        let refusal = Arc::new(Refusal {
            node: client.node.clone(),
            view: refusal.view,
            generation,
            message: refusal.message,
            resources: refusal.resources,
            at: SystemTime::now(),
        });
        let names = refusal.resources.iter().cloned();
        client.refused[refusal.view as usize].extend(names.map(|name| (name, Arc::clone(&refusal))));
        if state.refusals.len() == REFUSALS {
            state.refusals.pop_front();
        }
        state.refusals.push_back(refusal);
        self.acknowledged.refusing.send_modify(|changes| *changes += 1);
    }
}

impl Drop for Connected {
    fn drop(&mut self) {
        let mut state = self.acknowledged.state();
        if let Some(client) = state.clients.remove(&self.stream) {
            state.leave(client.acknowledged);
            if client.refused.iter().any(|refused| !refused.is_empty()) {
                self.acknowledged.refusing.send_modify(|changes| *changes += 1);
            }
        }
        self.acknowledged.publish(&state);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::{
        super::{entry::Entry, push::chunks, testing::policy},
        *,
    };

    #[tokio::test]
    async fn a_state_is_in_force_when_the_last_has_acknowledged_it() {
        let all = Arc::new(Acknowledged::default());
        all.wait_in_force(7).await;
        let one = all.connect(1, "sa".to_owned(), None);
        let other = all.connect(2, "sa".to_owned(), None);
        let mut waits = Box::pin(all.wait_in_force(7));
        one.acknowledged(8);
        assert!((&mut waits).now_or_never().is_none());
        assert_eq!((all.connected(), all.lagging(7), all.lagging(9)), (2, 1, 2));
        other.acknowledged(7);
        waits.await;
        let mut waits = Box::pin(all.wait_in_force(8));
        assert!((&mut waits).now_or_never().is_none());
        drop(other);
        waits.await;
        drop(one);
        assert_eq!((all.connected(), *all.in_force().borrow()), (0, u64::MAX));
        assert!(all.state().generations.is_empty());
    }

    #[test]
    fn refusals_are_remembered_and_bounded() {
        let all = Arc::new(Acknowledged::default());
        let client = all.connect(1, "sa".to_owned(), None);
        client.named("ztunnel~10.0.0.1");
        for n in 0..REFUSALS as u64 + 10 {
            let refusal = session::Refusal {
                view: View::Authorization,
                message: "no".to_owned(),
                resources: vec!["ns/p".into()],
            };
            client.refused(refusal, n);
        }
        let refusals = all.refusals();
        assert_eq!(
            (refusals.len(), refusals[REFUSALS - 1].generation),
            (REFUSALS, REFUSALS as u64 + 9)
        );
        assert_eq!(refusals[0].node, "ztunnel~10.0.0.1");
    }

    #[test]
    fn a_resource_is_refused_until_it_is_taken_or_gone() {
        const VIEW: View = View::Authorization;
        let puts = |names: &[&str]| -> Vec<_> {
            let entries = names.iter().map(|name| Arc::new(Entry::new(&policy(name, 0))));
            entries.collect()
        };
        let taken = |names: &[&str]| Chunk::Encoded(chunks(VIEW, &puts(names), &[], 1 << 20).remove(0));
        let all = Arc::new(Acknowledged::default());
        let mut changes = all.refusing();
        let client = all.connect(1, "sa".to_owned(), None);
        let refused = |changes: &mut watch::Receiver<u64>| {
            changes.borrow_and_update();
            let names: Vec<_> = all.refused(VIEW).into_keys().collect();
            names.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for name in ["ns/a", "ns/b", "ns/c"] {
            client.refused(
                session::Refusal {
                    view: VIEW,
                    message: "no".to_owned(),
                    resources: vec![name.into()],
                },
                1,
            );
        }
        assert!(changes.has_changed().unwrap());
        assert_eq!(refused(&mut changes), ["ns/a", "ns/b", "ns/c"]);
        client.accepted(VIEW, &taken(&["ns/other"]));
        client.accepted(View::Address, &taken(&["ns/a"]));
        assert!(!changes.has_changed().unwrap());
        client.accepted(VIEW, &taken(&["ns/a", "ns/other"]));
        assert!(changes.has_changed().unwrap());
        assert_eq!(refused(&mut changes), ["ns/b", "ns/c"]);
        let gone = Chunk::Encoded(chunks(VIEW, &[], &["ns/b".into()], 1 << 20).remove(0));
        client.accepted(VIEW, &gone);
        assert_eq!(refused(&mut changes), ["ns/c"]);
        let younger = all.connect(2, "other".to_owned(), None);
        younger.refused(
            session::Refusal {
                view: VIEW,
                message: "neither".to_owned(),
                resources: vec!["ns/c".into()],
            },
            1,
        );
        assert_eq!(all.refused(VIEW)["ns/c"].message, "no");
        drop(younger);
        drop(client);
        assert!(changes.has_changed().unwrap());
        assert!(refused(&mut changes).is_empty());
    }
}
