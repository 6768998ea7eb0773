//! A client that believes what it is sent, and what it then has: each rule of the protocol, and random sequences of
//! everything that may happen. Does not know of sockets.

use std::collections::{BTreeMap, BTreeSet};

use proto::{Message, discovery::DeltaDiscoveryResponse, discovery::Status, security::Scope};

use super::super::{Cache, codec::Known, testing::*};
use super::*;
use crate::resources::{Change, Type};

#[path = "session_tests/converge.rs"]
mod converge;

const LIMITS: Limits = Limits {
    names: 1000,
    acknowledge: Duration::from_secs(60),
    settle: Duration::from_millis(20),
};

/// A client that believes what it is sent, and the server's side of its stream.
struct Client {
    session: Session,
    now: Instant,
    pushes: Pushes,
    /// Name and version of what it has.
    has: [BTreeMap<String, String>; 3],
    responses: Vec<DeltaDiscoveryResponse>,
    waiting: Vec<(View, String)>,
}

fn request(view: View) -> Request {
    Request {
        type_url: view.url().to_owned(),
        ..Default::default()
    }
}

fn strings(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

impl Client {
    fn new() -> Self {
        Self {
            session: Session::new(1, LIMITS),
            now: Instant::now(),
            // Small chunks: plans have several parts.
            pushes: Pushes::new(200),
            has: Default::default(),
            responses: Vec::new(),
            waiting: Vec::new(),
        }
    }

    fn wildcard(views: &[View]) -> Self {
        let mut client = Self::new();
        for view in views {
            client.say(request(*view));
        }
        client
    }

    fn say(&mut self, request: Request) -> Event {
        self.session.request(request, self.now)
    }

    fn subscribe(&mut self, view: View, names: &[&str], unsubscribe: &[&str]) {
        self.say(Request {
            subscribe: strings(names),
            unsubscribe: strings(unsubscribe),
            ..request(view)
        });
    }

    /// Takes what there is to be taken without acknowledging anything.
    fn receive(&mut self, cache: &Cache) -> usize {
        let before = self.responses.len();
        while let Some(response) = self.session.next(&cache.snapshot(), &self.pushes, self.now) {
            let bytes = response.frames().concat();
            let response_ = DeltaDiscoveryResponse::decode(&bytes[5..]).unwrap();
            let has = &mut self.has[response.view as usize];
            for name in &response_.removed_resources {
                has.remove(name);
            }
            for resource in &response_.resources {
                has.insert(resource.name.clone(), resource.version.clone());
            }
            self.waiting.push((response.view, response.nonce));
            self.responses.push(response_);
        }
        self.responses.len() - before
    }

    fn acknowledge(&mut self) -> bool {
        let Some((view, nonce)) = self.waiting.pop() else {
            return false;
        };
        self.say(Request { nonce, ..request(view) });
        true
    }

    fn refuse(&mut self, message: &str) -> Event {
        let (view, nonce) = self.waiting.pop().unwrap();
        self.say(Request {
            nonce,
            error: Some(Status {
                message: message.to_owned(),
                ..Default::default()
            }),
            ..request(view)
        })
    }

    /// Until there is nothing more to be said, with the responses that it took.
    fn settle(&mut self, cache: &Cache) -> Vec<DeltaDiscoveryResponse> {
        self.now += LIMITS.settle;
        let before = self.responses.len();
        loop {
            if self.receive(cache) == 0 && !self.acknowledge() {
                assert_eq!(self.session.overdue(), None);
                return self.responses[before..].to_vec();
            }
        }
    }

    fn names(&self, view: View) -> BTreeSet<&str> {
        self.has[view as usize].keys().map(String::as_str).collect()
    }

    /// As it comes back on another stream.
    fn reconnect(&self, views: &[(View, &[&str])]) -> Self {
        let mut back = Self::new();
        for (view, names) in views {
            let has = &self.has[*view as usize];
            let known = has.iter().map(|(name, version)| Known {
                name: name.clone().into(),
                version: version.clone().into(),
            });
            back.has[*view as usize] = has.clone();
            back.say(Request {
                known: known.collect(),
                subscribe: strings(names),
                ..request(*view)
            });
        }
        back
    }
}

fn sent(responses: &[DeltaDiscoveryResponse]) -> Vec<&str> {
    let resources = responses.iter().flat_map(|response| &response.resources);
    let mut names: Vec<_> = resources.map(|resource| resource.name.as_str()).collect();
    names.sort_unstable();
    names
}

fn gone(responses: &[DeltaDiscoveryResponse]) -> Vec<&str> {
    let removed = responses.iter().flat_map(|response| &response.removed_resources);
    removed.map(String::as_str).collect()
}

fn mesh(cache: &Cache) {
    cache.apply(vec![
        Change::Put(service("ns/s", "10.1.0.1", 0)),
        Change::Put(workload("a", "10.0.0.1", &["ns/s"], 0)),
        Change::Put(workload("b", "10.0.0.2", &["ns/s"], 0)),
        Change::Put(workload("c", "10.0.0.3", &[], 0)),
        Change::Put(policy("ns/p", 0)),
    ]);
}

#[test]
fn everything_comes_first_and_then_what_changed() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    assert_eq!(sent(&client.settle(&cache)), ["a", "b", "c", "ns/p", "ns/s"]);
    assert_eq!(client.session.acknowledged(), 1);
    cache.apply(vec![
        Change::Put(workload("a", "10.0.0.1", &["ns/s"], 1)),
        remove(Type::Address, "c"),
    ]);
    let responses = client.settle(&cache);
    assert_eq!((sent(&responses), gone(&responses)), (vec!["a"], vec!["c"]));
    assert_eq!(responses.len(), 1);
    assert_eq!(client.session.acknowledged(), 2);
    assert!(client.settle(&cache).is_empty());
}

