//! A mesh on plain loopback: each pod is an address of 127.0.0.0/8 with real listeners, real certificates and a real
//! proxy. Only capture is played: a client says where it wants to go before it dials its pod's outbound listener.

#![allow(dead_code, missing_docs, unused_imports, clippy::unwrap_used)]

pub mod two;

use std::{
    collections::HashMap,
    io::{self, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    time::Duration,
};

use identity::{Clock, Identities, LocalAuthority, generate_root};
use l4::{Config, Pod, PodListeners, PodSockets, Proxy};
use mesh::{Contents, Knowledge, Writer};
use model::{
    MeshSettings, NamespacedName, OriginalDst, PeerAddr, Policy, Service, TrustDomain, TunnelProtocol, Workload,
    WorkloadUid,
};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use telemetry::{AccessLog, Format};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
};

/// No other process of this machine, and no other test of this one, uses the same addresses.
pub fn new_address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let (high, low) = ((process / 250 % 250) as u8, (process % 250) as u8);
    IpAddr::V4(Ipv4Addr::new(
        127,
        1 + high,
        1 + low,
        NEXT.fetch_add(1, Ordering::Relaxed),
    ))
}

/// Who dials this port makes the proxy panic.
pub const PANIC_PORT: u16 = 666;

/// A pod's network, played.
pub struct LoopbackNetwork {
    ip: IpAddr,
    dialled: Mutex<HashMap<SocketAddr, SocketAddr>>,
    steered: Mutex<Option<SocketAddr>>,
    /// Where the pod's datagrams to its name server were going.
    pub name_server: Mutex<Option<SocketAddr>>,
}

impl PodSockets for LoopbackNetwork {
    fn original_destination(&self, _accepted: SockRef<'_>, peer: PeerAddr, _local: SocketAddr) -> Option<OriginalDst> {
        let dialled = self.dialled.lock().unwrap().remove(&peer.0)?;
        assert_ne!(dialled.port(), PANIC_PORT, "a bug that the test makes");
        Some(OriginalDst(dialled))
    }

    fn inbound_destination(&self, _accepted: SockRef<'_>, local: SocketAddr) -> OriginalDst {
        OriginalDst(self.steered.lock().unwrap().unwrap_or(local))
    }

    fn outbound_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        socket_from((self.ip, 0).into(), target)
    }

    fn inbound_socket(&self, target: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
        socket_from(source, target)
    }

    fn name_server(&self, _slot: usize, _client: SocketAddr) -> Option<SocketAddr> {
        *self.name_server.lock().unwrap()
    }

    fn datagram_socket(&self, target: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(target), Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_nonblocking(true)?;
        socket.bind(&SocketAddr::new(self.ip, 0).into())?;
        Ok(socket)
    }
}

fn socket_from(source: SocketAddr, target: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(target), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_nonblocking(true)?;
    if source.is_ipv4() == target.is_ipv4() {
        socket.set_reuse_address(source.port() != 0)?;
        socket.bind(&source.into())?;
    }
    Ok(socket)
}

pub struct LabPod {
    pub uid: WorkloadUid,
    pub ip: IpAddr,
    pub outbound: SocketAddr,
    pub inbound: SocketAddr,
    pub network: Arc<LoopbackNetwork>,
}

impl LabPod {
    pub fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, port)
    }

    /// As an application of the pod that is captured.
    pub async fn dial(&self, destination: SocketAddr) -> io::Result<TcpStream> {
        let socket = if self.ip.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.bind(SocketAddr::new(self.ip, 0))?;
        self.network
            .dialled
            .lock()
            .unwrap()
            .insert(socket.local_addr()?, destination);
        socket.connect(self.outbound).await
    }

    /// As somebody who dials the capture port itself.
    pub async fn dial_uncaptured(&self) -> io::Result<TcpStream> {
        TcpStream::connect(self.outbound).await
    }

    /// As somebody outside the mesh, in plaintext.
    pub async fn receive_plaintext(&self, from: IpAddr, port: u16) -> io::Result<TcpStream> {
        *self.network.steered.lock().unwrap() = Some(self.at(port));
        let socket = TcpSocket::new_v4()?;
        socket.bind(SocketAddr::new(from, 0))?;
        socket.connect(self.inbound).await
    }

    pub async fn listen(&self, port: u16) -> TcpListener {
        TcpListener::bind(self.at(port)).await.unwrap()
    }
}

