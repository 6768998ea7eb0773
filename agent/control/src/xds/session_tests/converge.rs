//! Whatever happens, a client has in the end what there is. Knows no rule of the protocol by itself.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::security::Scope;

use super::{
    super::{
        super::{Cache, Entry, testing::*},
        View,
    },
    Client, LIMITS, mesh, request,
};
use crate::resources::{Change, Type};

/// What may happen.
#[derive(Debug, Clone)]
enum Step {
    Apply(Vec<Change>),
    Receive,
    Acknowledge,
    Refuse,
    Subscribe(&'static str),
    Unsubscribe(&'static str),
    Reconnect,
}

const NAMES: [&str; 7] = ["c//0", "c//1", "ns/0", "ns/1", "/10.0.0.0", "/10.0.0.1", "*"];

const SCOPES: [Scope; 3] = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector];

fn step() -> impl Strategy<Value = Step> {
    let change = prop_oneof![
        3 => (0..4u8, 0..3u8, prop::collection::btree_set(0..2u8, 0..3), 0..2u32).prop_map(|(n, ip, services, content)| {
            let services: Vec<_> = services.into_iter().map(|n| format!("ns/{n}")).collect();
            let services: Vec<_> = services.iter().map(String::as_str).collect();
            Change::Put(workload(&format!("c//{n}"), &format!("10.0.0.{ip}"), &services, content))
        }),
        2 => (0..2u8, 0..3u8, 0..2u32)
            .prop_map(|(n, ip, content)| Change::Put(service(&format!("ns/{n}"), &format!("10.0.0.{ip}"), content))),
        1 => (0..2u8, prop::sample::select(&SCOPES[..]), 0..2u32)
            .prop_map(|(n, scope, content)| Change::Put(scoped(&format!("ns/{n}"), scope, content))),
        2 => (0..4u8).prop_map(|n| remove(Type::Address, &format!("c//{n}"))),
        1 => (0..2u8).prop_map(|n| remove(Type::Address, &format!("ns/{n}"))),
        1 => (0..2u8).prop_map(|n| remove(Type::Authorization, &format!("ns/{n}"))),
    ];
    prop_oneof![
        6 => prop::collection::vec(change, 1..4).prop_map(Step::Apply),
        4 => Just(Step::Receive),
        4 => Just(Step::Acknowledge),
        1 => Just(Step::Refuse),
        2 => prop::sample::select(&NAMES[..]).prop_map(Step::Subscribe),
        1 => prop::sample::select(&NAMES[..]).prop_map(Step::Unsubscribe),
        1 => Just(Step::Reconnect),
    ]
}

/// What a name means, by reading everything.
fn expected(cache: &Cache, names: &BTreeSet<&str>) -> BTreeMap<String, String> {
    let state = cache.snapshot();
    let table = state.table(Type::Address);
    let named =
        |entry: &Entry| names.contains(&*entry.name) || entry.aliases.iter().any(|alias| names.contains(&**alias));
    let wanted = table.iter().filter(|entry| {
        names.contains("*")
            || named(entry)
            || table
                .iter()
                .any(|service| named(service) && entry.services.contains(&service.name))
    });
    wanted
        .map(|entry| (entry.name.to_string(), entry.version.to_string()))
        .collect()
}

fn run(wildcard: bool, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let cache = Cache::new();
    mesh(&cache);
    let first: &[&str] = if wildcard { &["*"] } else { &["ns/0", "/10.0.0.1"] };
    let mut names: BTreeSet<&str> = first.iter().copied().collect();
    let mut client = Client::new();
    client.subscribe(View::Address, first, &[]);
    client.say(request(View::Authorization));
    client.now += LIMITS.settle;
    for step in steps {
        match step {
            Step::Apply(changes) => drop(cache.apply(changes)),
            Step::Receive => drop(client.receive(&cache)),
            Step::Acknowledge => drop(client.acknowledge()),
            // This client complains and keeps what it was sent.
            Step::Refuse if client.waiting.is_empty() => {}
            Step::Refuse => drop(client.refuse("no")),
            Step::Subscribe(name) => {
                names.insert(name);
                client.subscribe(View::Address, &[name], &[]);
            }
            Step::Unsubscribe(name) if names.len() > 1 && names.contains(name) => {
                names.remove(name);
                if name == "*" {
                    // Who gives everything up forgets it; what it still asks for by name is answered anew.
                    client.has[View::Address as usize].clear();
                }
                client.subscribe(View::Address, &[], &[name]);
            }
            Step::Unsubscribe(_) => {}
            Step::Reconnect => {
                let names: Vec<_> = names.iter().copied().collect();
                client = client.reconnect(&[(View::Address, &names), (View::Authorization, &[])]);
                client.now += LIMITS.settle;
            }
        }
    }
    client.settle(&cache);
    let state = cache.snapshot();
    let policies = state.table(Type::Authorization).iter();
    let policies: BTreeMap<_, _> = policies
        .map(|entry| (entry.name.to_string(), entry.version.to_string()))
        .collect();
    prop_assert_eq!(&client.has[View::Authorization as usize], &policies);
    let has = &client.has[View::Address as usize];
    for (name, version) in expected(&cache, &names) {
        prop_assert_eq!(has.get(&name), Some(&version), "{} is missing or old", name);
    }
    // It may have more than it asked for now, but everything that it was not told to forget is there, and current.
    if names.contains("*") {
        prop_assert_eq!(has.len(), state.len(Type::Address));
    }
    prop_assert_eq!(client.session.acknowledged(), state.generation());
    Ok(())
}

proptest! {
    #[test]
    fn clients_converge(wildcard: bool, steps in prop::collection::vec(step(), 0..40)) {
        run(wildcard, steps)?;
    }
}
