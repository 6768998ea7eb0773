//! Enrolment of a pod whose connections are half done.

#![allow(clippy::unwrap_used, clippy::too_many_lines, reason = "a test fails by panicking")]

mod lab;

use capture::Reason;
use lab::{HOLD_BACK, OUTSIDE4, accept, captured, until};

const SERVE: &str = "l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True)";

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
fn a_handshake_under_way_from_outside_is_finished() {
    lab::test("a_handshake_under_way_from_outside_is_finished", |lab| async move {
        let node = lab.node();
        let pod = lab.pod("a", 2);
        node.know(pod.spec.clone()).await.unwrap();
        let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
        app.must(SERVE);
        lab.run(Some("out"), &format!("iptables -A {HOLD_BACK}"));
        outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
        let begun = lab.run(Some("a"), "ss -Htn state syn-recv sport = :8080");
        assert!(begun.contains("8080"), "{begun}");
        captured(&node, &pod).await;
        node.reconcile().await.unwrap();
        lab.run(Some("out"), &format!("iptables -D {HOLD_BACK}"));
        outside.must("s.sendall(b'ask')");
        app.must("c, _ = l.accept(); c.sendall(c.recv(3))");
        assert_eq!(outside.must("s.recv(3)"), "b'ask'");
    });
}

#[test]
fn a_handshake_under_way_whose_answer_is_lost_is_answered_again() {
    lab::test(
        "a_handshake_under_way_whose_answer_is_lost_is_answered_again",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            node.know(pod.spec.clone()).await.unwrap();
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(SERVE);
            for (iptables, family, own) in [("iptables", "AF_INET", pod.ip4()), ("ip6tables", "AF_INET6", pod.ip6())] {
                let lose = "INPUT -p tcp --sport 8080 --tcp-flags SYN,ACK SYN,ACK -j DROP";
                lab.run(Some("out"), &format!("{iptables} -A {lose}"));
                outside.must(&format!("s = socket.socket(socket.{family}); s.setblocking(False)"));
                let begun = outside.tell(&format!("s.connect(('{own}', 8080))"));
                assert!(begun.unwrap_err().starts_with("EINPROGRESS"));
                until("the application answers", || {
                    let begun = lab.run(Some("a"), "ss -Htn state syn-recv sport = :8080");
                    begun.contains("8080").then_some(())
                });
                captured(&node, &pod).await;
                lab.run(Some("out"), &format!("{iptables} -D {lose}"));
                outside.must("s.settimeout(5); s.sendall(b'ask')");
                app.must("c, _ = l.accept(); c.sendall(c.recv(3))");
                assert_eq!(outside.must("s.recv(3)"), "b'ask'");
                node.release(pod.uid()).await.unwrap();
            }
        },
    );
}

#[test]
fn an_older_connection_lets_no_forged_answer_to_a_handshake_out() {
    lab::test(
        "an_older_connection_lets_no_forged_answer_to_a_handshake_out",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            node.know(pod.spec.clone()).await.unwrap();
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(SERVE);
            outside.must(&format!("s = socket.create_connection(('{}', 8080))", pod.ip4()));
            app.must("c, a = l.accept()");
            let port = app.must("a[1]");
            captured(&node, &pod).await;
            app.must("r = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)");
            let dropped = || node.counters().of_pod(pod.uid(), Reason::ForeignSocket);
            let before = dropped();
            app.must(&format!(
                "r.sendto(struct.pack('!HHIIBBHHH', 8080, {port}, 1, 0, 0x50, 0x12, 512, 0, 0), ('{OUTSIDE4}', 0))"
            ));
            until("it is dropped", || (dropped() > before).then_some(()));
        },
    );
}

/// Outside: handshakes without end, of which the last part does not arrive; then who is answered.
const BEGIN: &str = r#"
import resource, selectors
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
begun, stop = [], False
# The table of files does not grow step by step, which takes long.
os.dup2(0, 8000)
def begin():
    while not stop and len(begun) < 4000:
        begun.append(socket.create_connection((own, 8080)))
b = threading.Thread(target=begin, daemon=True)
def finish():
    global stop
    stop = True
    b.join()
def count_answers(wanted):
    ready, answers = selectors.DefaultSelector(), 0
    for s in begun: ready.register(s, selectors.EVENT_READ)
    while answers < wanted:
        some = ready.select(5)
        if not some: break
        for key, _ in some:
            ready.unregister(key.fileobj)
            answers += key.fileobj.recv(3) == b'ask'
    return answers
"#;

/// In a pod: a server that counts who comes, and echoes once.
const ECHO: &str = r#"
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (8192, 8192))
came = []
l = socket.create_server(('::', 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
l.settimeout(None)
def echo():
    while True:
        c, _ = l.accept()
        came.append(c)
        c.sendall(c.recv(3))
threading.Thread(target=echo, daemon=True).start()
"#;

#[test]
fn handshakes_that_begin_with_the_enrolment_are_finished() {
    lab::test(
        "handshakes_that_begin_with_the_enrolment_are_finished",
        |lab| async move {
            let node = lab.node();
            let pod = lab.pod("a", 2);
            node.know(pod.spec.clone()).await.unwrap();
            let (mut app, mut outside) = (lab.in_pod(&pod), lab.outside());
            app.must(ECHO);
            outside.must(BEGIN);
            lab.run(Some("out"), &format!("iptables -A {HOLD_BACK}"));
            outside.must(&format!("own = '{}'; b.start()", pod.ip4()));
            until("one has begun", || (outside.must("len(begun)") != "0").then_some(()));
            let (_, listeners) = captured(&node, &pod).await;
            outside.must("finish()");
            lab.run(Some("out"), &format!("iptables -D {HOLD_BACK}"));
            outside.must("for s in begun: s.sendall(b'ask')");
            let all: usize = outside.must("len(begun)").parse().unwrap();
            let mut agents = Vec::new();
            let to_the_application = until("all are accepted", || {
                agents.extend(listeners.inbound[0].accept().ok());
                let came: usize = app.must("len(came)").parse().unwrap();
                (came + agents.len() == all).then_some(came)
            });
            assert!(to_the_application > 0);
            let answered = outside.must(&format!("count_answers({to_the_application})"));
            assert_eq!(answered, to_the_application.to_string(), "of {all}");
        },
    );
}
