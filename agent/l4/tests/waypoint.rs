//! Waypoints, on both sides: the client's connection is handed to a replica, and the destination takes only what came
//! through one. The waypoint itself is played: HBONE is the agent's, the header and the bytes are the test's.

#![allow(clippy::unwrap_used)]

mod lab;

use std::net::{IpAddr, SocketAddr};

use l4::{Config, FailureKind};
use lab::{Lab, LabPod, echo, eventually, expect_echo, expect_refused, expect_reset, new_address};
use model::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, HealthStatus, NamespacedName,
    TunnelProtocol, Unusable, Workload,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A client, a server, and a waypoint of the sandwiched kind with two replicas, all on one node.
struct Mesh {
    lab: Lab,
    proxy: l4::Proxy,
    client: LabPod,
    server: LabPod,
    waypoints: [LabPod; 2],
    /// The service of the server.
    web: SocketAddr,
    /// Where both replicas take the header: a port of the loopback that nobody else has.
    proxied: TcpListener,
}

fn gateway() -> GatewayAddress {
    GatewayAddress {
        destination: GatewayDestination::Hostname(NamespacedName::new("shop", "wp.shop.svc.cluster.local")),
        hbone_mtls_port: 15008,
    }
}

impl Mesh {
    async fn new() -> Self {
        let mut lab = Lab::new();
        let proxy = lab.proxy_with(Config {
            // The waypoint is asked for what it has not heard of, and does not hear of it: no reason to wait for long.
            discovery_timeout: std::time::Duration::from_millis(50),
            ..Config::default()
        });
        let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
        let waypoints = [lab.pod(&proxy, "wp-1"), lab.pod(&proxy, "wp-2")];
        let web = lab.service("web", 80, 8080, &["server"]);
        lab.service("wp", 15008, 15008, &["wp-1", "wp-2"]);
        let proxied = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = Some(proxied.local_addr().unwrap().port());
        let mut mesh = Self {
            lab,
            proxy,
            client,
            server,
            waypoints,
            web,
            proxied,
        };
        for name in ["wp-1", "wp-2"] {
            let waypoint = mesh.workload(name);
            waypoint.service_account = "wp".into();
            waypoint.application_tunnel = Some(ApplicationTunnel {
                protocol: ApplicationTunnelProtocol::Proxy,
                port,
            });
        }
        mesh
    }

    fn workload(&mut self, name: &str) -> &mut Workload {
        let mut all = self.lab.contents.workloads.iter_mut();
        all.find(|workload| &*workload.name == name).unwrap()
    }

    fn put_service_behind(&mut self, waypoint: Option<GatewayAddress>) {
        let mut all = self.lab.contents.services.iter_mut();
        all.find(|service| &*service.name == "web").unwrap().waypoint = waypoint;
    }

    fn put_server_behind(&mut self, waypoint: Option<GatewayAddress>) {
        self.workload("server").waypoint = waypoint;
    }

