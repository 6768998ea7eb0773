//! What is counted is what the access log says, whatever becomes of connections.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use l4::Config;
use lab::{Lab, echo, expect_echo, new_address, policy, value};
use model::{Action, Match, StringMatch, TunnelProtocol};
use prometheus_client::registry::Registry;
use proptest::prelude::*;
use telemetry::{
    Metrics,
    metrics::{Exposition, Limits},
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// What becomes of a connection.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// Echoes this much and closes.
    Echo(u16),
    /// Is denied at the destination.
    Denied,
    /// Goes to a service without endpoints.
    NoEndpoint,
    /// Goes to a port that nobody listens at.
    Closed,
    /// Goes to what the mesh does not know.
    Outside(u16),
    /// Comes from outside the mesh in plaintext.
    Plaintext(u16),
    /// Is reset by the client.
    Reset,
    /// Lives to the end.
    Lives(u16),
}

fn fate() -> impl Strategy<Value = Fate> {
    let size = 1..5000u16;
    prop_oneof![
        size.clone().prop_map(Fate::Echo),
        Just(Fate::Denied),
        Just(Fate::NoEndpoint),
        Just(Fate::Closed),
        size.clone().prop_map(Fate::Outside),
        size.clone().prop_map(Fate::Plaintext),
        Just(Fate::Reset),
        size.prop_map(Fate::Lives),
    ]
}

/// Of each reporter and flag: how many, and bytes from client to server and back.
type Sums = BTreeMap<(String, String), [u64; 3]>;

fn logged(lines: &[String]) -> Sums {
    let mut sums = Sums::new();
    for line in lines {
        let number = |field| value(line, field).unwrap().parse::<u64>().unwrap();
        let outbound = value(line, "direction") == Some("outbound");
        let (sent, received) = (number("bytes_sent"), number("bytes_recv"));
        let (reporter, up, down) = match outbound {
            true => ("source", sent, received),
            false => ("destination", received, sent),
        };
        let flag = value(line, "response_flags").unwrap();
        let sum = sums.entry((reporter.to_owned(), flag.to_owned())).or_default();
        *sum = [sum[0] + 1, sum[1] + up, sum[2] + down];
    }
    sums
}

fn scrape(metrics: &Metrics) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(metrics.clone()));
    Exposition::Text.write(&registry).unwrap()
}

fn sum(text: &str, name: &str, with: &[String]) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(&format!("{name}{{")) && with.iter().all(|part| line.contains(part)))
        .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
        .sum()
}

async fn exchange(mut socket: tokio::net::TcpStream, size: u16) -> tokio::net::TcpStream {
    expect_echo(&mut socket, &vec![7; size.into()]).await;
    socket
}

async fn end(mut socket: tokio::net::TcpStream) {
    let _ = socket.shutdown().await;
    let _ = socket.read_to_end(&mut Vec::new()).await;
}

async fn play(fates: &[Fate]) {
    let metrics = Metrics::default();
    let mut lab = Lab::new();
    let proxy = lab.proxy_with(Config {
        metrics: metrics.clone(),
        ..Config::default()
    });
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    let empty = lab.service("empty", 80, 8080, &[]);
    let plain = lab.workload("plain", TunnelProtocol::None);
    let principal = Match {
        principals: vec![StringMatch::Presence],
        destination_ports: vec![8081],
        ..Match::default()
    };
    lab.contents.policies.push(policy("no-8081", Action::Deny, principal));
    lab.publish();
    echo(server.listen(8080).await);
    let outside = tokio::net::TcpListener::bind(SocketAddr::new(plain, 0)).await.unwrap();
    let outside_address = outside.local_addr().unwrap();
    echo(outside);
    let mut live = Vec::new();
    for fate in fates {
        match *fate {
            Fate::Echo(size) => end(exchange(client.dial(server.at(8080)).await.unwrap(), size).await).await,
            Fate::Outside(size) => end(exchange(client.dial(outside_address).await.unwrap(), size).await).await,
            Fate::Plaintext(size) => {
                let socket = server.receive_plaintext(new_address(), 8080).await.unwrap();
                end(exchange(socket, size).await).await;
            }
            Fate::Denied | Fate::NoEndpoint | Fate::Closed => {
                let destination = match fate {
                    Fate::Denied => server.at(8081),
                    Fate::NoEndpoint => empty,
                    _ => server.at(8082),
                };
                // Refused so early that connecting may fail already.
                if let Ok(socket) = client.dial(destination).await {
                    end(socket).await;
                }
            }
            Fate::Reset => {
                let socket = exchange(client.dial(server.at(8080)).await.unwrap(), 1).await;
                socket.set_zero_linger().unwrap();
            }
            Fate::Lives(size) => live.push(exchange(client.dial(server.at(8080)).await.unwrap(), size).await),
        }
    }
    check_what_lives(&proxy, &metrics, &live).await;
    // Ended by the proxy: every connection has its line and is closed.
    proxy.drain(Duration::ZERO).await;
    let lines = lab.lines();
    assert!(
        lines.len() >= fates.iter().map(|fate| lines_of(*fate)).sum(),
        "{lines:#?}"
    );
    compare(&scrape(&metrics), &lines);
}

