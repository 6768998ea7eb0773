//! The resources of one type: what is held in which version, what the current state's parts have brought so far, and
//! what was refused.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Range,
    sync::Arc,
};

use bytes::Bytes;

use mesh::{Delta, Unreadable};
use model::{NamespacedName, NetworkAddress, WorkloadUid};

use crate::{
    books::Type,
    decode::{self, Object},
    state::Change,
};

/// What a resource is, to remove it by its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    Workload,
    Service,
    Policy,
}

#[derive(Debug)]
struct Entry {
    version: Box<str>,
    kind: Kind,
}

#[derive(Debug)]
struct Refusal {
    reason: String,
    /// Something stands for it in the mesh.
    closes: Option<Type>,
    /// Said on this connection.
    recent: bool,
}

/// What closes where a resource can't be read.
#[derive(Debug)]
enum Closing {
    /// The policy that is made of this message.
    Policy(Vec<u8>),
    /// No way to these addresses.
    Address(Vec<NetworkAddress>),
}

#[derive(Debug)]
struct Staged {
    version: Box<str>,
    object: Object,
    /// Where its message is among the staged ones.
    message: Range<usize>,
}

/// A change that does not say its type yet.
#[derive(Debug)]
pub(crate) enum Untyped {
    Put(Arc<str>, Box<str>, Bytes),
    Remove(String),
}

impl Untyped {
    pub(crate) fn of(self, type_: Type) -> Change {
        match self {
            Self::Put(name, version, message) => Change::put(type_, name, version, message),
            Self::Remove(name) => Change::remove(type_, name.into()),
        }
    }
}

/// The resources of one type.
#[derive(Debug, Default)]
pub(crate) struct Held {
    entries: HashMap<Arc<str>, Entry>,
    rejected: BTreeMap<String, Refusal>,
    /// A name's last word counts.
    puts: HashMap<Arc<str>, Staged>,
    /// The messages of what is staged, one after the other: many small ones would leave as many holes.
    messages: Vec<u8>,
    removals: BTreeSet<String>,
    /// What is to stand for what can't be read.
    closing: BTreeMap<String, Closing>,
    synchronised: bool,
}

fn kind_of(object: &Object) -> Kind {
    match object {
        Object::Workload(_) => Kind::Workload,
        Object::Service(_) => Kind::Service,
        Object::Policy(_) => Kind::Policy,
    }
}

/// The object's name; a workload's own text, so that it is in memory once.
fn name_of(object: &Object) -> Arc<str> {
    match object {
        Object::Workload(workload) => workload.uid.0.clone(),
        Object::Service(service) => service.key().to_string().into(),
        Object::Policy(policy) => policy.key().to_string().into(),
    }
}

fn key_of(name: &str) -> NamespacedName {
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    NamespacedName::new(namespace, name)
}

fn remove(kind: Kind, name: &str, delta: &mut Delta) {
    match kind {
        Kind::Workload => delta.removed_workloads.push(WorkloadUid(name.into())),
        Kind::Service => delta.removed_services.push(key_of(name)),
        Kind::Policy => delta.removed_policies.push(key_of(name)),
    }
}

impl Held {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether this connection brought a whole state.
    pub(crate) fn is_synchronised(&self) -> bool {
        self.synchronised
    }

    /// What was refused, with why.
    pub(crate) fn rejected(&self) -> impl Iterator<Item = (&str, &str)> {
        let rejected = self.rejected.iter();
        rejected.map(|(name, refusal)| (name.as_str(), refusal.reason.as_str()))
    }

    /// What is held, to be told to the control plane.
    pub(crate) fn versions(&self) -> BTreeMap<String, String> {
        let entries = self.entries.iter();
        entries
            .map(|(name, entry)| (name.to_string(), entry.version.to_string()))
            .collect()
    }

    /// What was left unfinished is forgotten.
    pub(crate) fn disconnected(&mut self) {
        self.puts = HashMap::new();
        self.messages = Vec::new();
        self.removals.clear();
        self.closing.clear();
        self.synchronised = false;
        self.rejected.values_mut().for_each(|refusal| refusal.recent = false);
    }

    pub(crate) fn stage(&mut self, object: Object, version: String, message: &[u8]) {
        let name = name_of(&object);
        self.removals.remove(&*name);
        self.closing.remove(&*name);
        let start = self.messages.len();
        self.messages.extend_from_slice(message);
        let staged = Staged {
            version: version.into(),
            object,
            message: start..self.messages.len(),
        };
        self.puts.insert(name, staged);
    }

    pub(crate) fn stage_removal(&mut self, name: &str) {
        self.puts.remove(name);
        self.closing.remove(name);
        self.removals.insert(name.to_owned());
    }

