//! What one client has and wants of one type: the protocol's decisions, without sockets or time.
//!
//! ```text
//!            request                        next(state) ─► chunk                acknowledged
//! (nothing) ────────► something owed ──────────────────────────────► in flight ─────────────► quiet
//!                          ▲          more chunks of the same plan ◄─┘  or refused             │
//!                          └────────────── the state moved on, names were asked for ◄──────────┘
//! ```
//! *Everything*: by a first request without names, or by `*`. The client is then known by the state it was last sent and
//! no list of what it has. What it missed while a response was in flight is in the difference to the newest state: that
//! difference is the only queue. *By name*: `network/ip`, `namespace/hostname` or uid. A service brings its endpoints, as
//! with istiod, and what was once sent is kept up to date until it is gone or its name is given up, also when it is no
//! endpoint any more: a client must not keep a stale one. A name that means nothing is answered as removed, and sent when
//! it appears. (istiod also sends the endpoints of the client's own node unasked; we don't: the agent asks for its pods.)
//!
//! What the client reports on coming back (`initial_resource_versions`) is not sent again if its version is ours, and
//! removed if we don't have it; with names, the reported ones count as asked for, as with istiod. A name that is
//! subscribed again is answered though nothing changed. A refused response is not sent again: only what then changes is.
//! For removals the refused count as had, for an older one may be.
//!
//! Policies that are gone or narrower wait: see `session`.
//!
//! Invariants: whatever the requests, changes and refusals, a client that takes what it is sent ends up with what it asked
//! for (`clients_converge`, in `session`); one response in flight.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
};

use super::{
    View,
    cache::{Snapshot, Table},
    codec::{Known, Request},
    entry::Entry,
    push::{Chunk, Encoded, Pushes, chunks},
};

/// One client and one type.
#[derive(Debug)]
pub(super) struct Subscription {
    view: View,
    wildcard: bool,
    /// Asked for by name.
    names: HashSet<Arc<str>>,
    /// By name, too: what it may have, to be kept up to date.
    held: HashSet<Arc<str>>,
    /// Names that wait for an answer.
    asked: Vec<Arc<str>>,
    /// What it reported, until the first plan is made.
    known: Vec<Known>,
    /// Something has to be said even if there is nothing to say.
    owed: bool,
    /// Everything has to be sent though it was before.
    again: bool,
    /// The state that it was wholly sent.
    sent: Option<Arc<Snapshot>>,
    plan: Option<Plan>,
    /// Of policies: what opens, to be said once the addresses of its generation are.
    withheld: BTreeMap<Arc<str>, Withheld>,
    /// The nonce and content of a response that is not acknowledged.
    in_flight: Option<(String, Chunk)>,
    acknowledged: u64,
}

/// What a policy became, and is not said yet.
#[derive(Debug)]
struct Withheld {
    since: u64,
    /// None: it is gone.
    put: Option<Arc<Entry>>,
    /// As the client has it, it holds for those, too, that do not name it.
    wide: bool,
}

/// What is still to be sent on the way to a state.
#[derive(Debug)]
struct Plan {
    target: Arc<Snapshot>,
    first: VecDeque<Arc<Encoded>>,
    /// Then all pages from here.
    pages: Option<usize>,
}

/// What a client made of a response.
#[derive(Debug)]
pub(super) enum Verdict {
    /// It is in force there.
    Accepted(Chunk),
    /// It is not.
    Refused(Chunk),
    /// It was not about the response that is in flight.
    Stale,
}

const EVERYTHING: &str = "*";

