//! From one way of capture to the other on a live node: nothing gets past, and what lives goes on.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use capture::{CaptureError, IptablesNode, Node};
use lab::{Actor, OUTSIDE4, OUTSIDE6, accept, captured, until};
use model::{PeerAddr, PodSettings, canonical_socket};
use socket2::SockRef;

/// Outside: a server that counts who comes, and echoes.
const SERVE: &str = r#"
came = []
l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)
l.settimeout(None)
def echo(c):
    c.settimeout(None)
    while True:
        data = c.recv(65536)
        if not data: return
        c.sendall(data)
def loop():
    while True:
        c, a = l.accept()
        came.append(a)
        threading.Thread(target=echo, args=(c,), daemon=True).start()
threading.Thread(target=loop, daemon=True).start()
"#;

/// In a pod: connects without end, and says what it got.
const HAMMER: &str = r#"
tries, stop = 0, False
def hammer():
    global tries
    while not stop:
        try:
            s = socket.socket(); s.settimeout(0.2); s.connect(('10.78.0.2', 8080)); s.close()
        except OSError: pass
        tries += 1
h = threading.Thread(target=hammer, daemon=True)
"#;

const LISTEN: &str = "l = socket.create_server(('::', 9090), family=socket.AF_INET6, dualstack_ipv6=True)";

fn echoes(app: &mut Actor, socket: &str) {
    assert_eq!(
        app.must(&format!("[{socket}.sendall(b'ping'), {socket}.recv(4).decode()][1]")),
        "ping"
    );
}

/// As an upgrade by a surge does it: another cgroup, and the listeners handed over.
#[test]
fn from_iptables_to_ebpf_with_its_listeners() {
    lab::test("from_iptables_to_ebpf_with_its_listeners", |lab| async move {
        let pod = lab.pod("a", 2);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(LISTEN);
        let former = IptablesNode::start(&lab.pin_dir()).unwrap();
        let handle = former.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        let before = handle.listeners().unwrap();
        outside.must(&format!("i = socket.create_connection(('{}', 9090))", pod.ip4()));
        let (mut carried, _) = accept(&before.inbound[0]);
        let mut config = lab.config();
        config.agent_cgroup = Some(config.pods_cgroup.with_file_name("elsewhere"));
        config.takes_over = true;
        let node = Node::start(config).unwrap_or_else(|error| panic!("{error}"));
        let held = handle.sockets().unwrap().into_iter();
        node.offer(
            pod.uid().clone(),
            held.map(|(kind, socket)| (kind.to_owned(), socket)).collect(),
        );
        let (_handle, listeners) = captured(&node, &pod).await;
        for (port, listeners) in [(9090, &listeners.inbound), (15008, &listeners.hbone)] {
            outside.must(&format!("s = socket.create_connection(('{}', {port}), 5)", pod.ip4()));
            let (mut stream, _) = accept(&listeners[0]);
            stream.write_all(b"pong").unwrap();
            assert_eq!(outside.must("s.recv(4).decode()"), "pong");
        }
        carried.write_all(b"pong").unwrap();
        assert_eq!(outside.must("i.recv(4).decode()"), "pong");
        drop(former);
    });
}

