//! The capture by iptables: what it redirects, what it leaves alone, and that it is repaired and removed.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener},
};

use capture::{CaptureError, IptablesNode, IptablesPodHandle};
use lab::{Lab, OUTSIDE4, OUTSIDE6, accept, captured_by_rules as captured, connect, forbidding, nobody_came};
use model::{Exclusions, OriginalDst, PodSettings};
use socket2::SockRef;

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

fn start(lab: &Lab) -> IptablesNode {
    IptablesNode::start(&lab.pin_dir()).unwrap()
}

fn accepted_destination(handle: &IptablesPodHandle, listener: &TcpListener) -> Option<OriginalDst> {
    let (stream, _) = accept(listener);
    handle.original_destination(SockRef::from(&stream), stream.local_addr().unwrap())
}

#[test]
fn a_redirected_connection_keeps_its_destination() {
    lab::test("a_redirected_connection_keeps_its_destination", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut app = lab.in_pod(&pod);
        for (family, dialled, expected) in [
            ("AF_INET", OUTSIDE4, "10.78.0.2:8080"),
            ("AF_INET6", OUTSIDE6, "[fd78::2]:8080"),
            ("AF_INET6", "::ffff:10.78.0.2", "10.78.0.2:8080"),
            // What is nowhere is redirected, too.
            ("AF_INET", "10.99.9.9", "10.99.9.9:8080"),
        ] {
            app.must(&format!(
                "s = socket.socket(socket.{family}); s.connect(('{dialled}', 8080))"
            ));
            let original = accepted_destination(&handle, &listeners.outbound[0]);
            assert_eq!(original, Some(OriginalDst(expected.parse().unwrap())));
            assert_eq!(app.must("s.getpeername()[:2]"), format!("('{dialled}', 8080)"));
        }
        for own in [
            "127.0.0.1".to_owned(),
            "::1".to_owned(),
            pod.ip4().to_string(),
            pod.ip6().to_string(),
        ] {
            app.must(&format!("s = socket.create_connection(('{own}', 15001))"));
            let original = accepted_destination(&handle, &listeners.outbound[0]);
            assert_eq!(original, None, "{own} was dialled directly");
        }
    });
}

#[test]
fn an_agents_own_connection_is_not_redirected() {
    lab::test("an_agents_own_connection_is_not_redirected", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        outside.must(SERVE);
        for there in [OUTSIDE4, OUTSIDE6] {
            let target = SocketAddr::new(there.parse().unwrap(), 8080);
            let mut stream = connect(handle.outbound_socket(target).unwrap(), target).unwrap();
            outside.must("c, a = l.accept(); c.sendall(b'hello'); c.close()");
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            assert_eq!(said, "hello");
        }
        assert!(nobody_came(&listeners.outbound[0]));
    });
}

#[test]
fn the_application_sees_the_client() {
    lab::test("the_application_sees_the_client", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        // The strictest setting must not drop what comes from the client's address over the loopback device.
        lab.run(
            Some("a"),
            "sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.eth0.rp_filter=1",
        );
        let mut app = lab.in_pod(&pod);
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        for (client, own) in [(OUTSIDE4, pod.ip4()), (OUTSIDE6, pod.ip6())] {
            outside.must(&format!("s = socket.create_connection(('{own}', 8080))"));
            let (stream, peer) = accept(&listeners.inbound[0]);
            let local = stream.local_addr().unwrap();
            let OriginalDst(target) = handle.inbound_destination(SockRef::from(&stream), local);
            assert_eq!(target, SocketAddr::new(own, 8080));
            let mut upstream = connect(
                handle.inbound_socket(target, SocketAddr::new(peer.ip(), 0)).unwrap(),
                target,
            )
            .unwrap();
            app.must("c, a = l.accept()");
            assert_eq!(app.must("a[0]").replace("::ffff:", ""), client);
            upstream.write_all(b"to the application").unwrap();
            assert_eq!(app.must("c.recv(99)"), "b'to the application'");
            app.must("c.sendall(b'back'); c.close()");
            let mut back = String::new();
            upstream.read_to_string(&mut back).unwrap();
            assert_eq!(back, "back");
            lab::a_port_serves_again_but_never_two(
                &mut app,
                |source| handle.inbound_socket(target, source),
                target,
                peer,
            );
        }
    });
}

