//! What bounds a pod's queries: how many are with name servers at once, and for how long.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::{Config, Proxy, dns};
use lab::{Lab, LabPod, new_address};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UdpSocket,
};

/// Longer than any test takes.
const NEVER: Duration = Duration::from_secs(3600);
const SERVFAIL: u8 = 2;

/// A query for the text of `example.org`.
fn query(id: u16) -> Vec<u8> {
    let mut query = id.to_be_bytes().to_vec();
    query.extend(b"\x01\0\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x10\0\x01");
    query
}

/// A pod, its socket to its name server, and that server, which answers nothing by itself.
struct Asking {
    _lab: Lab,
    _proxy: Proxy,
    client: UdpSocket,
    server: UdpSocket,
}

impl Asking {
    async fn with(config: dns::Config) -> Self {
        let mut lab = Lab::new();
        let proxy = lab.proxy_with(Config {
            dns: config,
            ..Config::default()
        });
        let server = UdpSocket::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
        let (LabPod { ip, network, .. }, mut late) = lab.late_pod("client", new_address());
        *network.name_server.lock().unwrap() = Some(server.local_addr().unwrap());
        let served = std::net::UdpSocket::bind(SocketAddr::new(ip, 0)).unwrap();
        let client = UdpSocket::bind(SocketAddr::new(ip, 0)).await.unwrap();
        client.connect(served.local_addr().unwrap()).await.unwrap();
        late.dns = Some(vec![(0, served)]);
        proxy.add_pod(late).unwrap();
        lab.publish();
        Self {
            _lab: lab,
            _proxy: proxy,
            client,
            server,
        }
    }

    async fn ask(&self, id: u16) {
        self.client.send(&query(id)).await.unwrap();
    }

    /// The next query that the server gets, and who asks.
    async fn asked(&self) -> (u16, SocketAddr) {
        let mut buffer = [0; 512];
        let receiving = tokio::time::timeout(Duration::from_secs(30), self.server.recv_from(&mut buffer));
        let (length, from) = receiving.await.expect("the server is asked").unwrap();
        let id = u16::from_be_bytes([buffer[0], buffer[1]]);
        assert_eq!(buffer[..length], query(id), "not a bit is changed");
        (id, from)
    }

    /// The next answer: its id and its code.
    async fn answered(&self) -> (u16, u8) {
        let mut buffer = [0; 512];
        let receiving = tokio::time::timeout(Duration::from_secs(30), self.client.recv(&mut buffer));
        receiving.await.expect("the pod is answered").unwrap();
        (u16::from_be_bytes([buffer[0], buffer[1]]), buffer[3] & 0x0f)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_so_many_queries_with_name_servers_and_more_are_told_so() {
    let limit = dns::Config::default().forwarding;
    let asking = Asking::with(dns::Config {
        timeout: NEVER,
        ..dns::Config::default()
    })
    .await;
    let mut waiting = Vec::new();
    for id in 0..u16::try_from(limit).unwrap() {
        asking.ask(id).await;
        waiting.push(asking.asked().await);
    }
    // Each before its turn is told at once, and the server does not hear of it.
    for id in [10_000, 10_001] {
        asking.ask(id).await;
        assert_eq!(asking.answered().await, (id, SERVFAIL));
    }
    // One is answered: there is room for another one.
    let (id, from) = waiting.remove(7);
    let mut answer = query(id);
    answer[2] |= 0x80;
    asking.server.send_to(&answer, from).await.unwrap();
    assert_eq!(asking.answered().await, (id, 0));
    asking.ask(10_002).await;
    assert_eq!(asking.asked().await.0, 10_002);
    asking.ask(10_003).await;
    assert_eq!(asking.answered().await, (10_003, SERVFAIL));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_that_does_not_answer_is_not_waited_for() {
    let asking = Asking::with(dns::Config {
        timeout: Duration::from_millis(50),
        forwarding: 1,
        ..dns::Config::default()
    })
    .await;
    for id in 0..3 {
        // Each has the room that the one before gave back.
        asking.ask(id).await;
        assert_eq!(asking.asked().await.0, id);
        assert_eq!(asking.answered().await, (id, SERVFAIL));
    }
}

#[test]
fn a_query_ends_before_resolvers_stop_waiting() {
    // resolv.conf(5): 5 s, unless `options timeout` says otherwise.
    assert!(dns::Config::default().timeout < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_over_tcp_is_told_in_the_log_whoever_answers() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, mut late) = lab.late_pod("client", new_address());
    late.dns = Some(Vec::new());
    proxy.add_pod(late).unwrap();
    lab.service("web", 80, 8080, &[]);
    lab.publish();
    let mut stream = client.dial("192.0.2.53:53".parse().unwrap()).await.unwrap();
    let mut query = b"\x00\x07\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
    query.extend(b"\x03web\x04shop\x03svc\x07cluster\x05local\x00\x00\x01\x00\x01");
    let mut framed = u16::try_from(query.len()).unwrap().to_be_bytes().to_vec();
    framed.extend(&query);
    stream.write_all(&framed).await.unwrap();
    let mut answer = vec![0; usize::from(stream.read_u16().await.unwrap())];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!((answer[3] & 0x0f, answer[7]), (0, 1), "no error, one address");
    drop(stream);
    let identity = "src.identity=\"spiffe://cluster.local/ns/shop/sa/client\"";
    lab.line(&[
        "outbound",
        "dst.addr=192.0.2.53:53",
        "src.workload=\"client\"",
        identity,
    ]);
}