#[test]
fn from_iptables_to_ebpf() {
    lab::test("from_iptables_to_ebpf", |lab| async move {
        let pod = lab.pod("a", 2);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        outside.must(SERVE);
        app.must(LISTEN);
        app.must(&format!("older = socket.create_connection(('{OUTSIDE4}', 8080))"));
        echoes(&mut app, "older");
        // The agent that was: one connection each way, which it still serves after the other came.
        let former = IptablesNode::start(&lab.pin_dir()).unwrap();
        let handle = former.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        let listeners = handle.listeners().unwrap();
        app.must(&format!("carried = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (mut outbound, _) = accept(&listeners.outbound[0]);
        outside.must(&format!("i = socket.create_connection(('{}', 9090))", pod.ip4()));
        let (mut inbound, _) = accept(&listeners.inbound[0]);
        drop((former, handle, listeners));
        app.must(HAMMER);
        app.must("h.start()");
        until("it hammers", || (app.must("tries") != "0").then_some(()));

        let node = lab.node();
        let (handle, listeners) = captured(&node, &pod).await;
        let tried: u64 = app.must("tries").parse().unwrap();
        until("it hammers on", || {
            (app.must("tries").parse::<u64>().unwrap() > tried + 20).then_some(())
        });
        app.must("stop = True; h.join()");
        assert_eq!(outside.must("len(came)"), "1", "only the one from before the capture");
        while listeners.outbound[0].accept().is_ok() {}

        echoes(&mut app, "older");
        let mut buffer = [0; 4];
        app.must("carried.sendall(b'ping')");
        outbound.read_exact(&mut buffer).unwrap();
        outbound.write_all(b"pong").unwrap();
        assert_eq!(app.must("carried.recv(4).decode()"), "pong");
        outside.must("i.sendall(b'ping')");
        inbound.read_exact(&mut buffer).unwrap();
        inbound.write_all(b"pong").unwrap();
        assert_eq!(outside.must("i.recv(4).decode()"), "pong");

        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (stream, peer) = accept(&listeners.outbound[0]);
        let original = handle.original_destination(PeerAddr(peer), stream.local_addr().unwrap());
        assert_eq!(original.unwrap().0, format!("{OUTSIDE4}:8080").parse().unwrap());
        outside.must(&format!("j = socket.create_connection(('{}', 9090))", pod.ip4()));
        let (stream, _) = accept(&listeners.inbound[0]);
        let local = canonical_socket(stream.local_addr().unwrap());
        assert_eq!(local, SocketAddr::new(pod.ip4(), 9090));
        // What the old connections need goes with them.
        assert!(lab.rules(Some("a")).contains("CONNMARK"));
        assert!(!lab.rules(Some("a")).contains("REDIRECT"));
        drop((outbound, inbound));
        app.must("carried.close()");
        outside.must("i.close()");
        let deadline = std::time::Instant::now() + lab::PATIENCE;
        while !lab.rules(Some("a")).is_empty() {
            assert!(std::time::Instant::now() < deadline, "{}", lab.rules(Some("a")));
            node.reconcile().await.unwrap();
        }
        assert!(!lab.rules(None).is_empty());
        node.forget_untold().await.unwrap();
        assert_eq!(lab.rules(None), "");
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        echoes(&mut app, "older");
    });
}

#[test]
fn from_ebpf_to_iptables() {
    lab::test("from_ebpf_to_iptables", |lab| async move {
        let pod = lab.pod("a", 2);
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        outside.must(SERVE);
        app.must(LISTEN);
        app.must(&format!("older = socket.create_connection(('{OUTSIDE4}', 8080))"));
        echoes(&mut app, "older");
        let former = lab.node();
        let (handle, _) = captured(&former, &pod).await;
        // What the former agent carries into the pod, both ways silent until after the change.
        let mut carried = Vec::new();
        for (client, own, name) in [(OUTSIDE4, pod.ip4(), "c4"), (OUTSIDE6, pod.ip6(), "c6")] {
            let target = SocketAddr::new(own, 9090);
            let socket = handle.inbound_socket(target, lab::any_port(client)).unwrap();
            carried.push((lab::connect(socket, target).unwrap(), name));
            app.must(&format!("{name}, _ = l.accept()"));
        }
        drop((former, handle));
        app.must(HAMMER);
        app.must("h.start()");
        until("it hammers", || (app.must("tries") != "0").then_some(()));

        let node = IptablesNode::start(&lab.pin_dir()).unwrap();
        // A pod that starts meanwhile: the hooks that are still there must let it talk.
        let other = lab.pod("b", 3);
        let mut newcomer = lab.in_pod(&other);
        node.know(other.spec.clone()).await.unwrap();
        newcomer.must(&format!(
            "s = socket.create_connection(('{OUTSIDE4}', 8080)); s.close()"
        ));
        let handle = node.capture(pod.spec.clone(), PodSettings::default()).await.unwrap();
        let listeners = handle.listeners().unwrap();
        let tried: u64 = app.must("tries").parse().unwrap();
        until("it hammers on", || {
            (app.must("tries").parse::<u64>().unwrap() > tried + 20).then_some(())
        });
        app.must("stop = True; h.join()");
        assert_eq!(outside.must("[a[0] for a in came].count('::ffff:10.77.1.2')"), "1");
        while listeners.outbound[0].accept().is_ok() {}
        assert!(!lab.links().is_empty());
        node.forget_untold().await.unwrap();
        assert_eq!(lab.links(), Vec::<std::path::PathBuf>::new());

        echoes(&mut app, "older");
        for (stream, name) in &mut carried {
            app.must(&format!("{name}.sendall(b'pong')"));
            stream.read_exact(&mut [0; 4]).unwrap();
            stream.write_all(b"ping").unwrap();
            assert_eq!(app.must(&format!("{name}.recv(4).decode()")), "ping");
        }
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (stream, _) = accept(&listeners.outbound[0]);
        let original = handle.original_destination(SockRef::from(&stream), stream.local_addr().unwrap());
        assert_eq!(original.unwrap().0, format!("{OUTSIDE4}:8080").parse().unwrap());
        outside.must(&format!(
            "i = socket.create_connection(('{}', 9090)); i.sendall(b'ping')",
            pod.ip4()
        ));
        let (mut stream, peer) = accept(&listeners.inbound[0]);
        let mut buffer = [0; 4];
        stream.read_exact(&mut buffer).unwrap();
        let original = handle.inbound_destination(SockRef::from(&stream), stream.local_addr().unwrap());
        assert_eq!(original.0, SocketAddr::new(pod.ip4(), 9090));
        // The application is reached from the client's address: rules and routes are those of the new way.
        let socket = handle
            .inbound_socket(original.0, SocketAddr::new(peer.ip(), 0))
            .unwrap();
        let mut dialled = lab::connect(socket, original.0).unwrap();
        app.must("c, a = l.accept(); c.sendall(b'pong')");
        dialled.read_exact(&mut buffer).unwrap();
        // What those need that the former agent carries goes with them.
        let rules_of_mark = || lab.run(Some("a"), "ip -6 rule list fwmark 0x539/0xfff");
        assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        assert!(rules_of_mark().contains("oif lo"), "{}", rules_of_mark());
        for (stream, name) in carried.into_iter().rev() {
            drop(stream);
            assert_eq!(app.must(&format!("{name}.recv(4).decode()")), "");
            app.must(&format!("{name}.close()"));
        }
        let deadline = std::time::Instant::now() + lab::PATIENCE;
        while !rules_of_mark().is_empty() {
            assert!(std::time::Instant::now() < deadline, "{}", rules_of_mark());
            assert_eq!(node.reconcile().await.unwrap(), Vec::<String>::new());
        }
        app.must("c.sendall(b'pong')");
        dialled.read_exact(&mut buffer).unwrap();
    });
}

#[test]
fn hooks_of_another_version_are_not_taken_over() {
    lab::test("hooks_of_another_version_are_not_taken_over", |lab| async move {
        drop(lab.node());
        let maps = std::fs::read_dir(lab.pin_dir()).unwrap().flatten();
        let maps = maps
            .map(|entry| entry.path())
            .find(|path| path.to_string_lossy().contains("maps-v"));
        std::fs::remove_file(maps.unwrap().join("PODS")).unwrap();
        let error = IptablesNode::start(&lab.pin_dir()).err().unwrap();
        assert!(matches!(error, CaptureError::OtherCapture(_)), "{error}");
    });
}
