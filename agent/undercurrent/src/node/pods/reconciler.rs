//! The task that makes this node's pods what they should be.
//!
//! A pod that is to leave the mesh is released only when its peers were told: its annotation goes first, and its capture
//! when the mesh says so too and slower peers may know, or after some seconds (make before break, but a control plane that
//! is away holds up nobody for long): [`Pod::may_be_released`].
//!
//! A pod that an agent before this one had captured is taken over at once, whether there is a certificate yet or not, and
//! whether it is to stay or on its way out of the mesh: it runs, and what comes to it waits for somebody to accept it. One that is
//! about to start, or to join, waits for its certificate, since it must be able to talk at once.

use std::{
    collections::{BTreeMap, HashSet},
    path::Path,
    time::Duration,
};

use anyhow::Context;
use model::{Identity, NamespacedName, WorkloadUid};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
    time::Instant,
};

use super::{
    Event, Outcome, Parts, PodView, Pods, View,
    expectation::{Expected, Oracle, Trouble},
    pod::{Leaving, Pod, State},
    untold::Lookout,
};
use crate::node::{
    records::{PodRecord, Records},
    redirection::Wishes,
};

const RECONCILE_EVERY: Duration = Duration::from_secs(15);
/// What could not be done on its date is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// Events that wait; the local socket serves fewer connections than that at once.
const EVENTS: usize = 256;

/// Starts the reconciler with the pods that an earlier agent was told of.
pub fn start(parts: Parts, directory: &Path) -> anyhow::Result<(Pods, View, JoinHandle<()>)> {
    let (records, found) =
        Records::open(directory).with_context(|| format!("cannot keep pods in {}", directory.display()))?;
    if !found.is_empty() {
        tracing::info!(pods = found.len(), "pods found again from before the restart");
    }
    let (events, receiver) = mpsc::channel(EVENTS);
    let view = View::default();
    let cluster = match &parts.oracle {
        Oracle::Mesh { .. } => None,
        Oracle::Cluster(pods) => Some(pods.cluster.clone()),
    };
    // Never told: nothing but the mesh and the timer wakes.
    let api_changed = cluster
        .as_ref()
        .map_or_else(|| watch::channel(0).1, |cluster| cluster.changed());
    let restored = |record: PodRecord| (record.pod.clone(), Pod::restored(record));
    let reconciler = Reconciler {
        pods: found.into_values().map(restored).collect(),
        parts,
        records,
        unused: HashSet::new(),
        lookout: Lookout::default(),
        view: view.clone(),
    };
    let pods = Pods { events, cluster };
    Ok((pods, view, tokio::spawn(reconciler.run(receiver, api_changed))))
}

/// Waits while another agent is in charge. False: nobody can ask any more.
async fn resumed(events: &mut mpsc::Receiver<Event>) -> bool {
    let ask_again = || Err(admin::ASK_AGAIN.to_owned());
    while let Some(event) = events.recv().await {
        match event {
            Event::Resume => return true,
            // Nothing is done, and that is what was asked for.
            Event::Pause(paused) => drop(paused.send(())),
            Event::Added(_, answer, _) | Event::Removed(_, _, answer) | Event::Garbage(_, answer) => {
                let _ = answer.send(ask_again());
            }
        }
    }
    false
}

pub(super) struct Reconciler {
    pub(super) parts: Parts,
    records: Records,
    pub(super) pods: BTreeMap<NamespacedName, Pod>,
    /// Identities with a certificate that no pod had at the last repair.
    unused: HashSet<Identity>,
    pub(super) lookout: Lookout,
    view: View,
}

