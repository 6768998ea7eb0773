//! No TCP gets out of a captured pod but through the agent, whatever root in it tries.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::net::SocketAddr;

use capture::{Node, Reason};
use lab::{Actor, Lab, OUTSIDE4, OUTSIDE6, TestPod, accept, captured, forbidding, until};
use model::PodSettings;

/// What a pod's process knows how to send by hand. `MARKER` is in the payload of everything that must not get out.
const FORGE: &str = r#"
MARKER = b"ESCAPE"
def tcp(flags=2, source=40000):
    return struct.pack("!HHIIBBHHH", source, 8080, 1, 0, 0x50, flags, 512, 0, 0) + MARKER
def ip4(protocol, payload, fragment=0, options=b"", source="10.77.1.2"):
    return struct.pack("!BBHHHBBH4s4s", 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), 7, fragment, 64,
        protocol, 0, socket.inet_aton(source), socket.inet_aton("10.78.0.2")) + options + payload
def ip6(following, payload):
    pton = lambda text: socket.inet_pton(socket.AF_INET6, text)
    return struct.pack("!IHBB16s16s", 6 << 28, len(payload), following, 64, pton("fd77::2"), pton("fd78::2")) + payload
def options6(following):
    return bytes([following, 0, 1, 4, 0, 0, 0, 0])
