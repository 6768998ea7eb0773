//! The agent's death and its successor.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{collections::BTreeSet, io::Write, net::SocketAddr};

use capture::{Node, Reason};
use lab::{Lab, OUTSIDE4, OUTSIDE6, accept, captured, connect, until};
use model::PeerAddr;

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

#[test]
fn without_the_agent_nothing_passes_and_the_next_one_takes_over() {
    lab::test(
        "without_the_agent_nothing_passes_and_the_next_one_takes_over",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(SERVE);
            let (handle, listeners) = captured(&node, &pod).await;
            let links = lab.links();
            drop((node, handle, listeners));
            assert_eq!(lab.links(), links, "pins stay");
            for (own, there) in [(pod.ip4(), OUTSIDE4), (pod.ip6(), OUTSIDE6)] {
                let refused = |answer: Result<String, String>| assert!(answer.unwrap_err().starts_with("ECONNREFUSED"));
                refused(app.tell(&format!("socket.create_connection(('{there}', 8080))")));
                for port in [8080, 15001, 15006, 15008] {
                    refused(outside.tell(&format!("socket.create_connection(('{own}', {port}))")));
                }
            }
            let mut kubelet = lab.kubelet();
            kubelet.must(&format!("socket.create_connection(('{}', 8080))", pod.ip4()));

            let node = lab.node();
            assert!(node.counters().get(Reason::NoListener) >= 10);
            let (handle, listeners) = captured(&node, &pod).await;
            assert_eq!(lab.links(), links, "adopted");
            app.must(&format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"));
            let (stream, peer) = accept(&listeners.outbound[0]);
            assert!(
                handle
                    .original_destination(PeerAddr(peer), stream.local_addr().unwrap())
                    .is_some()
            );
            assert_eq!(app.must("s.getpeername()[0]"), OUTSIDE6);
        },
    );
}

#[test]
fn a_pod_that_is_gone_leaves_nothing_at_the_next_start() {
    lab::test(
        "a_pod_that_is_gone_leaves_nothing_at_the_next_start",
        |lab| async move {
            let node = lab.node();
            let without = lab.links();
            let (gone, stays) = (lab.pod("a", 2), lab.pod("b", 3));
            captured(&node, &stays).await;
            let with_one: BTreeSet<_> = lab.links().into_iter().collect();
            captured(&node, &gone).await;
            drop(node);
            lab.run(None, &format!("ip netns del {}.a", lab.id()));
            until("the namespace is gone", || {
                let node = lab.node();
                let left: BTreeSet<_> = lab.links().into_iter().collect();
                drop(node);
                (left == with_one).then_some(())
            });
            let node = lab.node();
            node.forget_untold().await.unwrap();
            assert_eq!(lab.links(), without);
        },
    );
}

#[test]
fn an_agent_that_died_half_way_is_repaired_by_the_next() {
    lab::test(
        "an_agent_that_died_half_way_is_repaired_by_the_next",
        |lab| async move {
            let pod = lab.pod("a", 2);
            let untouched = lab.settings();
            let node = lab.node();
            captured(&node, &pod).await;
            let (links, good) = (lab.links(), lab.settings());
            drop(node);
            let half_ways: [&dyn Fn(); 4] = [
                &|| remove_pins(&lab, &["guard"]),
                &|| remove_pins(&lab, &["guard", "steer"]),
                &|| remove_pins(&lab, &["guard", "steer", "proof", "connect4", "connect6", "sock_ops"]),
                &|| {
                    lab.run(Some("a"), "ip rule del pref 32764");
                },
            ];
            let mut app = lab.in_pod(&pod);
            for spoil in half_ways {
                spoil();
                let node = lab.node();
                let (handle, listeners) = captured(&node, &pod).await;
                assert_eq!(lab.links(), links);
                assert_eq!(lab.settings(), good);
                app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
                let (stream, peer) = accept(&listeners.outbound[0]);
                assert!(
                    handle
                        .original_destination(PeerAddr(peer), stream.local_addr().unwrap())
                        .is_some()
                );
                let before = node.counters().of_pod(pod.uid(), Reason::ForeignSocket);
                app.must(&format!(
                    "socket.socket(socket.AF_INET, socket.SOCK_RAW, 6).sendto(b'x' * 40, ('{OUTSIDE4}', 0))"
                ));
                until("the guard is there", || {
                    (node.counters().of_pod(pod.uid(), Reason::ForeignSocket) > before).then_some(())
                });
            }
            // And one that died before it could take a pod out of the mesh.
            let node = lab.node();
            node.know(pod.spec.clone()).await.unwrap();
            assert_eq!(lab.settings(), untouched);
            let mut outside = lab.outside();
            outside.must(SERVE);
            app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
            outside.must("l.accept()");
        },
    );
}

