//! Every identity that this node speaks for: fetched once, cached, rotated at half life, never served expired.
//!
//! ```text
//! (unknown) ──credentials()──> fetching ──> held ──half life──> held, fetching ──> held (new serial)
//!                                 │ fails                           │ fails: retried with back-off, the old one
//!                                 ▼                                 ▼ serves until it expires
//!                              backing off                       backing off
//! ```
//! One success ends the back-off of every identity that failed because the authority was away
//! (`one_success_wakes_those_who_wait`). A root that leaves the bundle has the certificates under it fetched anew.
//!
//! A clock that is set, forward past a certificate's end or back before its beginning, has it fetched anew within
//! [`LONGEST_SLEEP`], once (`a_clock_that_is_set_forward_has_certificates_fetched_once`, `a_clock_that_is_set_back_…`). What
//! is not valid yet by this clock is served meanwhile: a peer whose clock is right takes it.

use std::{
    collections::HashMap,
    fmt,
    hash::{BuildHasher, RandomState},
    sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard},
    time::{Duration, SystemTime},
};

use model::Identity;
use tokio::{
    sync::{Mutex, Notify, Semaphore, watch},
    task::JoinSet,
};

use crate::{Authority, Clock, Credentials, IssueError, Trust};

/// Certificates fetched at the same time.
const PARALLEL_ISSUES: usize = 8;
/// After the first failure; doubled with each further one up to [`LONGEST_BACKOFF`], each time ± 20 %.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const LONGEST_BACKOFF: Duration = Duration::from_secs(150);
/// The longest where nothing valid is held: a pod may be waiting.
const LONGEST_BACKOFF_WAITING: Duration = Duration::from_secs(10);
/// An authority that takes longer counts as unavailable.
const ISSUE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long [`Identities::rotate`] sleeps at most: a clock that was set is noticed after this.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);
/// A clock that is so much earlier than it was has been set; less is how clocks are kept right.
const SET_BACK: Duration = Duration::from_secs(60);

/// There is no valid certificate for an identity, now.
#[derive(Debug, Clone, thiserror::Error)]
#[error("no certificate for {identity}: {reason}")]
pub struct IdentityUnavailable {
    /// Whose.
    pub identity: Identity,
    /// Why.
    pub reason: IssueError,
}

/// A certificate as a debug view shows it.
#[derive(Debug, Clone)]
pub struct CertificateInfo {
    /// Whose.
    pub identity: Identity,
    /// Its serial number and validity, if there is one.
    pub held: Option<(String, SystemTime, SystemTime)>,
    /// When the next is fetched.
    pub next_fetch: SystemTime,
    /// Why the last fetch failed, until one succeeds.
    pub last_error: Option<IssueError>,
}

/// The certificates of this node's identities. Cheap to clone; shared by all shards.
#[derive(Clone)]
pub struct Identities(Arc<Inner>);

struct Inner {
    authority: Arc<dyn Authority>,
    trust: Trust,
    clock: Clock,
    entries: RwLock<HashMap<Identity, Entry>>,
    permits: Semaphore,
    /// Wakes [`Identities::rotate`] when an entry comes whose date may be the earliest.
    changed: Notify,
    /// Counts what was issued.
    issued: watch::Sender<u64>,
    random: RandomState,
}

struct Entry {
    credentials: Option<Arc<Credentials>>,
    next_fetch: SystemTime,
    /// What time it was when that was decided.
    decided: SystemTime,
    failures: u32,
    last_error: Option<IssueError>,
    /// Held while fetching, so that everyone who waits for an identity shares one fetch.
    fetching: Arc<Mutex<()>>,
}

impl Identities {
    /// Nothing is fetched before it is asked for. Peers are judged by `trust`; a trust domain alone is enough where the
    /// authority hands out the roots.
    pub fn new(authority: Arc<dyn Authority>, trust: impl Into<Trust>, clock: Clock) -> Self {
        Self(Arc::new(Inner {
            authority,
            trust: trust.into(),
            clock,
            entries: RwLock::default(),
            permits: Semaphore::new(PARALLEL_ISSUES),
            changed: Notify::new(),
            issued: watch::Sender::new(0),
            random: RandomState::new(),
        }))
    }

    /// The valid certificate that is held, if any. For the hot path: one shared lock, one look-up, no allocation.
    pub fn cached(&self, identity: &Identity) -> Option<Arc<Credentials>> {
        let entries = self.0.read();
        let credentials = entries.get(identity)?.credentials.as_ref()?;
        (credentials.not_after() > self.0.clock.now()).then(|| credentials.clone())
    }

