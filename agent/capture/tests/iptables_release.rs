//! The capture by iptables, taken back: what lives goes on, and then nothing is left.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    io::{Read, Write},
    net::SocketAddr,
    time::Instant,
};

use capture::IptablesNode;
use lab::{Lab, OUTSIDE4, OUTSIDE6, PATIENCE, accept, captured_by_rules as captured, connect, until};

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

fn start(lab: &Lab) -> IptablesNode {
    IptablesNode::start(&lab.pin_dir()).unwrap()
}

/// Waits until the last of what a released pod `a` had is gone.
async fn drained(lab: &Lab, node: &IptablesNode) {
    let deadline = Instant::now() + PATIENCE;
    while !lab.rules(Some("a")).is_empty() {
        assert!(Instant::now() < deadline, "{}", lab.run(Some("a"), "ss -tan"));
        node.reconcile().await.unwrap();
    }
}

#[test]
fn what_the_agent_dialled_outlives_the_release() {
    lab::test("what_the_agent_dialled_outlives_the_release", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let mut app = lab.in_pod(&pod);
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        // Its end is at the client's address, and needs a part of the rules after the release, too.
        let target = SocketAddr::new(pod.ip4(), 8080);
        let socket = handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
        let mut upstream = connect(socket, target).unwrap();
        app.must("c, a = l.accept()");
        node.release(pod.uid()).await.unwrap();
        drop(listeners);
        app.must("c.sendall(b'still'); c.close()");
        let mut said = String::new();
        upstream.read_to_string(&mut said).unwrap();
        assert_eq!(said, "still");
        drop(upstream);
        drained(&lab, &node).await;
    });
}

/// A peer that hears late opens streams in the tunnel that it has, and may still make one.
#[test]
fn what_comes_after_the_release_still_reaches_the_application() {
    lab::test(
        "what_comes_after_the_release_still_reaches_the_application",
        |lab| async move {
            let node = start(&lab);
            let pod = lab.pod("a", 2);
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(SERVE);
            let (handle, listeners) = captured(&node, &pod).await;
            let mut dialled = |client: &str, own| {
                let target = SocketAddr::new(own, 8080);
                let socket = handle.inbound_socket(target, lab::any_port(client)).unwrap();
                connect(socket, target).expect("the application's answer finds back");
                app.must("l.accept()");
            };
            // As between capture's release and the proxy's.
            node.release(pod.uid()).await.unwrap();
            outside.must(&format!("s = socket.create_connection(('{}', 15008))", pod.ip4()));
            let (tunnel, _) = accept(&listeners.hbone[0]);
            dialled(OUTSIDE4, pod.ip4());
            drop(listeners);
            node.reconcile().await.unwrap();
            dialled(OUTSIDE4, pod.ip4());
            dialled(OUTSIDE6, pod.ip6());
            drop(tunnel);
            outside.must("s.close()");
            drained(&lab, &node).await;
        },
    );
}

#[test]
fn a_dial_under_way_outlives_the_release() {
    lab::test("a_dial_under_way_outlives_the_release", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let mut app = lab.in_pod(&pod);
        app.must(SERVE);
        let (handle, listeners) = captured(&node, &pod).await;
        drop(listeners);
        let hold_back = "INPUT -p tcp --dport 8080 -j DROP";
        lab.run(Some("a"), &format!("iptables -A {hold_back}"));
        let target = SocketAddr::new(pod.ip4(), 8080);
        let socket = handle.inbound_socket(target, lab::any_port(OUTSIDE4)).unwrap();
        socket.connect(&target.into()).unwrap_err();
        node.release(pod.uid()).await.unwrap();
        node.reconcile().await.unwrap();
        lab.run(Some("a"), &format!("iptables -D {hold_back}"));
        until("the application's answer finds back", || socket.peer_addr().ok());
        app.must("l.accept()[0].close()");
        drop(socket);
        drained(&lab, &node).await;
    });
}

#[test]
fn a_redirected_connection_outlives_the_release() {
    lab::test("a_redirected_connection_outlives_the_release", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut app = lab.in_pod(&pod);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (mut stream, _) = accept(&listeners.outbound[0]);
        node.release(pod.uid()).await.unwrap();
        // As the proxy does: what lives has its handle.
        drop(listeners);
        assert!(handle.listeners().is_err());
        app.must("s.sendall(b'still')");
        stream.read_exact(&mut [0; 5]).unwrap();
        stream.write_all(b"here").unwrap();
        assert_eq!(app.must("s.recv(9)"), "b'here'");
        assert!(!lab.rules(Some("a")).contains("REDIRECT"));
        // Captured again meanwhile, released again: as before.
        captured(&node, &pod).await;
        node.release(pod.uid()).await.unwrap();
        node.reconcile().await.unwrap();
        // The next agent captures the pod no more, and the former finishes what it carries.
        let next = start(&lab);
        next.know(pod.spec.clone()).await.unwrap();
        next.forget_untold().await.unwrap();
        next.reconcile().await.unwrap();
        app.must("s.sendall(b'still')");
        stream.read_exact(&mut [0; 5]).unwrap();
        stream.write_all(b"there").unwrap();
        assert_eq!(app.must("s.recv(9)"), "b'there'");
        app.must("s.close()");
        drop(stream);
        drained(&lab, &next).await;

        // A pod that is gone needs nothing any more: whoever still holds on is told.
        let (_handle, listeners) = captured(&node, &pod).await;
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (_stream, _) = accept(&listeners.outbound[0]);
        node.forget(pod.uid()).await;
        assert!(app.tell("s.recv(1)").unwrap_err().starts_with("ECONNRESET"));
        assert_eq!(lab.rules(Some("a")), "");
    });
}

#[test]
fn what_a_dead_agent_left_ends_with_its_connections() {
    lab::test("what_a_dead_agent_left_ends_with_its_connections", |lab| async move {
        let node = start(&lab);
        let pod = lab.pod("a", 2);
        let (handle, listeners) = captured(&node, &pod).await;
        let mut app = lab.in_pod(&pod);
        app.must(&format!("s = socket.create_connection(('{OUTSIDE4}', 8080))"));
        let (stream, _) = accept(&listeners.outbound[0]);
        drop((node, handle, listeners, stream));
        let next = start(&lab);
        next.know(pod.spec.clone()).await.unwrap();
        assert_eq!(app.must("s.recv(1)"), "b''");
        app.must("s.close()");
        drained(&lab, &next).await;
    });
}

#[test]
fn nothing_is_left() {
    lab::test("nothing_is_left", |lab| async move {
        let pods = [lab.pod("a", 2), lab.pod("b", 3)];
        let state = || lab.rules(Some("a")) + &lab.rules(Some("b")) + &lab.rules(None) + &lab.settings();
        lab.run(Some("a"), "iptables -t nat -A OUTPUT -d 10.1.1.1/32 -j ACCEPT");
        let before = state();
        let node = start(&lab);
        for pod in &pods {
            captured(&node, pod).await;
        }
        assert_ne!(state(), before);
        node.release(pods[0].uid()).await.unwrap();
        node.forget(pods[1].uid()).await;
        assert_eq!(state(), before, "released and forgotten");

        for pod in &pods {
            captured(&node, pod).await;
        }
        drop(node);
        capture::uninstall_iptables(pods.iter().map(|pod| pod.spec.netns.clone())).unwrap();
        assert_eq!(state(), before, "uninstalled");
        capture::uninstall_iptables(pods.iter().map(|pod| pod.spec.netns.clone())).unwrap();
    });
}
