//! Whatever the changes and their order, what is known is what one would know who was told everything at once.
#![allow(clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use mesh::{Contents, Delta, Snapshot};
use model::{
    Action, HealthStatus, Match, NamespacedName, NetworkAddress, NetworkMode, Policy, Scope, Service, TunnelProtocol,
    Visibility, Workload, WorkloadUid,
};
use proptest::{collection::vec, prelude::*};

fn ip(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, last).into()
}

fn key(kind: &str, number: u8) -> NamespacedName {
    NamespacedName::new(format!("n{}", number % 2), format!("{kind}{number}"))
}

fn uid(number: u8) -> WorkloadUid {
    WorkloadUid::of_pod("c", "n", &format!("p{number}"))
}

#[derive(Clone, Debug)]
enum Step {
    Workload(Box<Workload>),
    Service(Box<Service>),
    Policy(Box<Policy>),
    RemoveWorkload(u8),
    RemoveService(u8),
    RemovePolicy(u8),
}

fn workload() -> impl Strategy<Value = Workload> {
    let services = vec((0..6u8, 0..3u16), 0..3);
    let addresses = vec(0..12u8, 0..3);
    (0..10u8, addresses, services, any::<[bool; 4]>(), vec(0..4u8, 0..2)).prop_map(
        |(number, addresses, services, [sick, host, far, uneven], policies)| Workload {
            uid: uid(number),
            name: format!("p{number}").into(),
            namespace: format!("n{}", number % 2).into(),
            workload_ips: addresses.into_iter().map(ip).collect(),
            protocol: TunnelProtocol::Hbone,
            services: services
                .into_iter()
                .map(|(service, port)| (key("s", service), [(80, 80 + port)].into()))
                .collect(),
            status: if sick {
                HealthStatus::Unhealthy
            } else {
                HealthStatus::Healthy
            },
            network_mode: if host {
                NetworkMode::HostNetwork
            } else {
                NetworkMode::Standard
            },
            network: if far && uneven { "far".into() } else { "".into() },
            capacity: if uneven { 2 } else { 1 },
            authorization_policies: policies.into_iter().map(|policy| key("a", policy)).collect(),
            ..Workload::default()
        },
    )
}

fn service() -> impl Strategy<Value = Service> {
    let address = (0..8u8, proptest::option::of(29..=32u8));
    (0..6u8, vec(address, 0..3), any::<bool>(), 0..3u16).prop_map(|(number, addresses, canonical, port)| {
        let NamespacedName { namespace, name } = key("s", number);
        Service {
            name: name.clone(),
            namespace,
            hostname: name,
            vips: addresses
                .into_iter()
                .map(|(last, length)| NetworkAddress {
                    network: "".into(),
                    address: ip(200 + last),
                    length,
                })
                .collect(),
            ports: [(80, port)].into(),
            canonical,
            visibility: if port == 2 {
                Visibility::Namespace
            } else {
                Visibility::Public
            },
            ..Service::default()
        }
    })
}

fn policy() -> impl Strategy<Value = Policy> {
    (0..4u8, 0..3u8, any::<u16>()).prop_map(|(number, scope, port)| {
        let NamespacedName { namespace, name } = key("a", number);
        Policy {
            name,
            namespace,
            scope: [Scope::Global, Scope::Namespace, Scope::WorkloadSelector][usize::from(scope)],
            action: Action::Deny,
            rules: vec![vec![vec![Match {
                destination_ports: vec![port],
                ..Match::default()
            }]]],
            dry_run: false,
            origin: None,
        }
    })
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => workload().prop_map(|workload| Step::Workload(Box::new(workload))),
        2 => service().prop_map(|service| Step::Service(Box::new(service))),
        1 => policy().prop_map(|policy| Step::Policy(Box::new(policy))),
        2 => (0..10u8).prop_map(Step::RemoveWorkload),
        1 => (0..6u8).prop_map(Step::RemoveService),
        1 => (0..4u8).prop_map(Step::RemovePolicy),
    ]
}

/// Everything that was told and not taken back.
#[derive(Default)]
struct Told {
    workloads: BTreeMap<WorkloadUid, Workload>,
    services: BTreeMap<NamespacedName, Service>,
    policies: BTreeMap<NamespacedName, Policy>,
}