impl Subscription {
    /// By a type's first request.
    pub(super) fn new(view: View, request: &mut Request) -> Self {
        let mut new = Self {
            view,
            wildcard: request.subscribe.is_empty(),
            names: HashSet::new(),
            held: HashSet::new(),
            asked: Vec::new(),
            known: Vec::new(),
            owed: true,
            again: false,
            sent: None,
            plan: None,
            withheld: BTreeMap::new(),
            in_flight: None,
            acknowledged: 0,
        };
        new.change(request);
        new.known = std::mem::take(&mut request.known);
        if !new.wildcard {
            let reported = new
                .known
                .iter()
                .filter_map(|known| std::str::from_utf8(&known.name).ok());
            let reported: Vec<Arc<str>> = reported.map(Arc::from).collect();
            new.asked.extend(reported.iter().cloned());
            new.names.extend(reported);
        }
        new
    }

    /// By a later one.
    pub(super) fn change(&mut self, request: &Request) {
        for name in &request.subscribe {
            self.owed = true;
            if name == EVERYTHING {
                self.wildcard = true;
                self.again = self.sent.is_some() || self.plan.is_some();
            } else {
                let name: Arc<str> = name.as_str().into();
                self.names.insert(Arc::clone(&name));
                self.asked.push(name);
            }
        }
        for name in &request.unsubscribe {
            if name == EVERYTHING {
                self.give_up_everything();
            } else if self.names.remove(name.as_str()) {
                self.asked.retain(|asked| **asked != **name);
                self.give_up(name);
            }
        }
    }

    /// It forgets what it had; what it still asks for by name is answered anew.
    fn give_up_everything(&mut self) {
        (self.wildcard, self.again) = (false, false);
        (self.sent, self.plan) = (None, None);
        self.held.clear();
        self.known.clear();
        self.withheld.clear();
        self.asked = self.names.iter().cloned().collect();
    }

    /// The client forgets what it gives up; endpoints, which it did not name, it keeps, and is told of.
    fn give_up(&mut self, name: &str) {
        self.held.remove(name);
        if let Some(state) = self.sent.clone() {
            let table = state.table(self.view.type_());
            let forgotten = table.named(name).filter(|entry| !self.wants(table, entry));
            for entry in forgotten.collect::<Vec<_>>() {
                self.held.remove(&entry.name);
            }
        }
    }

    /// How many names it asked for.
    pub(super) fn names(&self) -> usize {
        self.names.len()
    }

    /// The state that was put on the wire whole, if nothing is left of a plan.
    pub(super) fn sent(&self) -> Option<&Arc<Snapshot>> {
        match self.plan {
            None => self.sent.as_ref(),
            Some(_) => None,
        }
    }

    /// Whether what was sent last is a part of a state, of which more follows.
    pub(super) fn is_midway(&self) -> bool {
        self.plan.is_some()
    }

    /// The generation whose content, as far as asked for, the client acknowledged.
    pub(super) fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// The client answers.
    pub(super) fn answered(&mut self, nonce: &str, refused: bool) -> Verdict {
        match self.in_flight.take_if(|(sent, _)| sent == nonce) {
            None => Verdict::Stale,
            Some((_, chunk)) => {
                self.rest();
                match refused {
                    true => Verdict::Refused(chunk),
                    false => Verdict::Accepted(chunk),
                }
            }
        }
    }

    /// Takes note if there is nothing left to be said or acknowledged.
    fn rest(&mut self) {
        let quiet = self.in_flight.is_none() && self.plan.is_none() && self.withheld.is_empty();
        if let (true, Some(sent)) = (quiet && !self.owed, &self.sent) {
            self.acknowledged = sent.generation();
        }
    }

    /// The next response on the way to a state; the caller gives it the nonce.
    pub(super) fn next(&mut self, to: &Arc<Snapshot>, pushes: &Pushes, nonce: impl Fn() -> String) -> Option<Chunk> {
        if self.in_flight.is_some() {
            self.skip(to, pushes);
            return None;
        }
        if self.plan.is_none() {
            self.make_plan(to, pushes);
        }
        let chunk = self.take(pushes.chunk_bytes());
        let chunk = match chunk {
            None if self.owed => Some(Chunk::empty()),
            other => other,
        };
        self.owed &= chunk.is_none();
        if let Some(chunk) = &chunk {
            self.in_flight = Some((nonce(), chunk.clone()));
        }
        self.rest();
        chunk
    }