impl Reconciler {
    async fn run(mut self, mut events: mpsc::Receiver<Event>, mut api_changed: watch::Receiver<u64>) {
        let mut changed = self.parts.knowledge.changed();
        let mut issued = self.parts.identities.issued();
        let mut timer = tokio::time::interval(RECONCILE_EVERY);
        timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let due = self.next_date();
            tokio::select! {
                event = events.recv() => match event {
                    Some(Event::Pause(paused)) => {
                        self.pause();
                        let _ = paused.send(());
                        if !resumed(&mut events).await {
                            return;
                        }
                        self.reread().await;
                    }
                    Some(event) => self.handle(event).await,
                    None => return,
                },
                // The writer lives as long as the process; without it there is nothing new to learn.
                Ok(()) = changed.changed() => self.reconcile_all().await,
                Ok(()) = api_changed.changed() => {
                    self.look_for_untold(false).await;
                    self.reconcile_all().await;
                }
                Ok(()) = issued.changed() => self.reconcile_all().await,
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    self.reconcile_all().await;
                }
                _ = timer.tick() => {
                    self.repair().await;
                    self.look_for_untold(true).await;
                    self.reconcile_all().await;
                    self.show();
                    self.view.lock().attempted.send_replace(true);
                }
            }
            self.show();
        }
    }

    /// When somebody's patience ends, or a release may wait no longer.
    fn next_date(&self) -> Option<Instant> {
        let dates = self.pods.values().flat_map(|pod| {
            let leaving = pod.leaving.map(Leaving::ends);
            pod.waiting.iter().map(|(_, until)| *until).chain(leaving)
        });
        // What is overdue failed, and is tried again a little later.
        let soon = Instant::now() + RETRY;
        dates.min().map(|date| if date <= Instant::now() { soon } else { date })
    }

    async fn handle(&mut self, event: Event) {
        match event {
            Event::Added(record, answer, until) => self.add(*record, answer, until).await,
            Event::Removed(pod, container_id, answer) => {
                let successor = self.pods.get(&pod).is_some_and(|known| {
                    let other = &known.record.container_id;
                    let another = !container_id.is_empty() && !other.is_empty() && *other != container_id;
                    // Of one that was found the sandbox is not known; this may be an earlier one of its name.
                    another || (known.record.found && known.record.netns.exists())
                });
                let outcome = if successor { Ok(()) } else { self.remove(&pod).await };
                self.show();
                let _ = answer.send(outcome);
            }
            Event::Garbage(valid, answer) => {
                let outcome = self.collect(&valid).await;
                self.show();
                let _ = answer.send(outcome);
            }
            // The first is handled by `run`, and the second means nothing while this is in charge.
            Event::Pause(_) | Event::Resume => {}
        }
    }

    /// From here on another agent is in charge: plugins that wait are to ask it, and annotations are its business.
    fn pause(&mut self) {
        for pod in self.pods.values_mut() {
            for (answer, _) in pod.waiting.drain(..) {
                let _ = answer.send(Err(admin::ASK_AGAIN.to_owned()));
            }
        }
        self.parts.board.put(Wishes::default());
    }

    /// In charge again: what the other agent recorded meanwhile holds.
    async fn reread(&mut self) {
        let found = match self.records.read() {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "the records of pods cannot be read again: going on with those known before");
                return;
            }
        };
        let gone = self.which(|pod| {
            let now = found.get(&pod.record.pod);
            now.is_none_or(|record| !record.is_same_sandbox(&pod.record))
        });
        let mut identities = Vec::new();
        for key in gone {
            identities.extend(self.take_out(&key).await);
        }
        for (key, record) in found {
            self.pods.entry(key).or_insert_with(|| Pod::restored(record));
        }
        self.repair().await;
        self.reconcile_all().await;
        // Not before: a pod in another sandbox has the identity still.
        identities
            .iter()
            .for_each(|identity| self.forget_identity(Some(identity)));
    }

    async fn add(&mut self, record: PodRecord, answer: oneshot::Sender<Outcome>, until: Instant) {
        let key = record.pod.clone();
        self.make_way(&record).await;
        let kept = self.keep(record).await;
        if let Err(error) = kept {
            let _ = answer.send(Err(error));
            return;
        }
        self.tell_mesh();
        if let Some(pod) = self.pods.get_mut(&key) {
            pod.waiting.push((answer, until));
        }
        self.reconcile(&key).await;
        self.show();
        if let Some(pod) = self.pods.get_mut(&key) {
            pod.answer(Instant::now());
        }
    }

    /// Keeps the record of a pod that is told of; one of its name in another sandbox is its predecessor, and gone.
    pub(super) async fn keep(&mut self, mut record: PodRecord) -> Outcome {
        let key = record.pod.clone();
        if self
            .pods
            .get(&key)
            .is_some_and(|before| !before.record.is_same_sandbox(&record))
        {
            self.remove(&key).await?;
        }
        if let Some(before) = self.pods.get(&key) {
            record.starting &= before.record.starting;
            record.captured = before.record.captured;
        }
        self.records
            .keep(&record)
            .map_err(|error| format!("cannot keep the record of {key}: {error}"))?;
        let pod = self.pods.entry(key).or_insert_with(|| Pod::new(record.clone(), false));
        pod.record = record;
        Ok(())
    }

    async fn remove(&mut self, key: &NamespacedName) -> Outcome {
        self.lookout.ended(key);
        if self.pods.contains_key(key) {
            let identity = self.take_out(key).await;
            self.forget_identity(identity.as_ref());
            self.tell_mesh();
        }
        self.records
            .drop_record(key)
            .map_err(|error| format!("cannot drop the record of {key}: {error}"))
    }

    /// Takes a pod out of the kernel, the proxy and this agent's books, but for its record. What it was captured as: the
    /// identity may be another pod's, too.
    async fn take_out(&mut self, key: &NamespacedName) -> Option<Identity> {
        let pod = self.pods.remove(key)?;
        if let State::Told(told) = &pod.state {
            self.parts.forget(told.uid()).await;
        }
        let identity = pod.captured_as().cloned();
        for (answer, _) in pod.waiting {
            let _ = answer.send(Err("the pod is gone".to_owned()));
        }
        identity
    }

    pub(super) fn which(&self, is: impl Fn(&Pod) -> bool) -> Vec<NamespacedName> {
        let those = self.pods.values().filter(|pod| is(pod));
        those.map(|pod| pod.record.pod.clone()).collect()
    }

    /// The certificate of an identity that no pod has any more is not kept.
    fn forget_identity(&self, identity: Option<&Identity>) {
        if let Some(identity) = identity
            && !self.pods.values().any(|pod| pod.captured_as() == Some(identity))
        {
            self.parts.identities.forget(identity);
        }
    }

    /// Forgets the pods of sandboxes that are no more. One whose sandbox nobody named stays.
    async fn collect(&mut self, valid: &[String]) -> Outcome {
        let gone = |pod: &Pod| !pod.record.container_id.is_empty() && !valid.contains(&pod.record.container_id);
        for key in self.which(gone) {
            tracing::info!(pod = %key, "its sandbox is gone, as the container runtime says");
            self.remove(&key).await?;
        }
        Ok(())
    }

    fn tell_mesh(&self) {
        if let Oracle::Cluster(pods) = &self.parts.oracle {
            pods.tell(self.pods.values().map(|pod| &pod.record));
        }
    }

    /// What nobody tells of: namespaces that vanished, and capture that is not as it was left.
    async fn repair(&mut self) {
        for key in self.which(|pod| !pod.record.netns.exists()) {
            tracing::info!(pod = %key, "its network namespace is gone");
            self.drop_pod(&key).await;
        }
        match self.parts.capture.reconcile().await {
            Ok(repaired) => repaired.iter().for_each(|what| tracing::warn!("repaired: {what}")),
            Err(error) => tracing::error!(%error, "cannot see whether capture stands as it should"),
        }
        self.forget_unused();
    }

    /// The certificate of an identity that no pod has is not kept for longer than connections may need that were accepted
    /// while one had it: a pod left the mesh, or is somebody else now.
    fn forget_unused(&mut self) {
        let snapshot = self.parts.knowledge.snapshot();
        let of_pod = |pod: &Pod| {
            let expected = self.parts.oracle.expected(&pod.record, &self.parts.knowledge);
            let wanted = expected.ok().and_then(|expected| match expected {
                Expected::Captured { uid, identity, .. } => Some((uid, identity)),
                Expected::Uncaptured(_) => None,
            });
            // The trust domain is as the mesh says.
            let announced = wanted.as_ref().and_then(|(uid, _)| snapshot.workload(uid));
            let announced = announced.map(|workload| workload.identity());
            let wanted = wanted.map(|(_, identity)| identity);
            pod.captured_as().cloned().into_iter().chain(announced).chain(wanted)
        };
        let used: HashSet<Identity> = self.pods.values().flat_map(of_pod).collect();
        let held = self.parts.identities.list().into_iter().map(|held| held.identity);
        let unused: HashSet<Identity> = held.filter(|identity| !used.contains(identity)).collect();
        for identity in unused.intersection(&self.unused) {
            self.parts.identities.forget(identity);
        }
        self.unused = unused;
    }

    /// Removes a pod that nobody waits for.
    pub(super) async fn drop_pod(&mut self, key: &NamespacedName) {
        if let Err(error) = self.remove(key).await {
            tracing::warn!(pod = %key, error, "cannot forget the pod");
        }
    }

    async fn reconcile_all(&mut self) {
        self.learn();
        let keys: Vec<_> = self.pods.keys().cloned().collect();
        for key in keys {
            self.reconcile(&key).await;
        }
        self.send_tunnels_away();
        // One that is found now ran without any agent: it does not hold up the others. Nor does one that is served until it
        // has left, or that goes on as it was until it can join.
        let counts = |pod: &Pod| (pod.restored || !pod.record.found) && pod.state == State::Unknown;
        let waiting = |pod: &Pod| pod.trouble.is_some() && counts(pod);
        let settled = self.parts.knowledge.snapshot().ready() && !self.pods.values().any(waiting);
        if settled && !self.view.settled() {
            // Whoever sees the agent ready sees its pods.
            self.show();
            self.view.lock().settled = true;
            self.parts.identities.settled();
            self.parts.link.release_unclaimed();
            if let Err(error) = self.parts.capture.forget_untold().await {
                tracing::error!(%error, "cannot forget pods that went while no agent ran");
            }
        }
        self.show();
        let now = Instant::now();
        self.pods.values_mut().for_each(|pod| pod.answer(now));
    }

    /// Tells the peers of pods that are on their way out, once: what lives ends by itself or with the pod.
    fn send_tunnels_away(&mut self) {
        for pod in self.pods.values_mut() {
            if let State::Told(Expected::Captured { uid, .. }) = &pod.state
                && !pod.sent_away
                && self.parts.oracle.is_leaving(&pod.record)
            {
                pod.sent_away = true;
                self.parts.proxy.send_tunnels_away(uid);
                tracing::debug!(pod = %pod.record.pod, "on its way out: its peers are told to open no streams in their tunnels");
            }
        }
    }

    /// Takes over what the API says now, also into the records: an agent after this one may start without it.
    fn learn(&mut self) {
        for pod in self.pods.values_mut() {
            let Some(news) = self.parts.oracle.news(&pod.record) else {
                continue;
            };
            pod.record.api = Some(news);
            if let Err(error) = self.records.keep(&pod.record) {
                tracing::warn!(pod = %pod.record.pod, %error, "cannot keep the pod's record");
            }
        }
        self.tell_mesh();
    }

    /// Brings one pod nearer to what it should be.
    async fn reconcile(&mut self, key: &NamespacedName) {
        let Some(pod) = self.pods.get(key) else { return };
        let outcome = match self.parts.oracle.expected(&pod.record, &self.parts.knowledge) {
            Ok(expected) if pod.state == State::Told(expected.clone()) => Ok(expected),
            Ok(expected) => self.change(key, &expected).await.map(|()| expected),
            Err(trouble) => Err(trouble),
        };
        let Some(pod) = self.pods.get_mut(key) else { return };
        let trouble = match outcome {
            Ok(expected) => {
                (pod.state, pod.leaving) = (State::Told(expected), None);
                // Not captured: when it joins, it is as new.
                pod.restored &= pod.captured_as().is_some();
                if pod.note()
                    && let Err(error) = self.records.keep(&pod.record)
                {
                    tracing::warn!(pod = %key, %error, "cannot keep the pod's record");
                }
                None
            }
            Err(trouble) => Some(trouble),
        };
        if let Some(trouble) = &trouble
            && pod.trouble.as_ref() != Some(trouble)
        {
            match trouble {
                Trouble::Waiting(text) => tracing::info!(pod = %key, "{text}"),
                Trouble::Failed(text) => tracing::error!(pod = %key, "{text}"),
            }
        }
        pod.trouble = trouble;
    }

    async fn change(&mut self, key: &NamespacedName, after: &Expected) -> Result<(), Trouble> {
        let Some(pod) = self.pods.get_mut(key) else {
            return Ok(());
        };
        match after {
            Expected::Uncaptured(uid) => {
                let unserved = pod.restored && pod.state == State::Unknown && pod.record.captured == Some(true);
                if unserved && let Some(before) = self.parts.oracle.captured(&pod.record, &self.parts.knowledge) {
                    match self.parts.take(&pod.record, &before, false).await {
                        Ok(()) => pod.state = State::Told(before),
                        // It leaves all the same; what came to it meanwhile is refused.
                        Err(trouble) => {
                            tracing::warn!(pod = %key, why = trouble.text(), "cannot serve it until it leaves the mesh");
                            self.parts.abandon(uid).await;
                            pod.record.captured = None;
                        }
                    }
                }
                let captured = pod.captured_as().is_some();
                // Of one found again it is not known here whether it is captured; the mesh may say so.
                if captured || (pod.restored && pod.state == State::Unknown) {
                    // Of one that this agent does not serve, nobody is refused any more by its release; and where not all is let
                    // in that comes in plaintext, peers that know are refused until it is released.
                    let lingers = captured && !self.parts.is_restricted(uid);
                    if !pod.may_be_released(!self.parts.may_be_dialled(key, uid), lingers) {
                        let text = "it leaves the mesh: its peers are told before it is released";
                        return Err(Trouble::Waiting(text.to_owned()));
                    }
                }
                if captured {
                    self.parts.release(&pod.record, uid).await?;
                    // Released: from here on it is known and not captured, whatever fails next.
                    (pod.state, pod.restored) = (State::Unknown, false);
                }
                self.parts.know(&pod.record, uid).await
            }
            Expected::Captured { uid, identity, .. } => {
                pod.leaving = None;
                if !pod.restored
                    && let Err(trouble) = self.parts.may_start(identity)
                {
                    if pod.state == State::Unknown && pod.record.captured == Some(false) {
                        // It runs, and goes on as it was until it can join.
                        self.parts.know(&pod.record, uid).await?;
                        pod.state = State::Told(Expected::Uncaptured(uid.clone()));
                    }
                    return Err(trouble);
                }
                if pod.record.captured == Some(false) {
                    // Before it is so: an agent that finds it captured after a crash must not take it for one that is not.
                    pod.record.captured = None;
                    let kept = self.records.keep(&pod.record);
                    kept.map_err(|error| Trouble::Failed(format!("cannot keep the pod's record: {error}")))?;
                }
                let served = matches!(&pod.state, State::Told(Expected::Captured { uid: served, .. }) if served == uid);
                self.parts.take(&pod.record, after, served).await
            }
        }
    }

    /// Shows every pod in the status, and what its annotation is to say on the board.
    fn show(&self) {
        let view = |pod: &Pod| {
            let uid = match &pod.state {
                State::Unknown => WorkloadUid("".into()),
                State::Told(told) => told.uid().clone(),
            };
            let settings = match &pod.state {
                State::Told(Expected::Captured { settings, .. }) => Some(settings),
                State::Told(Expected::Uncaptured(_)) | State::Unknown => None,
            };
            PodView {
                pod: pod.record.pod.clone(),
                uid,
                addresses: pod.record.addresses.clone(),
                captured: settings.is_some(),
                identity: pod.captured_as().cloned(),
                answers_dns: settings.is_some_and(|settings| self.parts.answers_dns(settings)),
                problem: pod.trouble.as_ref().map(|trouble| trouble.text().to_owned()),
                settings: settings.cloned().unwrap_or_default(),
                notes: pod
                    .record
                    .api
                    .iter()
                    .flat_map(|api| api.left_out.iter().chain(&api.problems).cloned())
                    .collect(),
            }
        };
        let pods = self.pods.values().map(view).collect();
        let mut state = self.view.lock();
        state.pods = pods;
        let wishes = Wishes {
            pods: self.pods.values().filter_map(Pod::wish).collect(),
            complete: state.settled,
            missed: self.lookout.missed(),
        };
        drop(state);
        self.parts.board.put(wishes);
    }
}
