//! The Secrets that the authority stands in, all in the root namespace, and what becomes of them.
//!
//! | Secret | holds | written by |
//! | --- | --- | --- |
//! | `cacerts` | the user's own authority, in Istio's form; wins | the user |
//! | `istio-ca-secret` | ours, where the user gave none: an intermediate and its key | whichever replica is first |
//! | `undercurrent-ca-root` | the root and its key, read only to make that intermediate | as above |
//! | `undercurrent-ca-state` | what is in force: signing, announced, the bundle (see [`super::rotation`]) | any replica |
//!
//! A reconciler: woken by a watch of each and by the next step's time, compares what is with what should be. Every write
//! carries the version that it was made from, and one that lost the race rereads, so replicas agree without a leader
//! (`two_replicas_agree_on_one_authority`). Only what is stored is put in force. A Secret that can't be used is refused by
//! name and the last good state goes on (`broken_cacerts_are_refused_by_name_and_the_last_good_one_signs_on`); with a
//! broken `cacerts` and no state, nothing is made up: the control plane does not become ready. With the API away, what is
//! in force stays. The task ends with the drain.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::{Stream, StreamExt, stream};
use k8s_openapi::{ByteString, api::core::v1::Secret};
use kube::{
    Api, Client, ResourceExt,
    api::{ObjectMeta, PostParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tasks::{DrainMode, DrainSignal};

use super::{
    authority::Authority,
    generate,
    material::{Material, MaterialError},
    rotation::{State, Step},
    source::SourceError,
};

/// The user's.
pub const GIVEN: &str = "cacerts";
/// Ours.
pub const OWN: &str = "istio-ca-secret";
/// Our root.
pub const ROOT: &str = "undercurrent-ca-root";
/// What is in force.
pub const STATE: &str = "undercurrent-ca-state";
const ALL: [&str; 4] = [GIVEN, OWN, ROOT, STATE];

/// Marks an `istio-ca-secret` that we made, and so may renew.
const MADE_BY: &str = "undercurrent.io/made-by";
/// How long to wait, at the most, until the next look; the watches wake earlier.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// How long the API may take for all that a turn has to write.
const PATIENCE: Duration = Duration::from_secs(20);

type Values = BTreeMap<String, Vec<u8>>;

/// Follows the Secrets.
pub struct Secrets {
    api: Api<Secret>,
    namespace: String,
    authority: Arc<Authority>,
    trust_domain: String,
    overlap: Duration,
    known: HashMap<&'static str, Secret>,
    synced: HashSet<&'static str>,
    /// What was said last, so that it is said once.
    said: Option<String>,
    problem: tokio::sync::watch::Sender<Option<Arc<str>>>,
}

impl Secrets {
    /// `overlap`: how long a root is trusted before anything is signed below it, and after; as long as a certificate lives.
    pub fn new(
        client: Client,
        namespace: &str,
        authority: Arc<Authority>,
        trust_domain: &str,
        overlap: Duration,
    ) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_owned(),
            authority,
            trust_domain: trust_domain.to_owned(),
            overlap,
            known: HashMap::new(),
            synced: HashSet::new(),
            said: None,
            problem: tokio::sync::watch::Sender::new(None),
        }
    }

    /// What is wrong with the Secrets, in words; none when all is well.
    pub fn problem(&self) -> tokio::sync::watch::Receiver<Option<Arc<str>>> {
        self.problem.subscribe()
    }

    /// Runs until drained.
    pub async fn run(mut self, mut drain: DrainSignal) {
        let mut events = self.watches();
        let mut wait = LONGEST_WAIT;
        loop {
            tokio::select! {
                _ = drain.reached(DrainMode::Graceful) => return,
                event = events.next() => match event {
                    Some((name, event)) => self.take(name, event),
                    None => return,
                },
                () = tokio::time::sleep(wait) => {}
            }
            wait = self.turn().await;
        }
    }

    fn watches(&self) -> impl Stream<Item = (&'static str, Event<Secret>)> + Unpin + use<> {
        let watches = ALL.map(|name| {
            let config = watcher::Config::default().fields(&format!("metadata.name={name}"));
            let events = watcher(self.api.clone(), config).default_backoff();
            let named = events.filter_map(move |event| async move {
                match event {
                    Ok(event) => Some((name, event)),
                    Err(error) => {
                        tracing::warn!(secret = name, %error, "the watch of a Secret broke; it is started again");
                        None
                    }
                }
            });
            named.boxed()
        });
        stream::select_all(watches)
    }

    fn take(&mut self, name: &'static str, event: Event<Secret>) {
        match event {
            Event::Init => {
                self.synced.remove(name);
            }
            Event::Apply(secret) | Event::InitApply(secret) if secret.name_any() == name => {
                self.known.insert(name, secret);
                // Seen in this listing: at its end it is not taken for deleted.
                self.synced.insert(name);
            }
            Event::Delete(secret) if secret.name_any() == name => {
                self.known.remove(name);
            }
            Event::InitDone => {
                if self.synced.insert(name) {
                    self.known.remove(name);
                }
            }
            Event::Apply(_) | Event::InitApply(_) | Event::Delete(_) => {}
        }
    }

    /// One comparison; answers how long the next may wait.
    async fn turn(&mut self) -> Duration {
        if self.synced.len() < ALL.len() {
            return LONGEST_WAIT;
        }
        let now = whole_seconds(self.authority.clock().now());
        let reconciled = tokio::time::timeout(PATIENCE, self.reconcile(now)).await;
        match reconciled.unwrap_or(Err(SourceError::Late)) {
            Ok(problem) => {
                self.say(problem);
                let due = self.authority.state().and_then(|state| state.due(self.overlap));
                let until = due.map(|due| due.duration_since(now).unwrap_or_default());
                until.map_or(LONGEST_WAIT, |until| until.clamp(Duration::from_secs(1), LONGEST_WAIT))
            }
            Err(SourceError::Raced(name)) => {
                tracing::debug!(secret = name, "another replica was faster; looking again");
                self.reread(name).await;
                Duration::from_millis(50)
            }
            Err(error) => {
                self.say(Some(error));
                RETRY
            }
        }
    }

    fn say(&mut self, problem: Option<SourceError>) {
        let text = problem.map(|problem| problem.to_string());
        if text == self.said {
            return;
        }
        match &text {
            Some(text) => tracing::error!("certificate authority: {text}"),
            None => tracing::info!("certificate authority: all Secrets can be used again"),
        }
        self.problem.send_replace(text.as_deref().map(Into::into));
        self.said = text;
    }

    /// Toward what is wanted. A Secret that can't be used is answered beside, since what is in force may still move.
    async fn reconcile(&mut self, now: SystemTime) -> Result<Option<SourceError>, SourceError> {
        let (wanted, problem) = match self.wanted(now).await {
            Ok(wanted) => (Some(wanted), None),
            Err(error @ SourceError::Unusable { .. }) => (None, Some(error)),
            Err(error) => return Err(error),
        };
        let stored = self.stored(now);
        let (state, step) = match (stored.clone().or_else(|| self.authority.state()), wanted) {
            (Some(state), wanted) => state.step(wanted.as_ref(), self.overlap, now),
            (None, Some(wanted)) => (State::new(wanted, now), Step::Switched),
            (None, None) => return Ok(problem),
        };
        if stored.as_ref() != Some(&state) {
            let values = state.write()?;
            self.write(STATE, "undercurrent.io/ca-state", values, false).await?;
        }
        if self.authority.state().as_ref() != Some(&state) {
            tell(step, &state);
            self.authority.put(state);
        }
        Ok(problem)
    }

    async fn wanted(&mut self, now: SystemTime) -> Result<Material, SourceError> {
        if let Some(given) = self.known.get(GIVEN) {
            return Material::read(&values(given), now).map_err(|error| self.unusable(GIVEN, error));
        }
        let own = match self.known.get(OWN) {
            Some(own) => {
                let material = Material::read(&values(own), now);
                let ours = own.annotations().contains_key(MADE_BY);
                match material {
                    Ok(material) if !ours || !is_due(&material, now) => return Ok(material),
                    Err(error) if !ours => return Err(self.unusable(OWN, error)),
                    // Ours, and near its end, past it or damaged: a new one below the same root.
                    Ok(material) => material.roots().to_vec(),
                    Err(_) => Vec::new(),
                }
            }
            None => Vec::new(),
        };
        let root = self.root(now).await?;
        let made = generate::intermediate(&root, &self.trust_domain, &own, now);
        let made = made.map_err(|error| self.unusable(ROOT, error))?;
        self.write(OWN, "istio.io/ca-root", made.clone(), true).await?;
        tracing::info!(secret = OWN, "made an intermediate certificate authority");
        Material::read(&made, now).map_err(|error| self.unusable(OWN, error))
    }

    /// Our root; a new one where there is none, or where it would not outlive the next intermediate.
    async fn root(&mut self, now: SystemTime) -> Result<Values, SourceError> {
        if let Some(root) = self.known.get(ROOT) {
            let root = values(root);
            let until = generate::root_not_after(&root).map_err(|error| self.unusable(ROOT, error))?;
            if until > now + generate::INTERMEDIATE_LIFETIME {
                return Ok(root);
            }
        }
        let root = generate::root(&self.trust_domain, now)?;
        self.write(ROOT, "undercurrent.io/ca-root", root.clone(), true).await?;
        tracing::info!(
            secret = ROOT,
            "made a root certificate authority; its key is in this Secret only"
        );
        Ok(root)
    }

    fn stored(&self, now: SystemTime) -> Option<State> {
        let stored = values(self.known.get(STATE)?);
        match State::read(&stored, now) {
            Ok(state) => Some(state),
            Err(error) => {
                tracing::error!(secret = STATE, %error, "the stored state cannot be used and is written anew");
                None
            }
        }
    }

    fn unusable(&self, name: &'static str, error: MaterialError) -> SourceError {
        SourceError::Unusable {
            namespace: self.namespace.clone(),
            name,
            error,
            consequence: match self.authority.is_ready() {
                true => "what was in force before goes on signing",
                false => "nothing is signed until it is mended",
            },
        }
    }

    /// Writes over exactly the version that is known, or creates.
    async fn write(&mut self, name: &'static str, type_: &str, values: Values, ours: bool) -> Result<(), SourceError> {
        let before = self.known.get(name);
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(name.into()),
                namespace: Some(self.namespace.clone()),
                resource_version: before.and_then(ResourceExt::resource_version),
                annotations: ours.then(|| BTreeMap::from([(MADE_BY.into(), "undercurrent".into())])),
                ..ObjectMeta::default()
            },
            data: Some(
                values
                    .into_iter()
                    .map(|(key, value)| (key, ByteString(value)))
                    .collect(),
            ),
            type_: Some(
                before
                    .and_then(|secret| secret.type_.clone())
                    .unwrap_or_else(|| type_.into()),
            ),
            ..Secret::default()
        };
        let written = match before {
            Some(_) => self.api.replace(name, &PostParams::default(), &secret).await,
            None => self.api.create(&PostParams::default(), &secret).await,
        };
        match written {
            Ok(written) => {
                self.known.insert(name, written);
                Ok(())
            }
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Err(SourceError::Raced(name)),
            Err(error) => Err(SourceError::Api {
                what: "write",
                name,
                error,
            }),
        }
    }

    async fn reread(&mut self, name: &'static str) {
        match self.api.get_opt(name).await {
            Ok(Some(secret)) => {
                self.known.insert(name, secret);
            }
            Ok(None) => {
                self.known.remove(name);
            }
            Err(error) => tracing::warn!(secret = name, %error, "cannot reread a Secret"),
        }
    }
}

fn values(secret: &Secret) -> Values {
    let data = secret.data.iter().flatten();
    data.map(|(key, value)| (key.clone(), value.0.clone())).collect()
}

/// Past two thirds of its life.
fn is_due(material: &Material, now: SystemTime) -> bool {
    let whole = material
        .not_after()
        .duration_since(material.not_before())
        .unwrap_or_default();
    now > material.not_before() + whole.mul_f64(2.0 / 3.0)
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

fn tell(step: Step, state: &State) {
    let (signing, roots) = (state.signing.fingerprint(), state.roots.len());
    match (step, &state.next) {
        (Step::Announced, Some(next)) => {
            tracing::info!(
                next = next.fingerprint(),
                signing,
                roots,
                "announced a new authority: trusted, signs later"
            );
        }
        (Step::Switched, _) => tracing::info!(signing, roots, "signing authority in force"),
        (Step::Withdrawn, _) => tracing::info!(signing, roots, "withdrew the announced authority"),
        _ => tracing::info!(signing, roots, "trust bundle in force"),
    }
}
