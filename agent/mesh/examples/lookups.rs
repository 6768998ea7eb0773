//! What a look-up costs in the maps of a snapshot, beside a `HashMap` of the same entries, what the choice of an endpoint
//! costs, and what a change costs in meshes of several sizes: `cargo run --release -p mesh --example lookups`.
#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use mesh::{Delta, Knowledge, Route, Snapshot, Writer};
use model::{NamespacedName, NetworkAddress, OriginalDst, Service, TunnelProtocol, Workload, WorkloadUid};

const LOOKUPS: usize = 2_000_000;
const CHANGES: usize = 2_000;

fn ip(number: usize) -> IpAddr {
    Ipv4Addr::from(0x0a00_0000 + number as u32).into()
}

fn vip(number: usize) -> IpAddr {
    Ipv4Addr::from(0x6440_0000 + number as u32).into()
}

fn key(number: usize) -> NamespacedName {
    NamespacedName::new("shop", format!("s{number}.shop.svc.cluster.local"))
}

fn workload(number: usize, version: &str) -> Workload {
    Workload {
        uid: WorkloadUid::of_pod("Kubernetes", "shop", &format!("web-{number}")),
        name: format!("web-{number}").into(),
        namespace: "shop".into(),
        workload_ips: vec![ip(number)],
        protocol: TunnelProtocol::Hbone,
        canonical_revision: version.into(),
        services: [(key(number / 10), [(80, 8080)].into())].into(),
        ..Workload::default()
    }
}

fn service(number: usize) -> Service {
    let NamespacedName { namespace, name } = key(number);
    Service {
        name: format!("s{number}").into(),
        namespace,
        hostname: name,
        vips: vec![NetworkAddress::new("", vip(number))],
        ports: [(80, 8080)].into(),
        ..Service::default()
    }
}

fn mesh_of(size: usize) -> (Writer, Knowledge, Duration) {
    let (mut writer, knowledge) = mesh::new();
    let delta = Delta {
        workloads: (0..size).map(|number| workload(number, "v1").into()).collect(),
        services: (0..size / 10).map(|number| service(number).into()).collect(),
        ..Delta::default()
    };
    let start = Instant::now();
    assert!(writer.apply(delta).is_empty());
    (writer, knowledge, start.elapsed())
}

/// Nanoseconds from an address to what a decision reads of what is there, each look-up waiting for the one before, as a
/// connection waits for it; the best of five.
fn cost(size: usize, look_up: impl Fn(usize) -> usize) -> f64 {
    let once = || {
        let start = Instant::now();
        let mut at = 0;
        for _ in 0..LOOKUPS {
            at = (at + 0x9E37_79B1 + black_box(look_up(black_box(at)))) % size;
        }
        black_box(at);
        start.elapsed().as_nanos() as f64 / LOOKUPS as f64
    };
    (0..5).map(|_| once()).fold(f64::INFINITY, f64::min)
}

fn compare(name: &str, size: usize, map: impl Fn(usize) -> usize, snapshot: impl Fn(usize) -> usize) {
    let (map, snapshot) = (cost(size, map), cost(size, snapshot));
    println!(
        "{size:>7} {name:<16} HashMap {map:6.1} ns   snapshot {snapshot:6.1} ns   ratio {:.2}",
        snapshot / map
    );
}

fn lookups(size: usize, snapshot: &Snapshot) {
    let by_ip: HashMap<IpAddr, Arc<Workload>> = (0..size)
        .map(|number| (ip(number), snapshot.workload_by_ip(ip(number)).unwrap().clone()))
        .collect();
    compare(
        "workload by ip",
        size,
        |number| by_ip[&ip(number)].capacity as usize,
        |number| snapshot.workload_by_ip(ip(number)).unwrap().capacity as usize,
    );
    let services = size / 10;
    let by_vip: HashMap<IpAddr, Arc<Service>> = (0..services)
        .map(|number| (vip(number), snapshot.service_by_vip(vip(number)).unwrap().clone()))
        .collect();
    compare(
        "service by vip",
        services,
        |number| by_vip[&vip(number)].ports.len(),
        |number| snapshot.service_by_vip(vip(number)).unwrap().ports.len(),
    );
    let keys: Vec<NamespacedName> = (0..services).map(key).collect();
    let endpoints: HashMap<NamespacedName, Vec<Arc<Workload>>> = keys
        .iter()
        .map(|key| (key.clone(), snapshot.endpoints(key).iter().cloned().collect()))
        .collect();
    compare(
        "endpoints",
        services,
        |number| endpoints[&keys[number]].len(),
        |number| snapshot.endpoints(&keys[number]).len(),
    );
}

/// What a whole decision costs for a service of `endpoints` endpoints.
fn decisions(endpoints: usize) {
    let (mut writer, knowledge) = mesh::new();
    let one = |number: usize| {
        let workload = workload(number, "v1");
        Arc::new(Workload {
            services: [(key(0), [(80, 8080)].into())].into(),
            ..workload
        })
    };
    let delta = Delta {
        workloads: (0..endpoints).map(one).collect(),
        services: vec![service(0).into()],
        ..Delta::default()
    };
    assert!(writer.apply(delta).is_empty());
    let (snapshot, source) = (knowledge.snapshot(), workload(endpoints, "v1"));
    let dialled = OriginalDst(SocketAddr::new(vip(0), 80));
    let each = cost(endpoints.max(2), |number| {
        match snapshot.resolve(
            &source,
            dialled,
            (number as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            &[],
        ) {
            Route::Tunnel { target, .. } => usize::from(target.port()),
            other => panic!("{other:?}"),
        }
    });
    println!("{endpoints:>7} endpoints: a decision {each:6.1} ns");
}

fn main() {
    for endpoints in [1, 2, 10, 100, 1_000, 10_000] {
        decisions(endpoints);
    }
    for size in [1_000, 10_000, 100_000] {
        let (mut writer, knowledge, built) = mesh_of(size);
        lookups(size, &knowledge.snapshot());
        let start = Instant::now();
        for change in 0..CHANGES {
            let number = change.wrapping_mul(7919) % size;
            let version = format!("v{change}");
            writer.apply(Delta {
                workloads: vec![workload(number, &version).into()],
                ..Delta::default()
            });
        }
        let each = start.elapsed() / CHANGES as u32;
        println!("{size:>7} built in {built:?}; one change in force in {each:?}\n");
    }
}
