//! What a pod's settings exclude goes past the agent, and nothing else does, whatever root in the pod tries.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::io::Write;

use capture::{CapturedPod, Node, PodHandle, PodListeners, Reason};
use lab::{Actor, Lab, OUTSIDE4, OUTSIDE6, TestPod, accept, captured, connect, nobody_came, until};
use model::{Exclusions, PeerAddr, PodSettings};
use socket2::SockRef;

/// Servers outside on the ports 5432 and 8080, of both families, that answer with who comes.
const SERVE: &str = r#"
def serve(port):
    l = socket.create_server(('::', port), family=socket.AF_INET6, dualstack_ipv6=True)
    l.settimeout(None)
    def one(c):
        c.settimeout(None)
        c.sendall((c.getpeername()[0].replace('::ffff:', '') + chr(10)).encode())
        while c.recv(65536): pass
        c.close()
    def loop():
        while True: threading.Thread(target=one, args=(l.accept()[0],), daemon=True).start()
    threading.Thread(target=loop, daemon=True).start()
for port in (5432, 8080): serve(port)
"#;

fn excluding() -> PodSettings {
    PodSettings {
        exclusions: Exclusions {
            outbound_ranges: vec!["fd78::/64".parse().unwrap()],
            outbound_ports: vec![5432],
            inbound_ports: vec![9090],
            ..Exclusions::default()
        },
        ..PodSettings::default()
    }
}

struct Place {
    lab: Lab,
    node: Node,
    pod: TestPod,
    app: Actor,
    outside: Actor,
    handle: PodHandle,
    listeners: PodListeners,
}

impl Place {
    async fn new(lab: Lab, settings: PodSettings) -> Self {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let app = lab.in_pod(&pod);
        let mut outside = lab.outside();
        outside.must(SERVE);
        let handle = node.capture(pod.spec.clone(), settings).await.unwrap();
        let listeners = handle.listeners().unwrap();
        Self {
            lab,
            node,
            pod,
            app,
            outside,
            handle,
            listeners,
        }
    }

    fn count(&self, reason: Reason) -> u64 {
        self.node.counters().of_pod(self.pod.uid(), reason)
    }

    /// The application connects by `s`, and reaches the server itself, which sees the pod.
    fn goes_past(&mut self, what: &str) {
        let before = self.count(Reason::ExcludedOutbound);
        self.app.must(what);
        let seen = self.app.must("s.recv(99).decode().strip()");
        assert!(
            [self.pod.ip4().to_string(), self.pod.ip6().to_string()].contains(&seen),
            "{what}: {seen}"
        );
        assert!(nobody_came(&self.listeners.outbound[0]), "{what}");
        assert_eq!(self.count(Reason::ExcludedOutbound), before + 1, "{what}");
    }

    /// The application connects, and the agent gets it.
    fn is_captured(&mut self, what: &str, destination: &str) {
        self.app.must(what);
        let (stream, peer) = accept(&self.listeners.outbound[0]);
        let original = self
            .handle
            .original_destination(PeerAddr(peer), stream.local_addr().unwrap());
        assert_eq!(original.unwrap().0, destination.parse().unwrap(), "{what}");
    }

    /// It must be dropped.
    fn is_dropped(&mut self, what: &str) {
        self.is_dropped_as(what, Reason::ForeignSocket);
    }

    fn is_dropped_as(&mut self, what: &str, reason: Reason) {
        let before = self.count(reason);
        self.app.begin(what);
        until(&format!("{what} is dropped"), || {
            (self.count(reason) > before).then_some(())
        });
        let _ = self.app.finish();
    }
}

