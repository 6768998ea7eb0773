//! What is decided by which shard is told first.

use std::{
    io::{self, Read as _, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use identity::{Clock, LocalAuthority, generate_root};
use mesh::Contents;
use model::{OriginalDst, PeerAddr, TrustDomain};
use socket2::{Domain, SockRef, Socket, Type};
use telemetry::Format;

use super::*;
use crate::{PodSockets, testing::workload};

const TWO_SHARDS: usize = 2;

/// A pod on loopback; everything that is sent to it was going to its application.
struct Network(SocketAddr);

impl PodSockets for Network {
    fn original_destination(&self, _accepted: SockRef<'_>, _peer: PeerAddr, _local: SocketAddr) -> Option<OriginalDst> {
        None
    }

    fn inbound_destination(&self, _accepted: SockRef<'_>, _local: SocketAddr) -> OriginalDst {
        OriginalDst(self.0)
    }

    fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(target), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    }

    fn inbound_socket(&self, target: SocketAddr, _source: SocketAddr) -> io::Result<Socket> {
        self.outbound_socket(target)
    }
}

struct Rig {
    proxy: Proxy,
    uid: WorkloadUid,
    application: SocketAddr,
    inbound: SocketAddr,
}

/// A proxy of two shards, which serves one pod. The pod's application sends back what it gets.
fn rig() -> Rig {
    let echo = TcpListener::bind("127.0.0.1:0").unwrap();
    let application = echo.local_addr().unwrap();
    std::thread::spawn(move || {
        for client in echo.incoming().map_while(Result::ok) {
            std::thread::spawn(move || io::copy(&mut &client, &mut &client));
        }
    });
    let (mut writer, knowledge) = mesh::new();
    let pod = workload("server", "shop", "127.0.0.1");
    let uid = pod.uid.clone();
    let contents = Contents {
        workloads: vec![pod],
        ..Contents::default()
    };
    assert!(writer.replace(contents, &[]).is_empty());
    let (root, key) = generate_root(&TrustDomain::default()).unwrap();
    let authority = LocalAuthority::from_pem(&root, &key).unwrap();
    let identities = Identities::new(Arc::new(authority), TrustDomain::default(), Clock::system());
    let config = Config {
        shards: TWO_SHARDS,
        shards_per_pod: TWO_SHARDS,
        ..Config::default()
    };
    let log = AccessLog::start(io::sink(), Format::Text).unwrap();
    let proxy = Proxy::start(config, knowledge, identities, log).unwrap();
    let mut rig = Rig {
        proxy,
        uid,
        application,
        inbound: application,
    };
    rig.add();
    rig
}

impl Rig {
    /// The pod comes into the mesh.
    fn add(&mut self) {
        let inbound = TcpListener::bind("127.0.0.1:0").unwrap();
        self.inbound = inbound.local_addr().unwrap();
        let pod = Pod {
            uid: self.uid.clone(),
            sockets: Arc::new(Network(self.application)),
            listeners: PodListeners {
                inbound: vec![inbound],
                ..PodListeners::default()
            },
            dns: None,
        };
        self.proxy.add_pod(pod).unwrap();
    }

    fn dial(&self) -> TcpStream {
        TcpStream::connect(self.inbound).unwrap()
    }

    fn lanes(&self) -> (usize, usize) {
        let lanes = self.proxy.placement.of(&self.uid).unwrap();
        (lanes.home(), lanes.others()[0])
    }

    fn retire(&self, shard: usize) {
        let uid = self.uid.clone();
        self.proxy.shards[shard].tell(Command::RetirePod { uid });
        // It has been done once the next thing has been.
        self.count(shard);
    }

    fn count(&self, shard: usize) -> usize {
        let (answer, answered) = oneshot::channel();
        self.proxy.shards[shard].tell(Command::Connections(answer));
        answered.blocking_recv().unwrap().len()
    }

    /// Until the proxy serves nobody.
    fn wait_idle(&self) {
        until(|| (0..TWO_SHARDS).all(|shard| self.count(shard) == 0));
    }
}

fn until(holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::yield_now();
    }
}

fn expect_echo(mut client: &TcpStream) {
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

#[test]
fn what_the_home_handed_over_last_is_carried() {
    let rig = rig();
    let (home, other) = rig.lanes();
    let stays = rig.dial();
    expect_echo(&stays);
    assert_eq!((rig.count(home), rig.count(other)), (1, 0));
    rig.retire(other);
    // The home does not know yet, and shares out.
    let last = rig.dial();
    expect_echo(&last);
    assert_eq!((rig.count(home), rig.count(other)), (1, 1));
    rig.retire(home);
    until(|| TcpStream::connect(rig.inbound).is_err());
    expect_echo(&last);
    drop((stays, last));
    rig.wait_idle();
}

#[test]
fn a_pod_that_comes_back_keeps_its_connections_and_what_was_under_way() {
    let mut rig = rig();
    let (home, other) = rig.lanes();
    let first = rig.dial();
    expect_echo(&first);
    rig.retire(other);
    let last = rig.dial();
    rig.retire(home);
    rig.add();
    let new = rig.dial();
    for client in [&first, &last, &new] {
        expect_echo(client);
    }
    drop((first, last, new));
    rig.wait_idle();
}

#[test]
fn what_waited_when_a_pod_left_is_carried() {
    let mut rig = rig();
    for _ in 0..50 {
        let waiting: Vec<TcpStream> = (0..20).map(|_| rig.dial()).collect();
        rig.proxy.retire_pod(&rig.uid);
        waiting.iter().for_each(expect_echo);
        rig.add();
    }
}

#[test]
fn a_pod_that_was_removed_takes_nothing_that_is_handed_over() {
    let rig = rig();
    let (home, other) = rig.lanes();
    let stays = rig.dial();
    expect_echo(&stays);
    let uid = rig.uid.clone();
    rig.proxy.shards[other].tell(Command::RemovePod { uid });
    assert_eq!(rig.count(other), 0);
    let mut last = rig.dial();
    assert_eq!(last.read(&mut [0; 1]).unwrap(), 0);
    assert_eq!((rig.count(home), rig.count(other)), (1, 0));
    rig.proxy.remove_pod(&rig.uid);
    rig.wait_idle();
}
