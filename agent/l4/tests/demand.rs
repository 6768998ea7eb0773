//! Knowledge on demand: who dials what nothing is known of waits for the answer, and not for ever.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::Config;
use lab::{Lab, LabPod, echo, expect_echo, expect_refused, new_address};
use mesh::{Delta, Demands, Wanted};
use model::NetworkAddress;
use tokio::net::TcpListener;

/// A lab in which only the client is known.
fn on_demand(config: Config) -> (Lab, Demands, l4::Proxy, LabPod) {
    let (writer, knowledge, demands) = mesh::with("", mesh::Scope::OnDemand);
    let mut lab = Lab::knowing(writer, knowledge);
    let proxy = lab.proxy_with(config);
    let client = lab.pod(&proxy, "client");
    lab.publish();
    (lab, demands, proxy, client)
}

async fn wanted(demands: &mut Demands) -> std::net::IpAddr {
    match demands.next().await.unwrap() {
        Wanted::Address(NetworkAddress { address, .. }) => address,
        other => panic!("not an address: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_a_connection_waits_to_be_told() {
    let (mut lab, mut demands, proxy, client) = on_demand(Config::default());
    let server = lab.pod(&proxy, "server");
    echo(server.listen(8080).await);
    let mut socket = client.dial(server.at(8080)).await.unwrap();
    assert_eq!(wanted(&mut demands).await, server.ip);
    // Something else becomes known first.
    lab.writer.apply(Delta::default());
    lab.publish();
    expect_echo(&mut socket, b"in the mesh").await;
    drop(socket);
    lab.line(&["outbound", "dst.workload=\"server\"", "dst.hbone_addr"]);

    let outside = TcpListener::bind(SocketAddr::new(new_address(), 0)).await.unwrap();
    let address = outside.local_addr().unwrap();
    echo(outside);
    let mut socket = client.dial(address).await.unwrap();
    assert_eq!(wanted(&mut demands).await, address.ip());
    lab.writer.apply(Delta {
        absent: vec![address.ip()],
        ..Delta::default()
    });
    expect_echo(&mut socket, b"outside").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_who_is_told_nothing_is_refused() {
    let (lab, mut demands, _proxy, client) = on_demand(Config {
        discovery_timeout: Duration::from_millis(50),
        ..Config::default()
    });
    let nowhere = SocketAddr::new(new_address(), 80);
    expect_refused(client.dial(nowhere).await).await;
    assert_eq!(wanted(&mut demands).await, nowhere.ip());
    lab.line(&["outbound", "the control plane did not say in time what"]);
}