#[test]
fn changes_are_coalesced_while_a_response_is_in_flight() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Address]);
    client.settle(&cache);
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 1))]);
    assert_eq!(client.receive(&cache), 1);
    for content in 2..50 {
        cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], content))]);
        cache.apply(vec![Change::Put(workload("new", "10.0.0.9", &[], content))]);
        cache.apply(vec![remove(Type::Address, "new")]);
        assert_eq!(client.receive(&cache), 0);
    }
    let responses = client.settle(&cache);
    assert_eq!(
        (responses.len(), sent(&responses), gone(&responses)),
        (1, vec!["a"], vec![])
    );
}

#[test]
fn who_comes_back_is_sent_what_changed() {
    let (cache, replica) = (Cache::new(), Cache::new());
    mesh(&cache);
    mesh(&replica);
    let views: [(View, &[&str]); 2] = [(View::Address, &[]), (View::Authorization, &[])];
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    client.settle(&cache);
    let mut same = client.reconnect(&views);
    let responses = same.settle(&replica);
    assert_eq!(
        (responses.len(), sent(&responses), gone(&responses)),
        (2, vec![], vec![])
    );
    replica.apply(vec![
        remove(Type::Address, "b"),
        remove(Type::Authorization, "ns/p"),
        Change::Put(service("ns/s", "10.1.0.1", 1)),
    ]);
    let mut back = client.reconnect(&views);
    let responses = back.settle(&replica);
    assert_eq!((sent(&responses), gone(&responses)), (vec!["ns/s"], vec!["b", "ns/p"]));
    assert_eq!(back.session.acknowledged(), 2);
}

#[test]
fn a_service_brings_its_endpoints_and_keeps_them_current() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    client.subscribe(View::Address, &["*"], &["*"]);
    let responses = client.settle(&cache);
    assert_eq!((responses.len(), sent(&responses)), (1, vec![]), "nothing, but said");
    client.subscribe(View::Address, &["/10.1.0.1"], &[]);
    assert_eq!(sent(&client.settle(&cache)), ["a", "b", "ns/s"]);
    cache.apply(vec![
        Change::Put(workload("d", "10.0.0.4", &["ns/s"], 0)),
        Change::Put(workload("c", "10.0.0.3", &[], 1)),
    ]);
    assert_eq!(sent(&client.settle(&cache)), ["d"]);
    // No endpoint any more, but the client has it.
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 0))]);
    assert_eq!(sent(&client.settle(&cache)), ["a"]);
    cache.apply(vec![remove(Type::Address, "a"), remove(Type::Address, "c")]);
    assert_eq!(gone(&client.settle(&cache)), ["a"]);
    client.subscribe(View::Address, &["ns/s"], &[]);
    assert_eq!(
        sent(&client.settle(&cache)),
        ["ns/s"],
        "asked for again, so answered; its endpoints are there"
    );
}

