//! What responses, refusals and reconnections make of what is held.

use proto::{Message, discovery::Resource, prost_types::Any, security, workload as wire};

use super::*;

fn resource(type_: Type, name: &str, version: &str, value: Vec<u8>) -> Resource {
    Resource {
        name: name.to_owned(),
        aliases: Vec::new(),
        version: version.to_owned(),
        resource: Some(Any {
            type_url: type_.url().to_owned(),
            value,
        }),
    }
}

fn workload(uid: &str, status: i32, version: &str) -> Resource {
    let workload = wire::Workload {
        uid: uid.to_owned(),
        addresses: vec![vec![10, 0, 0, 1].into()],
        status,
        ..Default::default()
    };
    let address = wire::Address {
        r#type: Some(wire::address::Type::Workload(workload)),
    };
    resource(Type::Address, uid, version, address.encode_to_vec())
}

fn policy(name: &str, action: i32, version: &str) -> Resource {
    let policy = security::Authorization {
        name: name.to_owned(),
        namespace: "shop".to_owned(),
        scope: security::Scope::Namespace.into(),
        action,
        ..Default::default()
    };
    resource(
        Type::Authorization,
        &format!("shop/{name}"),
        version,
        policy.encode_to_vec(),
    )
}

fn response(type_: Type, resources: Vec<Resource>, removed: &[&str]) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        type_url: type_.url().to_owned(),
        nonce: "n".to_owned(),
        resources,
        removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

fn books(mode: Mode) -> Books {
    let mut books = Books::new(mode, MeshSettings::default());
    books.open(&Node::default());
    books
}

/// Books that know an empty mesh.
fn ready() -> Books {
    let mut books = books(Mode::Wildcard);
    for type_ in Type::ALL {
        books.response(response(type_, Vec::new(), &[])).unwrap();
    }
    assert!(books.is_ready() && books.is_synchronised());
    books
}

fn says(step: &Step) -> Option<&str> {
    step.requests[0]
        .error_detail
        .as_ref()
        .map(|status| status.message.as_str())
}

#[test]
fn the_first_requests_are_those_of_ztunnel() {
    let node = Node {
        id: "ztunnel~1".to_owned(),
        ..Default::default()
    };
    let requests = Books::new(Mode::Wildcard, MeshSettings::default()).open(&node);
    assert_eq!(requests.len(), 2);
    for (request, type_) in requests.iter().zip(Type::ALL) {
        assert_eq!(
            (request.type_url.as_str(), &request.node),
            (type_.url(), &Some(node.clone()))
        );
        assert!(
            request.resource_names_subscribe.is_empty(),
            "everything is asked for by no name"
        );
    }
    let requests = Books::new(Mode::OnDemand, MeshSettings::default()).open(&node);
    assert!(
        requests[0].resource_names_subscribe.is_empty(),
        "of policies, everything"
    );
    assert_eq!(
        (
            &requests[1].resource_names_subscribe[..],
            &requests[1].resource_names_unsubscribe[..]
        ),
        (&["*".to_owned()][..], &["*".to_owned()][..])
    );
}

#[test]
fn nothing_is_known_before_both_types_are() {
    let mut books = books(Mode::Wildcard);
    let step = books
        .response(response(Type::Address, vec![workload("a", 0, "1")], &[]))
        .unwrap();
    assert_eq!((step.delta.is_none(), books.is_ready()), (true, false));
    let step = books
        .response(response(Type::Address, vec![workload("b", 0, "1")], &["a"]))
        .unwrap();
    assert!(step.delta.is_none());
    let step = books
        .response(response(Type::Authorization, vec![policy("p", 1, "1")], &[]))
        .unwrap();
    let delta = step.delta.unwrap();
    assert_eq!(
        (delta.workloads.len(), delta.policies.len(), delta.settings.is_some()),
        (1, 1, true)
    );
    assert_eq!(&*delta.workloads[0].uid.0, "b");
}

#[test]
fn on_demand_policies_are_enough_to_begin_with() {
    let mut books = books(Mode::OnDemand);
    assert!(
        books
            .response(response(Type::Authorization, Vec::new(), &[]))
            .unwrap()
            .delta
            .is_some()
    );
    assert!(books.is_ready() && books.is_synchronised());
}