#[test]
fn what_passes_through_the_pod_is_not_taken_for_its_own() {
    lab::test(
        "what_passes_through_the_pod_is_not_taken_for_its_own",
        |lab| async move {
            let node = start(&lab);
            let pod = lab.pod("a", 2);
            let (handle, listeners) = captured(&node, &pod).await;
            // As from a container inside the pod: it comes in, for somebody else.
            lab.run(None, "ip route add 10.55.0.1/32 via 10.77.1.2 dev v-a onlink");
            lab.kubelet()
                .must("s = socket.socket(); s.setblocking(False); s.connect_ex(('10.55.0.1', 80))");
            let mut outside = lab.outside();
            lab.run(Some("out"), "ip route add 10.55.0.1/32 via 10.78.0.1");
            outside.must("s = socket.create_connection(('10.55.0.1', 80))");
            let (stream, _) = accept(&listeners.inbound[0]);
            let local = stream.local_addr().unwrap();
            let OriginalDst(target) = handle.inbound_destination(SockRef::from(&stream), local);
            assert_eq!(target.port(), 15006, "a loop, which the proxy refuses");
        },
    );
}

#[test]
fn a_connection_from_before_lives_on() {
    lab::test("a_connection_from_before_lives_on", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (mut app, mut outside, mut kubelet) = (lab.in_pod(&pod), lab.outside(), lab.kubelet());
        app.must(SERVE);
        outside.must(SERVE);
        app.must(&format!("out = socket.create_connection(('{OUTSIDE4}', 8080))"));
        app.must(&format!("out6 = socket.create_connection(('{OUTSIDE6}', 8080))"));
        outside.must("one = l.accept()[0]; two = l.accept()[0]");
        outside.must(&format!("into = socket.create_connection(('{}', 8080))", pod.ip4()));
        kubelet.must(&format!("into = socket.create_connection(('{}', 8080))", pod.ip6()));
        app.must("three = l.accept()[0]; four = l.accept()[0]");
        let mut exchange = |when: &str| {
            // Each end begins once: conntrack sees either as the first.
            app.must("out.sendall(b'1'); out6.sendall(b'2')");
            assert_eq!(outside.must("one.recv(9), two.recv(9)"), "(b'1', b'2')", "{when}");
            outside.must("one.sendall(b'3'); two.sendall(b'4'); into.sendall(b'5')");
            kubelet.must("into.sendall(b'6')");
            assert_eq!(app.must("out.recv(9), out6.recv(9)"), "(b'3', b'4')", "{when}");
            assert_eq!(app.must("three.recv(9), four.recv(9)"), "(b'5', b'6')", "{when}");
            app.must("three.sendall(b'7'); four.sendall(b'8')");
            assert_eq!(
                outside.must("into.recv(9)") + &kubelet.must("into.recv(9)"),
                "b'7'b'8'",
                "{when}"
            );
        };
        exchange("before");
        let (_handle, listeners) = captured(&node, &pod).await;
        exchange("captured");
        node.release(pod.uid()).await.unwrap();
        exchange("released");
        assert!(nobody_came(&listeners.outbound[0]) && nobody_came(&listeners.inbound[0]));
    });
}