#[test]
fn what_is_excluded_goes_past_the_agent_and_is_counted() {
    lab::test(
        "what_is_excluded_goes_past_the_agent_and_is_counted",
        |lab| async move {
            let mut place = Place::new(lab, excluding()).await;
            for what in [
                format!("s = socket.create_connection(('{OUTSIDE4}', 5432))"),
                format!("s = socket.socket(socket.AF_INET6); s.connect(('::ffff:{OUTSIDE4}', 5432))"),
                format!("s = socket.create_connection(('{OUTSIDE6}', 5432))"),
                format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"),
                format!(
                    "s = socket.socket(); s.setblocking(True); s.sendto(b'fast', 0x20000000, ('{OUTSIDE4}', 5432))"
                ),
            ] {
                place.goes_past(&what);
            }
            assert_eq!(place.app.must("s.getpeername()"), format!("('{OUTSIDE4}', 5432)"));
            place.is_captured(
                &format!("t = socket.create_connection(('{OUTSIDE4}', 8080))"),
                &format!("{OUTSIDE4}:8080"),
            );
            place
                .app
                .must("s.sendall(b'x' * 100000); s.shutdown(1); s.recv(1); s.close()");
            until("its bytes are counted", || {
                (place.count(Reason::ExcludedSent) >= 100_000).then_some(())
            });
            assert!(place.count(Reason::ExcludedReceived) >= 10);
            assert_eq!(place.count(Reason::ForeignSocket), 0);
            if place
                .app
                .tell("s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)")
                .is_ok()
            {
                place.goes_past(&format!("s.connect(('{OUTSIDE4}', 5432))"));
            }
        },
    );
}

#[test]
fn only_what_is_included_is_captured() {
    lab::test("only_what_is_included_is_captured", |lab| async move {
        let mut settings = PodSettings::default();
        settings.exclusions.only_outbound_ranges = Some(vec!["10.78.0.0/24".parse().unwrap()]);
        let mut place = Place::new(lab, settings).await;
        place.is_captured(
            &format!("t = socket.create_connection(('{OUTSIDE4}', 8080))"),
            &format!("{OUTSIDE4}:8080"),
        );
        place.goes_past(&format!("s = socket.create_connection(('{OUTSIDE6}', 8080))"));
    });
}

#[test]
fn an_exclusion_is_no_way_to_anything_else() {
    lab::test("an_exclusion_is_no_way_to_anything_else", |lab| async move {
        let mut place = Place::new(lab, excluding()).await;
        // A socket that was let out once goes elsewhere through the agent.
        place.goes_past(&format!("s = socket.create_connection(('{OUTSIDE4}', 5432))"));
        place
            .app
            .must("libc = __import__('ctypes').CDLL(None); libc.connect(s.fileno(), bytes(16), 16)");
        place.is_captured(&format!("s.connect(('{OUTSIDE4}', 8080))"), &format!("{OUTSIDE4}:8080"));
        // The ports themselves are no pass: as source of a connection, by hand, without a connection, spoofed.
        for port in [9090, 5432] {
            place.is_captured(
                &format!(
                    "b{port} = socket.socket(); b{port}.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); \
                     b{port}.bind(('', {port})); b{port}.connect(('{OUTSIDE4}', 8080))"
                ),
                &format!("{OUTSIDE4}:8080"),
            );
        }
        place.app.must(
            "def raw(source, to, port, flags):\n  s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 6)\n  \
             s.sendto(struct.pack('!HHIIBBHHH', source, port, 1, 1, 0x50, flags, 512, 0, 0) + b'ESCAPE', (to, 0))",
        );
        for flags in [0x02, 0x12, 0x10, 0x18, 0x04, 0x11] {
            for (source, port) in [(9090, 8080), (5432, 8080), (40000, 5432), (9090, 5432)] {
                place.is_dropped(&format!("raw({source}, '{OUTSIDE4}', {port}, {flags})"));
            }
        }
        place.is_dropped(&format!(
            "f = socket.socket(); f.setsockopt(socket.IPPROTO_IP, 19, 1); f.bind(('10.77.1.9', 0)); f.settimeout(0.2); \
             f.connect(('{OUTSIDE4}', 5432))"
        ));
        // NAT inside the pod, where there is any.
        let nat = "iptables -t nat -A OUTPUT -p tcp --dport 5432 -j DNAT --to-destination 10.78.0.2:8080";
        if std::process::Command::new("iptables").arg("--version").output().is_ok() {
            place.lab.run(Some("a"), nat);
            place.is_dropped(&format!(
                "f = socket.socket(); f.settimeout(0.2); f.connect(('{OUTSIDE4}', 5432))"
            ));
        }
    });
}