    /// Policies that are gone, or narrower, since this generation or before it.
    pub(super) fn release(&mut self, floor: u64, pushes: &Pushes, nonce: impl Fn() -> String) -> Option<Chunk> {
        if self.in_flight.is_some() || self.plan.is_some() || self.withheld.is_empty() {
            return None;
        }
        let (mut puts, mut gone) = (Vec::new(), Vec::new());
        self.withheld.retain(|name, withheld| {
            let stays = withheld.since > floor;
            match &withheld.put {
                _ if stays => {}
                Some(put) => puts.push(Arc::clone(put)),
                None => gone.push(Arc::clone(name)),
            }
            stays
        });
        let mut parts: VecDeque<_> = chunks(self.view, &puts, &gone, pushes.chunk_bytes()).into();
        let chunk = Chunk::Encoded(parts.pop_front()?);
        if !parts.is_empty() {
            let target = Arc::clone(self.sent.as_ref()?);
            self.plan = Some(Plan {
                target,
                first: parts,
                pages: None,
            });
        }
        self.in_flight = Some((nonce(), chunk.clone()));
        Some(chunk)
    }

    /// A state that brings nothing new needs no response, and so no acknowledgement.
    fn skip(&mut self, to: &Arc<Snapshot>, pushes: &Pushes) {
        if self.plan.is_none()
            && self.wildcard
            && let Some(from) = &self.sent
        {
            let push = pushes.between(self.view, from, to);
            if push.puts().next().is_none() && push.removed().next().is_none() {
                self.sent = Some(Arc::clone(to));
            }
        }
    }

    fn make_plan(&mut self, to: &Arc<Snapshot>, pushes: &Pushes) {
        let from = self.sent.clone();
        let behind = from.as_ref().is_none_or(|from| from.generation() < to.generation());
        if !behind && self.asked.is_empty() && !self.again {
            return;
        }
        let asked = std::mem::take(&mut self.asked);
        let again = std::mem::take(&mut self.again);
        let (mut first, pages) = match (&from, self.wildcard) {
            (None, true) if again || self.known.is_empty() => (Vec::new(), Some(0)),
            (None, true) => (self.reported(to, pushes), None),
            (Some(from), true) => (self.everything(from, to, pushes), again.then_some(0)),
            (from, false) => (self.by_name(from.as_deref(), &asked, to, pushes), None),
        };
        if self.wildcard {
            first.extend(self.answers(&asked, to, pushes));
        }
        self.known = Vec::new();
        self.plan = Some(Plan {
            target: Arc::clone(to),
            first: first.into(),
            pages,
        });
    }

    /// The next part of the plan; at its end the client was sent the state.
    fn take(&mut self, limit: usize) -> Option<Chunk> {
        let plan = self.plan.as_mut()?;
        let chunk = match plan.first.pop_front() {
            Some(encoded) => Some(Chunk::Encoded(encoded)),
            None => plan.pages(self.view, limit),
        };
        if plan.first.is_empty() && !plan.has_pages(self.view) {
            self.sent = self.plan.take().map(|plan| plan.target);
        }
        chunk
    }

    /// What changed, to somebody who has everything.
    fn everything(&mut self, from: &Snapshot, to: &Arc<Snapshot>, pushes: &Pushes) -> Vec<Arc<Encoded>> {
        let push = pushes.between(self.view, from, to);
        if self.view != View::Authorization {
            return push.chunks().to_vec();
        }
        let table = from.table(self.view.type_());
        let narrows = |put: &Entry| put.named && self.is_wide(&put.name, table.get(&put.name).map(|entry| &**entry));
        let (narrower, others): (Vec<_>, Vec<_>) = push.puts().cloned().partition(|put| narrows(put));
        for put in &others {
            self.withheld.remove(&put.name);
        }
        for entry in push.removed() {
            let wide = self.is_wide(&entry.name, Some(entry));
            self.withhold(&entry.name, to, None, wide);
        }
        if narrower.is_empty() {
            return push.put_chunks().to_vec();
        }
        for put in narrower {
            self.withhold(&Arc::clone(&put.name), to, Some(put), true);
        }
        chunks(self.view, &others, &[], pushes.chunk_bytes())
    }