#[test]
fn a_process_of_the_node_reaches_the_application_as_a_probe() {
    lab::test(
        "a_process_of_the_node_reaches_the_application_as_a_probe",
        |lab| async move {
            let node = start(&lab);
            let pod = lab.pod("a", 2);
            let mut app = lab.in_pod(&pod);
            app.must(SERVE);
            let (_handle, listeners) = captured(&node, &pod).await;
            for (own, source) in [
                (pod.ip4(), "169.254.7.127"),
                (pod.ip6(), "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
            ] {
                let mut kubelet = lab.kubelet();
                kubelet.must(&format!(
                    "s = socket.create_connection(('{own}', 8080)); s.sendall(b'probe')"
                ));
                app.must("c, a = l.accept()");
                assert_eq!(app.must("c.recv(99)"), "b'probe'");
                assert_eq!(app.must("a[0]").replace("::ffff:", ""), source);
                app.must("c.sendall(b'x' * 100000); c.close()");
                assert_eq!(kubelet.must("sum(iter(lambda: len(s.recv(65536)), 0))"), "100000");
            }
            assert!(nobody_came(&listeners.inbound[0]));
            // Whoever comes through the node does not.
            let other = lab.pod("b", 3);
            for mut asker in [lab.outside(), lab.in_pod(&other)] {
                for own in [pod.ip4(), pod.ip6()] {
                    asker.must(&format!("s = socket.create_connection(('{own}', 8080))"));
                    accept(&listeners.inbound[0]);
                }
            }
            app.must("l.settimeout(0)");
            assert!(app.tell("l.accept()").is_err());
        },
    );
}

#[test]
fn a_pod_that_went_unheard_takes_no_probes_along() {
    lab::test("a_pod_that_went_unheard_takes_no_probes_along", |lab| async move {
        let (node, pod) = (start(&lab), lab.pod("a", 2));
        let mut gone = lab.pod("b", 3).spec;
        gone.addresses = pod.spec.addresses.clone();
        assert!(node.know(gone.clone()).await.is_ok());
        captured(&node, &pod).await;
        node.forget(&gone.uid).await;
        assert!(lab.rules(None).contains("10.77.1.2"));
    });
}

#[test]
fn without_an_agent_connections_are_refused() {
    lab::test("without_an_agent_connections_are_refused", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let other = lab.pod("b", 3);
        let mut app = lab.in_pod(&pod);
        app.must(SERVE);
        let mut outside = lab.outside();
        outside.must(SERVE);
        let mut kubelet = lab.kubelet();
        let (handle, listeners) = captured(&node, &pod).await;
        let of_other = captured(&node, &other).await;
        let before = (lab.rules(Some("a")), lab.rules(None));
        drop((node, handle, listeners, of_other));
        let refused = |told: Result<String, String>| assert!(told.unwrap_err().starts_with("ECONNREFUSED"));
        for (there, own) in [(OUTSIDE4, pod.ip4()), (OUTSIDE6, pod.ip6())] {
            refused(app.tell(&format!("socket.create_connection(('{there}', 8080))")));
            refused(outside.tell(&format!("socket.create_connection(('{own}', 8080))")));
            // A probe needs no agent.
            kubelet.must(&format!("socket.create_connection(('{own}', 8080))"));
        }

        let node = start(&lab);
        let (handle, listeners) = captured(&node, &pod).await;
        assert_eq!((lab.rules(Some("a")), lab.rules(None)), before);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        assert!(accepted_destination(&handle, &listeners.outbound[0]).is_some());
        // The other was not told of again: the node's rules for it go.
        assert!(lab.rules(None).contains("10.77.1.3"));
        node.forget_untold().await.unwrap();
        assert!(!lab.rules(None).contains("10.77.1.3"));
        assert!(lab.rules(None).contains("10.77.1.2"));
        // And what the next is told not to capture, it releases.
        node.know(other.spec.clone()).await.unwrap();
        assert_eq!(lab.rules(Some("b")), "");
    });
}

