//! Enrolment, release, repair, uninstall.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use capture::{CaptureError, Node, Reason};
use lab::{Actor, HOLD_BACK, Lab, OUTSIDE4, OUTSIDE6, TestPod, accept, captured, connect, until};
use model::PodSettings;

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

/// A connection from the pod to the outside, and one from the outside to the pod, of each family.
struct Connections {
    app: Actor,
    outside: Actor,
}

impl Connections {
    fn open(lab: &Lab, pod: &TestPod) -> Self {
        let (mut app, mut outside) = (lab.in_pod(pod), lab.outside());
        app.must(SERVE);
        outside.must(SERVE);
        for (name, own, there) in [
            ("4", pod.ip4().to_string(), OUTSIDE4),
            ("6", pod.ip6().to_string(), OUTSIDE6),
        ] {
            app.must(&format!("out{name} = socket.create_connection(('{there}', 8080))"));
            outside.must(&format!("in{name}, _ = l.accept()"));
            outside.must(&format!("out{name} = socket.create_connection(('{own}', 8080))"));
            app.must(&format!("in{name}, _ = l.accept()"));
        }
        Self { app, outside }
    }

    /// Both ends speak and hear, with more than a window of data.
    fn speak(&mut self) {
        for name in ["4", "6"] {
            for (from, to) in [("out", "in"), ("in", "out")] {
                for swap in [false, true] {
                    let (speaker, hearer) = if swap {
                        (&mut self.outside, &mut self.app)
                    } else {
                        (&mut self.app, &mut self.outside)
                    };
                    speaker.begin(&format!("{from}{name}.sendall(b'x' * 300000)"));
                    hearer.must(&format!(
                        "got = 0\nwhile got < 300000:\n  piece = len({to}{name}.recv(65536))\n  assert piece\n  got += piece"
                    ));
                    speaker.finish().unwrap();
                }
            }
        }
    }

    fn close(&mut self) {
        self.app.must("out4.close(); in4.close()");
        self.outside.must("out6.close(); in6.close()");
        for (actor, name) in [(&mut self.outside, "4"), (&mut self.app, "6")] {
            assert_eq!(
                actor.must(&format!("out{name}.recv(1), in{name}.recv(1)")),
                "(b'', b'')"
            );
        }
    }
}

#[test]
fn older_connections_live_on_through_enrolment_restart_and_release() {
    lab::test(
        "older_connections_live_on_through_enrolment_restart_and_release",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            node.know(pod.spec.clone()).await.unwrap();
            let mut connections = Connections::open(&lab, &pod);
            let (_, listeners) = captured(&node, &pod).await;
            connections.speak();
            drop((node, listeners));
            connections.speak();
            let node = lab.node();
            captured(&node, &pod).await;
            connections.speak();
            node.reconcile().await.unwrap();
            connections.speak();
            node.release(pod.uid()).await.unwrap();
            connections.speak();
            connections.close();
        },
    );
}

#[test]
fn named_namespaces_are_looked_through_but_for_the_nodes_and_the_taken() {
    lab::test(
        "named_namespaces_are_looked_through_but_for_the_nodes_and_the_taken",
        |lab| async move {
            let (taken, free) = (lab.pod("a", 2), lab.pod("b", 3));
            let directory = std::path::Path::new("/run/netns");
            let found = capture::named_netns(directory, std::slice::from_ref(&taken.spec.netns)).unwrap();
            let ours = |netns: &capture::NamedNetns| netns.path.to_string_lossy().contains(lab.id());
            let names: Vec<_> = found.iter().filter(|netns| ours(netns)).collect();
            let has = |pod: &TestPod| names.iter().any(|netns| netns.path == pod.spec.netns);
            assert!(has(&free) && !has(&taken), "{names:?}");
            assert!(
                names
                    .iter()
                    .all(|netns| !netns.path.ends_with(format!("{}.node", lab.id())))
            );
            let netns = names.iter().find(|netns| netns.path == free.spec.netns).unwrap();
            assert!(
                netns.addresses.contains(&free.ip4()) && netns.addresses.contains(&free.ip6()),
                "{netns:?}"
            );
            // Files that are no namespaces.
            let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
            assert_eq!(capture::named_netns(directory, &[]).unwrap(), []);
            let gone = capture::named_netns(&directory.join("gone"), &[]).unwrap_err();
            assert!(gone.to_string().contains("gone"), "{gone}");
        },
    );
}