#[test]
fn a_name_that_comes_back_to_a_service_brings_the_endpoints_of_now() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    client.subscribe(View::Address, &["/10.1.0.1"], &[]);
    client.settle(&cache);
    cache.apply(vec![
        Change::Put(service("ns/s", "10.1.0.2", 0)),
        Change::Put(workload("c", "10.0.0.3", &["ns/s"], 0)),
    ]);
    assert_eq!(
        sent(&client.settle(&cache)),
        ["ns/s"],
        "it has it, but did not ask for it"
    );
    cache.apply(vec![Change::Put(service("ns/s", "10.1.0.1", 0))]);
    assert_eq!(sent(&client.settle(&cache)), ["c", "ns/s"]);
}

#[test]
fn a_name_that_means_nothing_is_answered_and_delivered_when_it_appears() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    client.subscribe(View::Address, &["/10.0.0.9", "c"], &[]);
    let responses = client.settle(&cache);
    assert_eq!((sent(&responses), gone(&responses)), (vec!["c"], vec!["/10.0.0.9"]));
    cache.apply(vec![Change::Put(workload("e", "10.0.0.9", &[], 0))]);
    assert_eq!(sent(&client.settle(&cache)), ["e"]);
    client.subscribe(View::Address, &[], &["/10.0.0.9", "c"]);
    cache.apply(vec![
        Change::Put(workload("e", "10.0.0.9", &[], 1)),
        Change::Put(workload("c", "10.0.0.3", &[], 1)),
    ]);
    assert!(client.settle(&cache).is_empty());
}

#[test]
fn names_that_were_had_are_not_sent_again_on_coming_back() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    client.subscribe(View::Address, &["ns/s", "c"], &[]);
    client.settle(&cache);
    cache.apply(vec![
        Change::Put(workload("a", "10.0.0.1", &["ns/s"], 1)),
        remove(Type::Address, "c"),
    ]);
    let mut back = client.reconnect(&[(View::Address, &["ns/s", "c"])]);
    let responses = back.settle(&cache);
    assert_eq!((sent(&responses), gone(&responses)), (vec!["a"], vec!["c"]));
    assert_eq!(back.names(View::Address), BTreeSet::from(["a", "b", "ns/s"]));
}

#[test]
fn everything_may_be_given_up_for_names_and_names_for_everything() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Address]);
    client.settle(&cache);
    client.subscribe(View::Address, &["c"], &["*"]);
    assert_eq!(sent(&client.settle(&cache)), ["c"]);
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 1))]);
    assert!(client.settle(&cache).is_empty());
    cache.apply(vec![remove(Type::Address, "c")]);
    client.subscribe(View::Address, &["*"], &[]);
    let responses = client.settle(&cache);
    assert_eq!(
        (sent(&responses), gone(&responses)),
        (vec!["a", "b", "ns/s"], vec!["c"])
    );
}

#[test]
fn a_refused_response_is_reported_and_not_sent_again_until_it_changes() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    client.settle(&cache);
    cache.apply(vec![Change::Put(policy("ns/p", 1)), Change::Put(policy("ns/q", 0))]);
    client.receive(&cache);
    let Event::Refused(refusal) = client.refuse("ns/q: no such action") else {
        panic!()
    };
    assert_eq!(
        (refusal.view, &refusal.resources[..]),
        (View::Authorization, &["ns/q".into()][..])
    );
    assert_eq!(refusal.message, "ns/q: no such action");
    let Event::Understood = client.say(request(View::Authorization)) else {
        panic!("nothing was taken")
    };
    assert!(client.settle(&cache).is_empty());
    assert_eq!(client.session.acknowledged(), 2, "it is known there, if not liked");
    cache.apply(vec![Change::Put(policy("ns/q", 1))]);
    client.receive(&cache);
    let (_, nonce) = client.waiting.pop().unwrap();
    let answer = Request {
        nonce,
        ..request(View::Authorization)
    };
    let Event::Accepted(View::Authorization, taken) = client.say(answer) else {
        panic!("it is taken")
    };
    assert_eq!(taken.names().map(|name| &**name).collect::<Vec<_>>(), ["ns/q"]);
}