    fn withhold(&mut self, name: &Arc<str>, to: &Snapshot, put: Option<Arc<Entry>>, wide: bool) {
        let since = to.generation();
        self.withheld.insert(Arc::clone(name), Withheld { since, put, wide });
    }

    /// Whether the client has a policy of this name that holds for those, too, that do not name it; `sent` is what it was
    /// sent last, unless something is withheld.
    fn is_wide(&self, name: &str, sent: Option<&Entry>) -> bool {
        match self.withheld.get(name) {
            Some(withheld) => withheld.wide,
            None => sent.is_some_and(|entry| !entry.named),
        }
    }

    /// What changed, to somebody who had everything once.
    fn reported(&mut self, to: &Arc<Snapshot>, pushes: &Pushes) -> Vec<Arc<Encoded>> {
        let table = to.table(self.view.type_());
        let mut narrower = Vec::new();
        let mut known: HashMap<&[u8], &[u8]> = self
            .known
            .iter()
            .map(|known| (&known.name[..], &known.version[..]))
            .collect();
        let seen = table.iter().filter(|entry| entry.is_seen_in(self.view));
        let mut puts = Vec::new();
        for entry in seen {
            match known.remove(entry.name.as_bytes()) {
                Some(version) if version == entry.version.as_bytes() => {}
                // It may be wider there: what that version said, nobody knows any more.
                Some(_) if entry.named => narrower.push(Arc::clone(entry)),
                _ => puts.push(Arc::clone(entry)),
            }
        }
        let gone = known.into_keys().filter_map(|name| std::str::from_utf8(name).ok());
        let mut gone: Vec<Arc<str>> = gone.map(Arc::from).collect();
        if self.view == View::Authorization {
            for name in std::mem::take(&mut gone) {
                self.withhold(&name, to, None, true);
            }
        }
        for put in narrower {
            self.withhold(&Arc::clone(&put.name), to, Some(put), true);
        }
        chunks(self.view, &puts, &gone, pushes.chunk_bytes())
    }

    /// Names that were asked for beside everything: answered, though they were sent already.
    fn answers(&self, asked: &[Arc<str>], to: &Arc<Snapshot>, pushes: &Pushes) -> Vec<Arc<Encoded>> {
        let mut answer = Answer::default();
        for name in asked {
            answer.add(self.view, to.table(self.view.type_()), name, |_| false);
        }
        answer.encode(self.view, pushes.chunk_bytes())
    }

    fn by_name(
        &mut self,
        from: Option<&Snapshot>,
        asked: &[Arc<str>],
        to: &Arc<Snapshot>,
        pushes: &Pushes,
    ) -> Vec<Arc<Encoded>> {
        let table = to.table(self.view.type_());
        let mut answer = Answer::default();
        let reported: HashMap<&[u8], &[u8]> = self
            .known
            .iter()
            .map(|known| (&known.name[..], &known.version[..]))
            .collect();
        let current = |entry: &Entry| reported.get(entry.name.as_bytes()) == Some(&entry.version.as_bytes());
        for name in asked {
            answer.add(self.view, table, name, |entry| self.held.contains(&entry.name));
        }
        answer.found.retain(|_, entry| !current(entry));
        if let Some(from) = from {
            let push = pushes.between(self.view, from, to);
            for put in push.puts() {
                let wanted = self.wants(table, put);
                if wanted || self.held.contains(&put.name) {
                    answer.found.insert(Arc::clone(&put.name), Arc::clone(put));
                }
                // A name of the service may be new, so that endpoints come that did not change.
                if wanted {
                    answer.add_endpoints(self.view, table, put, |entry| self.held.contains(&entry.name));
                }
            }
            let gone = push.removed().filter(|entry| self.held.contains(&entry.name));
            answer.missing.extend(gone.map(|entry| Arc::clone(&entry.name)));
        }
        for name in asked {
            self.held
                .extend(meant(table, name).map(|entry| Arc::clone(&entry.name)));
        }
        self.held.extend(answer.found.keys().cloned());
        self.held.retain(|name| !answer.missing.contains(name));
        answer.encode(self.view, pushes.chunk_bytes())
    }