#[test]
fn a_bad_resource_is_refused_by_name_and_not_held() {
    let mut books = ready();
    let bad = workload("bad", 9, "1");
    let step = books
        .response(response(Type::Address, vec![bad, workload("good", 0, "1")], &[]))
        .unwrap();
    assert_eq!(says(&step), Some("bad: status: value 9 is not known to this version"));
    assert_eq!(step.requests[0].response_nonce, "n");
    assert_eq!(step.delta.unwrap().workloads.len(), 1);
    assert_eq!(books.rejected(10).len(), 1);
    let reopened = &books.open(&Node::default())[Type::Address as usize];
    assert_eq!(
        reopened.initial_resource_versions,
        [("good".to_owned(), "1".to_owned())].into()
    );

    // Of one that was good once, the good version is held.
    let step = books
        .response(response(Type::Address, vec![workload("good", 9, "2")], &[]))
        .unwrap();
    assert!(says(&step).is_some());
    let delta = step.delta.unwrap();
    assert_eq!((delta.workloads.len(), delta.removed_workloads.len()), (0, 0));
    let reopened = &books.open(&Node::default())[Type::Address as usize];
    assert_eq!(reopened.initial_resource_versions["good"], "1");
    books
        .response(response(Type::Address, vec![workload("good", 1, "3")], &[]))
        .unwrap();
    assert_eq!(books.rejected(10), []);
}

#[test]
fn a_state_in_parts_is_one_delta() {
    let mut books = ready();
    let mut part = response(Type::Address, vec![workload("a", 0, "1"), workload("b", 0, "1")], &[]);
    part.system_version_info = "7+".to_owned();
    let step = books.response(part).unwrap();
    assert_eq!((step.delta, step.changes.len(), step.requests.len()), (None, 0, 1));
    let mut last = response(Type::Address, vec![workload("c", 0, "1")], &["a"]);
    last.system_version_info = "7".to_owned();
    let delta = books.response(last).unwrap().delta.unwrap();
    assert_eq!(
        delta
            .workloads
            .iter()
            .map(|workload| &*workload.uid.0)
            .collect::<Vec<_>>(),
        ["b", "c"]
    );

    // What was begun and broke off is forgotten.
    let mut part = response(Type::Address, vec![workload("d", 0, "1")], &["b"]);
    part.system_version_info = "8+".to_owned();
    books.response(part).unwrap();
    let reopened = &books.open(&Node::default())[Type::Address as usize];
    assert_eq!(
        reopened.initial_resource_versions.keys().collect::<Vec<_>>(),
        ["b", "c"]
    );
}

#[test]
fn an_unreadable_policy_closes_until_it_is_gone() {
    let closed = |books: &mut Books| {
        let step = books
            .response(response(Type::Authorization, vec![policy("p", 9, "1")], &[]))
            .unwrap();
        assert!(says(&step).unwrap().starts_with("shop/p: action: value 9"));
        let delta = step.delta.unwrap();
        assert_eq!(
            (delta.policies.len(), delta.policies[0].action),
            (1, model::Action::Deny)
        );
        assert_eq!(step.changes.len(), 1, "it closes after a restart, too");
    };
    let gone = |step: Step| {
        let key = model::NamespacedName::new("shop", "p");
        assert_eq!(step.delta.unwrap().removed_policies, [key]);
        assert_eq!(step.changes.len(), 1);
    };
    let mut books = ready();
    closed(&mut books);
    gone(
        books
            .response(response(Type::Authorization, Vec::new(), &["shop/p"]))
            .unwrap(),
    );
    closed(&mut books);
    // Gone while we were away: nobody says so, since we never said that we hold it.
    books.open(&Node::default());
    gone(books.response(response(Type::Authorization, Vec::new(), &[])).unwrap());
    assert_eq!(books.rejected(10), []);
    closed(&mut books);
    let delta = books
        .response(response(Type::Authorization, vec![policy("p", 1, "2")], &[]))
        .unwrap()
        .delta
        .unwrap();
    assert_eq!(delta.policies.len(), 1);
    // And where a good one was known, that stays.
    let delta = books
        .response(response(Type::Authorization, vec![policy("p", 9, "3")], &[]))
        .unwrap()
        .delta
        .unwrap();
    assert_eq!(delta, Delta::default());
}

/// Not even the beginning of a message, at this address.
fn garbage(name: &str, alias: &str) -> Resource {
    Resource {
        aliases: vec![alias.to_owned(), "shop/a.name".to_owned()],
        ..resource(Type::Address, name, "1", b"\xff\xff".to_vec())
    }
}

fn closed(step: &Step) -> Vec<(String, Vec<String>)> {
    let unreadable = &step.delta.as_ref().unwrap().unreadable;
    let places = |unreadable: &mesh::Unreadable| unreadable.addresses.iter().map(ToString::to_string).collect();
    unreadable
        .iter()
        .map(|unreadable| (unreadable.name.to_string(), places(unreadable)))
        .collect()
}

