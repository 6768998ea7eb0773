//! What is to be told of which object, and what is left to tell. Bounded by the objects themselves.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Instant,
};

use k8s::{Effect, Finding, ObjectRef, live::Kind};
use serde_json::Value;
use tokio::sync::Notify;

/// An object that has a condition, as the watch brought it.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Which.
    pub object: ObjectRef,
    /// None: it is gone.
    pub state: Option<SeenState>,
}

/// What matters of its state.
#[derive(Clone, Debug)]
pub struct SeenState {
    /// `apiVersion`.
    pub version: String,
    /// Its uid.
    pub uid: String,
    /// Of its specification.
    pub generation: i64,
    /// Its conditions as they stand.
    pub conditions: Option<Value>,
}

impl Seen {
    /// Of an object of the API; nothing for kinds that have no condition here.
    pub fn of(kind: Kind, namespace: &str, name: &str, object: Option<&Value>) -> Option<Self> {
        if !kind.has_condition() {
            return None;
        }
        let state = object.map(|object| {
            let text = |pointer: &str| {
                let found = object.pointer(pointer).and_then(Value::as_str);
                found.unwrap_or_default().to_owned()
            };
            SeenState {
                version: text("/apiVersion"),
                uid: text("/metadata/uid"),
                generation: object
                    .pointer("/metadata/generation")
                    .and_then(Value::as_i64)
                    .unwrap_or_default(),
                conditions: object.pointer("/status/conditions").cloned(),
            }
        });
        Some(Self {
            object: kind.object(namespace, name),
            state,
        })
    }
}

/// An object that something may be told of.
#[derive(Clone, Debug)]
pub struct Record {
    /// Of an object that has a condition.
    pub seen: Option<SeenState>,
    /// What is to be told.
    pub findings: Vec<Finding>,
    /// The state of the mesh that has it.
    pub generation: u64,
    /// Since when.
    pub since: Instant,
}