#[test]
fn a_stale_nonce_acknowledges_nothing() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Authorization]);
    client.receive(&cache);
    for nonce in ["1.0", "ffff", ""] {
        client.say(Request {
            nonce: nonce.to_owned(),
            ..request(View::Authorization)
        });
    }
    assert_eq!(client.session.acknowledged(), 0);
    assert!(client.session.overdue().is_some());
    assert_eq!(client.session.overdue(), Some(client.now + LIMITS.acknowledge));
    client.acknowledge();
    assert_eq!(client.session.overdue(), None);
}

#[test]
fn an_unknown_type_is_not_answered_and_too_many_names_are_refused() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    let unknown = Request {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
        ..Default::default()
    };
    assert!(matches!(client.say(unknown), Event::UnknownType(_)));
    assert!(client.settle(&cache).is_empty());
    let many = Request {
        subscribe: (0..1001).map(|n| n.to_string()).collect(),
        ..request(View::Address)
    };
    assert!(matches!(client.say(many), Event::TooManyNames));
}

#[test]
fn an_empty_mesh_is_said_to_be_empty() {
    let cache = Cache::new();
    cache.apply(vec![]);
    let mut client = Client::wildcard(&View::ALL);
    assert_eq!(client.settle(&cache).len(), 3);
    assert_eq!(client.session.acknowledged(), 1);
}

#[test]
fn an_address_never_comes_before_its_policy() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::new();
    client.say(request(View::Address));
    assert_eq!(client.receive(&cache), 0, "policies may be asked for in a moment");
    client.say(request(View::Authorization));
    client.settle(&cache);
    assert_eq!(client.responses[0].type_url, proto::AUTHORIZATION_TYPE);
    // A policy is on the way, not acknowledged, and the next comes with a workload that names it.
    cache.apply(vec![Change::Put(policy("ns/q", 0))]);
    assert_eq!(client.receive(&cache), 1);
    cache.apply(vec![
        Change::Put(policy("ns/r", 0)),
        Change::Put(workload("c", "10.0.0.3", &[], 7)),
    ]);
    assert_eq!(client.receive(&cache), 0);
    let responses = client.settle(&cache);
    assert_eq!(
        responses
            .iter()
            .flat_map(|r| &r.resources)
            .map(|r| &*r.name)
            .collect::<Vec<_>>(),
        ["ns/r", "c"]
    );
    // Who never asks for policies has addresses after a moment.
    let mut alone = Client::wildcard(&[View::Workload]);
    assert_eq!(alone.session.wakes(alone.now), Some(alone.now + LIMITS.settle));
    assert_eq!(alone.settle(&cache)[0].type_url, View::Workload.url());
}

#[test]
fn a_policy_leaves_after_the_last_address() {
    let cache = Cache::new();
    mesh(&cache);
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    client.settle(&cache);
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 1))]);
    client.receive(&cache);
    cache.apply(vec![
        Change::Put(workload("b", "10.0.0.2", &[], 1)),
        remove(Type::Authorization, "ns/p"),
    ]);
    assert_eq!(client.receive(&cache), 0, "addresses of before are on the way");
    assert!(client.names(View::Authorization).contains("ns/p"));
    let responses = client.settle(&cache);
    assert_eq!(
        (sent(&responses[..1]), gone(&responses[1..])),
        (vec!["b"], vec!["ns/p"])
    );
    assert_eq!(client.session.acknowledged(), 3);
    // Gone and back before that was said: it stays.
    cache.apply(vec![Change::Put(policy("ns/p", 0))]);
    client.settle(&cache);
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 2))]);
    client.receive(&cache);
    cache.apply(vec![
        Change::Put(workload("b", "10.0.0.2", &[], 2)),
        remove(Type::Authorization, "ns/p"),
    ]);
    client.receive(&cache);
    cache.apply(vec![Change::Put(policy("ns/p", 0))]);
    assert!(gone(&client.settle(&cache)).is_empty());
    assert!(client.names(View::Authorization).contains("ns/p"));
}

/// The names of what was put, in the order of the wire.
fn puts(responses: &[DeltaDiscoveryResponse]) -> Vec<&str> {
    let resources = responses.iter().flat_map(|response| &response.resources);
    resources.map(|resource| resource.name.as_str()).collect()
}