struct Lines(mpsc::Sender<String>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for line in String::from_utf8_lossy(bytes).lines() {
            let _ = self.0.send(line.to_owned());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub struct Lab {
    pub writer: Writer,
    pub knowledge: Knowledge,
    pub contents: Contents,
    pub identities: Identities,
    /// The root of all certificates, PEM.
    pub root: String,
    log: AccessLog,
    lines: mpsc::Receiver<String>,
}

impl Lab {
    pub fn new() -> Self {
        let (writer, knowledge) = mesh::new();
        Self::knowing(writer, knowledge)
    }

    /// A lab of this knowledge.
    pub fn knowing(writer: Writer, knowledge: Knowledge) -> Self {
        let trust_domain = TrustDomain::default();
        let (certificate, key) = generate_root(&trust_domain).unwrap();
        let authority = LocalAuthority::from_pem(&certificate, &key).unwrap();
        let (sender, lines) = mpsc::channel();
        Self {
            writer,
            knowledge,
            contents: Contents::default(),
            identities: Identities::new(Arc::new(authority), trust_domain, Clock::system()),
            root: certificate,
            log: AccessLog::start(Lines(sender), Format::Text).unwrap(),
            lines,
        }
    }

    pub fn proxy(&self) -> Proxy {
        self.proxy_with(Config::default())
    }

    pub fn proxy_with(&self, config: Config) -> Proxy {
        Proxy::start(
            config,
            self.knowledge.clone(),
            self.identities.clone(),
            self.log.clone(),
        )
        .unwrap()
    }

    /// What is in `contents` becomes known.
    pub fn publish(&mut self) {
        let rejected = self.writer.replace(self.contents.clone(), &[]);
        assert!(rejected.is_empty(), "{rejected:?}");
    }

    /// A pod of the mesh, served by the proxy; known once it is published.
    pub fn pod(&mut self, proxy: &Proxy, name: &str) -> LabPod {
        let ip = new_address();
        self.pod_at(proxy, name, ip)
    }

    pub fn pod_at(&mut self, proxy: &Proxy, name: &str, ip: IpAddr) -> LabPod {
        let (pod, late) = self.late_pod(name, ip);
        proxy.add_pod(late).unwrap();
        pod
    }

    /// A pod whose listeners take connections and do not answer, until it is given to a proxy.
    pub fn late_pod(&mut self, name: &str, ip: IpAddr) -> (LabPod, Pod) {
        let workload = workload(name, ip);
        let uid = workload.uid.clone();
        self.contents.workloads.push(workload);
        let listener = |port| std::net::TcpListener::bind(SocketAddr::new(ip, port)).unwrap();
        let (outbound, inbound, hbone) = (listener(0), listener(0), listener(15008));
        let network = Arc::new(LoopbackNetwork {
            ip,
            dialled: Mutex::default(),
            steered: Mutex::default(),
            name_server: Mutex::default(),
        });
        let pod = LabPod {
            uid: uid.clone(),
            ip,
            outbound: outbound.local_addr().unwrap(),
            inbound: inbound.local_addr().unwrap(),
            network: network.clone(),
        };
        let listeners = PodListeners {
            outbound: vec![outbound],
            inbound: vec![inbound],
            hbone: vec![hbone],
        };
        let late = Pod {
            uid,
            sockets: network,
            listeners,
            dns: None,
        };
        (pod, late)
    }

    /// A workload that is known and not served by any proxy.
    pub fn workload(&mut self, name: &str, protocol: TunnelProtocol) -> IpAddr {
        let ip = new_address();
        self.contents.workloads.push(Workload {
            protocol,
            ..workload(name, ip)
        });
        ip
    }

    pub fn service(&mut self, name: &str, port: u16, target: u16, endpoints: &[&str]) -> SocketAddr {
        let vip = new_address();
        let service = Service {
            name: name.into(),
            namespace: "shop".into(),
            hostname: format!("{name}.shop.svc.cluster.local").into(),
            vips: vec![format!("/{vip}").parse().unwrap()],
            ports: [(port, target)].into(),
            ..Service::default()
        };
        for workload in &mut self.contents.workloads {
            if endpoints.contains(&&*workload.name) {
                workload.services.insert(service.key(), [(port, target)].into());
            }
        }
        self.contents.services.push(service);
        SocketAddr::new(vip, port)
    }

    /// Every line that was written and not read yet; of what has ended before.
    pub fn lines(&self) -> Vec<String> {
        self.log.flush(Duration::from_secs(30));
        self.lines.try_iter().collect()
    }

    /// Waits for the access-log line that holds all of these texts.
    pub fn line(&self, texts: &[&str]) -> String {
        let mut others = Vec::new();
        loop {
            match self.lines.recv_timeout(Duration::from_secs(30)) {
                Ok(line) if texts.iter().all(|text| line.contains(text)) => return line,
                Ok(line) => others.push(line),
                Err(_) => panic!("no line with {texts:?} among {others:#?}"),
            }
        }
    }
}

fn workload(name: &str, ip: IpAddr) -> Workload {
    Workload {
        uid: WorkloadUid::of_pod("Kubernetes", "shop", name),
        name: name.into(),
        namespace: "shop".into(),
        trust_domain: TrustDomain::default(),
        service_account: name.into(),
        workload_ips: vec![ip],
        protocol: TunnelProtocol::Hbone,
        network_mode: model::NetworkMode::Standard,
        node: "node".into(),
        canonical_name: name.into(),
        canonical_revision: "v1".into(),
        workload_name: name.into(),
        workload_type: "deployment".into(),
        cluster_id: "Kubernetes".into(),
        services: Default::default(),
        authorization_policies: Vec::new(),
        status: model::HealthStatus::Healthy,
        ..Workload::default()
    }
}

/// A field of an access-log line.
pub fn value<'a>(line: &'a str, field: &str) -> Option<&'a str> {
    let rest = &line[line.find(&format!(" {field}="))? + field.len() + 2..];
    Some(match rest.strip_prefix('"') {
        Some(quoted) => quoted.split('"').next()?,
        None => rest.split_whitespace().next()?,
    })
}