/// Removes pins, and with the last agent's death what they held.
fn remove_pins(lab: &Lab, names: &[&str]) {
    for link in lab.links() {
        let name = link.file_name().unwrap().to_string_lossy().into_owned();
        if names.iter().any(|prefix| name.starts_with(prefix)) {
            std::fs::remove_file(link).unwrap();
        }
    }
}

#[test]
fn an_agent_with_other_layouts_replaces_the_maps_and_lets_nothing_past() {
    lab::test(
        "an_agent_with_other_layouts_replaces_the_maps_and_lets_nothing_past",
        |lab| async move {
            let pod = lab.pod("a", 2);
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            outside.must(SERVE);
            app.must(&format!("older = socket.create_connection(('{OUTSIDE4}', 8080))"));
            outside.must("c, _ = l.accept()");
            let node = lab.node();
            let (_, listeners) = captured(&node, &pod).await;
            let current = std::fs::read_dir(lab.pin_dir())
                .unwrap()
                .map(|entry| entry.unwrap().path());
            let maps = current
                .into_iter()
                .find(|path| path.display().to_string().contains("maps-v"))
                .unwrap();
            let other = lab.pin_dir().join("maps-v0");
            std::fs::rename(&maps, &other).unwrap();
            let newer = lab.node();
            assert!(maps.exists() && other.exists());
            let dial = format!("s = socket.create_connection(('{OUTSIDE4}', 8080))");
            assert!(app.tell(&dial).unwrap_err().starts_with("EPERM"));
            // It ends half way: the one before goes on.
            drop(newer);
            node.reconcile().await.unwrap();
            app.must(&dial);
            accept(&listeners.outbound[0]);
            drop((node, listeners));
            let node = lab.node();
            let (_, listeners) = captured(&node, &pod).await;
            node.forget_untold().await.unwrap();
            assert!(maps.exists() && !other.exists());
            app.must(&dial);
            accept(&listeners.outbound[0]);
            app.must("older.sendall(b'ping')");
            assert_eq!(outside.must("c.recv(4).decode()"), "ping");
            app.must("s.close(); older.close()");
            drop(listeners);
            node.release(pod.uid()).await.unwrap();
            let fwmark_accept = || lab.run(Some("a"), "sysctl -n net.ipv4.tcp_fwmark_accept");
            let deadline = std::time::Instant::now() + lab::PATIENCE;
            while fwmark_accept().trim() != "0" {
                assert!(std::time::Instant::now() < deadline);
                node.reconcile().await.unwrap();
            }
        },
    );
}

#[test]
fn an_agent_in_another_cgroup_takes_over() {
    lab::test("an_agent_in_another_cgroup_takes_over", |lab| async move {
        let pod = lab.pod("a", 2);
        let mut config = lab.config();
        config.agent_cgroup = Some(config.pods_cgroup.with_file_name("elsewhere"));
        let former = Node::start(config).unwrap_or_else(|error| panic!("{error}"));
        captured(&former, &pod).await;
        drop(former);
        let node = lab.node();
        let (handle, _) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        outside.must(SERVE);
        let target = SocketAddr::new(OUTSIDE4.parse().unwrap(), 8080);
        connect(handle.outbound_socket(target).unwrap(), target).expect("the guard knows the new cgroup");
        let mut app = lab.in_pod(&pod);
        app.must(SERVE);
        let target = SocketAddr::new(pod.ip4(), 8080);
        let socket = handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
        connect(socket, target).unwrap();
        app.must("l.settimeout(5); l.accept()");
    });
}

