//! Knowledge on demand: who dials what nothing is known of waits for the answer, and not for ever.

#![allow(clippy::unwrap_used)]

mod lab;

use std::{net::SocketAddr, time::Duration};

use l4::Config;
use lab::{Lab, LabPod, echo, expect_echo, expect_refused, new_address};
use mesh::{Delta, Demands, Wanted};
use model::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, NamespacedName, NetworkAddress,
};
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
    lab.line(&["outbound", "or did not say in time"]);
}

/// The waypoint, by its name.
fn gateway() -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedName::new("shop", "wp.shop.svc.cluster.local")),
        hbone_mtls_port: 15008,
    }
}

async fn expect_waypoint_wanted(demands: &mut Demands) {
    let name = NamespacedName::new("shop", "wp.shop.svc.cluster.local");
    let next = tokio::time::timeout(Duration::from_secs(30), demands.next()).await;
    assert_eq!(next.unwrap(), Some(Wanted::Service(name)));
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_a_waypoint_is_asked_for_by_its_name() {
    let (mut lab, mut demands, proxy, client) = on_demand(Config::default());
    let web = lab.service("web", 80, 8080, &[]);
    let mut dialled = client.dial(web).await.unwrap();
    assert_eq!(wanted(&mut demands).await, web.ip());
    lab.contents.services[0].waypoint = Some(gateway());
    lab.publish();
    expect_waypoint_wanted(&mut demands).await;
    // It, too, is played by an agent, and hands to an echo what it takes.
    let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = inside.local_addr().unwrap().port();
    echo(inside);
    let _waypoint = lab.pod(&proxy, "wp");
    lab.contents.workloads[1].application_tunnel = Some(ApplicationTunnel {
        protocol: ApplicationTunnelProtocol::Proxy,
        port: Some(port),
    });
    lab.service("wp", 15008, 15008, &["wp"]);
    lab.publish();
    let mut signature = [0; 14];
    tokio::io::AsyncReadExt::read_exact(&mut dialled, &mut signature)
        .await
        .unwrap();
    assert_eq!(&signature, b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_what_has_a_waypoint_asks_who_that_is_before_it_refuses_it() {
    let (mut lab, mut demands, proxy, client) = on_demand(Config::default());
    let server = lab.pod(&proxy, "server");
    lab.contents.workloads[1].waypoint = Some(gateway());
    lab.publish();
    let _listener = server.listen(8080).await;
    let waypoint = lab.pod(&proxy, "wp");
    lab.service("wp", 15008, 15008, &["wp"]);
    let ask = |lab: &Lab, who: &LabPod| lab::connect_by_hand(lab, who, server.at(15008), server.at(8080));
    let asking = tokio::spawn(ask(&lab, &waypoint));
    expect_waypoint_wanted(&mut demands).await;
    assert!(!asking.is_finished());
    lab.publish();
    assert_eq!(asking.await.unwrap(), 200);
    // Who is none is told so, and nothing is asked for any more.
    assert_eq!(ask(&lab, &client).await, 401);
    assert_eq!(demands.try_next(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_a_workload_that_is_not_told_of_its_waypoint_takes_nothing() {
    let (mut lab, mut demands, proxy, client) = on_demand(Config {
        discovery_timeout: Duration::from_millis(50),
        ..Config::default()
    });
    let server = lab.pod(&proxy, "server");
    lab.contents.workloads[1].waypoint = Some(gateway());
    lab.publish();
    let _listener = server.listen(8080).await;
    let refused = lab::connect_by_hand(&lab, &client, server.at(15008), server.at(8080)).await;
    assert_eq!(refused, 401);
    expect_waypoint_wanted(&mut demands).await;
    lab.line(&["inbound", "denied: the workload is behind waypoint shop/wp"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_a_waypoint_asks_who_it_is() {
    let (mut lab, mut demands, proxy, client) = on_demand(Config::default());
    let (server, waypoint) = (lab.pod(&proxy, "server"), lab.pod(&proxy, "wp"));
    let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    lab.contents.workloads[1].waypoint = Some(gateway());
    lab.contents.workloads[2].application_tunnel = Some(ApplicationTunnel {
        protocol: ApplicationTunnelProtocol::Proxy,
        port: Some(inside.local_addr().unwrap().port()),
    });
    lab.publish();
    lab.service("wp", 15008, 15008, &["wp"]);
    let asking = lab::connect_by_hand(&lab, &client, waypoint.at(15008), server.at(8080));
    let asking = tokio::spawn(asking);
    expect_waypoint_wanted(&mut demands).await;
    lab.publish();
    assert_eq!(asking.await.unwrap(), 200);
}