#[test]
fn a_spoiled_rule_is_repaired() {
    lab::test("a_spoiled_rule_is_repaired", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (_handle, _listeners) = captured(&node, &pod).await;
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        let (good, good_of_node) = (lab.rules(Some("a")), lab.rules(None));
        let routes = "sh -c 'ip -4 rule; ip -6 rule; ip -4 route show table 100; ip -6 route show table 100'";
        let good_routes = lab.run(Some("a"), routes);
        for spoil in [
            "iptables -t nat -F UNDERCURRENT_OUTPUT",
            "ip6tables -t nat -D OUTPUT -j UNDERCURRENT_OUTPUT",
            "iptables -t nat -I OUTPUT 1 -p tcp -j ACCEPT",
            "iptables -t mangle -F PREROUTING",
            "ip -6 rule del pref 32764",
            "ip route flush table 100",
        ] {
            lab.run(Some("a"), spoil);
            let repaired = node.reconcile().await.unwrap();
            assert_eq!(repaired.len(), 1, "{spoil}: {repaired:?}");
            assert_eq!(lab.run(Some("a"), routes), good_routes, "{spoil}");
            // What somebody else put there is theirs; it only may not come first.
            let now = lab.rules(Some("a")).replace("\n-A OUTPUT -p tcp -j ACCEPT", "");
            assert_eq!(now, good, "{spoil}");
        }
        lab.run(None, "iptables -t nat -D POSTROUTING -j UNDERCURRENT_POSTRT");
        assert_eq!(node.reconcile().await.unwrap().len(), 1);
        assert_eq!(lab.rules(None), good_of_node);
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn non_tcp_can_be_forbidden() {
    lab::test("non_tcp_can_be_forbidden", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        node.capture(pod.spec.clone(), forbidding()).await.unwrap();
        let mut app = lab.in_pod(&pod);
        for (family, there) in [("AF_INET", OUTSIDE4), ("AF_INET6", OUTSIDE6)] {
            let send = format!("socket.socket(socket.{family}, socket.SOCK_DGRAM).sendto(b'x', ('{there}', 9))");
            assert!(app.tell(&send).unwrap_err().starts_with("EPERM"), "{there}");
            // The neighbour can still be found.
            app.must(&format!("socket.create_connection(('{there}', 8080))"));
        }
        node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        app.must(&format!(
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('{OUTSIDE4}', 9))"
        ));
    });
}

#[test]
fn a_pod_that_cannot_be_captured_says_why() {
    lab::test("a_pod_that_cannot_be_captured_says_why", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let mut app = lab.in_pod(&pod);
        app.must("thief = socket.create_server(('0.0.0.0', 15006))");
        let error = node
            .capture(pod.spec.clone(), PodSettings::default())
            .await
            .unwrap_err();
        assert!(matches!(error, CaptureError::PortTaken { port: 15006, .. }), "{error}");
        app.must("thief.close()");
        let mut wrong = pod.spec.clone();
        wrong.addresses = vec!["10.77.1.9".parse().unwrap()];
        let error = node.capture(wrong, PodSettings::default()).await.unwrap_err();
        assert!(matches!(error, CaptureError::AddressNotThere { .. }), "{error}");
        assert_eq!(lab.rules(Some("a")), "");
        captured(&node, &pod).await;
    });
}

#[test]
fn what_is_excluded_goes_past_the_agent() {
    lab::test("what_is_excluded_goes_past_the_agent", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(SERVE);
        outside.must(SERVE);
        outside.must("m = socket.create_server(('::', 5432), family=socket.AF_INET6, dualstack_ipv6=True)");
        let settings = PodSettings {
            exclusions: Exclusions {
                outbound_ranges: vec!["fd78::/64".parse().unwrap()],
                outbound_ports: vec![5432],
                inbound_ports: vec![8080],
                ..Exclusions::default()
            },
            ..PodSettings::default()
        };
        let handle = node.capture(pod.spec.clone(), settings.clone()).await.unwrap();
        let listeners = handle.listeners().unwrap();
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        for (there, port, server) in [(OUTSIDE4, 5432, "m"), (OUTSIDE6, 5432, "m"), (OUTSIDE6, 8080, "l")] {
            app.must(&format!("s = socket.create_connection(('{there}', {port}))"));
            let seen = outside.must(&format!("{server}.accept()[1][0].replace('::ffff:', '')"));
            assert!(
                [pod.ip4().to_string(), pod.ip6().to_string()].contains(&seen),
                "{there}:{port}: {seen}"
            );
        }
        assert!(nobody_came(&listeners.outbound[0]));
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let original = accepted_destination(&handle, &listeners.outbound[0]);
        assert_eq!(original, Some(OriginalDst(format!("{OUTSIDE4}:8080").parse().unwrap())));
        for own in [pod.ip4(), pod.ip6()] {
            outside.must(&format!("s = socket.create_connection(('{own}', 8080))"));
            app.must("c, a = l.accept()");
            assert!([OUTSIDE4, OUTSIDE6].contains(&app.must("a[0]").replace("::ffff:", "").as_str()));
            assert!(nobody_came(&listeners.inbound[0]));
            outside.must(&format!("s = socket.create_connection(('{own}', 8081))"));
            accept(&listeners.inbound[0]);
        }
        let bypassing = PodSettings {
            bypass_inbound: true,
            ..PodSettings::default()
        };
        node.capture(pod.spec.clone(), bypassing).await.unwrap();
        outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
        app.must("c, a = l.accept()");
        node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
        accept(&listeners.inbound[0]);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 5432))"));
        accept(&listeners.outbound[0]);
    });
}