#[test]
fn a_policy_is_narrowed_after_the_addresses_that_name_it() {
    let cache = Cache::new();
    mesh(&cache);
    let narrow = |content| Change::Put(scoped("ns/p", Scope::WorkloadSelector, content));
    let a = |content| Change::Put(workload("a", "10.0.0.1", &[], content));
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    client.settle(&cache);
    for wide in [Scope::Global, Scope::Namespace] {
        cache.apply(vec![Change::Put(scoped("ns/p", wide, 9)), a(9)]);
        client.settle(&cache);
        cache.apply(vec![narrow(1), a(1), Change::Put(policy("ns/q", wide as u32))]);
        assert_eq!(puts(&client.settle(&cache)), ["ns/q", "a", "ns/p"]);
        assert_eq!(client.session.acknowledged(), cache.snapshot().generation());
        // It is narrow there now, and what it says changes as that of others does.
        cache.apply(vec![narrow(2), a(2)]);
        assert_eq!(puts(&client.settle(&cache)), ["ns/p", "a"]);
        // Widened, it is so first.
        cache.apply(vec![Change::Put(scoped("ns/p", wide, 2)), a(3)]);
        assert_eq!(puts(&client.settle(&cache)), ["ns/p", "a"]);
    }
}

#[test]
fn a_policy_is_narrowed_once_whatever_becomes_of_it_meanwhile() {
    let narrow = |content| Change::Put(scoped("ns/p", Scope::WorkloadSelector, content));
    let end = || remove(Type::Authorization, "ns/p");
    let wide = || Change::Put(scoped("ns/p", Scope::Namespace, 7));
    let b = |content| Change::Put(workload("b", "10.0.0.2", &[], content));
    let cases: [(Vec<Change>, &[&str], &[&str]); 5] = [
        (vec![narrow(1), narrow(2)], &["b", "ns/p"], &[]),
        (vec![end(), narrow(1)], &["b", "ns/p"], &[]),
        (vec![narrow(1), end(), narrow(2)], &["b", "ns/p"], &[]),
        (vec![narrow(1), end()], &["b"], &["ns/p"]),
        (vec![narrow(1), wide()], &["ns/p", "b"], &[]),
    ];
    for (changes, put, removed) in cases {
        let cache = Cache::new();
        mesh(&cache);
        let mut client = Client::wildcard(&[View::Address, View::Authorization]);
        client.settle(&cache);
        // Addresses of before are on the way.
        cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &[], 1))]);
        client.receive(&cache);
        let mut responses = Vec::new();
        for (content, change) in changes.into_iter().enumerate() {
            cache.apply(vec![change, b(content as u32 + 1)]);
            let before = client.responses.len();
            client.receive(&cache);
            responses.extend_from_slice(&client.responses[before..]);
        }
        responses.extend(client.settle(&cache));
        assert_eq!((puts(&responses), gone(&responses)), (put.to_vec(), removed.to_vec()));
        assert_eq!(client.session.acknowledged(), cache.snapshot().generation());
    }
}

#[test]
fn who_comes_back_may_have_a_policy_as_it_was_before_it_was_narrowed() {
    let (cache, replica) = (Cache::new(), Cache::new());
    mesh(&cache);
    mesh(&replica);
    let mut client = Client::wildcard(&[View::Address, View::Authorization]);
    client.settle(&cache);
    replica.apply(vec![
        Change::Put(scoped("ns/p", Scope::WorkloadSelector, 0)),
        Change::Put(scoped("ns/new", Scope::WorkloadSelector, 0)),
        Change::Put(workload("a", "10.0.0.1", &[], 1)),
    ]);
    let mut back = client.reconnect(&[(View::Address, &[]), (View::Authorization, &[])]);
    assert_eq!(puts(&back.settle(&replica)), ["ns/new", "a", "ns/p"]);
    // Who asks for policies alone waits for no address.
    let mut back = client.reconnect(&[(View::Authorization, &[])]);
    let responses = back.settle(&replica);
    assert_eq!(sent(&responses), ["ns/new", "ns/p"]);
    assert_eq!(back.session.acknowledged(), 2);
}
