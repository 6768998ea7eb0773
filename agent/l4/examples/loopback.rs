//! Two proxies on loopback, for measuring without capture: whatever connects to the printed address is a client pod's
//! application that dialled the server pod.
//!
//! ```text
//! cargo run --release -p l4 --example loopback -- [SHARDS]
//! load serve --listen 127.9.0.2:8080          the server pod's application
//! load requests --target 127.9.0.1:15001      the client pod's
//! ```
//! `noisy` (127.9.0.3) and `noisy-server` (127.9.0.4) are another two pods of the same proxies: to see what a neighbour does.
//!
//! A STRICT policy and the access log (to nowhere) are on, as by default. Ends when stdin does.

#![allow(clippy::unwrap_used)]

use std::{
    io::{self, Read},
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use identity::{Clock, Identities, LocalAuthority, generate_root};
use l4::{Config, Pod, PodListeners, PodSockets, Proxy};
use model::{Action, Match, OriginalDst, PeerAddr, Policy, Scope, StringMatch, TrustDomain};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use telemetry::{AccessLog, Format};

/// Each pod, and whom it dials.
const PODS: [(&str, &str, Option<&str>); 4] = [
    ("client", "127.9.0.1", Some("127.9.0.2")),
    ("server", "127.9.0.2", None),
    ("noisy", "127.9.0.3", Some("127.9.0.4")),
    ("noisy-server", "127.9.0.4", None),
];

struct Network {
    own: IpAddr,
    dials: Option<IpAddr>,
}

impl PodSockets for Network {
    fn original_destination(&self, _: SockRef<'_>, _: PeerAddr, _: SocketAddr) -> Option<OriginalDst> {
        Some(OriginalDst(SocketAddr::new(self.dials?, 8080)))
    }

    fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        bound((self.own, 0).into(), target)
    }

    fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
        bound(source, target)
    }
}

fn bound(source: SocketAddr, target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(source.port() != 0)?;
    socket.bind(&source.into())?;
    Ok(socket)
}

fn serve(proxy: &Proxy, name: &str, own: &str, dials: Option<&str>) {
    let own: IpAddr = own.parse().unwrap();
    let listener = |port| vec![std::net::TcpListener::bind(SocketAddr::new(own, port)).unwrap()];
    let listeners = PodListeners {
        outbound: listener(15001),
        inbound: listener(15006),
        hbone: listener(15008),
    };
    let uid = model::WorkloadUid::of_pod("Kubernetes", "shop", name);
    proxy
        .add_pod(Pod {
            uid,
            sockets: Arc::new(Network {
                own,
                dials: dials.map(|ip| ip.parse().unwrap()),
            }),
            listeners,
            dns: None,
        })
        .unwrap();
}

fn main() {
    let trust_domain = TrustDomain::default();
    let (certificate, key) = generate_root(&trust_domain).unwrap();
    let authority = LocalAuthority::from_pem(&certificate, &key).unwrap();
    let identities = Identities::new(Arc::new(authority), trust_domain, Clock::system());
    let (mut writer, knowledge) = mesh::new();
    let workloads = PODS.map(|(name, ip, _)| {
        format!("- {{uid: Kubernetes//v1/Pod/shop/{name}, name: {name}, namespace: shop, workloadIps: [{ip}], protocol: HBONE}}\n")
    });
    let mut contents = mesh::static_file::parse(&format!("workloads:\n{}", workloads.concat()))
        .unwrap()
        .0;
    let no_identity = Match {
        not_principals: vec![StringMatch::Presence],
        ..Match::default()
    };
    contents.policies.push(Policy {
        name: "strict".into(),
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action: Action::Deny,
        rules: vec![vec![vec![no_identity]]],
        dry_run: false,
        origin: None,
    });
    writer.replace(contents, &[]);
    let mut config = Config::default();
    if let Some(shards) = std::env::args().nth(1) {
        config.shards = shards.parse().unwrap();
    }
    let log = AccessLog::start(io::sink(), Format::Text).unwrap();
    let start = || Proxy::start(config.clone(), knowledge.clone(), identities.clone(), log.clone()).unwrap();
    let (near, far) = (start(), start());
    for (name, ip, dials) in PODS {
        let (proxy, port) = if dials.is_some() { (&near, 15001) } else { (&far, 8080) };
        serve(proxy, name, ip, dials);
        println!("{name}: {ip}:{port}");
    }
    println!("shards: {} each", config.shards);
    let _ = io::stdin().read_to_end(&mut Vec::new());
    println!(
        "client's proxy: {:?}\nserver's proxy: {:?}",
        near.counters(),
        far.counters()
    );
}
