//! Each limit holds, and says which it is.

use std::time::Duration;

use store::http::Limits;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::raw::{Hostile, NEVER, reply};

/// So short that nobody can keep it who does not try.
const AT_ONCE: Duration = Duration::from_millis(30);

const WATCH: &[u8] = b"GET /api/v1/namespaces?watch=1 HTTP/1.1\r\nhost: x\r\n\r\n";
const HEALTH: &[u8] = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n";

async fn never<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(NEVER, what).await.unwrap()
}

#[tokio::test]
async fn a_connection_over_the_limit_waits_for_its_turn() {
    let limits = Limits {
        connections: 1,
        ..Limits::default()
    };
    let server = Hostile::start(limits).await;
    let mut first = server.connect().await;
    let second = server.get("/healthz");
    let mut second = std::pin::pin!(second);
    for _ in 0..3 {
        // While the first is served, the second is not.
        let mut answer = [0; 64];
        let served = async {
            first.write_all(HEALTH).await.unwrap();
            first.read(&mut answer).await.unwrap()
        };
        tokio::select! {
            biased;
            early = &mut second => panic!("{early:?}"),
            count = served => assert!(count > 0),
        }
    }
    drop(first);
    assert_eq!(never(second).await.status, 200);
}

#[tokio::test]
async fn a_watch_over_the_limit_is_a_429() {
    let limits = Limits {
        watches: 1,
        ..Limits::default()
    };
    let server = Hostile::start(limits).await;
    let mut first = server.connect().await;
    first.write_all(WATCH).await.unwrap();
    let mut answer = [0; 64];
    first.read_exact(&mut answer).await.unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    let refused = server.get("/api/v1/namespaces?watch=1").await;
    assert_eq!(refused.status, 429, "{refused:?}");
    assert!(
        refused.text.contains("retry-after: 5") && refused.text.contains("too many watches"),
        "{refused:?}"
    );
    // Lists go on, and the place is free once the first watcher has gone.
    assert!(server.is_well().await);
    drop(first);
    let again = async { while server.get("/api/v1/namespaces?watch=1&timeoutSeconds=1").await.status != 200 {} };
    never(again).await;
}

#[tokio::test]
async fn a_body_over_the_limit_is_a_413() {
    let server = Hostile::start(Limits::default()).await;
    let path = "/api/v1/namespaces/shop/configmaps";
    let body = vec![b' '; (3 << 20) + 1];
    let refused = server.ask("POST", path, "application/json", &body).await;
    assert_eq!(refused.status, 413, "{refused:?}");
    assert!(refused.text.contains("limit is 3145728"), "{refused:?}");
    assert!(server.is_well().await);
}

#[tokio::test]
async fn a_body_that_does_not_come_is_a_408() {
    let limits = Limits {
        body: AT_ONCE,
        ..Limits::default()
    };
    let server = Hostile::start(limits).await;
    let head = b"POST /api/v1/namespaces HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\nconnection: close\r\n\r\n{";
    let refused = server.send(head).await;
    assert_eq!(refused.status, 408, "{refused:?}");
    assert!(refused.text.contains("did not arrive within"), "{refused:?}");
}

#[tokio::test]
async fn a_head_over_the_limit_is_a_431() {
    let server = Hostile::start(Limits::default()).await;
    let filler = "x".repeat(100 << 10);
    let refused = server
        .send(format!("GET /healthz HTTP/1.1\r\nhost: x\r\nx: {filler}\r\n\r\n").as_bytes())
        .await;
    assert_eq!(refused.status, 431, "{refused:?}");
}

#[tokio::test]
async fn who_says_nothing_is_cut_off() {
    let limits = Limits {
        connections: 1,
        handshake: AT_ONCE,
        head: AT_ONCE,
        ..Limits::default()
    };
    let server = Hostile::start(limits).await;
    // Not a byte.
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let _ = never(silent.read(&mut [0])).await;
    // A handshake, in either protocol, and no request; or one that does not end; or the half of HTTP/2's preface.
    for (protocol, bytes) in [
        ("http/1.1", &b""[..]),
        ("h2", b""),
        ("http/1.1", b"GET /healthz HTTP/1.1\r\nhost:"),
        ("h2", b"PRI * HTTP/2.0\r\n"),
        ("h2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
    ] {
        let mut connection = never(server.connect_with(&[protocol])).await.unwrap();
        connection.write_all(bytes).await.unwrap();
        reply(&mut connection).await;
    }
    // There is one place, and it is free.
    assert!(never(server.is_well()).await);
}
