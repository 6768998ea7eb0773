//! REGISTRY_ONLY at the source: what is refused, what opens it, and what becomes of live connections.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::{Config, Proxy};
use lab::{Lab, LabPod, echo, expect_echo, expect_refused, expect_reset, new_address};
use model::{LoadBalancing, LoadBalancingMode, OutboundMode, OutboundTrafficPolicy, Service};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A client, and somebody outside the mesh.
async fn out(mode: OutboundMode) -> (Lab, Proxy, LabPod, SocketAddr) {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let client = lab.pod(&proxy, "client");
    lab.contents.settings.outbound_traffic_policy.mode = mode;
    lab.publish();
    (lab, proxy, client, outside().await)
}

async fn outside() -> SocketAddr {
    let listener = TcpListener::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    echo(listener);
    address
}

/// A ServiceEntry without resolution.
fn entry(address: SocketAddr) -> Service {
    Service {
        name: "entry".into(),
        namespace: "shop".into(),
        hostname: "api.example".into(),
        vips: vec![format!("/{}", address.ip()).parse().unwrap()],
        ports: [(address.port(), address.port())].into(),
        load_balancing: Some(LoadBalancing {
            mode: LoadBalancingMode::Passthrough,
            ..LoadBalancing::default()
        }),
        ..Service::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn registry_only_refuses_and_an_entry_opens_what_it_names() {
    let (mut lab, _proxy, client, address) = out(OutboundMode::RegistryOnly).await;
    expect_refused(client.dial(address).await).await;
    let line = lab.line(&["outbound", "is not in the registry"]);
    assert!(
        line.contains(&address.to_string()) && line.contains("ServiceEntry"),
        "{line}"
    );

    lab.contents.services.push(entry(address));
    lab.publish();
    let mut socket = client.dial(address).await.unwrap();
    expect_echo(&mut socket, b"named").await;
    drop(socket);
    let line = lab.line(&["outbound", &format!("dst.addr={address}"), "bytes"]);
    assert!(line.contains("api.example"), "{line}");
    // Another port of the same address is another destination.
    let listener = TcpListener::bind(SocketAddr::new(address.ip(), 0)).await.unwrap();
    expect_refused(client.dial(listener.local_addr().unwrap()).await).await;
    lab.line(&["shop/api.example has that address"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_registry_no_longer_names_is_cut() {
    let (mut lab, _proxy, client, named) = out(OutboundMode::AllowAny).await;
    let other = outside().await;
    lab.contents.services.push(entry(named));
    lab.publish();
    let mut to_named = client.dial(named).await.unwrap();
    expect_echo(&mut to_named, b"named").await;
    let mut to_other = client.dial(other).await.unwrap();
    expect_echo(&mut to_other, b"not named").await;

    lab.contents.settings.outbound_traffic_policy.mode = OutboundMode::RegistryOnly;
    lab.publish();
    expect_reset(to_other).await;
    lab.line(&["closed: no longer in the registry", &other.to_string()]);
    expect_echo(&mut to_named, b"still named").await;

    lab.contents.services.clear();
    lab.publish();
    expect_reset(to_named).await;
    lab.line(&["closed: no longer in the registry", &named.to_string()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn before_it_is_known_a_connection_waits_and_is_refused() {
    let mut lab = Lab::new();
    let outbound = lab.writer.outbound();
    let proxy = lab.proxy_with(Config {
        discovery_timeout: Duration::from_millis(100),
        ..Config::default()
    });
    let client = lab.pod(&proxy, "client");
    let server = lab.pod(&proxy, "server");
    lab.publish();
    let address = outside().await;
    expect_refused(client.dial(address).await).await;
    lab.line(&["it is not known yet whether the mesh is REGISTRY_ONLY"]);
    echo(server.listen(8080).await);
    let mut inside = client.dial(server.at(8080)).await.unwrap();
    expect_echo(&mut inside, b"inside nothing waits").await;

    let patient = lab.proxy();
    let client = lab.pod(&patient, "patient");
    lab.publish();
    let mut socket = client.dial(address).await.unwrap();
    outbound.set(OutboundTrafficPolicy::default());
    expect_echo(&mut socket, b"outside").await;
}

/// A query for the text of `example.org`, with its length before it.
const QUERY: &[u8] = b"\0\x1d\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x07example\x03org\0\0\x10\0\x01";

/// A name server that answers what it is asked with nothing.
async fn name_server() -> SocketAddr {
    let listener = TcpListener::bind(SocketAddr::new(new_address(), 53)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            let mut query = vec![0; QUERY.len()];
            while socket.read_exact(&mut query).await.is_ok() {
                query[4] |= 0x80;
                socket.write_all(&query).await.unwrap();
            }
        }
    });
    address
}

async fn expect_answer(socket: &mut TcpStream) {
    socket.write_all(QUERY).await.unwrap();
    let mut answer = vec![0; QUERY.len()];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!((&answer[2..4], answer[4] & 0x80), (&QUERY[2..4], 0x80));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_name_server_passes_on_is_not_judged() {
    let (mut lab, proxy, own_server, address) = out(OutboundMode::RegistryOnly).await;
    let (client, mut late) = lab.late_pod("asks us", new_address());
    late.dns = Some(Vec::new());
    proxy.add_pod(late).unwrap();
    lab.publish();
    let server = name_server().await;
    let mut asking = client.dial(server).await.unwrap();
    expect_answer(&mut asking).await;
    // It is the name server's, and not a way out for anything: what is no DNS ends, and no other port is opened.
    asking.write_all(b"\0\x05SSH-2").await.unwrap();
    assert_eq!(asking.read_to_end(&mut Vec::new()).await.unwrap_or(0), 0);
    expect_refused(client.dial(address).await).await;
    lab.line(&["is not in the registry", &address.to_string()]);
    // Whose name server is not ours has a connection like any other.
    expect_refused(own_server.dial(server).await).await;
    lab.line(&["is not in the registry", &server.to_string()]);
    // What is asked lives on when the mode changes, and when it changes back.
    let mut asking = client.dial(server).await.unwrap();
    for mode in [OutboundMode::AllowAny, OutboundMode::RegistryOnly] {
        lab.contents.settings.outbound_traffic_policy.mode = mode;
        lab.publish();
        expect_answer(&mut asking).await;
    }
}