    /// The certificate, fetched first if none is held; whoever asks meanwhile shares that fetch.
    ///
    /// After a failure the error is repeated to everyone until the back-off is over.
    pub async fn credentials(&self, identity: &Identity) -> Result<Arc<Credentials>, IdentityUnavailable> {
        if let Some(credentials) = self.cached(identity) {
            return Ok(credentials);
        }
        let fetching = self.0.enter(identity);
        let alone = fetching.clone().lock_owned().await;
        if let Some(credentials) = self.cached(identity) {
            return Ok(credentials);
        }
        let unavailable = |reason| IdentityUnavailable {
            identity: identity.clone(),
            reason,
        };
        if let Some(reason) = self.0.still_failing(identity) {
            return Err(unavailable(reason));
        }
        // A task of its own: that one of those who wait gives up must not end it for the others.
        let (identities, fetched) = (self.clone(), identity.clone());
        let fetching = tokio::spawn(async move {
            let result = identities.0.fetch(&fetched, &fetching).await;
            drop(alone);
            result
        });
        let lost = |_| IssueError::Unavailable("shutting down".into());
        fetching.await.map_err(lost).flatten().map_err(unavailable)
    }

    /// Has [`Identities::rotate`] fetch the certificate, if none is held; does not wait for it.
    pub fn want(&self, identity: &Identity) {
        let mut entries = self.0.write();
        if !entries.contains_key(identity) {
            let now = self.0.clock.now();
            entries.insert(identity.clone(), Entry::due(now, now));
            drop(entries);
            self.0.changed.notify_waiters();
        }
    }

    /// Why the last fetch of it failed, unless one succeeded since.
    pub fn last_error(&self, identity: &Identity) -> Option<IssueError> {
        self.0.read().get(identity)?.last_error.clone()
    }

    /// Who is trusted.
    pub fn trust(&self) -> &Trust {
        &self.0.trust
    }

    /// Wakes when a certificate was issued; the value counts them.
    pub fn issued(&self) -> watch::Receiver<u64> {
        self.0.issued.subscribe()
    }

    /// Drops the certificate and stops rotating it: the last pod of this identity is gone.
    pub fn forget(&self, identity: &Identity) {
        self.0.write().remove(identity);
        self.0.authority.forget(identity);
    }

    /// Every identity that is needed has been asked for: what the authority keeps of others goes.
    pub fn settled(&self) {
        let identities = self.0.read().keys().cloned().collect();
        self.0.authority.retain(&identities);
    }

    /// What is held, by identity.
    pub fn list(&self) -> Vec<CertificateInfo> {
        let info = |(identity, entry): (&Identity, &Entry)| CertificateInfo {
            identity: identity.clone(),
            held: entry
                .credentials
                .as_ref()
                .map(|held| (held.serial().to_owned(), held.not_before(), held.not_after())),
            next_fetch: entry.next_fetch,
            last_error: entry.last_error.clone(),
        };
        let mut list: Vec<_> = self.0.read().iter().map(info).collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    /// Rotates what is held, until dropped. The caller spawns and owns this, once.
    ///
    /// Without it certificates are fetched when they are first needed and again when they have expired.
    pub async fn rotate(&self) {
        let mut running = JoinSet::new();
        let mut bundle = self.0.trust.changed();
        loop {
            let changed = self.0.changed.notified();
            let now = self.0.clock.now();
            let mut next = LONGEST_SLEEP;
            for (identity, due, fetching) in self.0.dates(now) {
                match due.duration_since(now) {
                    Ok(wait) if !wait.is_zero() => next = next.min(wait),
                    _ => {
                        if let Ok(alone) = fetching.clone().try_lock_owned() {
                            let identities = self.clone();
                            running.spawn(async move {
                                if let Err(error) = identities.0.fetch(&identity, &fetching).await {
                                    tracing::warn!(%identity, %error, "the certificate was not rotated");
                                }
                                drop(alone);
                            });
                        }
                    }
                }
            }
            tokio::select! {
                () = changed => {}
                // The sender is in `self`.
                Ok(()) = bundle.changed() => self.0.fetch_outdated(),
                () = tokio::time::sleep(next.max(Duration::from_millis(10))) => {}
                Some(_) = running.join_next() => {}
            }
        }
    }
}

impl Inner {
    fn read(&self) -> RwLockReadGuard<'_, HashMap<Identity, Entry>> {
        self.entries.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(&self) -> RwLockWriteGuard<'_, HashMap<Identity, Entry>> {
        self.entries.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn enter(&self, identity: &Identity) -> Arc<Mutex<()>> {
        let mut entries = self.write();
        // Whoever entered fetches; the rotation takes over if its thread ends meanwhile.
        let now = self.clock.now();
        let due = now + ISSUE_TIMEOUT;
        let entry = entries.entry(identity.clone()).or_insert_with(|| Entry::due(now, due));
        entry.fetching.clone()
    }

    fn still_failing(&self, identity: &Identity) -> Option<IssueError> {
        let entries = self.read();
        let entry = entries.get(identity)?;
        let error = entry.last_error.as_ref()?;
        let now = self.clock.now();
        (entry.due_at(now) > now).then(|| error.clone())
    }

    fn dates(&self, now: SystemTime) -> Vec<(Identity, SystemTime, Arc<Mutex<()>>)> {
        let date =
            |(identity, entry): (&Identity, &Entry)| (identity.clone(), entry.due_at(now), entry.fetching.clone());
        self.read().iter().map(date).collect()
    }