#[test]
fn only_included_ranges_are_redirected() {
    lab::test("only_included_ranges_are_redirected", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        outside.must(SERVE);
        let mut settings = PodSettings::default();
        settings.exclusions.only_outbound_ranges = Some(vec!["10.78.0.0/24".parse().unwrap()]);
        let handle = node.capture(pod.spec.clone(), settings).await.unwrap();
        let listeners = handle.listeners().unwrap();
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        accept(&listeners.outbound[0]);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"));
        outside.must("l.accept()");
        assert!(nobody_came(&listeners.outbound[0]));
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn what_comes_by_a_virtual_interface_is_the_pods_own() {
    lab::test("what_comes_by_a_virtual_interface_is_the_pods_own", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let mut guest = lab.guest("a", "virt0");
        let settings = PodSettings {
            virtual_interfaces: vec!["virt0".to_owned()],
            ..PodSettings::default()
        };
        let handle = node.capture(pod.spec.clone(), settings).await.unwrap();
        let listeners = handle.listeners().unwrap();
        guest.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let original = accepted_destination(&handle, &listeners.outbound[0]);
        assert_eq!(original, Some(OriginalDst(format!("{OUTSIDE4}:8080").parse().unwrap())));
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
    });
}

#[test]
fn the_rules_are_where_the_nodes_own_are() {
    lab::test("the_rules_are_where_the_nodes_own_are", |lab| async move {
        let pod = lab.pod("a", 2);
        for backend in ["legacy", "nft"] {
            let there = std::process::Command::new(format!("iptables-{backend}"))
                .args(["-t", "nat", "-S"])
                .output();
            if !there.is_ok_and(|output| output.status.success()) {
                eprintln!("not run: iptables-{backend} does not work here");
                continue;
            }
            let other = if backend == "nft" { "legacy" } else { "nft" };
            lab.run(None, &format!("iptables-{backend} -t filter -A FORWARD -p 132 -j DROP"));
            let node = start(&lab);
            let (handle, listeners) = captured(&node, &pod).await;
            let saved = |backend: &str| lab.run(Some("a"), &format!("iptables-{backend}-save -t nat"));
            assert!(saved(backend).contains("UNDERCURRENT_OUTPUT"), "{backend}");
            assert!(!saved(other).contains("UNDERCURRENT_OUTPUT"), "{backend}");
            let mut app = lab.in_pod(&pod);
            for there in [format!("{OUTSIDE4}:8080"), format!("[{OUTSIDE6}]:8080")] {
                let there: SocketAddr = there.parse().unwrap();
                app.must(&format!("s = socket.create_connection(('{}', 8080))", there.ip()));
                assert_eq!(
                    accepted_destination(&handle, &listeners.outbound[0]),
                    Some(OriginalDst(there))
                );
            }
            assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
            drop((app, listeners, handle));
            node.forget(pod.uid()).await;
            assert!(!saved(backend).contains("UNDERCURRENT"), "{backend}");
            lab.run(None, &format!("iptables-{backend} -t filter -F FORWARD"));
        }
    });
}