#[test]
fn an_older_connection_that_ends_does_not_come_back() {
    lab::test("an_older_connection_that_ends_does_not_come_back", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        node.know(pod.spec.clone()).await.unwrap();
        let mut connections = Connections::open(&lab, &pod);
        let port = connections.app.must("out4.getsockname()[1]");
        captured(&node, &pod).await;
        connections.close();
        connections.outside.must("in4.close()");
        until("the connection has ended", || {
            let states = lab.run(
                Some("a"),
                &format!("ss -Htn state connected exclude time-wait sport = :{port}"),
            );
            states.trim().is_empty().then_some(())
        });
        // The same ends again, by hand.
        connections
            .app
            .must("r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)");
        let mut send = |flags: u8| {
            connections.app.must(&format!(
                "r.sendto(struct.pack('!HHIIBBHHH', {port}, 8080, 1, 0, 0x50, {flags}, 512, 0, 0), ('{OUTSIDE4}', 0))"
            ));
        };
        let dropped = || node.counters().of_pod(pod.uid(), Reason::ForeignSocket);
        let before = dropped();
        send(0x02);
        until("the SYN is dropped", || (dropped() > before).then_some(()));
        node.reconcile().await.unwrap();
        let before = dropped();
        send(0x18);
        until("what follows is dropped", || (dropped() > before).then_some(()));
    });
}

#[test]
fn a_released_pod_is_as_it_was() {
    lab::test("a_released_pod_is_as_it_was", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        lab.run(Some("a"), "sysctl -qw net.ipv4.conf.all.rp_filter=1");
        let before = lab.settings();
        let pins = lab.links();
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        outside.must(SERVE);
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        assert_ne!(lab.settings(), before);
        let target = SocketAddr::new(pod.ip4(), 8080);
        let socket = handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
        connect(socket, target).expect("strict reverse-path filtering is not in the way");
        app.must(&format!("socket.create_connection(('{OUTSIDE4}', 8080))"));
        let counted = node.counters().get(Reason::Captured);
        assert!(counted > 0);
        drop((handle, listeners));
        node.release(pod.uid()).await.unwrap();
        assert_eq!(lab.settings(), before);
        assert_eq!(lab.links(), pins);
        assert_eq!(
            node.counters().get(Reason::Captured),
            counted,
            "the node's counts only go up"
        );
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
        app.must("l.accept(); l.accept()");
    });
}

#[test]
fn what_the_agent_carries_outlives_the_release() {
    lab::test("what_the_agent_carries_outlives_the_release", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let before = lab.settings();
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut carried = Vec::new();
        for (client, own) in [(OUTSIDE4, pod.ip4()), (OUTSIDE6, pod.ip6())] {
            outside.must(&format!("s = socket.create_connection(('{own}', 8080))"));
            let (stream, peer) = accept(&listeners.inbound[0]);
            let target = SocketAddr::new(own, 8080);
            let socket = handle.inbound_socket(target, SocketAddr::new(peer.ip(), 0)).unwrap();
            let upstream = connect(socket, target).unwrap();
            app.must(&format!(
                "{}, _ = l.accept()",
                if client == OUTSIDE4 { "c4" } else { "c6" }
            ));
            outside.must(if client == OUTSIDE4 { "s4 = s" } else { "s6 = s" });
            carried.push((stream, upstream));
        }
        let mut speak = |app: &mut Actor| {
            for ((client, upstream), name) in carried.iter_mut().zip(["4", "6"]) {
                outside.must(&format!("s{name}.sendall(b'ask')"));
                let mut asked = [0; 3];
                client.read_exact(&mut asked).unwrap();
                upstream.write_all(&asked).unwrap();
                app.must(&format!("c{name}.sendall(c{name}.recv(3))"));
                upstream.read_exact(&mut asked).unwrap();
                client.write_all(&asked).unwrap();
                assert_eq!(outside.must(&format!("s{name}.recv(3)")), "b'ask'");
            }
        };
        speak(&mut app);
        drop((handle, listeners));
        node.release(pod.uid()).await.unwrap();
        speak(&mut app);
        node.know(pod.spec.clone()).await.unwrap();
        node.reconcile().await.unwrap();
        speak(&mut app);
        // It comes back, and leaves again.
        captured(&node, &pod).await;
        speak(&mut app);
        node.release(pod.uid()).await.unwrap();
        speak(&mut app);
        assert_ne!(lab.settings(), before);
        drop(carried);
        app.must("c4.recv(1), c6.recv(1), c4.close(), c6.close()");
        outside.must("s4.close(), s6.close()");
        node.reconcile().await.unwrap();
        assert_eq!(lab.settings(), before);
    });
}