#[test]
fn a_socket_from_outside_the_pods_is_not_let_out_by_an_exclusion() {
    lab::test(
        "a_socket_from_outside_the_pods_is_not_let_out_by_an_exclusion",
        |lab| async move {
            let mut place = Place::new(lab, excluding()).await;
            let mut stranger = place.lab.actor(Some("a"), "elsewhere");
            let before = place.count(Reason::ForeignSocket);
            stranger.begin(&format!(
                "s = socket.socket(); s.settimeout(0.3); s.connect(('{OUTSIDE4}', 5432))"
            ));
            until("it is dropped", || {
                (place.count(Reason::ForeignSocket) > before).then_some(())
            });
            assert!(stranger.finish().is_err());
            assert_eq!(place.app.must("1"), "1");
        },
    );
}

const LISTEN: &str = "l = socket.create_server(('::', 9090), family=socket.AF_INET6, dualstack_ipv6=True)";

#[test]
fn an_excluded_port_is_reached_directly_and_no_other() {
    lab::test("an_excluded_port_is_reached_directly_and_no_other", |lab| async move {
        let mut place = Place::new(lab, excluding()).await;
        place.app.must(LISTEN);
        for (own, own_outside) in [(place.pod.ip4(), OUTSIDE4), (place.pod.ip6(), OUTSIDE6)] {
            place.outside.must(&format!(
                "s = socket.create_connection(('{own}', 9090)); s.sendall(b'hello')"
            ));
            place.app.must("c, a = l.accept()");
            assert_eq!(place.app.must("c.recv(9).decode()"), "hello");
            assert_eq!(place.app.must("a[0].replace('::ffff:', '')"), own_outside);
            place.app.must("c.sendall(b'x' * 100000); c.close()");
            assert_eq!(place.outside.must("sum(iter(lambda: len(s.recv(65536)), 0))"), "100000");
            assert!(nobody_came(&place.listeners.inbound[0]));
            place
                .outside
                .must(&format!("t = socket.create_connection(('{own}', 9091))"));
            accept(&place.listeners.inbound[0]);
            place
                .outside
                .must(&format!("t = socket.create_connection(('{own}', 15008))"));
            accept(&place.listeners.hbone[0]);
        }
        assert_eq!(place.count(Reason::ExcludedInbound), 2);
        until("its bytes are counted", || {
            (place.count(Reason::ExcludedSent) >= 200_000).then_some(())
        });
        assert_eq!(place.count(Reason::ForeignSocket), 0);
        // Nobody listens: refused by the pod itself.
        place.app.must("l.close()");
        let refused = place
            .outside
            .tell(&format!("socket.create_connection(('{}', 9090))", place.pod.ip4()));
        assert!(refused.unwrap_err().starts_with("ECONNREFUSED"));
    });
}

#[test]
fn with_inbound_bypassed_all_ports_are_reached_directly_but_hbone() {
    lab::test(
        "with_inbound_bypassed_all_ports_are_reached_directly_but_hbone",
        |lab| async move {
            let settings = PodSettings {
                bypass_inbound: true,
                ..PodSettings::default()
            };
            let mut place = Place::new(lab, settings).await;
            place.app.must(LISTEN);
            place
                .outside
                .must(&format!("s = socket.create_connection(('{}', 9090))", place.pod.ip4()));
            place.app.must("c, a = l.accept(); c.sendall(b'hello')");
            assert_eq!(place.outside.must("s.recv(9).decode()"), "hello");
            place
                .outside
                .must(&format!("t = socket.create_connection(('{}', 15008))", place.pod.ip4()));
            accept(&place.listeners.hbone[0]);
            place.is_captured(
                &format!("t = socket.create_connection(('{OUTSIDE4}', 8080))"),
                &format!("{OUTSIDE4}:8080"),
            );
        },
    );
}