    /// The last good one stays, here and in the mesh; where there is none, something closes.
    pub(crate) fn stage_refusal(
        &mut self,
        type_: Type,
        name: &str,
        message: &[u8],
        aliases: &[String],
        reason: String,
    ) {
        let is_held = self.entries.contains_key(name) && !self.removals.contains(name);
        let closing = match type_ {
            _ if self.puts.contains_key(name) => None,
            Type::Authorization if is_held => None,
            Type::Authorization => decode::closing(name, message).map(|_| Closing::Policy(message.to_vec())),
            // Also of what is held: the bad version may be in more places than the good one.
            Type::Address => Some(decode::places(message, aliases))
                .filter(|places| !places.is_empty())
                .map(Closing::Address),
        };
        let before = self.rejected.get(name).and_then(|refusal| refusal.closes);
        let refusal = Refusal {
            reason,
            closes: closing.as_ref().map(|_| type_).or(before),
            recent: true,
        };
        if let Some(closing) = closing {
            self.closing.insert(name.to_owned(), closing);
        }
        self.rejected.insert(name.to_owned(), refusal);
    }

    /// The state is whole: what changes.
    pub(crate) fn commit(&mut self, live: bool) -> (Vec<Untyped>, Delta) {
        let (mut changes, mut delta) = (Vec::new(), Delta::default());
        for name in std::mem::take(&mut self.removals) {
            let closed = self.forget_refusal(&name, &mut delta);
            if let Some(entry) = self.entries.remove(name.as_str()) {
                remove(entry.kind, &name, &mut delta);
                changes.push(Untyped::Remove(name));
            } else if closed {
                changes.push(Untyped::Remove(name));
            }
        }
        if live && !std::mem::replace(&mut self.synchronised, true) {
            self.forget_stale(&mut changes, &mut delta);
        }
        for (name, closing) in std::mem::take(&mut self.closing) {
            changes.extend(self.close(name, closing, &mut delta));
        }
        // By name, so that what follows does not depend on a hash.
        let mut puts: Vec<_> = std::mem::take(&mut self.puts).into_iter().collect();
        puts.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        let messages = Bytes::from(std::mem::take(&mut self.messages));
        for (name, staged) in puts {
            self.forget_refusal(&name, &mut delta);
            let (kind, version) = (kind_of(&staged.object), staged.version.clone());
            let before = self.entries.insert(name.clone(), Entry { version, kind });
            if let Some(before) = before.filter(|before| before.kind != kind) {
                remove(before.kind, &name, &mut delta);
            }
            match staged.object {
                Object::Workload(workload) => delta.workloads.push(workload),
                Object::Service(service) => delta.services.push(service),
                Object::Policy(policy) => delta.policies.push(*policy),
            }
            changes.push(Untyped::Put(name, staged.version, messages.slice(staged.message)));
        }
        (changes, delta)
    }

    /// Has something stand for what can't be read; what the disk is told, unless it has the last good version.
    fn close(&self, name: String, closing: Closing, delta: &mut Delta) -> Option<Untyped> {
        let message = match closing {
            Closing::Policy(message) => {
                delta.policies.extend(decode::closing(&name, &message));
                message
            }
            Closing::Address(addresses) => {
                let message = decode::stand_in(&addresses);
                let name = name.as_str().into();
                delta.unreadable.push(Unreadable { name, addresses });
                message
            }
        };
        (!self.entries.contains_key(name.as_str())).then(|| Untyped::Put(name.into(), Box::default(), message.into()))
    }

    /// A refusal that is over; whether something stood for it.
    fn forget_refusal(&mut self, name: &str, delta: &mut Delta) -> bool {
        let closes = self.rejected.remove(name).and_then(|refusal| refusal.closes);
        match closes {
            Some(Type::Authorization) => delta.removed_policies.push(key_of(name)),
            Some(Type::Address) => delta.removed_unreadable.push(name.into()),
            None => {}
        }
        closes.is_some()
    }

    /// Refusals of an earlier connection: they are not among what we say we hold, so one that is still there came again.
    fn forget_stale(&mut self, changes: &mut Vec<Untyped>, delta: &mut Delta) {
        let stale = self.rejected.iter().filter(|(_, refusal)| !refusal.recent);
        let stale: Vec<String> = stale.map(|(name, _)| name.clone()).collect();
        for name in stale {
            // What is held is on the disk by this name.
            if self.forget_refusal(&name, delta) && !self.entries.contains_key(name.as_str()) {
                changes.push(Untyped::Remove(name));
            }
        }
    }
}