#[test]
fn a_handshake_with_the_agent_at_the_release_reaches_the_application() {
    lab::test(
        "a_handshake_with_the_agent_at_the_release_reaches_the_application",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let before = lab.settings();
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(SERVE);
            let (handle, listeners) = captured(&node, &pod).await;
            lab.run(Some("out"), &format!("iptables -A {HOLD_BACK}"));
            outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
            // As the proxy does, whose listeners close last.
            node.release(pod.uid()).await.unwrap();
            node.reconcile().await.unwrap();
            lab.run(Some("out"), &format!("iptables -D {HOLD_BACK}"));
            outside.must("s.sendall(b'ask')");
            let (client, peer) = accept(&listeners.inbound[0]);
            let target = SocketAddr::new(pod.ip4(), 8080);
            let socket = handle.inbound_socket(target, SocketAddr::new(peer.ip(), 0)).unwrap();
            let upstream = connect(socket, target).expect("the application's answer finds back");
            app.must("l.accept()[0].close()");
            drop((client, upstream, listeners));
            node.reconcile().await.unwrap();
            assert_eq!(lab.settings(), before);
        },
    );
}

#[test]
fn a_query_under_way_at_the_release_is_answered_by_the_server_that_was_asked() {
    lab::test(
        "a_query_under_way_at_the_release_is_answered_by_the_server_that_was_asked",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let (handle, _listeners) = captured(&node, &pod).await;
            let queries = node.set_dns(pod.uid(), true).await.unwrap().unwrap();
            let mut app = lab.in_pod(&pod);
            let mut asked = Vec::new();
            for (family, server) in [("AF_INET", OUTSIDE4), ("AF_INET6", OUTSIDE6)] {
                app.must(&format!(
                    "{family} = socket.socket(socket.{family}, socket.SOCK_DGRAM); {family}.settimeout(5); \
                     {family}.sendto(b'query', ('{server}', 53))"
                ));
                asked.push(until("the query comes", || {
                    queries.iter().find_map(|(slot, socket)| {
                        let (_, client) = socket.recv_from(&mut [0; 16]).ok()?;
                        Some((*slot, socket, client, family, server))
                    })
                }));
            }
            node.release(pod.uid()).await.unwrap();
            for (slot, socket, client, family, server) in &asked {
                let known = SocketAddr::new(server.parse().unwrap(), 53);
                assert_eq!(handle.name_server(*slot), Some(known));
                socket.send_to(b"answer", client).unwrap();
                app.must(&format!("data, a = {family}.recvfrom(16)"));
                assert_eq!(app.must("data, a[:2]"), format!("(b'answer', ('{server}', 53))"));
            }
            // The numbers are the same when it comes back, and nobody's when it is gone.
            captured(&node, &pod).await;
            let slots = || asked.iter().map(|(slot, ..)| handle.name_server(*slot));
            assert!(slots().all(|server| server.is_some()));
            node.forget(pod.uid()).await;
            assert!(slots().all(|server| server.is_none()));
        },
    );
}

#[test]
fn what_a_pod_spoils_is_repaired() {
    lab::test("what_a_pod_spoils_is_repaired", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        captured(&node, &pod).await;
        let good = lab.settings();
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        lab.run(Some("a"), "ip rule del pref 32764");
        lab.run(Some("a"), "ip -6 route flush table 100");
        lab.run(Some("a"), "sysctl -qw net.ipv4.tcp_fwmark_accept=0");
        assert_eq!(node.reconcile().await.unwrap().len(), 3);
        assert_eq!(lab.settings(), good);
    });
}

#[test]
fn uninstall_leaves_nothing() {
    lab::test("uninstall_leaves_nothing", |lab| async move {
        let pod = lab.pod("a", 2);
        let before = (lab.settings(), tcx(&lab));
        for by_the_node in [true, false] {
            let node = lab.node();
            captured(&node, &pod).await;
            assert_ne!((lab.settings(), tcx(&lab)), before);
            if by_the_node {
                node.uninstall().await.unwrap();
            } else {
                drop(node);
                capture::uninstall(&lab.pin_dir()).unwrap();
            }
            assert_eq!((lab.settings(), tcx(&lab)), before);
            assert!(!lab.pin_dir().exists());
        }
        capture::uninstall(&lab.pin_dir()).expect("nothing there is no failure");
        let mut outside = lab.outside();
        outside.must(SERVE);
        lab.in_pod(&pod)
            .must(&format!("socket.create_connection(('{OUTSIDE4}', 8080))"));
    });
}