    /// Whether a name that it asked for means this, or a service that this is an endpoint of.
    fn wants(&self, table: &Table, entry: &Entry) -> bool {
        let named = |entry: &Entry| {
            self.names.contains(&entry.name) || entry.aliases.iter().any(|alias| self.names.contains(alias))
        };
        let services = entry
            .services
            .iter()
            .filter_map(|name| table.get(name).map(|service| (name, service)));
        named(entry) || { services }.any(|(name, service)| self.names.contains(name) || named(service))
    }
}

impl Plan {
    /// Whether there are pages to come that hold something.
    fn has_pages(&self, view: View) -> bool {
        let table = self.target.table(view.type_());
        let pages = self
            .pages
            .into_iter()
            .flat_map(|at| at..)
            .map_while(|at| table.page(at));
        pages.into_iter().any(|page| !page.body(view).is_empty())
    }

    /// The next pages, up to the limit.
    fn pages(&mut self, view: View, limit: usize) -> Option<Chunk> {
        let table = self.target.table(view.type_());
        let mut at = self.pages?;
        let (mut pages, mut size) = (Vec::new(), 0);
        self.pages = loop {
            let Some(page) = table.page(at) else { break None };
            let len = page.body(view).len();
            if size > 0 && size + len > limit {
                break Some(at);
            }
            if len > 0 {
                pages.push(Arc::clone(page));
                size += len;
            }
            at += 1;
        };
        (!pages.is_empty()).then_some(Chunk::Pages(pages))
    }
}

/// What names mean.
#[derive(Default)]
struct Answer {
    found: BTreeMap<Arc<str>, Arc<Entry>>,
    missing: BTreeSet<Arc<str>>,
}

impl Answer {
    fn add(&mut self, view: View, table: &Table, name: &Arc<str>, held: impl Fn(&Entry) -> bool) {
        let mut any = false;
        for entry in table.named(name).filter(|entry| entry.is_seen_in(view)) {
            any = true;
            self.found.insert(Arc::clone(&entry.name), Arc::clone(entry));
            self.add_endpoints(view, table, entry, &held);
        }
        if !any {
            self.missing.insert(Arc::clone(name));
        }
    }

    fn add_endpoints(&mut self, view: View, table: &Table, service: &Entry, held: impl Fn(&Entry) -> bool) {
        let endpoints = table.endpoints(&service.name).filter(|entry| entry.is_seen_in(view));
        for endpoint in endpoints.filter(|entry| !held(entry)) {
            self.found.insert(Arc::clone(&endpoint.name), Arc::clone(endpoint));
        }
    }

    fn encode(&self, view: View, limit: usize) -> Vec<Arc<Encoded>> {
        let puts: Vec<_> = self.found.values().cloned().collect();
        let missing: Vec<_> = self.missing.iter().cloned().collect();
        chunks(view, &puts, &missing, limit)
    }
}

/// What a name means, with the endpoints of what is a service.
fn meant<'a>(table: &'a Table, name: &'a str) -> impl Iterator<Item = &'a Arc<Entry>> {
    table
        .named(name)
        .flat_map(|entry| std::iter::once(entry).chain(table.endpoints(&entry.name)))
}
