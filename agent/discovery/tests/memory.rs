//! What a workload costs an agent, all told: the mesh with its indexes, what discovery keeps to speak of it, and what
//! the disk's writer has left of it.
#![allow(clippy::unwrap_used)]
#![expect(unsafe_code, reason = "an allocator that counts passes every call on as it is")]

#[allow(dead_code, reason = "each test uses a part of it")]
mod fake;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use discovery::{Client, Config, Limits, Mode, NodeId};
use fake::{Fake, policy, state};
use identity::Upstream;
use model::MeshSettings;
use proto::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Message, discovery::Resource, prost_types::Any, workload as wire};

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator with the caller's own arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const WORKLOADS: u32 = 100_000;
/// Workloads of a response, of a service.
const PART: u32 = 1_000;
const ENDPOINTS: u32 = 10;
/// The target of the issue, in bytes a workload, its tenth of a service included.
const ALLOWED: usize = 1536;

fn address(name: &str, kind: wire::address::Type) -> Resource {
    let message = wire::Address { r#type: Some(kind) };
    Resource {
        name: name.to_owned(),
        aliases: Vec::new(),
        version: "0123456789abcdef".to_owned(),
        resource: Some(Any {
            type_url: ADDRESS_TYPE.to_owned(),
            value: message.encode_to_vec(),
        }),
    }
}

fn hostname(number: u32) -> String {
    format!("service-{number}.namespace-{}.svc.cluster.local", number % 100)
}

/// As a Deployment's pod is told of by istiod.
fn pod(number: u32) -> Resource {
    let service = number / ENDPOINTS;
    let namespace = format!("namespace-{}", service % 100);
    let name = format!(
        "service-{service}-6d4cf56db6-{:05x}",
        number.wrapping_mul(2_654_435_761) >> 12
    );
    let uid = format!("Kubernetes//v1/Pod/{namespace}/{name}-{number}");
    let ports = wire::PortList {
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
    };
    let workload = wire::Workload {
        uid: uid.clone(),
        name,
        namespace: namespace.clone(),
        addresses: vec![(0x0a00_0000 + number).to_be_bytes().to_vec().into()],
        tunnel_protocol: wire::TunnelProtocol::Hbone.into(),
        service_account: format!("service-{service}"),
        node: format!("node-{}", number % 1000),
        canonical_name: format!("service-{service}"),
        canonical_revision: "v1".to_owned(),
        workload_name: format!("service-{service}"),
        cluster_id: "Kubernetes".to_owned(),
        services: [(format!("{namespace}/{}", hostname(service)), ports)].into(),
        authorization_policies: vec!["istio-system/istio_converted_static_strict".to_owned()],
        locality: Some(wire::Locality {
            region: "region".to_owned(),
            zone: format!("zone-{}", number % 3),
            subzone: String::new(),
        }),
        ..Default::default()
    };
    address(&uid, wire::address::Type::Workload(workload))
}

fn service(number: u32) -> Resource {
    let namespace = format!("namespace-{}", number % 100);
    let service = wire::Service {
        name: format!("service-{number}"),
        namespace: namespace.clone(),
        hostname: hostname(number),
        addresses: vec![wire::NetworkAddress {
            network: String::new(),
            address: (0x6440_0000 + number).to_be_bytes().to_vec().into(),
            length: None,
        }],
        ports: vec![wire::Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: 0,
        }],
        ..Default::default()
    };
    address(
        &format!("{namespace}/{}", hostname(number)),
        wire::address::Type::Service(service),
    )
}

/// What this process has of the machine's memory.
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn a_workload_costs_an_agent_less_than_a_kibibyte_and_a_half() {
    let directory = tempfile::tempdir().unwrap();
    let mut control = Fake::start().await;
    let (writer, knowledge, demands) = mesh::with("", mesh::Scope::Everything);
    let config = Config {
        upstream: Upstream {
            addresses: vec![format!("http://{}", control.address).parse().unwrap()],
            roots_file: "unused".into(),
        },
        token_file: None,
        node: NodeId {
            ip: [10, 0, 0, 7].into(),
            pod: "agent".to_owned(),
            namespace: "istio-system".to_owned(),
            node: "n1".to_owned(),
            metadata: Default::default(),
        },
        cluster: "Kubernetes".to_owned(),
        network: String::new(),
        mode: Mode::Wildcard,
        settings: MeshSettings::default(),
        state_dir: Some(directory.path().to_owned()),
        keeps: true,
        limits: Limits::default(),
    };
    let handle = Client::start(config, writer, demands);
    let mut stream = control.stream().await;
    stream.request().await;
    stream.request().await;
    stream.send(state(AUTHORIZATION_TYPE, vec![policy("p", 1)], &[]));
    stream.request().await;
    let (before, resident_before) = (LIVE.load(Relaxed), resident());
    for first in (0..WORKLOADS).step_by(PART as usize) {
        let services = (first / ENDPOINTS)..((first + PART) / ENDPOINTS);
        let resources = (first..first + PART).map(pod).chain(services.map(service));
        let mut part = state(ADDRESS_TYPE, resources.collect(), &[]);
        if first + PART < WORKLOADS {
            part.system_version_info.push('+');
        }
        stream.send(part);
        assert_eq!(stream.request().await.error_detail, None);
    }
    let counts = knowledge.snapshot().counts();
    assert_eq!(
        (counts.workloads, counts.services),
        (WORKLOADS as usize, (WORKLOADS / ENDPOINTS) as usize)
    );
    let each = || (LIVE.load(Relaxed) - before) / WORKLOADS as usize;
    // What is for the disk is let go once it is there.
    let written = async {
        while each() >= ALLOWED {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), written).await;
    println!(
        "{} bytes a workload; resident, with the control plane of the test: {}",
        each(),
        (resident() - resident_before) / WORKLOADS as usize
    );
    assert!(in_time.is_ok(), "{} bytes a workload", each());
    handle.stop().await;
}
