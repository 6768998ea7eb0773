//! Who may connect to whom, by the objects alone, and since when: what the mesh did is held against it.
//!
//! ```text
//!   begin(change 1)      in_force        begin(change 2)      in_force
//!   ──────┬─────────────────┬──────────────────┬─────────────────┬──────►
//!    old  │  old or new     │       new        │  new or newer   │  newer
//! ```
//! A change is certain from when every agent is known to have it; from its beginning until then both states may be met. A
//! connection is judged by every state that it may have met while it was tried. Pure: times are arguments.

use std::collections::{BTreeMap, BTreeSet};

/// What the objects say. Clients and servers by name; a client's name is its identity, too.
#[derive(Clone, Default, Debug)]
pub struct Rules {
    /// Server and client: denied by an AuthorizationPolicy.
    pub denied: BTreeSet<(String, String)>,
    /// A server with an AuthorizationPolicy that allows: nobody else.
    pub only: BTreeMap<String, String>,
    /// Servers that take no plaintext.
    pub strict: BTreeSet<String>,
    /// Clients that are not in the mesh.
    pub plain: BTreeSet<String>,
}

impl Rules {
    /// Whether a client is let in.
    pub fn let_in(&self, client: &str, server: &str) -> bool {
        let identity = (!self.plain.contains(client)).then_some(client);
        let Some(identity) = identity else {
            return !self.strict.contains(server) && !self.only.contains_key(server);
        };
        let denied = self.denied.contains(&(server.to_owned(), identity.to_owned()));
        !denied && self.only.get(server).is_none_or(|only| only == identity)
    }
}

/// What may become of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// It has to be answered.
    Allowed,
    /// It must not be.
    Refused,
    /// A change was under way.
    Either,
}

/// The states that there were.
#[derive(Debug)]
pub struct History(Vec<Epoch>);

#[derive(Debug)]
struct Epoch {
    begins: u64,
    /// None: not yet.
    in_force: Option<u64>,
    rules: Rules,
    /// Who comes, goes, or changes sides meanwhile.
    unsettled: BTreeSet<String>,
}

impl History {
    /// The first state, which is in force.
    pub fn new(now: u64, rules: Rules) -> Self {
        let unsettled = BTreeSet::new();
        Self(vec![Epoch {
            begins: now,
            in_force: Some(now),
            rules,
            unsettled,
        }])
    }

    /// The objects are about to say something else. Connections of those that are unsettled may fail meanwhile.
    pub fn begin(&mut self, now: u64, rules: Rules, unsettled: BTreeSet<String>) {
        self.0.push(Epoch {
            begins: now,
            in_force: None,
            rules,
            unsettled,
        });
    }

    /// Every agent has the last change.
    pub fn in_force(&mut self, now: u64) {
        if let Some(last) = self.0.last_mut() {
            last.in_force = Some(now);
        }
    }

    /// What the objects say now.
    pub fn rules(&self) -> Rules {
        self.0.last().map(|last| last.rules.clone()).unwrap_or_default()
    }

    /// How many states there were.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there was none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a client or a server was coming, going or changing sides in that time.
    pub fn is_unsettled(&self, who: &str, from: u64, to: u64) -> bool {
        self.0.iter().any(|epoch| {
            let until = epoch.in_force.unwrap_or(u64::MAX);
            epoch.unsettled.contains(who) && epoch.begins <= to && from <= until
        })
    }

    /// What may become of a connection that was tried from then to then.
    pub fn expected(&self, client: &str, server: &str, from: u64, to: u64) -> Expected {
        let (mut allowed, mut refused) = (false, false);
        for (epoch, next) in self.0.iter().zip(self.0.iter().skip(1).map(Some).chain([None])) {
            // Met until the next one is in force.
            let until = next.map_or(u64::MAX, |next| next.in_force.unwrap_or(u64::MAX));
            if epoch.begins > to || until < from {
                continue;
            }
            match epoch.rules.let_in(client, server) {
                true => allowed = true,
                false => refused = true,
            }
        }
        refused |= [client, server].iter().any(|who| self.is_unsettled(who, from, to));
        match (allowed, refused) {
            (true, false) => Expected::Allowed,
            (false, _) => Expected::Refused,
            (true, true) => Expected::Either,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strict() -> Rules {
        Rules {
            strict: BTreeSet::from(["web".to_owned()]),
            plain: BTreeSet::from(["outsider".to_owned()]),
            ..Rules::default()
        }
    }

    fn open() -> Rules {
        Rules {
            strict: BTreeSet::new(),
            ..strict()
        }
    }

    #[test]
    fn rules_say_what_istios_do() {
        let mut rules = strict();
        assert!(rules.let_in("friend", "web") && !rules.let_in("outsider", "web"));
        assert!(rules.let_in("outsider", "other"));
        rules.only.insert("other".to_owned(), "friend".to_owned());
        assert!(rules.let_in("friend", "other"));
        assert!(!rules.let_in("outsider", "other") && !rules.let_in("stranger", "other"));
        rules.denied.insert(("other".to_owned(), "friend".to_owned()));
        assert!(!rules.let_in("friend", "other") && rules.let_in("friend", "web"));
    }

    #[test]
    fn from_a_changes_beginning_until_it_is_in_force_both_states_may_be_met() {
        let mut history = History::new(0, open());
        history.begin(100, strict(), BTreeSet::new());
        history.in_force(200);
        let expected = |from, to| history.expected("outsider", "web", from, to);
        assert_eq!(expected(10, 99), Expected::Allowed);
        assert_eq!(expected(10, 100), Expected::Either);
        assert_eq!(expected(200, 300), Expected::Either);
        assert_eq!(expected(201, 300), Expected::Refused);
        // It concerns nobody else.
        assert_eq!(history.expected("friend", "web", 150, 160), Expected::Allowed);
    }

    #[test]
    fn what_is_not_in_force_yet_leaves_both_open() {
        let mut history = History::new(0, open());
        history.begin(100, strict(), BTreeSet::new());
        assert_eq!(history.expected("outsider", "web", 500, 600), Expected::Either);
    }

    #[test]
    fn who_comes_or_goes_may_fail_meanwhile_and_not_after() {
        let mut history = History::new(0, open());
        history.begin(100, open(), BTreeSet::from(["web".to_owned()]));
        history.in_force(200);
        assert_eq!(history.expected("friend", "web", 150, 160), Expected::Either);
        assert_eq!(history.expected("friend", "web", 201, 202), Expected::Allowed);
        assert_eq!(history.expected("friend", "other", 150, 160), Expected::Allowed);
    }
}
