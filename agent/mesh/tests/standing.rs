//! What a pod's verdicts depend on, and what not.
#![allow(clippy::unwrap_used)]

use mesh::Delta;
use model::{Action, NamespacedName, Policy, Scope, TunnelProtocol, Workload, WorkloadUid};

fn pod(namespace: &str, name: &str, ip: &str) -> Workload {
    Workload {
        uid: WorkloadUid::of_pod("c", namespace, name),
        name: name.into(),
        namespace: namespace.into(),
        workload_ips: vec![ip.parse().unwrap()],
        protocol: TunnelProtocol::Hbone,
        ..Workload::default()
    }
}

fn policy(namespace: &str, name: &str, scope: Scope) -> Policy {
    Policy {
        name: name.into(),
        namespace: namespace.into(),
        scope,
        action: Action::Deny,
        rules: vec![],
        dry_run: false,
        origin: None,
    }
}

fn policies(policies: impl IntoIterator<Item = Policy>) -> Delta {
    Delta {
        policies: policies.into_iter().collect(),
        ..Delta::default()
    }
}

#[test]
fn only_what_concerns_a_pod_changes_its_standing() {
    let (mut writer, knowledge) = mesh::new();
    let mut web = pod("shop", "web", "10.0.0.1");
    web.authorization_policies = vec![NamespacedName::new("shop", "selected")];
    let uid = web.uid.clone();
    let standing = || knowledge.snapshot().standing(&uid);
    let nothing = standing();
    let put = |workload: Workload| Delta {
        workloads: vec![workload.into()],
        ..Delta::default()
    };
    writer.apply(put(web.clone()));
    let mut before = standing();
    assert_ne!(nothing, before, "it is there");
    assert_eq!(before.workload().map(|found| &found.uid), Some(&uid));

    let all = [
        policy("istio-system", "mesh", Scope::Global),
        policy("shop", "namespace", Scope::Namespace),
        policy("shop", "selected", Scope::WorkloadSelector),
    ];
    for policy in all.clone() {
        writer.apply(policies([policy.clone()]));
        let now = standing();
        assert_ne!(before, now, "{}", policy.key());
        before = now;
    }
    // What is not about it, and what is as it was.
    writer.apply(put(pod("shop", "other", "10.0.0.2")));
    writer.apply(policies([policy("far", "namespace", Scope::Namespace)]));
    writer.apply(policies([policy("shop", "other", Scope::WorkloadSelector)]));
    writer.apply(policies(all.clone()));
    assert_eq!(before, standing());

    for policy in all {
        writer.apply(Delta {
            removed_policies: vec![policy.key()],
            ..Delta::default()
        });
        let now = standing();
        assert_ne!(before, now, "{}", policy.key());
        before = now;
    }
    web.service_account = "another".into();
    writer.apply(put(web));
    assert_ne!(before, standing());
}

#[test]
fn a_pod_that_is_no_longer_announced_as_it_is_stands_otherwise() {
    let (mut writer, knowledge) = mesh::new();
    let web = pod("shop", "web", "10.0.0.1");
    writer.apply(Delta {
        workloads: vec![web.clone().into()],
        ..Delta::default()
    });
    let before = knowledge.snapshot().standing(&web.uid);
    let successor = Workload {
        workload_ips: vec!["10.0.0.9".parse().unwrap()],
        ..web.clone()
    };
    writer.locals().set(vec![successor]);
    assert_ne!(before, knowledge.snapshot().standing(&web.uid));
}