def checksummed(packet):
    length = (packet[0] & 15) * 4
    total = sum(struct.unpack("!%dH" % (length // 2), packet[:length]))
    total = (total & 0xffff) + (total >> 16)
    return packet[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xffff) + packet[12:]
def frame(kind, payload, tag=b""):
    gateway = bytes.fromhex(GATEWAY)
    p.send(gateway + bytes(6) + tag + struct.pack("!H", kind) + payload)
"#;

/// Everything that arrives outside.
const WATCH: &str = r#"
w = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
w.bind(("eth0", 0))
def seen():
    bad, fenced = [], False
    while not fenced:
        packet = w.recv(65536)
        fenced = b"FENCE" in packet
        kind = packet[12:14]
        is_tcp = (kind == b"\x08\x00" and packet[23] == 6 and packet[26:30] == bytes([10, 77, 1, 2]))
        is_tcp |= (kind == b"\x86\xdd" and packet[20] == 6 and packet[22:24] == b"\xfd\x77")
        if is_tcp or b"ESCAPE" in packet:
            bad.append(packet.hex())
    return bad
"#;

/// An interpreter in a network namespace inside the pod's.
const NESTED: &str = r#"
n = subprocess.Popen(["unshare", "-n", sys.executable, "-u", "-c", """
import sys, socket, struct, errno
print("ready")
for line in sys.stdin:
    try:
        exec(line)
        print("done")
    except OSError as error:
        print(errno.errorcode[error.errno])
"""], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
n.stdout.readline()
def nested(code):
    n.stdin.write(code + chr(10))
    n.stdin.flush()
    return n.stdout.readline().strip()
"#;

struct Prison {
    lab: Lab,
    node: Node,
    pod: TestPod,
    inmate: Actor,
    outside: Actor,
    handle: capture::PodHandle,
    listeners: capture::PodListeners,
}

impl Prison {
    async fn new(lab: Lab) -> Self {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let mut inmate = lab.in_pod(&pod);
        inmate.must("early4 = socket.socket(); early6 = socket.socket(socket.AF_INET6)");
        let (handle, listeners) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        outside.must(WATCH);
        outside.must("u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('10.78.0.2', 9))");
        let gateway = lab.run(None, "ip -o link show dev v-a");
        let gateway = gateway
            .split("link/ether ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .replace(':', "");
        inmate.must(&format!("GATEWAY = '{gateway}'"));
        inmate.must(FORGE);
        inmate.must("p = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)); p.bind(('eth0', 0))");
        let mut prison = Self {
            lab,
            node,
            pod,
            inmate,
            outside,
            handle,
            listeners,
        };
        prison.nothing_got_out("at first");
        prison
    }

    fn count(&self, reason: Reason) -> u64 {
        self.node.counters().of_pod(self.pod.uid(), reason)
    }

    /// The inmate does something that must be dropped for this reason.
    fn dropped(&mut self, what: &str, reason: Reason) {
        let before = self.count(reason);
        self.inmate.must(what);
        until(&format!("{what} is dropped: {reason:?}"), || {
            (self.count(reason) > before).then_some(())
        });
        self.nothing_got_out(what);
    }

    /// The inmate connects, and the agent gets it.
    fn is_captured(&mut self, what: &str) {
        self.inmate.must(what);
        let (stream, peer) = accept(&self.listeners.outbound[0]);
        let original = self
            .handle
            .original_destination(model::PeerAddr(peer), stream.local_addr().unwrap());
        let there: [SocketAddr; 2] = [
            format!("{OUTSIDE4}:8080").parse().unwrap(),
            format!("[{OUTSIDE6}]:8080").parse().unwrap(),
        ];
        assert!(there.contains(&original.expect(what).0), "{what}");
        self.nothing_got_out(what);
    }

    /// A datagram, which is allowed, overtakes nothing: what was sent before it would have been seen.
    fn nothing_got_out(&mut self, what: &str) {
        self.inmate.must(&format!(
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'FENCE', ('{OUTSIDE4}', 9))"
        ));
        assert_eq!(self.outside.must("seen()"), "[]", "{what}");
    }
}

#[test]
fn whatever_connects_is_captured() {
    lab::test("whatever_connects_is_captured", |lab| async move {
        let mut prison = Prison::new(lab).await;
        let mut dial = |options: &str, family: &str, there: &str| {
            prison.is_captured(&format!(
                "s = socket.socket(socket.{family}); {options}; s.connect(('{there}', 8080))"
            ));
        };
        for (family, there) in [("AF_INET", OUTSIDE4), ("AF_INET6", OUTSIDE6)] {
            for mark in [0x539, 0x111, 1337, 1] {
                dial(&format!("s.setsockopt(socket.SOL_SOCKET, 36, {mark})"), family, there);
            }
            dial(
                "s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b'eth0')",
                family,
                there,
            );
            dial(
                "s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('', 15001 + 10000))",
                family,
                there,
            );
        }
        for (socket, there) in [("early4", OUTSIDE4), ("early6", OUTSIDE6)] {
            prison.is_captured(&format!("{socket}.connect(('{there}', 8080))"));
        }
        prison.is_captured(
            "s = socket.socket(); s.setblocking(True); s.sendto(b'ESCAPE', 0x20000000, ('10.78.0.2', 8080))",
        );
        prison.is_captured(
            "if os.fork() == 0:\n  os.setgid(1337); os.setuid(1337)\n  s = socket.socket(); s.connect(('10.78.0.2', 8080))\n  \
             s.recv(1); os._exit(0)",
        );
        let cgroup = prison.lab.config().pods_cgroup.join("a/below");
        prison.inmate.must(&format!(
            "os.mkdir('{0}'); open('{0}/cgroup.procs', 'w').write('0')",
            cgroup.display()
        ));
        prison.is_captured("s = socket.create_connection(('10.78.0.2', 8080))");
        if prison
            .inmate
            .tell("s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)")
            .is_ok()
        {
            prison.is_captured("s.connect(('10.78.0.2', 8080))");
        }
    });
}

#[test]
fn tcp_made_by_hand_is_dropped() {
    lab::test("tcp_made_by_hand_is_dropped", |lab| async move {
        let mut prison = Prison::new(lab).await;
        for flags in [0x02, 0x10, 0x18, 0x12, 0x04, 0x14, 0x01] {
            let raw = format!(
                "socket.socket(socket.AF_INET, socket.SOCK_RAW, 6).sendto(tcp({flags}), ('{OUTSIDE4}', 0)); \
                 socket.socket(socket.AF_INET6, socket.SOCK_RAW, 6).sendto(tcp({flags}), ('{OUTSIDE6}', 0))"
            );
            prison.dropped(&raw, Reason::ForeignSocket);
        }
        for (what, reason) in [
            ("frame(0x0800, checksummed(ip4(6, tcp())))", Reason::ForeignSocket),
            (
                "frame(0x0800, checksummed(ip4(6, tcp()[:20].replace(b'ESCAPE', b''))))",
                Reason::ForeignSocket,
            ),
            (
                "frame(0x0800, checksummed(ip4(6, struct.pack('!HHIIBBHHH', 1, 2, 3, 0, 0x50, 4, 0, 0, 0))))",
                Reason::ForeignSocket,
            ),
            (
                "frame(0x0800, checksummed(ip4(6, tcp(), options=b'\\1' * 8)))",
                Reason::ForeignSocket,
            ),
            ("frame(0x86dd, ip6(6, tcp()))", Reason::ForeignSocket),
            (
                "frame(0x86dd, ip6(0, options6(60) + options6(6) + tcp()))",
                Reason::ForeignSocket,
            ),
            (
                "frame(0x0800, checksummed(ip4(6, tcp())), b'\\x81\\0\\0\\5')",
                Reason::Vlan,
            ),
            (
                "frame(0x0800, checksummed(ip4(6, tcp())), b'\\x88\\xa8\\0\\5\\x81\\0\\0\\5')",
                Reason::Vlan,
            ),
            (
                "frame(0x8847, b'\\0\\0\\1\\xff' + checksummed(ip4(6, tcp())))",
                Reason::UnknownEtherType,
            ),
            (
                "frame(0x8864, b'\\x11\\0\\0\\1\\0\\x40\\0\\x21' + ip4(6, tcp()))",
                Reason::UnknownEtherType,
            ),
            ("frame(100, ip4(6, tcp()))", Reason::UnknownEtherType),
            (
                "frame(0x0800, checksummed(ip4(6, tcp()[:16], fragment=0x2000)))",
                Reason::Fragment,
            ),
            (
                "frame(0x0800, checksummed(ip4(6, tcp(), fragment=2)))",
                Reason::Fragment,
            ),
            (
                "frame(0x86dd, ip6(44, b'\\6\\0\\0\\1\\0\\0\\0\\7' + tcp()))",
                Reason::Fragment,
            ),
            (
                "frame(0x86dd, ip6(44, b'\\x3c\\0\\0\\1\\0\\0\\0\\7' + options6(6)))",
                Reason::Fragment,
            ),
            (
                "frame(0x86dd, ip6(0, options6(60) * 7 + options6(6) + tcp()))",
                Reason::ExtensionHeaders,
            ),
            ("frame(0x86dd, ip6(135, options6(6) + tcp()))", Reason::ExtensionHeaders),
            (
                "frame(0x0800, checksummed(ip4(4, ip4(6, tcp()))))",
                Reason::Encapsulation,
            ),
            (
                "frame(0x0800, checksummed(ip4(41, ip6(6, tcp()))))",
                Reason::Encapsulation,
            ),
            (
                "frame(0x0800, checksummed(ip4(47, b'\\0\\0\\x08\\0' + ip4(6, tcp()))))",
                Reason::Encapsulation,
            ),
            ("frame(0x86dd, ip6(51, options6(6) + tcp()))", Reason::Encapsulation),
            ("frame(0x0800, checksummed(ip4(6, tcp()))[:24])", Reason::Malformed),
            ("frame(0x0800, b'\\x41' + ip4(6, tcp())[1:])", Reason::Malformed),
            ("frame(0x0800, ip6(6, tcp()))", Reason::Malformed),
        ] {
            prison.dropped(what, reason);
        }
    });
}

#[test]
fn a_nested_namespace_has_no_way_out() {
    lab::test("a_nested_namespace_has_no_way_out", |lab| async move {
        let mut prison = Prison::new(lab).await;
        prison.inmate.must(NESTED);
        for command in [
            "ip link add n0 type veth peer name n1",
            "ip link set n1 netns {n.pid}",
            "ip addr add 10.99.0.1/24 dev n0",
            "ip link set n0 up",
            "sysctl -qw net.ipv4.ip_forward=1",
            "nsenter -n -t {n.pid} ip addr add 10.99.0.2/24 dev n1",
            "nsenter -n -t {n.pid} ip link set n1 up",
            "nsenter -n -t {n.pid} ip route add default via 10.99.0.1",
        ] {
            prison
                .inmate
                .must(&format!("subprocess.run(f'{command}'.split(), check=True)"));
        }
        let nested = |prison: &mut Prison, code: &str| prison.inmate.must(&format!("nested({code:?})"));
        let answer = nested(&mut prison, "socket.create_connection(('10.78.0.2', 8080))");
        assert_eq!(answer, "EPERM");
        let before = prison.count(Reason::NoSocket);
        let raw = "socket.socket(socket.AF_INET, socket.SOCK_RAW, 6).sendto(struct.pack('!HHIIBBHHH', 1, 8080, 1, 0, 0x50, 2, 512, 0, 0) + b'ESCAPE', ('10.78.0.2', 0))";
        assert_eq!(nested(&mut prison, raw), "done");
        until("the forwarded packet is dropped", || {
            (prison.count(Reason::NoSocket) > before).then_some(())
        });
        prison.nothing_got_out("nested");
    });
}

#[test]
fn a_process_of_another_cgroup_in_the_pod_has_no_way_out() {
    lab::test(
        "a_process_of_another_cgroup_in_the_pod_has_no_way_out",
        |lab| async move {
            let mut prison = Prison::new(lab).await;
            for cgroup in ["elsewhere", "kubelet"] {
                let before = prison.count(Reason::ForeignSocket);
                let mut stranger = prison.lab.actor(Some("a"), cgroup);
                stranger.must("s = socket.socket(); s.setblocking(False)");
                assert!(
                    stranger
                        .tell("s.connect(('10.78.0.2', 8080))")
                        .unwrap_err()
                        .starts_with("EINPROGRESS")
                );
                until("its SYN is dropped", || {
                    (prison.count(Reason::ForeignSocket) > before).then_some(())
                });
            }
            prison.nothing_got_out("another cgroup");
        },
    );
}

#[test]
fn a_pod_that_bends_the_agents_packets_gets_nothing_out() {
    lab::test(
        "a_pod_that_bends_the_agents_packets_gets_nothing_out",
        |lab| async move {
            let mut prison = Prison::new(lab).await;
            prison.outside.must("l = socket.create_server(('10.78.0.2', 8081))");
            if prison.inmate.tell("subprocess.run('iptables -t nat -A OUTPUT -p tcp --dport 8080 -j DNAT --to 10.78.0.2:8081'.split(), check=True)").is_err() {
            eprintln!("not run: redirected packets: no iptables here");
            return;
        }
            let target: SocketAddr = format!("{OUTSIDE4}:8080").parse().unwrap();
            let socket = prison.handle.outbound_socket(target).unwrap();
            assert!(socket.connect(&target.into()).is_err(), "nonblocking");
            until("the redirected SYN is dropped", || {
                (prison.count(Reason::Altered) > 0).then_some(())
            });
            prison.nothing_got_out("redirected");
            // The agent's connection to the application can't be made to leave: it is bound to the loopback device.
            for command in [
                "iptables -t nat -F",
                "ip addr add 10.77.1.77/32 dev eth0",
                "ip addr del 10.77.1.2/32 dev eth0",
                "ip rule del pref 32764",
            ] {
                prison
                    .inmate
                    .must(&format!("subprocess.run('{command}'.split(), check=True)"));
            }
            let target = SocketAddr::new(prison.pod.ip4(), 80);
            let socket = prison.handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
            let _ = socket.connect(&target.into());
            prison.nothing_got_out("the way in, turned round");
        },
    );
}

/// Where it may send nothing but TCP, and the agent may ask name servers.
#[test]
fn a_pod_that_bends_the_agents_questions_gets_nothing_out_and_nobody_in() {
    let name = "a_pod_that_bends_the_agents_questions_gets_nothing_out_and_nobody_in";
    lab::test(name, |lab| async move {
        let mut prison = Prison::new(lab).await;
        let (node, spec) = (&prison.node, prison.pod.spec.clone());
        node.capture(spec, forbidding()).await.unwrap();
        let bend = "iptables -t nat -A OUTPUT -p udp --dport 53 -j DNAT --to 10.78.0.2:9";
        let bent = prison
            .inmate
            .tell(&format!("subprocess.run('{bend}'.split(), check=True)"));
        if bent.is_err() {
            eprintln!("not run: redirected questions: no iptables here");
            return;
        }
        let target = SocketAddr::new(OUTSIDE4.parse().unwrap(), 53);
        let asking: std::net::UdpSocket = prison.handle.datagram_socket(target).unwrap().into();
        asking.connect(target).unwrap();
        asking.send(b"ESCAPE").unwrap();
        until("the redirected question is dropped", || {
            (prison.count(Reason::Altered) > 0).then_some(())
        });
        prison.outside.must("u.setblocking(False)");
        while let Ok(got) = prison.outside.tell("u.recvfrom(99)") {
            assert!(!got.contains("ESCAPE"), "{got}");
        }
        let before = prison.count(Reason::NonTcpForbidden);
        let port = asking.local_addr().unwrap().port();
        let answer = format!("u.sendto(b'hello', ('{}', {port}))", prison.pod.ip4());
        prison.outside.must(&answer);
        until("who was not asked is not let in", || {
            (prison.count(Reason::NonTcpForbidden) > before).then_some(())
        });
    });
}

#[test]
fn stolen_ports_do_not_matter() {
    lab::test("stolen_ports_do_not_matter", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let mut thief = lab.in_pod(&pod);
        for port in [15001, 15006, 15008, 15121, 15135] {
            thief.must(&format!(
                "t{port} = socket.create_server(('::', {port}), family=socket.AF_INET6, dualstack_ipv6=True, \
                 reuse_port=True); t{port}.settimeout(0)"
            ));
        }
        let (_, listeners) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        for (own, there) in [(pod.ip4(), OUTSIDE4), (pod.ip6(), OUTSIDE6)] {
            for port in 8080..8100 {
                thief.must(&format!("s = socket.create_connection(('{there}', {port}))"));
                accept(&listeners.outbound[0]);
            }
            outside.must(&format!("s = socket.create_connection(('{own}', 15008))"));
            accept(&listeners.hbone[0]);
            for port in [80, 15001, 15006, 15121] {
                outside.must(&format!("s = socket.create_connection(('{own}', {port}))"));
                accept(&listeners.inbound[0]);
            }
        }
        for port in [15001, 15006, 15008, 15121, 15135] {
            assert!(
                thief
                    .tell(&format!("t{port}.accept()"))
                    .unwrap_err()
                    .starts_with("EAGAIN")
            );
        }
        // And the other way round: nobody shares what the agent has.
        let honest = lab.pod("b", 3);
        captured(&node, &honest).await;
        let mut late = lab.in_pod(&honest);
        for port in [15001, 15006, 15008] {
            let steal = format!("socket.create_server(('0.0.0.0', {port}), reuse_port=True)");
            assert!(late.tell(&steal).unwrap_err().starts_with("EADDRINUSE"));
        }
    });
}

#[test]
fn what_is_not_tcp_passes_until_it_is_forbidden() {
    lab::test("what_is_not_tcp_passes_until_it_is_forbidden", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let mut app = lab.in_pod(&pod);
        let (handle, _) = captured(&node, &pod).await;
        let mut outside = lab.outside();
        outside.must("u = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); u.bind(('::', 9))");
        app.must("u4 = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u6 = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)");
        let ping = |app: &mut Actor, there: &str| {
            app.must(&format!(
                "subprocess.call(['ping', '-qc1', '-W1', '{there}'], stdout=-3)"
            ))
        };
        let has_ping = app.must("__import__('shutil').which('ping') is not None") == "True";
        for (socket, there) in [("u4", OUTSIDE4), ("u6", OUTSIDE6)] {
            app.must(&format!("{socket}.sendto(b'hello', ('{there}', 9))"));
            assert!(outside.must("u.recvfrom(99)").contains("hello"));
            assert!(!has_ping || ping(&mut app, there) == "0");
        }
        node.capture(pod.spec.clone(), forbidding()).await.unwrap();
        for (socket, there) in [("u4", OUTSIDE4), ("u6", OUTSIDE6)] {
            let before = node.counters().of_pod(pod.uid(), Reason::NonTcpForbidden);
            app.must(&format!("{socket}.sendto(b'hello', ('{there}', 9))"));
            until("it is dropped", || {
                (node.counters().of_pod(pod.uid(), Reason::NonTcpForbidden) > before).then_some(())
            });
            assert!(!has_ping || ping(&mut app, there) != "0");
        }
        // What the agent asks name servers is answered, as are no others.
        outside.must("u.settimeout(5)");
        for there in [OUTSIDE4, OUTSIDE6] {
            let target = std::net::SocketAddr::new(there.parse().unwrap(), 9);
            let asking: std::net::UdpSocket = handle.datagram_socket(target).unwrap().into();
            asking.set_nonblocking(false).unwrap();
            asking.set_read_timeout(Some(lab::PATIENCE)).unwrap();
            asking.connect(target).unwrap();
            asking.send(b"where").unwrap();
            outside.must("question, who = u.recvfrom(99); u.sendto(b'there', who)");
            let mut answer = [0; 9];
            assert_eq!(asking.recv(&mut answer).unwrap(), 5, "{there}");
            assert_eq!(&answer[..5], b"there");
        }
        let before = node.counters().of_pod(pod.uid(), Reason::NonTcpForbidden);
        outside.must(&format!("u.sendto(b'hello', ('::ffff:{}', 53))", pod.ip4()));
        until("what nobody asked for is dropped", || {
            (node.counters().of_pod(pod.uid(), Reason::NonTcpForbidden) > before).then_some(())
        });
        // Addresses are still found.
        lab.run(None, "ip neigh flush dev v-a");
        let mut kubelet = lab.kubelet();
        app.must("l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)");
        for own in [pod.ip4(), pod.ip6()] {
            kubelet.must(&format!("socket.create_connection(('{own}', 8080))"));
        }
        node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        app.must("u4.sendto(b'again', ('10.78.0.2', 9))");
        assert!(outside.must("u.recvfrom(99)").contains("again"));
    });
}