/// All of them.
#[derive(Default)]
pub struct Board {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    records: BTreeMap<ObjectRef, Record>,
    open: BTreeSet<ObjectRef>,
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A step of the index: objects with a condition that it took in, findings that changed, and the state of the mesh that has them.
    pub fn note(&self, seen: Vec<Seen>, findings: Vec<(ObjectRef, Vec<Finding>)>, generation: u64) {
        if seen.is_empty() && findings.is_empty() {
            return;
        }
        let mut state = self.state();
        for seen in seen {
            match seen.state {
                Some(found) => {
                    let record = state.touch(seen.object, generation);
                    record.seen = Some(found);
                }
                None => state.gone(&seen.object),
            }
        }
        for (object, findings) in findings {
            let told = findings.iter().any(|finding| finding.effect > Effect::Note);
            let has_condition = state.records.get(&object).is_some_and(|record| record.seen.is_some());
            if told || has_condition {
                state.touch(object, generation).findings = findings;
            } else {
                state.forget(&object);
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Resolves when something new is to be told.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    /// What is to be told.
    pub fn open(&self) -> Vec<(ObjectRef, Record)> {
        let state = self.state();
        let open = state
            .open
            .iter()
            .filter_map(|object| Some((object.clone(), state.records.get(object)?.clone())));
        open.collect()
    }

    /// It was told; unless there is something newer.
    pub fn done(&self, object: &ObjectRef, record: &Record) {
        let mut state = self.state();
        if state.records.get(object).is_none_or(|now| now.since == record.since) {
            state.open.remove(object);
        }
    }

    /// It has to be looked at again.
    pub fn reopen(&self, names: impl IntoIterator<Item = Arc<str>>) {
        let mut state = self.state();
        for name in names {
            // Resources are named as the policies that they are made of.
            let Some((namespace, name)) = name.split_once('/') else {
                continue;
            };
            let object = Kind::AuthorizationPolicy.object(namespace, name);
            if state.records.contains_key(&object) {
                state.open.insert(object);
            }
        }
    }

    /// All have to be looked at: another replica may have told something else.
    pub fn reopen_all(&self) {
        let mut state = self.state();
        state.open = state.records.keys().cloned().collect();
    }
}

impl State {
    fn touch(&mut self, object: ObjectRef, generation: u64) -> &mut Record {
        self.open.insert(object.clone());
        let record = self.records.entry(object).or_insert_with(|| Record {
            seen: None,
            findings: Vec::new(),
            generation,
            since: Instant::now(),
        });
        record.generation = generation;
        record.since = Instant::now();
        record
    }

    /// What was found of it stays until it is said that nothing is: it may come again in the same step.
    fn gone(&mut self, object: &ObjectRef) {
        match self.records.get_mut(object) {
            Some(record) if !record.findings.is_empty() => record.seen = None,
            _ => self.forget(object),
        }
    }

    fn forget(&mut self, object: &ObjectRef) {
        self.records.remove(object);
        self.open.remove(object);
    }
}

#[cfg(test)]
mod tests {
    use k8s::{Place, Problem};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_changed_while_it_was_told_stays_open() {
        let board = Board::default();
        let object = json!({"apiVersion": "v1", "metadata": {"uid": "u", "generation": 1}});
        let seen = || Seen::of(Kind::AuthorizationPolicy, "a", "b", Some(&object)).unwrap();
        board.note(vec![seen()], Vec::new(), 1);
        let open = board.open();
        let (name, record) = &open[0];
        board.note(vec![seen()], Vec::new(), 2);
        board.done(name, record);
        assert_eq!(board.open()[0].1.generation, 2);
        let (name, record) = board.open().remove(0);
        board.done(&name, &record);
        assert!(board.open().is_empty());
        board.reopen(["a/b".into(), "a/other".into(), "nonsense".into()]);
        assert_eq!(board.open().len(), 1);
        board.note(
            vec![Seen::of(Kind::AuthorizationPolicy, "a", "b", None).unwrap()],
            Vec::new(),
            3,
        );
        assert!(board.open().is_empty());
    }

    #[test]
    fn what_is_made_anew_at_once_keeps_its_findings() {
        let board = Board::default();
        let name = Kind::AuthorizationPolicy.object("a", "b");
        let seen = |uid: Option<&str>| {
            let object = uid.map(|uid| json!({"apiVersion": "v1", "metadata": {"uid": uid, "generation": 1}}));
            Seen::of(Kind::AuthorizationPolicy, "a", "b", object.as_ref()).unwrap()
        };
        let finding = Finding {
            place: Place::default(),
            object: name.clone(),
            field: String::new(),
            problem: Problem::NotActedUpon,
            effect: Effect::Closed,
        };
        board.note(vec![seen(Some("1"))], vec![(name.clone(), vec![finding])], 1);
        // What is found is as before, so that nothing is said of it.
        board.note(vec![seen(None), seen(Some("2"))], Vec::new(), 2);
        let (_, record) = board.open().remove(0);
        assert_eq!((record.seen.unwrap().uid.as_str(), record.findings.len()), ("2", 1));
        board.note(vec![seen(None)], vec![(name, Vec::new())], 3);
        assert!(board.state().records.is_empty() && board.open().is_empty());
    }

    #[test]
    fn notes_on_kinds_without_a_condition_are_not_told() {
        let board = Board::default();
        let object = Kind::Pod.object("a", "b");
        let finding = |effect| Finding {
            place: Place::default(),
            object: object.clone(),
            field: String::new(),
            problem: Problem::NotActedUpon,
            effect,
        };
        board.note(Vec::new(), vec![(object.clone(), vec![finding(Effect::Note)])], 1);
        assert!(board.open().is_empty());
        board.note(Vec::new(), vec![(object.clone(), vec![finding(Effect::Refused)])], 1);
        assert_eq!(board.open().len(), 1);
        board.note(Vec::new(), vec![(object.clone(), Vec::new())], 2);
        assert!(board.open().is_empty());
    }
}