/// A policy of namespace `shop`.
pub fn policy(name: &str, action: model::Action, one: model::Match) -> Policy {
    Policy {
        name: name.into(),
        namespace: "shop".into(),
        scope: model::Scope::Namespace,
        action,
        rules: vec![vec![vec![one]]],
        dry_run: false,
        origin: None,
    }
}

/// Serves whoever comes: sends back what it gets, until its end.
pub fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        loop {
            // Fails while there are no file descriptors.
            let Ok((mut socket, _)) = listener.accept().await else {
                tokio::task::yield_now().await;
                continue;
            };
            tokio::spawn(async move {
                let (mut reader, mut writer) = socket.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                let _ = writer.shutdown().await;
            });
        }
    });
}

/// Says something and expects it back.
pub async fn expect_echo(socket: &mut TcpStream, text: &[u8]) {
    socket.write_all(text).await.unwrap();
    let mut answer = vec![0; text.len()];
    socket.read_exact(&mut answer).await.unwrap();
    assert_eq!(answer, text);
}

/// Expects that the connection is reset, not closed.
pub async fn expect_reset(mut socket: TcpStream) {
    let read = socket.read_to_end(&mut Vec::new()).await;
    assert_eq!(read.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
}

/// Expects that a connection is refused with a reset, which may come so early that connecting already fails.
pub async fn expect_refused(dialled: io::Result<TcpStream>) {
    match dialled {
        Ok(socket) => expect_reset(socket).await,
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset),
    }
}

/// Waits for a condition that comes to be by itself.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !holds().await {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), waiting)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

/// A CONNECT as a peer might make it that knows something else than this lab: the status of the answer.
pub fn connect_by_hand(
    lab: &Lab,
    source: &LabPod,
    address: SocketAddr,
    asked: SocketAddr,
) -> impl Future<Output = u16> + Send + use<> {
    let (identities, ip, uid) = (lab.identities.clone(), source.ip, source.uid.clone());
    let workloads = &lab.contents.workloads;
    let workload = |is: &dyn Fn(&&Workload) -> bool| workloads.iter().find(is).unwrap().identity();
    let own = workload(&|workload| workload.uid == uid);
    let peer = workload(&|workload| workload.workload_ips.contains(&address.ip()));
    let connect = async move || {
        let credentials = identities.credentials(&own).await.unwrap();
        let key = hbone::TunnelKey {
            source: own,
            destination: vec![peer],
            workload: WorkloadUid::default(),
            address,
        };
        let request = hbone::ConnectRequest {
            authority: model::Authority::Address(asked),
            headers: Vec::new(),
        };
        let pool = hbone::Pool::new(std::rc::Rc::default());
        match pool
            .open(&key, &credentials, || socket_from((ip, 0).into(), address), request)
            .await
        {
            Ok(_) => 200,
            Err(hbone::OpenError::Refused { status, .. }) => status,
            Err(error) => panic!("{error}"),
        }
    };
    // A tunnel stays on its thread.
    let run = move || {
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().build_local(Default::default()).unwrap();
        runtime.block_on(connect())
    };
    let thread = tokio::task::spawn_blocking(run);
    async move { thread.await.unwrap() }
}