#[test]
fn exclusions_come_and_go_while_the_pod_runs() {
    lab::test("exclusions_come_and_go_while_the_pod_runs", |lab| async move {
        let mut place = Place::new(lab, PodSettings::default()).await;
        place.app.must(LISTEN);
        let dial = format!("s = socket.create_connection(('{OUTSIDE4}', 5432))");
        place.is_captured(&dial, &format!("{OUTSIDE4}:5432"));
        place.node.capture(place.pod.spec.clone(), excluding()).await.unwrap();
        place.goes_past(&dial);
        let from_outside = format!(
            "i = socket.create_connection(('{}', 9090), source_address=('', 40123))",
            place.pod.ip4()
        );
        place.outside.must(&from_outside);
        place.app.must("c, a = l.accept()");
        // Another one more: what is still excluded goes on.
        let mut more = excluding();
        more.exclusions.outbound_ports.push(6000);
        place.node.capture(place.pod.spec.clone(), more).await.unwrap();
        place.app.must("s.sendall(b'x'); c.sendall(b'y')");
        assert_eq!(place.outside.must("i.recv(1).decode()"), "y");
        // A restart of the agent changes nothing.
        let again = place.lab.node();
        again.capture(place.pod.spec.clone(), excluding()).await.unwrap();
        place.app.must("s.sendall(b'x'); c.sendall(b'y')");
        assert_eq!(place.outside.must("i.recv(1).decode()"), "y");
        // None any more: they end, and the next ones are captured.
        let handle = again
            .capture(place.pod.spec.clone(), PodSettings::default())
            .await
            .unwrap();
        let (listeners, node) = (handle.listeners().unwrap(), again);
        assert!(place.app.tell("s.recv(1)").unwrap_err().starts_with("ECONNABORTED"));
        assert!(place.outside.tell("i.recv(1)").unwrap_err().starts_with("ECONNRESET"));
        (place.handle, place.listeners, place.node) = (handle, listeners, node);
        place.is_captured(&dial, &format!("{OUTSIDE4}:5432"));
        // From the same port as when it was excluded.
        place.outside.must("i.close()");
        place.outside.must(&from_outside);
        accept(&place.listeners.inbound[0]);
    });
}

#[test]
fn what_the_agent_carries_is_no_former_exclusion() {
    lab::test("what_the_agent_carries_is_no_former_exclusion", |lab| async move {
        let mut place = Place::new(lab, PodSettings::default()).await;
        place.app.must(LISTEN);
        let own = place.pod.ip4();
        place
            .outside
            .must(&format!("i = socket.create_connection(('{own}', 9090))"));
        let (_client, peer) = accept(&place.listeners.inbound[0]);
        let target = std::net::SocketAddr::new(own, 9090);
        let socket = place
            .handle
            .inbound_socket(target, std::net::SocketAddr::new(peer.ip(), 0))
            .unwrap();
        let mut upstream = connect(socket, target).unwrap();
        place.app.must("c, a = l.accept()");
        for settings in [excluding(), PodSettings::default()] {
            place.node.capture(place.pod.spec.clone(), settings).await.unwrap();
            upstream.write_all(b"x").unwrap();
            assert_eq!(place.app.must("c.recv(1)"), "b'x'");
        }
    });
}

#[test]
fn what_is_older_than_the_enrolment_is_no_former_exclusion() {
    lab::test(
        "what_is_older_than_the_enrolment_is_no_former_exclusion",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            node.know(pod.spec.clone()).await.unwrap();
            outside.must(SERVE);
            app.must(LISTEN);
            app.must(&format!(
                "s = socket.create_connection(('{OUTSIDE4}', 8080)); s.recv(99)"
            ));
            outside.must(&format!("i = socket.create_connection(('{}', 9090))", pod.ip6()));
            app.must("c, a = l.accept()");
            let mut kubelet = lab.kubelet();
            kubelet.must(&format!("k = socket.create_connection(('{}', 9090))", pod.ip4()));
            app.must("d, a = l.accept()");
            node.capture(pod.spec.clone(), excluding()).await.unwrap();
            app.must("s.sendall(b'x'); c.sendall(b'y'); d.sendall(b'z')");
            assert_eq!(outside.must("i.recv(1)"), "b'y'");
            assert_eq!(kubelet.must("k.recv(1)"), "b'z'");
        },
    );
}

