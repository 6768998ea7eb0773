//! The node's own pods, before and after the mesh announces them.
#![allow(clippy::unwrap_used)]

use mesh::{Delta, Route, Wanted};
use model::{OriginalDst, TunnelProtocol, Workload, WorkloadUid};
use policy::{Facts, Reason};

fn pod(account: &str, ip: &str) -> Workload {
    Workload {
        uid: WorkloadUid::of_pod("c", "shop", "web"),
        name: "web".into(),
        namespace: "shop".into(),
        service_account: account.into(),
        workload_ips: vec![ip.parse().unwrap()],
        protocol: TunnelProtocol::Hbone,
        node: "n1".into(),
        ..Workload::default()
    }
}

fn facts() -> Facts {
    Facts {
        identity: None,
        aliases: std::sync::Arc::new([]),
        source: "10.0.0.9".parse().unwrap(),
        destination: "10.0.0.1:80".parse().unwrap(),
    }
}

fn announce(workload: Workload) -> Delta {
    Delta {
        workloads: vec![workload.into()],
        ..Delta::default()
    }
}

#[test]
fn a_pod_of_the_node_is_a_source_at_once_and_takes_nothing_before_it_is_announced() {
    let (mut writer, knowledge) = mesh::new();
    let local = pod("web", "10.0.0.1");
    writer.locals().set(vec![local.clone()]);
    assert!(!knowledge.snapshot().ready(), "the node's own pods are not the mesh");

    writer.apply(Delta::default());
    let snapshot = knowledge.snapshot();
    assert_eq!(**snapshot.workload(&local.uid).unwrap(), local);
    assert_eq!(**snapshot.workload_by_ip("10.0.0.1".parse().unwrap()).unwrap(), local);
    let out = snapshot.resolve(&local, OriginalDst("192.0.2.1:80".parse().unwrap()), 0, &[]);
    assert!(matches!(out, Route::Passthrough { .. }), "{out:?}");
    assert_eq!(snapshot.verdict(&facts(), &local).reason, Reason::NotAnnounced);

    let announced = Workload {
        canonical_name: "web".into(),
        ..local.clone()
    };
    writer.apply(announce(announced.clone()));
    let snapshot = knowledge.snapshot();
    assert_eq!(**snapshot.workload(&local.uid).unwrap(), announced);
    assert!(snapshot.verdict(&facts(), &announced).allowed);

    writer.apply(Delta {
        removed_workloads: vec![local.uid.clone()],
        ..Delta::default()
    });
    assert_eq!(
        knowledge.snapshot().verdict(&facts(), &local).reason,
        Reason::NotAnnounced
    );
    writer.locals().set(Vec::new());
    assert!(knowledge.snapshot().workload(&local.uid).is_none());
}

#[test]
fn an_earlier_pod_of_the_same_name_is_not_taken_for_the_one_that_runs() {
    for earlier in [pod("other", "10.0.0.1"), pod("web", "10.0.0.2")] {
        let (mut writer, knowledge) = mesh::new();
        let local = pod("web", "10.0.0.1");
        writer.locals().set(vec![local.clone()]);
        writer.apply(announce(earlier));
        let snapshot = knowledge.snapshot();
        assert_eq!(**snapshot.workload(&local.uid).unwrap(), local);
        assert_eq!(snapshot.verdict(&facts(), &local).reason, Reason::NotAnnounced);

        writer.apply(announce(local.clone()));
        assert!(knowledge.snapshot().verdict(&facts(), &local).allowed);
    }
}

#[test]
fn on_demand_a_pod_of_the_node_is_asked_for_once() {
    let (writer, _knowledge, mut demands) = mesh::with("", mesh::Scope::OnDemand);
    let local = pod("web", "10.0.0.1");
    writer.locals().set(vec![local.clone()]);
    writer.locals().set(vec![local.clone()]);
    assert_eq!(demands.try_next(), Some(Wanted::Workload(local.uid)));
    assert_eq!(demands.try_next(), None);
}

/// The mesh's trust domain changes before the agents' option does, or after it.
#[test]
fn a_pod_is_the_same_in_another_trust_domain() {
    let (mut writer, knowledge) = mesh::new();
    let local = pod("web", "10.0.0.1");
    let announced = Workload {
        trust_domain: model::TrustDomain::new("new.example"),
        ..local.clone()
    };
    writer.locals().set(vec![local]);
    writer.apply(announce(announced.clone()));
    let snapshot = knowledge.snapshot();
    assert_eq!(**snapshot.workload(&announced.uid).unwrap(), announced);
    assert!(snapshot.verdict(&facts(), &announced).allowed);
}