impl Told {
    /// Takes a step over, and into a delta in which it does not yet meet another of its name.
    fn take(&mut self, step: Step, delta: &mut Delta) {
        match step {
            Step::Workload(workload) => {
                delta.workloads.push(Workload::clone(&workload).into());
                self.workloads.insert(workload.uid.clone(), *workload);
            }
            Step::Service(service) => {
                delta.services.push(Service::clone(&service).into());
                self.services.insert(service.key(), *service);
            }
            Step::Policy(policy) => {
                delta.policies.push(Policy::clone(&policy));
                self.policies.insert(policy.key(), *policy);
            }
            Step::RemoveWorkload(number) => {
                delta.workloads.retain(|workload| workload.uid != uid(number));
                delta.removed_workloads.push(uid(number));
                self.workloads.remove(&uid(number));
            }
            Step::RemoveService(number) => {
                delta.services.retain(|service| service.key() != key("s", number));
                delta.removed_services.push(key("s", number));
                self.services.remove(&key("s", number));
            }
            Step::RemovePolicy(number) => {
                delta.policies.retain(|policy| policy.key() != key("a", number));
                delta.removed_policies.push(key("a", number));
                self.policies.remove(&key("a", number));
            }
        }
    }

    /// In another order than that of the names.
    fn contents(&self) -> Contents {
        Contents {
            workloads: self.workloads.values().rev().cloned().collect(),
            services: self.services.values().rev().cloned().collect(),
            policies: self.policies.values().rev().cloned().collect(),
            ..Contents::default()
        }
    }
}

/// Everything that can be looked up.
#[derive(Debug, PartialEq)]
struct Seen {
    workloads: BTreeMap<WorkloadUid, Arc<Workload>>,
    by_ip: Vec<Option<Arc<Workload>>>,
    services: BTreeMap<NamespacedName, Arc<Service>>,
    by_vip: Vec<Option<Arc<Service>>>,
    endpoints: Vec<[Vec<Arc<Workload>>; 2]>,
    policies: BTreeMap<WorkloadUid, BTreeSet<String>>,
}

fn seen(snapshot: &Snapshot) -> Seen {
    let policies = |workload: &Workload| {
        snapshot
            .policies_for(workload)
            .map(|policy| format!("{policy:?}"))
            .collect()
    };
    let workloads: BTreeMap<_, _> = snapshot
        .workloads()
        .map(|workload| (workload.uid.clone(), workload.clone()))
        .collect();
    assert!(
        workloads
            .iter()
            .all(|(uid, workload)| snapshot.workload(uid) == Some(workload))
    );
    assert_eq!(snapshot.counts().workloads, workloads.len());
    Seen {
        policies: workloads
            .values()
            .map(|workload| (workload.uid.clone(), policies(workload)))
            .collect(),
        workloads,
        by_ip: (0..=255)
            .map(|last| snapshot.workload_by_ip(ip(last)).cloned())
            .collect(),
        services: snapshot
            .services()
            .map(|service| (service.key(), service.clone()))
            .collect(),
        by_vip: (192..=223)
            .flat_map(|last| {
                let here = snapshot.service_by_vip_in(ip(last), "n0");
                [here, snapshot.service_by_vip(ip(last))].map(|service| service.cloned())
            })
            .collect(),
        endpoints: (0..6)
            .map(|number| {
                let key = key("s", number);
                let (healthy, unhealthy) = (snapshot.endpoints(&key), snapshot.unhealthy_endpoints(&key));
                [healthy, unhealthy].map(|list| list.iter().cloned().collect())
            })
            .collect(),
    }
}

proptest! {
    #[test]
    fn any_sequence_of_deltas_is_as_if_built_from_scratch(batches in vec(vec(step(), 0..6), 1..40)) {
        let (mut writer, knowledge) = mesh::new();
        // Fed by the whole contents each time, as a static file does.
        let (mut replacing, replaced) = mesh::new();
        let mut told = Told::default();
        let mut earlier: Vec<(Arc<Snapshot>, Seen)> = Vec::new();
        for batch in batches {
            let mut delta = Delta::default();
            batch.into_iter().for_each(|step| told.take(step, &mut delta));
            let rejected = writer.apply(delta);
            replacing.replace(told.contents(), &[]);
            let (mut scratch, from_scratch) = mesh::new();
            scratch.replace(told.contents(), &[]);

            let snapshot = knowledge.snapshot();
            let expected = seen(&from_scratch.snapshot());
            assert_eq!(seen(&snapshot), expected);
            assert_eq!(seen(&replaced.snapshot()), expected);
            assert_eq!(writer.conflicts(), scratch.conflicts());
            assert!(rejected.iter().all(|rejected| writer.conflicts().contains(rejected)));
            earlier.push((snapshot, expected));
        }
        // A snapshot stays what it was, whatever came later.
        for (snapshot, then) in earlier {
            assert_eq!(seen(&snapshot), then);
        }
    }
}