#[test]
fn the_end_of_an_exclusion_is_that_of_its_direction() {
    lab::test("the_end_of_an_exclusion_is_that_of_its_direction", |lab| async move {
        let both = PodSettings {
            bypass_inbound: true,
            exclusions: Exclusions {
                outbound_ranges: vec!["10.78.0.0/24".parse().unwrap()],
                ..Exclusions::default()
            },
            ..PodSettings::default()
        };
        let mut place = Place::new(lab, both.clone()).await;
        place.app.must(LISTEN);
        let own = place.pod.ip4();
        place.goes_past(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        place
            .outside
            .must(&format!("i = socket.create_connection(('{own}', 9090))"));
        place.app.must("c, a = l.accept()");
        // All ports of the pod are still excluded; that is nothing to what it dials.
        let inbound = PodSettings {
            bypass_inbound: true,
            ..PodSettings::default()
        };
        place.node.capture(place.pod.spec.clone(), inbound).await.unwrap();
        assert!(place.app.tell("s.recv(1)").unwrap_err().starts_with("ECONNABORTED"));
        place.app.must("c.sendall(b'y')");
        assert_eq!(place.outside.must("i.recv(1)"), "b'y'");
        // And the other way round.
        let outbound = PodSettings {
            bypass_inbound: false,
            ..both
        };
        place.node.capture(place.pod.spec.clone(), outbound).await.unwrap();
        assert!(place.outside.tell("i.recv(1)").unwrap_err().starts_with("ECONNRESET"));
    });
}

#[test]
fn the_exclusions_of_a_pod_are_its_own_and_end_with_it() {
    lab::test(
        "the_exclusions_of_a_pod_are_its_own_and_end_with_it",
        |lab| async move {
            let mut place = Place::new(lab, excluding()).await;
            let other = place.lab.pod("b", 3);
            let mut neighbour = place.lab.in_pod(&other);
            let (_, listeners) = captured(&place.node, &other).await;
            neighbour.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 5432))"));
            accept(&listeners.outbound[0]);
            place.node.release(place.pod.uid()).await.unwrap();
            (place.handle, place.listeners) = captured(&place.node, &place.pod).await;
            place.is_captured(
                &format!("s = socket.create_connection(('{OUTSIDE4}', 5432))"),
                &format!("{OUTSIDE4}:5432"),
            );
        },
    );
}

#[test]
fn what_comes_by_a_virtual_interface_is_the_pods_own() {
    lab::test("what_comes_by_a_virtual_interface_is_the_pods_own", |lab| async move {
        let settings = PodSettings {
            virtual_interfaces: vec!["virt0".to_owned()],
            ..PodSettings::default()
        };
        let mut place = Place::new(lab, settings.clone()).await;
        let mut guest = place.lab.guest("a", "virt0");
        let pod = CapturedPod::Ebpf(place.handle.clone());
        guest.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (stream, peer) = accept(&place.listeners.outbound[0]);
        let local = stream.local_addr().unwrap();
        let original = pod.original_destination(SockRef::from(&stream), PeerAddr(peer), local);
        assert_eq!(original.unwrap().0, format!("{OUTSIDE4}:8080").parse().unwrap());
        assert_eq!(place.node.reconcile().await.unwrap(), Vec::<String>::new());
        // From outside that port is nothing.
        place
            .outside
            .must(&format!("s = socket.create_connection(('{}', 15001))", place.pod.ip4()));
        let (stream, peer) = accept(&place.listeners.outbound[0]);
        let local = stream.local_addr().unwrap();
        assert_eq!(
            pod.original_destination(SockRef::from(&stream), PeerAddr(peer), local),
            None
        );
        // The next agent knows of the rules; without the setting they go.
        let again = place.lab.node();
        again
            .capture(place.pod.spec.clone(), PodSettings::default())
            .await
            .unwrap();
        let saved = place.lab.run(Some("a"), "iptables-save -t nat");
        assert!(!saved.contains("virt0"), "{saved}");
        let settled = again.capture(place.pod.spec.clone(), settings).await.unwrap();
        assert!(place.lab.run(Some("a"), "iptables-save -t nat").contains("virt0"));
        drop(settled);
        again.release(place.pod.uid()).await.unwrap();
        assert!(!place.lab.run(Some("a"), "iptables-save -t nat").contains("virt0"));
    });
}
