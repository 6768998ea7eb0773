//! The cache from outside: lookups and differences against a scan. Does not know of clients.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::testing::{policy, remove, service, workload};
use super::*;

fn names(entries: &[Arc<Entry>]) -> BTreeSet<&str> {
    entries.iter().map(|entry| &*entry.name).collect()
}

#[test]
fn a_change_that_changes_nothing_is_no_generation() {
    let cache = Cache::new();
    assert_eq!(cache.snapshot().generation(), 0);
    assert_eq!(cache.apply(vec![]), 1, "the first says that this is all there is");
    let put = || vec![Change::Put(policy("ns/p", 1))];
    assert_eq!(cache.apply(put()), 2);
    assert_eq!(cache.apply(put()), 2);
    assert_eq!(cache.apply(vec![remove(Type::Authorization, "ns/q")]), 2);
    assert_eq!(cache.apply(vec![remove(Type::Authorization, "ns/p")]), 3);
    assert!(cache.snapshot().is_empty());
    assert_eq!(*cache.watch().borrow(), 3);
}

#[test]
fn a_snapshot_does_not_change() {
    let cache = Cache::new();
    cache.apply(vec![Change::Put(workload("a", "10.0.0.1", &["ns/s"], 0))]);
    let before = cache.snapshot();
    let body = before.table(Type::Address).iter().next().unwrap().wire(View::Address);
    cache.apply(vec![
        Change::Put(workload("a", "10.0.0.2", &[], 1)),
        Change::Put(service("ns/s", "10.1.0.1", 0)),
    ]);
    let table = before.table(Type::Address);
    assert_eq!((before.len(Type::Address), table.iter().count()), (1, 1));
    assert_eq!(table.named("/10.0.0.1").count(), 1);
    assert_eq!(table.endpoints("ns/s").count(), 1);
    assert_eq!(table.get("a").unwrap().wire(View::Address), body);
    let now = cache.snapshot();
    assert_eq!(now.len(Type::Address), 2);
    assert_eq!(now.table(Type::Address).endpoints("ns/s").count(), 0);
}

#[test]
fn an_alias_of_two_means_both() {
    let cache = Cache::new();
    cache.apply(vec![
        Change::Put(workload("a", "10.0.0.1", &[], 0)),
        Change::Put(workload("b", "10.0.0.1", &[], 0)),
    ]);
    let state = cache.snapshot();
    let found: Vec<_> = state.table(Type::Address).named("/10.0.0.1").cloned().collect();
    assert_eq!(names(&found), BTreeSet::from(["a", "b"]));
}

#[test]
fn a_page_is_encoded_once_and_again_when_it_changed() {
    let mut page = Page::default();
    page.put(Arc::new(Entry::new(&workload("a", "10.0.0.1", &[], 0))));
    let body = page.body(View::Address).clone();
    assert_eq!(page.body(View::Address).as_ptr(), body.as_ptr());
    page.put(Arc::new(Entry::new(&service("ns/s", "10.1.0.1", 0))));
    assert!(page.body(View::Address).len() > body.len());
    assert!(page.body(View::Workload).len() < page.body(View::Address).len());
    page.remove("a");
    page.remove("ns/s");
    assert!(page.body(View::Address).is_empty());
}

fn change() -> impl Strategy<Value = Change> {
    let name = (0..6u8).prop_map(|n| format!("c//Pod/ns/{n}"));
    let address = (0..4u8).prop_map(|n| format!("10.0.0.{n}"));
    let services = prop::collection::btree_set(0..3u8, 0..3)
        .prop_map(|all| all.into_iter().map(|n| format!("ns/{n}")).collect::<Vec<_>>());
    prop_oneof![
        3 => (name.clone(), address.clone(), services, 0..2u32).prop_map(|(name, address, services, content)| {
            let services: Vec<_> = services.iter().map(String::as_str).collect();
            Change::Put(workload(&name, &address, &services, content))
        }),
        1 => (0..3u8, address, 0..2u32)
            .prop_map(|(n, address, content)| Change::Put(service(&format!("ns/{n}"), &address, content))),
        1 => (0..3u8, 0..2u32).prop_map(|(n, content)| Change::Put(policy(&format!("ns/{n}"), content))),
        1 => name.prop_map(|name| remove(Type::Address, &name)),
        1 => (0..3u8).prop_map(|n| remove(Type::Address, &format!("ns/{n}"))),
        1 => (0..3u8).prop_map(|n| remove(Type::Authorization, &format!("ns/{n}"))),
    ]
}

fn content(snapshot: &Snapshot, type_: Type) -> BTreeMap<Arc<str>, super::super::Version> {
    let entries = snapshot.table(type_).iter();
    entries.map(|entry| (Arc::clone(&entry.name), entry.version)).collect()
}

proptest! {
    #[test]
    fn the_difference_of_any_two_states_leads_from_one_to_the_other(
        batches in prop::collection::vec(prop::collection::vec(change(), 0..4), 1..12),
    ) {
        let cache = Cache::new();
        let mut states = vec![cache.snapshot()];
        for batch in batches {
            cache.apply(batch);
            states.push(cache.snapshot());
        }
        for from in &states {
            for to in &states {
                for type_ in Type::ALL {
                    let mut state = content(from, type_);
                    let difference = to.table(type_).since(from.table(type_));
                    for gone in &difference.removed {
                        prop_assert!(state.remove(&gone.name).is_some(), "removed in vain");
                    }
                    for put in &difference.puts {
                        prop_assert!(state.insert(Arc::clone(&put.name), put.version) != Some(put.version), "put in vain");
                    }
                    prop_assert_eq!(state, content(to, type_));
                }
            }
        }
    }

    #[test]
    fn lookups_agree_with_a_scan(changes in prop::collection::vec(change(), 0..30)) {
        let cache = Cache::new();
        cache.apply(changes);
        let state = cache.snapshot();
        let table = state.table(Type::Address);
        prop_assert_eq!(table.iter().count(), state.len(Type::Address));
        for asked in ["/10.0.0.0", "/10.0.0.1", "c//Pod/ns/1", "ns/1", "none"] {
            let found: Vec<_> = table.named(asked).cloned().collect();
            let scanned: Vec<_> = table.iter()
                .filter(|entry| &*entry.name == asked || entry.aliases.iter().any(|alias| &**alias == asked))
                .cloned().collect();
            prop_assert_eq!(names(&found), names(&scanned));
            let found: Vec<_> = table.endpoints(asked).cloned().collect();
            let scanned: Vec<_> = table.iter()
                .filter(|entry| entry.services.iter().any(|service| &**service == asked))
                .cloned().collect();
            prop_assert_eq!(names(&found), names(&scanned));
        }
    }
}