    /// Fetches and keeps. `fetching` is the entry's lock, held by the caller; an entry that was forgotten meanwhile
    /// has another one, or is gone, and is left alone.
    async fn fetch(&self, identity: &Identity, fetching: &Arc<Mutex<()>>) -> Result<Arc<Credentials>, IssueError> {
        let result = self.issue(identity).await;
        let jitter = self.jitter();
        let mut lost_a_root = false;
        let mut entries = self.write();
        let entry = entries
            .get_mut(identity)
            .filter(|entry| Arc::ptr_eq(&entry.fetching, fetching));
        if let Some(entry) = entry {
            let before = entry.credentials.clone();
            if let (Ok(new), Some(old)) = (&result, before)
                && old.loses_a_root_to(new)
            {
                lost_a_root = true;
            }
            entry.keep(&result, self.clock.now(), jitter);
        }
        if result.is_ok() {
            self.issued.send_modify(|issued| *issued += 1);
            // It is back: nobody waits out the back-off of its absence.
            let now = self.clock.now();
            entries.values_mut().for_each(|entry| entry.hope(now));
        }
        drop(entries);
        if lost_a_root {
            self.trust.distrust();
        }
        self.changed.notify_waiters();
        result
    }

    async fn issue(&self, identity: &Identity) -> Result<Arc<Credentials>, IssueError> {
        let closed = |_| IssueError::Unavailable("shutting down".into());
        let _permit = self.permits.acquire().await.map_err(closed)?;
        let issued = tokio::time::timeout(ISSUE_TIMEOUT, self.authority.issue(identity))
            .await
            .map_err(|_| IssueError::Unavailable("no answer in time".into()))??;
        let credentials = Credentials::under(identity.clone(), &self.trust, issued, &self.clock)
            .map_err(|error| IssueError::Unusable(error.to_string().into()))?;
        tracing::info!(%identity, serial = credentials.serial(), "certificate issued");
        Ok(Arc::new(credentials))
    }

    /// The bundle lost the roots of these: peers that have the new bundle refuse them.
    fn fetch_outdated(&self) {
        let now = self.clock.now();
        for entry in self.write().values_mut() {
            if entry.credentials.as_ref().is_some_and(|held| held.is_outdated()) {
                entry.next_fetch = now;
            }
        }
    }

    /// Uniform in 0..1; only for spreading load.
    fn jitter(&self) -> f64 {
        let entropy = self.random.hash_one(self.clock.now());
        (entropy >> 11) as f64 / (1u64 << 53) as f64
    }
}

impl Entry {
    fn due(now: SystemTime, next_fetch: SystemTime) -> Self {
        Self {
            credentials: None,
            next_fetch,
            decided: now,
            failures: 0,
            last_error: None,
            fetching: Arc::default(),
        }
    }

    /// When to fetch: as was decided, or now if the clock was set back since, for then nothing is where it was.
    fn due_at(&self, now: SystemTime) -> SystemTime {
        match self.decided.duration_since(now) {
            Ok(ahead) if ahead > SET_BACK => now,
            _ => self.next_fetch,
        }
    }

    /// The authority answers again.
    fn hope(&mut self, now: SystemTime) {
        if matches!(
            self.last_error,
            Some(IssueError::Unavailable(_) | IssueError::Unauthenticated(_))
        ) {
            self.next_fetch = self.next_fetch.min(now);
            self.failures = 0;
        }
    }

    fn keep(&mut self, result: &Result<Arc<Credentials>, IssueError>, now: SystemTime, jitter: f64) {
        self.decided = now;
        match result {
            Ok(credentials) => {
                // A certificate cut short by its authority's end may be past half of its life when it comes.
                let left = credentials.not_after().duration_since(now).unwrap_or(Duration::ZERO);
                let earliest = now + (left / 2).max(FIRST_BACKOFF);
                self.next_fetch = credentials
                    .rotation_due(jitter)
                    .max(earliest.min(now + LONGEST_BACKOFF));
                // Its authority's clock and this one differ; one of them will be set.
                if credentials.not_before() > now {
                    self.next_fetch = now + LONGEST_BACKOFF;
                }
                self.credentials = Some(credentials.clone());
                self.failures = 0;
                self.last_error = None;
            }
            Err(error) => {
                let valid = self.credentials.as_ref().is_some_and(|held| held.not_after() > now);
                let longest = if valid {
                    LONGEST_BACKOFF
                } else {
                    LONGEST_BACKOFF_WAITING
                };
                let backoff = FIRST_BACKOFF * 2u32.saturating_pow(self.failures.min(16));
                self.next_fetch = now + backoff.min(longest).mul_f64(0.8 + 0.4 * jitter);
                self.failures += 1;
                self.last_error = Some(error.clone());
            }
        }
    }
}

impl fmt::Debug for Identities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.list().iter().map(|info| &info.identity))
            .finish()
    }
}