    /// What the waypoint is told of the next connection that it is handed, and the connection.
    async fn handed(&self) -> (Told, TcpStream) {
        let (mut socket, _) = self.proxied.accept().await.unwrap();
        let mut head = [0; 16];
        socket.read_exact(&mut head).await.unwrap();
        assert_eq!(&head[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        let mut rest = vec![0; usize::from(u16::from_be_bytes([head[14], head[15]]))];
        socket.read_exact(&mut rest).await.unwrap();
        let address = |ip: usize, port: usize| {
            let ip: [u8; 4] = rest[ip..ip + 4].try_into().unwrap();
            SocketAddr::new(IpAddr::from(ip), u16::from_be_bytes([rest[port], rest[port + 1]]))
        };
        assert_eq!(rest[12], 0xd0);
        let told = Told {
            source: address(0, 8).ip(),
            target: address(4, 10),
            identity: String::from_utf8(rest[15..].to_vec()).unwrap(),
        };
        (told, socket)
    }
}

#[derive(PartialEq, Debug)]
struct Told {
    source: IpAddr,
    target: SocketAddr,
    identity: String,
}

fn told(client: &LabPod, target: SocketAddr) -> Told {
    Told {
        source: client.ip,
        target,
        identity: "spiffe://cluster.local/ns/shop/sa/client".into(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_behind_a_waypoint_is_handed_to_it_and_reached_by_it_alone() {
    let mut mesh = Mesh::new().await;
    mesh.put_service_behind(Some(gateway()));
    mesh.put_server_behind(Some(gateway()));
    mesh.lab.publish();
    echo(mesh.server.listen(8080).await);
    for dialled in [mesh.web, mesh.server.at(8080)] {
        let mut client = mesh.client.dial(dialled).await.unwrap();
        let (seen, mut waypoint) = mesh.handed().await;
        assert_eq!(seen, told(&mesh.client, dialled));
        // It opens a connection of its own, does what it is there for, and passes bytes on.
        let mut onward = mesh.waypoints[0].dial(mesh.server.at(8080)).await.unwrap();
        let relaying = async { tokio::io::copy_bidirectional(&mut waypoint, &mut onward).await };
        let asking = async {
            expect_echo(&mut client, b"through the waypoint").await;
            drop(client);
        };
        let (relayed, ()) = tokio::join!(relaying, asking);
        relayed.unwrap();
    }
    mesh.lab.line(&[
        "outbound",
        "dst.service=\"web.shop.svc.cluster.local\"",
        "dst.workload=\"wp-",
        &format!("dst.hbone_addr={}", mesh.web),
    ]);

    // Past it: in plaintext, and as a peer whose agent does not know of the waypoint.
    expect_refused(mesh.server.receive_plaintext(new_address(), 8080).await).await;
    mesh.lab.line(&[
        "inbound",
        "denied: the workload is behind waypoint shop/wp.shop.svc.cluster.local and takes only what comes",
        "plaintext",
    ]);
    assert_eq!(mesh.proxy.counters().failed(FailureKind::Denied), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_whose_agent_knows_of_no_waypoint_is_refused_by_the_server() {
    let mut lab = Lab::new();
    let (near, mut far_side) = (lab.proxy(), Lab::new());
    // Two nodes with one root and two states of knowledge.
    far_side.identities = lab.identities.clone();
    let far = far_side.proxy();
    let client = lab.pod(&near, "client");
    let server = far_side.pod(&far, "server");
    lab.contents.workloads.extend(far_side.contents.workloads.clone());
    far_side.contents.workloads.extend(lab.contents.workloads[..1].to_vec());
    lab.publish();
    far_side.publish();
    echo(server.listen(8080).await);
    let mut live = client.dial(server.at(8080)).await.unwrap();
    expect_echo(&mut live, b"there is no waypoint yet").await;

    far_side.contents.workloads[0].waypoint = Some(GatewayAddress::unusable(
        &NamespacedName::new("shop", "wp"),
        Unusable::NotProgrammed,
    ));
    far_side.publish();
    // What lives is judged again, as when a policy changes.
    expect_reset(live).await;
    far_side.line(&[
        "inbound",
        "no longer allowed: denied: the workload is behind Gateway shop/wp (it is not",
    ]);
    expect_refused(client.dial(server.at(8080)).await).await;
    far_side.line(&[
        "inbound",
        "denied: the workload is behind Gateway shop/wp (it is not programmed yet)",
    ]);
    lab.line(&["outbound", "the peer refused: 401"]);
    far_side.contents.workloads[0].waypoint = None;
    far_side.publish();
    expect_echo(&mut client.dial(server.at(8080)).await.unwrap(), b"and no more").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_replica_is_passed_over_before_the_client_notices() {
    let mut mesh = Mesh::new().await;
    mesh.put_service_behind(Some(gateway()));
    // It is announced, and nobody is there.
    let dead = mesh.lab.workload("wp-dead", TunnelProtocol::Hbone);
    let key = NamespacedName::new("shop", "wp.shop.svc.cluster.local");
    mesh.workload("wp-dead").services.insert(key, [(15008, 15008)].into());
    mesh.workload("wp-dead").service_account = "wp".into();
    mesh.workload("wp-2").status = HealthStatus::Unhealthy;
    mesh.lab.publish();
    for _ in 0..20 {
        let client = mesh.client.dial(mesh.web).await.unwrap();
        let (seen, mut waypoint) = mesh.handed().await;
        assert_eq!(seen.target, mesh.web);
        let answering = async {
            let mut byte = [0];
            waypoint.read_exact(&mut byte).await.unwrap();
            waypoint.write_all(&byte).await.unwrap();
        };
        let mut client = client;
        tokio::join!(answering, expect_echo(&mut client, b"x"));
    }
    assert!(mesh.proxy.counters().failed_over > 0, "{dead} was never tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_waypoint_ready_means_refused_and_not_bypassed() {
    let mut mesh = Mesh::new().await;
    let listener = mesh.server.listen(8080).await;
    let missing = GatewayAddress::unusable(&NamespacedName::new("shop", "wp"), Unusable::NotThere);
    mesh.put_service_behind(Some(missing.clone()));
    mesh.put_server_behind(Some(missing));
    mesh.lab.publish();
    expect_refused(mesh.client.dial(mesh.web).await).await;
    mesh.lab.line(&[
        "outbound",
        "service shop/web.shop.svc.cluster.local has to be reached through Gateway shop/wp, which can't be used: it is \
         not there",
    ]);
    expect_refused(mesh.client.dial(mesh.server.at(8080)).await).await;
    mesh.lab.line(&[
        "outbound",
        "/server has to be reached through Gateway shop/wp, which can't be used",
    ]);
    mesh.put_service_behind(Some(gateway()));
    for name in ["wp-1", "wp-2"] {
        mesh.workload(name).status = HealthStatus::Unhealthy;
    }
    mesh.lab.publish();
    expect_refused(mesh.client.dial(mesh.web).await).await;
    mesh.lab.line(&[
        "outbound",
        "service shop/wp.shop.svc.cluster.local has no healthy endpoint",
    ]);
    assert_eq!(mesh.proxy.counters().failed(FailureKind::NoRoute), 3);
    let nobody = tokio::time::timeout(std::time::Duration::ZERO, listener.accept()).await;
    assert!(nobody.is_err(), "the application was dialled");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_waypoint_takes_only_what_is_behind_it() {
    let mut mesh = Mesh::new().await;
    mesh.put_service_behind(Some(gateway()));
    mesh.lab.publish();
    // The client's agent believes that the pod, too, is behind it; the waypoint's knows better. One lab has one state of
    // knowledge, so the client asks the waypoint by its own address, and a stranger's is asked for by hand.
    let own = mesh.waypoints[0].at(8080);
    let client = mesh.client.dial(own).await.unwrap();
    let (seen, _waypoint) = mesh.handed().await;
    assert_eq!(seen.target, own, "what is dialled of the waypoint itself is its own");
    drop(client);
    let asked = mesh.server.at(8080);
    let address = mesh.waypoints[0].at(15008);
    let refused = lab::connect_by_hand(&mesh.lab, &mesh.client, address, asked).await;
    assert_eq!(refused, 400);
    mesh.lab.line(&[
        "inbound",
        &format!("the peer asked this waypoint for {asked}, which is not behind it"),
    ]);
    assert_eq!(
        lab::connect_by_hand(&mesh.lab, &mesh.client, address, mesh.web).await,
        200
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_for_what_comes_to_be_behind_a_waypoint_waits_for_the_news() {
    let mut lab = Lab::new();
    let proxy = lab.proxy();
    let (client, server) = (lab.pod(&proxy, "client"), lab.pod(&proxy, "server"));
    let waypoint = lab.pod(&proxy, "wp");
    lab.service("wp", 15008, 15008, &["wp"]);
    let inside = TcpListener::bind("127.0.0.1:0").await.unwrap();
    lab.contents.workloads[2].application_tunnel = Some(ApplicationTunnel {
        protocol: ApplicationTunnelProtocol::Proxy,
        port: Some(inside.local_addr().unwrap().port()),
    });
    lab.publish();
    let asking = lab::connect_by_hand(&lab, &client, waypoint.at(15008), server.at(8080));
    let asking = tokio::spawn(asking);
    eventually("the request is there", async || {
        let waiting = proxy.connections().await;
        waiting.iter().any(|one| one.pod == waypoint.uid)
    })
    .await;
    assert!(!asking.is_finished());
    lab.contents.workloads[1].waypoint = Some(gateway());
    lab.publish();
    assert_eq!(asking.await.unwrap(), 200);
    drop(client);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_waypoint_without_a_binding_says_what_it_lacks() {
    let mut mesh = Mesh::new().await;
    mesh.put_service_behind(Some(gateway()));
    for name in ["wp-1", "wp-2"] {
        mesh.workload(name).application_tunnel = None;
    }
    mesh.lab.publish();
    expect_refused(mesh.client.dial(mesh.web).await).await;
    mesh.lab.line(&["inbound", "ambient.istio.io/waypoint-inbound-binding"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_of_the_proxy_header_is_nobody_elses() {
    let mut mesh = Mesh::new().await;
    mesh.lab.publish();
    let port = mesh.proxied.local_addr().unwrap().port();
    expect_refused(mesh.waypoints[0].receive_plaintext(new_address(), port).await).await;
    mesh.lab.line(&["inbound", "takes PROXY headers from the mesh alone"]);
    // By a tunnel it is a target like any: the header that arrives says so, and who asked.
    let target = mesh.waypoints[0].at(port);
    let _client = mesh.client.dial(target).await.unwrap();
    let (seen, _) = mesh.handed().await;
    assert_eq!(seen, told(&mesh.client, target));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_that_speaks_hbone_itself_is_reached_by_tunnel() {
    let mut mesh = Mesh::new().await;
    mesh.workload("server").native_tunnel = true;
    mesh.lab.publish();
    echo(mesh.server.listen(8080).await);
    expect_echo(&mut mesh.client.dial(mesh.server.at(8080)).await.unwrap(), b"natively").await;
    let tunnelled = format!("dst.hbone_addr={}", mesh.server.at(8080));
    mesh.lab.line(&["outbound", &tunnelled]);
}