/// The devices of the node, which name the programs that are attached to them.
fn tcx(lab: &Lab) -> String {
    lab.run(None, "ip -d link show dev v-a")
}

#[test]
fn mix_ups_are_refused() {
    lab::test("mix_ups_are_refused", |lab| async move {
        let node = lab.node();
        let (a, b) = (lab.pod("a", 2), lab.pod("b", 3));
        let mut mixed = a.spec.clone();
        mixed.netns.clone_from(&b.spec.netns);
        let error = node.capture(mixed, PodSettings::default()).await.unwrap_err();
        assert!(matches!(error, CaptureError::AddressNotThere { .. }), "{error}");
        captured(&node, &a).await;
        lab.run(Some("b"), "ip addr add 10.77.1.2/32 dev eth0");
        let mut stolen = b.spec.clone();
        stolen.addresses = vec![a.ip4()];
        let error = node.capture(stolen, PodSettings::default()).await.unwrap_err();
        assert!(matches!(error, CaptureError::AddressTaken { .. }), "{error}");
        let mut host = b.spec.clone();
        host.netns = "/proc/self/ns/net".into();
        let error = node.capture(host, PodSettings::default()).await.unwrap_err();
        assert!(matches!(error, CaptureError::HostNetwork(_)), "{error}");
    });
}

#[test]
fn a_pod_that_went_unheard_takes_nothing_from_who_has_its_address_now() {
    lab::test(
        "a_pod_that_went_unheard_takes_nothing_from_who_has_its_address_now",
        |lab| async move {
            let node = lab.node();
            let (gone, mut pod) = (lab.pod("a", 2), lab.pod("b", 3));
            node.know(gone.spec.clone()).await.unwrap();
            lab.run(Some("b"), "ip addr add 10.77.1.2/32 dev eth0");
            lab.run(None, "ip route replace 10.77.1.2/32 dev v-b");
            pod.spec.addresses = vec![gone.ip4()];
            let (_handle, listeners) = captured(&node, &pod).await;
            node.forget(gone.uid()).await;
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
            accept(&listeners.outbound[0]);
            outside.must(&format!("s = socket.create_connection(('{}', 8080))", gone.ip4()));
            accept(&listeners.inbound[0]);
        },
    );
}

#[test]
fn ordinary_traffic_of_the_agent_is_not_dropped() {
    lab::test("ordinary_traffic_of_the_agent_is_not_dropped", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        outside.must(SERVE);
        for (own, there) in [(pod.ip4(), OUTSIDE4), (pod.ip6(), OUTSIDE6)] {
            let target = SocketAddr::new(there.parse().unwrap(), 8080);
            // The agent closes first, is in TIME_WAIT, and must still answer.
            let mut stream = connect(handle.outbound_socket(target).unwrap(), target).unwrap();
            outside.must("c, _ = l.accept()");
            outside.begin("sum(iter(lambda: len(c.recv(65536)), 0))");
            stream.write_all(&vec![b'x'; 1 << 20]).unwrap();
            drop(stream);
            assert_eq!(outside.finish().unwrap(), "1048576");
            outside.must("c.close()");
            until("the other end has its last ACK", || {
                let states = lab.run(Some("out"), "ss -Htn state last-ack");
                states.trim().is_empty().then_some(())
            });
            // The peer closes first.
            let mut stream = connect(handle.outbound_socket(target).unwrap(), target).unwrap();
            outside.must("c, _ = l.accept(); c.sendall(b'x' * 100000); c.close()");
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            assert_eq!(received.len(), 100_000);
            drop(stream);
            // To the agent, and a connection to nobody.
            outside.must(&format!("s = socket.create_connection(('{own}', 80))"));
            let (mut stream, _) = accept(&listeners.inbound[0]);
            stream.write_all(b"refused").unwrap();
            assert_eq!(outside.must("s.recv(99)"), "b'refused'");
            outside.must("s.close()");
        }
        let counters = node.counters();
        for reason in [
            Reason::ForeignSocket,
            Reason::NoSocket,
            Reason::Altered,
            Reason::Malformed,
        ] {
            assert_eq!(counters.get(reason), 0, "{reason:?}");
        }
    });
}

#[test]
fn the_programs_write_to_the_log_when_asked() {
    lab::test("the_programs_write_to_the_log_when_asked", |lab| async move {
        let node = Node::start(capture::NodeConfig {
            kernel_log: true,
            ..lab.config()
        })
        .unwrap_or_else(|error| panic!("{error}"));
        assert!(node.kernel_log().is_some());
        assert!(node.kernel_log().is_none(), "only once");
    });
}
