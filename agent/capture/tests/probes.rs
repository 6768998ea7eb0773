//! Who reaches a captured application directly: processes of the host, and nobody else.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use capture::Reason;
use lab::{Actor, Lab, TestPod, accept, captured, nobody_came, until};

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

async fn strict_pod(lab: &Lab) -> (capture::Node, TestPod, Actor, capture::PodListeners) {
    let node = lab.node();
    let pod = lab.pod("a", 2);
    let mut app = lab.in_pod(&pod);
    app.must(SERVE);
    let (_, listeners) = captured(&node, &pod).await;
    (node, pod, app, listeners)
}

#[test]
fn a_probe_of_the_host_reaches_the_application_from_its_real_address() {
    lab::test(
        "a_probe_of_the_host_reaches_the_application_from_its_real_address",
        |lab| async move {
            let (node, pod, mut app, listeners) = strict_pod(&lab).await;
            let mut kubelet = lab.kubelet();
            for own in [pod.ip4(), pod.ip6()] {
                kubelet.must(&format!(
                    "s = socket.create_connection(('{own}', 8080)); s.sendall(b'probe')"
                ));
                app.must("c, a = l.accept()");
                assert_eq!(app.must("c.recv(99)"), "b'probe'");
                let seen = app.must("a[0]").replace("::ffff:", "");
                assert_eq!(seen, kubelet.must("s.getsockname()[0]"));
                app.must("c.sendall(b'x' * 100000); c.close()");
                assert_eq!(kubelet.must("sum(iter(lambda: len(s.recv(65536)), 0))"), "100000");
                kubelet.must("s.close()");
                assert!(nobody_came(&listeners.inbound[0]));
            }
            assert_eq!(node.counters().get(Reason::ForeignSocket), 0);
            assert!(node.counters().get(Reason::ProbeAdmitted) >= 2);
        },
    );
}

#[test]
fn a_connection_of_the_host_outlives_many_others() {
    lab::test("a_connection_of_the_host_outlives_many_others", |lab| async move {
        let (node, pod, mut app, _listeners) = strict_pod(&lab).await;
        let mut host = lab.kubelet();
        let own = [pod.ip4(), pod.ip6()];
        for (index, own) in own.iter().enumerate() {
            host.must(&format!("idle{index} = socket.create_connection(('{own}', 8080))"));
            app.must(&format!("c{index}, _ = l.accept()"));
        }
        // More than are remembered.
        app.must("threading.Thread(target=lambda: [l.accept()[0].close() for _ in range(25000)], daemon=True).start()");
        host.must(&format!(
            "for i in range(25000):\n s = socket.create_connection(('{}', 8080))\n \
             s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)); s.close()",
            pod.ip4()
        ));
        for index in 0..own.len() {
            app.must(&format!("c{index}.sendall(b'pong')"));
            assert_eq!(host.must(&format!("idle{index}.recv(4).decode()")), "pong");
        }
        assert_eq!(node.counters().get(Reason::ForeignSocket), 0);
    });
}

#[test]
fn nobody_else_is_taken_for_the_host() {
    lab::test("nobody_else_is_taken_for_the_host", |lab| async move {
        let (node, pod, mut app, listeners) = strict_pod(&lab).await;
        let other = lab.pod("b", 3);
        node.know(other.spec.clone()).await.unwrap();
        app.must("l.settimeout(0)");
        let askers = [
            ("another pod", lab.in_pod(&other)),
            ("a host-network pod", lab.actor(None, "pods/hostnet")),
            ("the agent's cgroup", lab.actor(None, "agent")),
            ("forwarded", lab.outside()),
        ];
        for (who, mut asker) in askers {
            for own in [pod.ip4(), pod.ip6()] {
                asker.must(&format!("s = socket.create_connection(('{own}', 8080))"));
                accept(&listeners.inbound[0]);
                assert!(
                    app.tell("l.accept()").unwrap_err().starts_with("EAGAIN"),
                    "{who} came through"
                );
            }
        }
        assert_eq!(node.counters().get(Reason::ProbeAdmitted), 0);
    });
}

#[test]
fn the_ports_of_a_former_probe_help_nobody() {
    lab::test("the_ports_of_a_former_probe_help_nobody", |lab| async move {
        let (_node, pod, mut app, listeners) = strict_pod(&lab).await;
        let from = |actor: &mut Actor| {
            actor.must("s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)");
            actor.must("s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))");
            actor.must(&format!(
                "s.bind(('10.77.0.1', 45678)); s.connect(('{}', 8080))",
                pod.ip4()
            ));
        };
        let mut kubelet = lab.kubelet();
        from(&mut kubelet);
        app.must("c, a = l.accept()");
        kubelet.must("s.close()");
        let mut host_network = lab.actor(None, "pods/hostnet");
        from(&mut host_network);
        accept(&listeners.inbound[0]);
        app.must("l.settimeout(0)");
        assert!(app.tell("l.accept()").unwrap_err().starts_with("EAGAIN"));
    });
}

#[test]
fn a_stranger_can_not_speak_in_the_name_of_the_pod_or_of_the_agents_connections() {
    lab::test(
        "a_stranger_can_not_speak_in_the_name_of_the_pod_or_of_the_agents_connections",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let mut app = lab.in_pod(&pod);
            app.must(SERVE);
            let (handle, _listeners) = captured(&node, &pod).await;
            let target = std::net::SocketAddr::new(pod.ip4(), 8080);
            let socket = handle.inbound_socket(target, lab::any_port(lab::OUTSIDE4)).unwrap();
            let upstream = lab::connect(socket, target).unwrap();
            let port = upstream.local_addr().unwrap().port();
            let mut outside = lab.outside();
            outside.must("r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)");
            outside.must(&format!(
                "r.sendto(struct.pack('!HHIIBBHHH', {port}, 8080, 1, 1, 0x50, 0x18, 512, 0, 0) + b'hi', ('{}', 0))",
                pod.ip4()
            ));
            until("the impersonation is counted", || {
                (node.counters().of_pod(pod.uid(), Reason::Impersonation) == 1).then_some(())
            });
            // The way there is known from here on: a single packet is not lost.
            outside.must(&format!("s = socket.create_connection(('{}', 80))", pod.ip6()));
            outside.must("h = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW)");
            outside.must(
                "h.sendto(struct.pack('!IHBB16s16s', 6 << 28, 20, 6, 64, socket.inet_pton(socket.AF_INET6, 'fd77::2'), \
                 socket.inet_pton(socket.AF_INET6, 'fd77::2')) + struct.pack('!HHIIBBHHH', 9, 8080, 1, 0, 0x50, 2, 512, \
                 0, 0), ('fd77::2', 0))",
            );
            until("the spoofed own address is counted", || {
                (node.counters().of_pod(pod.uid(), Reason::OwnSource) == 1).then_some(())
            });
        },
    );
}