#[test]
fn an_unreadable_address_is_closed_until_it_is_gone() {
    let mut books = ready();
    let refuse = |books: &mut Books| {
        let bad = vec![garbage("bad", "net/10.0.0.9"), workload("odd", 9, "1")];
        let step = books.response(response(Type::Address, bad, &[])).unwrap();
        let expected = [("bad", "net/10.0.0.9"), ("odd", "/10.0.0.1")];
        let expected = expected.map(|(name, place)| (name.to_owned(), vec![place.to_owned()]));
        assert_eq!(closed(&step), expected);
        step.changes
    };
    assert_eq!(refuse(&mut books).len(), 2, "they are closed after a restart, too");
    let step = books
        .response(response(Type::Address, vec![workload("odd", 0, "2")], &["bad"]))
        .unwrap();
    let delta = step.delta.unwrap();
    assert_eq!(delta.workloads.len(), 1);
    assert_eq!(delta.removed_unreadable, ["bad".into(), "odd".into()]);
    assert_eq!((step.changes.len(), books.rejected(10).len()), (2, 0));

    // Gone while we were away.
    refuse(&mut books);
    books.open(&Node::default());
    let step = books.response(response(Type::Address, Vec::new(), &[])).unwrap();
    assert_eq!(step.delta.unwrap().removed_unreadable, ["bad".into(), "odd".into()]);
    assert_eq!(step.changes.len(), 1, "of the other the disk has the last good version");
}

#[test]
fn the_last_good_version_stays_and_what_the_bad_one_adds_is_closed() {
    let mut books = ready();
    books
        .response(response(Type::Address, vec![workload("pod", 0, "1")], &[]))
        .unwrap();
    let step = books
        .response(response(Type::Address, vec![garbage("pod", "/10.0.0.2")], &[]))
        .unwrap();
    assert_eq!(closed(&step), [("pod".to_owned(), vec!["/10.0.0.2".to_owned()])]);
    assert_eq!((step.changes.len(), books.count(Type::Address)), (0, 1));
}

#[test]
fn what_was_not_asked_for_ends_the_connection() {
    let unasked = DeltaDiscoveryResponse {
        type_url: "type.googleapis.com/envoy.config.cluster.v3.Cluster".to_owned(),
        ..Default::default()
    };
    assert!(ready().response(unasked).is_err());
}

#[test]
fn on_demand_an_address_is_asked_for_and_its_absence_is_told() {
    let mut books = books(Mode::OnDemand);
    books.response(response(Type::Authorization, Vec::new(), &[])).unwrap();
    let wanted = || Wanted::Address(model::NetworkAddress::new("net", [192, 0, 2, 1].into()));
    let request = books.want([wanted(), wanted()]).unwrap();
    assert_eq!(request.resource_names_subscribe, ["net/192.0.2.1"]);
    let delta = books
        .response(response(Type::Address, Vec::new(), &["net/192.0.2.1"]))
        .unwrap()
        .delta
        .unwrap();
    assert_eq!(delta.absent, [std::net::IpAddr::from([192, 0, 2, 1])]);
    let waypoint = || Wanted::Service(model::NamespacedName::new("shop", "wp.example"));
    let request = books.want([waypoint(), waypoint()]).unwrap();
    assert_eq!(request.resource_names_subscribe, ["shop/wp.example"]);
    // A new connection asks again.
    let requests = books.open(&Node::default());
    assert_eq!(
        requests[2].resource_names_subscribe,
        ["net/192.0.2.1", "shop/wp.example"]
    );
    assert_eq!(ready().want([wanted()]), None, "who knows everything asks for nothing");
}

#[test]
fn what_the_disk_had_is_told_to_the_control_plane() {
    let mut books = Books::new(Mode::Wildcard, MeshSettings::default());
    let message = |resource: Resource| {
        let value = resource.resource.unwrap().value;
        (resource.name, resource.version, value)
    };
    let resources = [
        (
            Type::Address,
            vec![message(workload("a", 0, "1")), message(workload("bad", 9, "1"))],
        ),
        (Type::Authorization, vec![message(policy("closes", 9, ""))]),
    ];
    let delta = books.restore(resources.into());
    assert_eq!(
        (delta.workloads.len(), delta.policies.len(), books.is_ready()),
        (1, 1, true)
    );
    assert_eq!(
        delta.unreadable.len(),
        1,
        "it closes where it is, as before the restart"
    );
    let requests = books.open(&Node::default());
    assert!(requests[0].initial_resource_versions.is_empty());
    assert_eq!(
        requests[1].initial_resource_versions,
        [("a".to_owned(), "1".to_owned())].into()
    );
}
