//! The thread that the index lives on: takes all steps that wait, applies them as one, hands on what follows.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    sync::Arc,
    thread,
};

use k8s::{Finding, ObjectRef, live::Kind};
use tokio::sync::mpsc;

use super::{Health, Message, Tally};
use crate::{
    index::{Config, Index, ObjectChange, Settings},
    resources::{Change, Type},
    status::Seen,
};

/// The most that is applied as one step.
const BATCH: usize = 4096;

/// What a step of the index came to.
#[derive(Debug, Default)]
pub struct Step {
    /// Resources that changed.
    pub changes: Vec<Change>,
    /// Objects whose findings changed.
    pub findings: Vec<(ObjectRef, Vec<Finding>)>,
    /// Policies that were taken in.
    pub seen: Vec<Seen>,
}

/// Where results go. Called on the index's thread.
pub trait Sink: Send + 'static {
    /// A step. The first one brings all there is.
    fn apply(&mut self, step: Step, settings: &Settings);
}

/// An index that is about to start.
pub struct Indexing {
    config: Config,
    sink: Box<dyn Sink>,
}

impl Indexing {
    /// With an empty index.
    pub fn new(config: Config, sink: impl Sink) -> Self {
        Self {
            config,
            sink: Box::new(sink),
        }
    }

    pub(super) fn root_namespace(&self) -> Arc<str> {
        self.config.root_namespace.clone()
    }

    pub(super) fn start(self, from: mpsc::Receiver<(Kind, Tally, Message)>, health: Health) -> io::Result<()> {
        thread::Builder::new()
            .name("index".into())
            .spawn(move || self.run(from, &health))?;
        Ok(())
    }

    fn run(self, mut from: mpsc::Receiver<(Kind, Tally, Message)>, health: &Health) {
        let Self { config, mut sink } = self;
        let mut index = Index::new(config);
        let mut start = Some(Start::default());
        let mut batch = Vec::new();
        // What was seen and is not in the cache yet.
        let mut tallies = BTreeMap::new();
        while from.blocking_recv_many(&mut batch, BATCH) > 0 {
            let mut changes: Vec<ObjectChange> = Vec::with_capacity(batch.len());
            let mut step = Step::default();
            for (kind, tally, message) in batch.drain(..) {
                tallies.insert(kind, tally);
                match message {
                    Message::Change(change, seen) => {
                        changes.push(*change);
                        step.seen.extend(seen);
                    }
                    Message::Synced(kind) => {
                        if let Some(start) = &mut start {
                            start.synced.insert(kind);
                        }
                    }
                }
            }
            let outcome = index.apply(changes);
            step.changes = outcome.changes;
            step.findings = outcome.findings;
            if let Some(starting) = &mut start {
                starting.keep(step);
                if starting.synced.len() < Kind::ALL.len() {
                    continue;
                }
                step = start.take().unwrap_or_default().all();
                tracing::info!(resources = step.changes.len(), "everything has been listed; serving");
            }
            if !(step.changes.is_empty() && step.findings.is_empty() && step.seen.is_empty()) {
                sink.apply(step, index.settings());
            }
            // Only now: who reads them goes by the cache having it all.
            for (kind, tally) in std::mem::take(&mut tallies) {
                health.with(kind, |state| state.applied = tally);
            }
        }
    }
}

/// What is kept until every kind was listed.
#[derive(Default)]
struct Start {
    synced: BTreeSet<Kind>,
    changes: HashMap<(Type, Arc<str>), Change>,
    findings: HashMap<ObjectRef, Vec<Finding>>,
    seen: HashMap<ObjectRef, Seen>,
}

impl Start {
    fn keep(&mut self, step: Step) {
        for change in step.changes {
            match change {
                Change::Put(ref resource) => {
                    self.changes.insert((resource.type_, resource.name.clone()), change);
                }
                Change::Remove { type_, name } => {
                    self.changes.remove(&(type_, name));
                }
            }
        }
        self.findings.extend(step.findings);
        self.seen
            .extend(step.seen.into_iter().map(|seen| (seen.object.clone(), seen)));
    }

    fn all(self) -> Step {
        Step {
            changes: self.changes.into_values().collect(),
            findings: self.findings.into_iter().collect(),
            seen: self.seen.into_values().collect(),
        }
    }
}
