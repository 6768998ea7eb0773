//! A full node, and pods of one address family.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{net::SocketAddr, time::Instant};

use capture::{IptablesNode, PodSpec};
use lab::{Lab, OUTSIDE4, OUTSIDE6, TestPod, accept, captured};
use model::{PeerAddr, PodSettings};
use socket2::SockRef;

/// As many as a kubelet runs on a node.
const PODS: u8 = 110;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_full_node_is_captured_and_let_go() {
    lab::test("a_full_node_is_captured_and_let_go", |lab| async move {
        let node = lab.node();
        let pods: Vec<TestPod> = (2..2 + PODS)
            .map(|number| lab.pod(&format!("p{number}"), number))
            .collect();
        let before = (descriptors(), lab.links().len(), resident());
        let started = Instant::now();
        let mut handles = Vec::new();
        for pod in &pods {
            let handle = node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
            handles.push(handle);
        }
        let captured = started.elapsed();
        // sk_lookup, the proof and the guard of each.
        assert_eq!(lab.links().len(), before.1 + 3 * usize::from(PODS));
        let held = (descriptors() - before.0, resident().saturating_sub(before.2));
        let started = Instant::now();
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        let reconciled = started.elapsed();
        for index in [0, 54, 109] {
            let mut app = lab.in_pod(&pods[index]);
            app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
            let (stream, peer) = accept(&handles[index].listeners().unwrap().outbound[0]);
            let original = handles[index].original_destination(PeerAddr(peer), stream.local_addr().unwrap());
            assert_eq!(original.unwrap().0, format!("{OUTSIDE4}:8080").parse().unwrap());
        }
        let started = Instant::now();
        drop(handles);
        for pod in &pods {
            node.forget(pod.uid()).await;
        }
        println!(
            "{PODS} pods: captured in {captured:?}, looked through in {reconciled:?}, let go in {:?}; {} descriptors and \
             {} kB more while they were",
            started.elapsed(),
            held.0,
            held.1
        );
        assert_eq!((descriptors(), lab.links().len()), (before.0, before.1));
        assert_eq!(node.counters().pods.len(), 0);
    });
}

/// A pod that has its IPv6 address alone.
fn only_ip6(lab: &Lab) -> TestPod {
    let pod = lab.pod("a", 2);
    lab.run(Some("a"), "ip addr del 10.77.1.2/32 dev eth0");
    TestPod {
        spec: PodSpec {
            addresses: vec![pod.ip6()],
            ..pod.spec
        },
        name: pod.name,
    }
}

const LISTEN: &str = "l = socket.create_server(('::', 9090), family=socket.AF_INET6)";

#[test]
fn a_pod_of_ipv6_alone_is_captured_by_ebpf() {
    lab::test("a_pod_of_ipv6_alone_is_captured_by_ebpf", |lab| async move {
        let node = lab.node();
        let pod = only_ip6(&lab);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(LISTEN);
        let (handle, listeners) = captured(&node, &pod).await;
        app.must(&format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"));
        let (stream, peer) = accept(&listeners.outbound[0]);
        let original = handle.original_destination(PeerAddr(peer), stream.local_addr().unwrap());
        assert_eq!(original.unwrap().0, format!("[{OUTSIDE6}]:8080").parse().unwrap());
        let refused = app.tell(&format!("socket.create_connection(('{OUTSIDE4}', 8080))"));
        assert!(refused.unwrap_err().starts_with("ENETUNREACH"));
        let own = pod.spec.addresses[0];
        outside.must(&format!("s = socket.create_connection(('{own}', 9090))"));
        let (stream, peer) = accept(&listeners.inbound[0]);
        assert_eq!(stream.local_addr().unwrap(), SocketAddr::new(own, 9090));
        let socket = handle
            .inbound_socket(SocketAddr::new(own, 9090), SocketAddr::new(peer.ip(), 0))
            .unwrap();
        lab::connect(socket, SocketAddr::new(own, 9090)).unwrap();
        assert_eq!(app.must("l.accept()[1][0]"), OUTSIDE6);
    });
}

#[test]
fn a_pod_of_ipv6_alone_is_captured_by_iptables() {
    lab::test("a_pod_of_ipv6_alone_is_captured_by_iptables", |lab| async move {
        let node = IptablesNode::start(&lab.pin_dir()).unwrap();
        let pod = only_ip6(&lab);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(LISTEN);
        let handle = node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        let listeners = handle.listeners().unwrap();
        app.must(&format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"));
        let (stream, _) = accept(&listeners.outbound[0]);
        let original = handle.original_destination(SockRef::from(&stream), stream.local_addr().unwrap());
        assert_eq!(original.unwrap().0, format!("[{OUTSIDE6}]:8080").parse().unwrap());
        let own = pod.spec.addresses[0];
        outside.must(&format!("s = socket.create_connection(('{own}', 9090))"));
        let (stream, peer) = accept(&listeners.inbound[0]);
        let local = stream.local_addr().unwrap();
        let original = handle.inbound_destination(SockRef::from(&stream), local);
        assert_eq!(original.0, SocketAddr::new(own, 9090));
        let socket = handle
            .inbound_socket(original.0, SocketAddr::new(peer.ip(), 0))
            .unwrap();
        lab::connect(socket, original.0).unwrap();
        assert_eq!(app.must("l.accept()[1][0]"), OUTSIDE6);
    });
}
