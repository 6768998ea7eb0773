//! The thread that the index lives on: takes all steps that wait, applies them as one, hands on what follows.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::Arc,
    thread,
};

use k8s::{Finding, ObjectRef, live::Kind};
use tokio::sync::mpsc;

use super::Message;
use crate::{
    index::{Config, Index, ObjectChange, Settings},
    resources::{Change, Type},
};

/// The most that is applied as one step.
const BATCH: usize = 4096;

/// Where results go. Called on the index's thread.
pub trait Sink: Send + 'static {
    /// Resources that changed, together with what is to be told of which objects. The first call brings all there is.
    fn apply(&mut self, changes: Vec<Change>, findings: Vec<(ObjectRef, Vec<Finding>)>, settings: &Settings);
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

    pub(super) fn start(self, from: mpsc::Receiver<Message>) -> io::Result<()> {
        thread::Builder::new().name("index".into()).spawn(move || self.run(from))?;
        Ok(())
    }

    fn run(self, mut from: mpsc::Receiver<Message>) {
        let Self { config, mut sink } = self;
        let mut index = Index::new(config);
        let mut start = Some(Start::default());
        let mut batch = Vec::new();
        while from.blocking_recv_many(&mut batch, BATCH) > 0 {
            let mut changes: Vec<ObjectChange> = Vec::with_capacity(batch.len());
            for message in batch.drain(..) {
                match message {
                    Message::Change(change) => changes.push(change),
                    Message::Synced(kind) => {
                        if let Some(start) = &mut start {
                            start.synced.insert(kind);
                        }
                    }
                }
            }
            let mut outcome = index.apply(changes);
            if let Some(starting) = &mut start {
                starting.keep(outcome.changes, outcome.findings);
                if starting.synced.len() < Kind::ALL.len() {
                    continue;
                }
                let all = start.take().unwrap_or_default();
                outcome.changes = all.changes.into_values().collect();
                outcome.findings = all.findings.into_iter().collect();
                tracing::info!(resources = outcome.changes.len(), "everything has been listed; serving");
            } else if outcome.changes.is_empty() && outcome.findings.is_empty() {
                continue;
            }
            sink.apply(outcome.changes, outcome.findings, index.settings());
        }
    }
}

/// What is kept until every kind was listed.
#[derive(Default)]
struct Start {
    synced: BTreeSet<Kind>,
    changes: HashMap<(Type, Arc<str>), Change>,
    findings: HashMap<ObjectRef, Vec<Finding>>,
}

impl Start {
    fn keep(&mut self, changes: Vec<Change>, findings: Vec<(ObjectRef, Vec<Finding>)>) {
        for change in changes {
            match change {
                Change::Put(ref resource) => {
                    self.changes.insert((resource.type_, resource.name.clone()), change);
                }
                Change::Remove { type_, name } => {
                    self.changes.remove(&(type_, name));
                }
            }
        }
        self.findings.extend(findings);
    }
}
