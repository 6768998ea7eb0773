//! What applications see of capture: nothing.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use std::{
    io::{Read, Write},
    net::SocketAddr,
};

use lab::{OUTSIDE4, OUTSIDE6, accept, captured, connect};
use model::{OriginalDst, PeerAddr};

fn address(ip: impl std::fmt::Display, port: u16) -> SocketAddr {
    let text = ip.to_string();
    if text.contains(':') {
        format!("[{text}]:{port}")
    } else {
        format!("{text}:{port}")
    }
    .parse()
    .unwrap()
}

#[test]
fn a_connection_comes_to_the_agent_with_its_destination() {
    lab::test(
        "a_connection_comes_to_the_agent_with_its_destination",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let (handle, listeners) = captured(&node, &pod).await;
            let mut app = lab.in_pod(&pod);
            for (family, dialled, expected) in [
                ("AF_INET", OUTSIDE4, OUTSIDE4),
                ("AF_INET6", OUTSIDE6, OUTSIDE6),
                ("AF_INET6", "::ffff:10.78.0.2", OUTSIDE4),
            ] {
                app.must(&format!(
                    "s = socket.socket(socket.{family}); s.connect(('{dialled}', 8080))"
                ));
                let (mut stream, peer) = accept(&listeners.outbound[0]);
                let local = stream.local_addr().unwrap();
                let original = handle.original_destination(PeerAddr(peer), local);
                assert_eq!(original, Some(OriginalDst(address(expected, 8080))));
                assert_eq!(handle.original_destination(PeerAddr(peer), local), None, "taken");
                assert_eq!(app.must("s.getpeername()[:2]"), format!("('{dialled}', 8080)"));
                let own = if expected.contains(':') { pod.ip6() } else { pod.ip4() };
                assert!(app.must("s.getsockname()[0]").ends_with(&own.to_string()));
                stream.write_all(b"hello").unwrap();
                assert_eq!(app.must("s.recv(5)"), "b'hello'");
                app.must("s.close()");
            }
        },
    );
}

#[test]
fn an_unknown_namespace_may_not_connect() {
    lab::test("an_unknown_namespace_may_not_connect", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        let mut outside = lab.outside();
        outside.must("l = socket.create_server(('10.78.0.2', 8080))");
        let mut app = lab.in_pod(&pod);
        let dial = "socket.create_connection(('10.78.0.2', 8080)).getpeername()";
        assert!(app.tell(dial).unwrap_err().starts_with("EPERM"));
        node.know(pod.spec.clone()).await.unwrap();
        app.must(dial);
        node.forget(pod.uid()).await;
        assert!(app.tell(dial).unwrap_err().starts_with("EPERM"));
    });
}

#[test]
fn inbound_connections_keep_their_destination_and_the_application_sees_the_client() {
    lab::test(
        "inbound_connections_keep_their_destination_and_the_application_sees_the_client",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            let mut app = lab.in_pod(&pod);
            app.must("l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)");
            let (handle, listeners) = captured(&node, &pod).await;
            let mut outside = lab.outside();
            for (client, own) in [(OUTSIDE4, pod.ip4()), (OUTSIDE6, pod.ip6())] {
                outside.must(&format!("s = socket.create_connection(('{own}', 8080))"));
                let (stream, peer) = accept(&listeners.inbound[0]);
                let local = model::canonical_socket(stream.local_addr().unwrap());
                assert_eq!(local, address(own, 8080));
                assert_eq!(
                    model::canonical_ip(peer.ip()),
                    client.parse::<std::net::IpAddr>().unwrap()
                );

                let socket = handle.inbound_socket(local, SocketAddr::new(peer.ip(), 61000)).unwrap();
                let mut upstream = connect(socket, local).unwrap();
                assert_eq!(upstream.local_addr().unwrap().port(), 61000);
                assert!(app.must("c, a = l.accept(); a[0]").is_empty());
                assert!(app.must("a[0]").ends_with(client));
                upstream.write_all(b"to the application").unwrap();
                assert_eq!(app.must("c.recv(99)"), "b'to the application'");
                app.must("c.sendall(b'back'); c.close()");
                let mut back = String::new();
                upstream.read_to_string(&mut back).unwrap();
                assert_eq!(back, "back");
                drop(upstream);
                lab::a_port_serves_again_but_never_two(
                    &mut app,
                    |source| handle.inbound_socket(local, source),
                    local,
                    peer,
                );

                outside.must(&format!("t = socket.create_connection(('{own}', 15008))"));
                accept(&listeners.hbone[0]);
            }
        },
    );
}
