//! Enrolment, release, restart, crash, uninstall.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    collections::BTreeSet,
    io::{Read, Write},
    net::SocketAddr,
};

use capture::{CaptureError, Node, Reason};
use lab::{Actor, Lab, OUTSIDE4, OUTSIDE6, TestPod, accept, captured, connect, until};
use model::PeerAddr;

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
fn an_attempt_to_connect_under_way_is_aborted() {
    lab::test("an_attempt_to_connect_under_way_is_aborted", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        node.know(pod.spec.clone()).await.unwrap();
        // Nobody answers there.
        lab.run(Some("out"), "ip route add blackhole 10.77.1.2/32");
        let mut app = lab.in_pod(&pod);
        app.must("s = socket.socket(); s.setblocking(False)");
        assert!(
            app.tell(&format!("s.connect(('{OUTSIDE4}', 8080))"))
                .unwrap_err()
                .starts_with("EINPROGRESS")
        );
        let (_, listeners) = captured(&node, &pod).await;
        assert_eq!(
            app.must("errno.errorcode[s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)]"),
            "ECONNABORTED"
        );
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        accept(&listeners.outbound[0]);
    });
}

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
fn a_released_pod_is_as_it_was() {
    lab::test("a_released_pod_is_as_it_was", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        lab.run(Some("a"), "sysctl -qw net.ipv4.conf.all.rp_filter=1");
        let before = settings(&lab);
        let pins = lab.links();
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        outside.must(SERVE);
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        assert_ne!(settings(&lab), before);
        let target = SocketAddr::new(pod.ip4(), 8080);
        let socket = handle.inbound_socket(target, OUTSIDE4.parse().unwrap()).unwrap();
        connect(socket, target).expect("strict reverse-path filtering is not in the way");
        drop((handle, listeners));
        node.release(pod.uid()).await.unwrap();
        assert_eq!(settings(&lab), before);
        assert_eq!(lab.links(), pins);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
        app.must("l.accept(); l.accept()");
    });
}

/// What capture changes in the pod: rules, routes, settings.
fn settings(lab: &Lab) -> String {
    [
        "ip -4 rule",
        "ip -6 rule",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "sysctl net.ipv4.tcp_fwmark_accept",
    ]
    .map(|command| lab.run(Some("a"), command))
    .join("")
        + &lab.run(Some("a"), "sysctl net.ipv4.conf.all.rp_filter")
}

#[test]
fn what_a_pod_spoils_is_repaired() {
    lab::test("what_a_pod_spoils_is_repaired", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        captured(&node, &pod).await;
        let good = settings(&lab);
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        lab.run(Some("a"), "ip rule del pref 32764");
        lab.run(Some("a"), "ip -6 route flush table 100");
        lab.run(Some("a"), "sysctl -qw net.ipv4.tcp_fwmark_accept=0");
        assert_eq!(node.reconcile().await.unwrap().len(), 3);
        assert_eq!(settings(&lab), good);
    });
}

#[test]
fn uninstall_leaves_nothing() {
    lab::test("uninstall_leaves_nothing", |lab| async move {
        let pod = lab.pod("a", 2);
        let before = (settings(&lab), tcx(&lab));
        for by_the_node in [true, false] {
            let node = lab.node();
            captured(&node, &pod).await;
            assert_ne!((settings(&lab), tcx(&lab)), before);
            if by_the_node {
                node.uninstall().await.unwrap();
            } else {
                drop(node);
                capture::uninstall(&lab.pin_dir()).unwrap();
            }
            assert_eq!((settings(&lab), tcx(&lab)), before);
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
fn mix_ups_are_refused() {
    lab::test("mix_ups_are_refused", |lab| async move {
        let node = lab.node();
        let (a, b) = (lab.pod("a", 2), lab.pod("b", 3));
        let mut mixed = a.spec.clone();
        mixed.netns.clone_from(&b.spec.netns);
        let error = node.capture(mixed, false).await.unwrap_err();
        assert!(matches!(error, CaptureError::AddressNotThere { .. }), "{error}");
        captured(&node, &a).await;
        lab.run(Some("b"), "ip addr add 10.77.1.2/32 dev eth0");
        let mut stolen = b.spec.clone();
        stolen.addresses = vec![a.ip4()];
        let error = node.capture(stolen, false).await.unwrap_err();
        assert!(matches!(error, CaptureError::AddressTaken { .. }), "{error}");
        let mut host = b.spec.clone();
        host.netns = "/proc/self/ns/net".into();
        let error = node.capture(host, false).await.unwrap_err();
        assert!(matches!(error, CaptureError::HostNetwork(_)), "{error}");
    });
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

#[test]
fn an_agent_that_died_half_way_is_repaired_by_the_next() {
    lab::test(
        "an_agent_that_died_half_way_is_repaired_by_the_next",
        |lab| async move {
            let pod = lab.pod("a", 2);
            let untouched = settings(&lab);
            let node = lab.node();
            captured(&node, &pod).await;
            let (links, good) = (lab.links(), settings(&lab));
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
                assert_eq!(settings(&lab), good);
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
            assert_eq!(settings(&lab), untouched);
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
            let node = lab.node();
            captured(&node, &pod).await;
            drop(node);
            let current = std::fs::read_dir(lab.pin_dir())
                .unwrap()
                .map(|entry| entry.unwrap().path());
            let maps = current
                .into_iter()
                .find(|path| path.display().to_string().contains("maps-v"))
                .unwrap();
            let other = lab.pin_dir().join("maps-v0");
            std::fs::rename(&maps, &other).unwrap();
            let node = lab.node();
            assert!(maps.exists() && !other.exists());
            let mut app = lab.in_pod(&pod);
            let dial = format!("s = socket.create_connection(('{OUTSIDE4}', 8080))");
            assert!(app.tell(&dial).unwrap_err().starts_with("EPERM"));
            let (_, listeners) = captured(&node, &pod).await;
            app.must(&dial);
            accept(&listeners.outbound[0]);
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
        let socket = handle.inbound_socket(target, OUTSIDE4.parse().unwrap()).unwrap();
        connect(socket, target).unwrap();
        app.must("l.settimeout(5); l.accept()");
    });
}