/// In an upgrade by a surge: two agents in two cgroups, and the former one finishes its connections. Its listeners outlive
/// it, and keep its cgroup.
#[test]
fn what_a_former_agents_listener_accepts_passes_the_guard() {
    lab::test(
        "what_a_former_agents_listener_accepts_passes_the_guard",
        |lab| async move {
            let pod = lab.pod("a", 2);
            let former = lab.node();
            let (handle, _) = captured(&former, &pod).await;
            let links = lab.links();
            let mut config = lab.config();
            config.agent_cgroup = Some(config.pods_cgroup.with_file_name("elsewhere"));
            config.takes_over = true;
            let node = Node::start(config).unwrap_or_else(|error| panic!("{error}"));
            node.offer(
                pod.uid().clone(),
                handle
                    .sockets()
                    .unwrap()
                    .into_iter()
                    .map(|(kind, socket)| (kind.to_owned(), socket))
                    .collect(),
            );
            let (_, listeners) = captured(&node, &pod).await;
            let address = |listeners: &[std::net::TcpListener]| listeners[0].local_addr().unwrap();
            assert_eq!(
                address(&listeners.outbound),
                address(&handle.listeners().unwrap().outbound),
                "the listener is the former agent's: a new one would have another port"
            );
            // What the former agent opens, out and in, is an agent's as before.
            let mut outside = lab.outside();
            outside.must(SERVE);
            let target = SocketAddr::new(OUTSIDE4.parse().unwrap(), 8080);
            connect(handle.outbound_socket(target).unwrap(), target).expect("the guard still knows the former cgroup");
            let mut app = lab.in_pod(&pod);
            app.must(SERVE);
            let target = SocketAddr::new(pod.ip4(), 8080);
            let socket = handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
            connect(socket, target).unwrap();
            app.must("l.settimeout(5); l.accept()");
            node.forget_former().await.unwrap();
            assert_eq!(lab.links().len(), links.len(), "the former agent's link is gone");
            // Its answers to the SYN have the listener's cgroup, and so has what is accepted.
            outside.must(&format!("s = socket.create_connection(('{}', 8080), 5)", pod.ip4()));
            let (mut stream, _) = accept(&listeners.inbound[0]);
            stream.write_all(b"bytes").unwrap();
            outside.must("s.settimeout(5); assert s.recv(5) == b'bytes'");
        },
    );
}

/// What an agent has said of the name server holds until the next one says it again, so that no query passes it by.
#[test]
fn a_successor_leaves_no_gap_in_which_queries_pass_it_by() {
    lab::test(
        "a_successor_leaves_no_gap_in_which_queries_pass_it_by",
        |lab| async move {
            let pod = lab.pod("a", 2);
            let former = lab.node();
            captured(&former, &pod).await;
            let queries = former.set_dns(pod.uid(), true).await.unwrap().unwrap();
            let mut config = lab.config();
            config.takes_over = true;
            let node = Node::start(config).unwrap_or_else(|error| panic!("{error}"));
            let (_handle, _listeners) = captured(&node, &pod).await;
            let mut app = lab.in_pod(&pod);
            app.must(&format!(
                "u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.sendto(b'query', ('{OUTSIDE4}', 53))"
            ));
            let mut buffer = [0; 16];
            let length = until("the former agent's socket has it", || {
                queries.iter().find_map(|(_, socket)| socket.recv(&mut buffer).ok())
            });
            assert_eq!(&buffer[..length], b"query");
        },
    );
}