/// Every sum of the counters with that of the log's lines.
fn compare(text: &str, lines: &[String]) {
    let said = logged(lines);
    for ((reporter, flag), [count, ..]) in &said {
        let with = [format!("reporter=\"{reporter}\""), format!("response_flags=\"{flag}\"")];
        assert_eq!(
            sum(text, "istio_tcp_connections_closed_total", &with),
            *count,
            "{with:?} {lines:#?}"
        );
        let failed = if flag == "-" { 0 } else { *count };
        assert_eq!(
            sum(text, "istio_tcp_connections_failed_total", &with),
            failed,
            "{with:?}"
        );
    }
    for reporter in ["source", "destination"] {
        let of = |index: usize| -> u64 {
            let own = said.iter().filter(|((by, _), _)| by == reporter);
            own.map(|(_, sums)| sums[index]).sum()
        };
        let with = [format!("reporter=\"{reporter}\"")];
        assert_eq!(sum(text, "istio_tcp_connections_opened_total", &with), of(0));
        assert_eq!(sum(text, "istio_tcp_received_bytes_total", &with), of(1));
        assert_eq!(sum(text, "istio_tcp_sent_bytes_total", &with), of(2));
    }
}

/// Lines that a connection leaves at least, both ends being of one proxy; a tunnel that breaks leaves one of its own.
fn lines_of(fate: Fate) -> usize {
    match fate {
        Fate::NoEndpoint | Fate::Outside(_) | Fate::Plaintext(_) => 1,
        _ => 2,
    }
}

/// A connection that lives is open, and its bytes are counted when somebody asks.
async fn check_what_lives(proxy: &l4::Proxy, metrics: &Metrics, live: &[tokio::net::TcpStream]) {
    let source = ["reporter=\"source\"".to_owned()];
    lab::eventually("only what lives is open", async || {
        proxy.count().await;
        let text = scrape(metrics);
        let opened = sum(&text, "istio_tcp_connections_opened_total", &source);
        opened - sum(&text, "istio_tcp_connections_closed_total", &source) == live.len() as u64
    })
    .await;
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn counters_are_what_the_access_log_says(fates in prop::collection::vec(fate(), 1..14)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(play(&fates));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bytes_of_a_connection_that_lives_are_counted_when_somebody_asks() {
    let metrics = Metrics::default();
    let mut lab = Lab::new();
    let proxy = lab.proxy_with(Config {
        metrics: metrics.clone(),
        ..Config::default()
    });
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    let web = lab.service("web", 80, 8080, &["server"]);
    lab.publish();
    echo(server.listen(8080).await);
    let _live = exchange(client.dial(web).await.unwrap(), 1234).await;
    proxy.count().await;
    let text = scrape(&metrics);
    for reporter in ["source", "destination"] {
        let with = [
            format!("reporter=\"{reporter}\""),
            "source_workload=\"client\"".to_owned(),
            "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"".to_owned(),
            "destination_workload=\"server\"".to_owned(),
            "destination_principal=\"spiffe://cluster.local/ns/shop/sa/server\"".to_owned(),
            "destination_service=\"web.shop.svc.cluster.local\"".to_owned(),
            "destination_service_name=\"web\"".to_owned(),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
        ];
        assert_eq!(sum(&text, "istio_tcp_connections_opened_total", &with), 1, "{text}");
        assert_eq!(sum(&text, "istio_tcp_received_bytes_total", &with), 1234);
        assert_eq!(sum(&text, "istio_tcp_sent_bytes_total", &with), 1234);
        assert_eq!(sum(&text, "istio_tcp_connections_closed_total", &with), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_that_nobody_scrapes_end() {
    let metrics = Metrics::new(Limits {
        expiry: Duration::from_millis(1),
        ..Limits::default()
    });
    let mut lab = Lab::new();
    let proxy = lab.proxy_with(Config {
        metrics: metrics.clone(),
        sweep: Duration::from_millis(10),
        ..Config::default()
    });
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    lab.publish();
    echo(server.listen(8080).await);
    let live = exchange(client.dial(server.at(8080)).await.unwrap(), 5).await;
    assert_eq!(metrics.len(), 2);
    end(live).await;
    lab::eventually("no series", async || metrics.is_empty()).await;
    // Likewise those of the next connection.
    end(exchange(client.dial(server.at(8080)).await.unwrap(), 5).await).await;
    lab::eventually("no series again", async || metrics.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn both_ends_lines_share_a_trace() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    lab.publish();
    echo(server.listen(8080).await);
    end(exchange(client.dial(server.at(8080)).await.unwrap(), 5).await).await;
    let first = lab.line(&["connection complete"]);
    let second = lab.line(&["connection complete"]);
    let trace = value(&first, "trace_id").unwrap();
    assert_eq!(trace.len(), 32);
    assert_eq!(Some(trace), value(&second, "trace_id"));
    assert_ne!(value(&first, "direction"), value(&second, "direction"));
}
