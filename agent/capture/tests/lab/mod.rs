//! A node in a box: a network namespace for the node, one for each pod, one outside, and their cgroups.
//!
//! Each test runs in a process of its own, inside the node's namespace and the agent's cgroup, started by [`test`] in
//! the test binary's process, which also clears up, whatever becomes of the test. What pods do is done by Python
//! interpreters inside them, told line by line.
//!
//! ```text
//! pod a (10.77.1.2, fd77::2) --veth-- node --veth-- outside (10.78.0.2, fd78::2)
//! pod b (10.77.1.3, fd77::3) --veth-/
//! ```
#![allow(dead_code, unreachable_pub)]

mod actor;
mod boxes;

use std::{
    env,
    future::Future,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

pub use actor::Actor;
use boxes::Boxes;
use capture::{IptablesNode, Node, NodeConfig, PodHandle, PodSpec};
use model::{PodSettings, WorkloadUid};

/// How long anything may take before a test fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

const CHILD: &str = "UCCAP_CHILD";

/// Runs a test inside a box of its own.
pub fn test<F: Future<Output = ()>>(name: &str, body: impl FnOnce(Lab) -> F) {
    if let Ok(id) = env::var(CHILD) {
        let lab = Lab {
            boxes: Boxes::existing(id),
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(body(lab));
        return;
    }
    if let Some(why) = why_not() {
        eprintln!("not run: {name}: {why}");
        return;
    }
    let boxes = Boxes::make(name);
    let mut child = Command::new(env::current_exe().unwrap());
    child.args([name, "--exact", "--nocapture"]).env(CHILD, boxes.id());
    let status = boxes.inside(child, None, "agent").status().unwrap();
    drop(boxes);
    assert!(status.success(), "{name} failed: see above");
}

fn why_not() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    if !object_path().exists() {
        return Some(format!(
            "no eBPF object at {} (build it, or set UNDERCURRENT_EBPF)",
            object_path().display()
        ));
    }
    let capabilities = capture::probe();
    (!capabilities.can_capture()).then(|| format!("this kernel lacks a hook:\n{capabilities}"))
}

fn object_path() -> PathBuf {
    env::var_os("UNDERCURRENT_EBPF").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../ebpf/target/bpfel-unknown-none/release/undercurrent"),
        PathBuf::from,
    )
}

/// The box, from inside.
pub struct Lab {
    boxes: Boxes,
}

/// A pod of the box.
#[derive(Clone)]
pub struct TestPod {
    pub spec: PodSpec,
    pub name: String,
}

impl TestPod {
    pub fn uid(&self) -> &WorkloadUid {
        &self.spec.uid
    }

    pub fn ip4(&self) -> IpAddr {
        self.spec.addresses[0]
    }

    pub fn ip6(&self) -> IpAddr {
        self.spec.addresses[1]
    }
}

impl Lab {
    pub fn config(&self) -> NodeConfig {
        NodeConfig {
            node: self.boxes.id().into(),
            pin_dir: self.pin_dir(),
            pods_cgroup: self.boxes.cgroup("pods"),
            agent_cgroup: None,
            takes_over: false,
            capabilities: capture::probe(),
            object: std::fs::read(object_path()).unwrap().leak(),
            kernel_log: env::var_os("UCCAP_LOG").is_some(),
        }
    }

    pub fn pin_dir(&self) -> PathBuf {
        self.boxes.pin_dir()
    }

    /// Starts the capture of the box's node.
    pub fn node(&self) -> Node {
        Node::start(self.config()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Makes a pod with addresses of both families that end in the number.
    pub fn pod(&self, name: &str, number: u8) -> TestPod {
        self.boxes.make_pod(name, number);
        TestPod {
            spec: PodSpec {
                uid: WorkloadUid::of_pod("test", "ns", name),
                netns: self.boxes.netns_path(name),
                addresses: vec![
                    format!("10.77.1.{number}").parse().unwrap(),
                    format!("fd77::{number}").parse().unwrap(),
                ],
            },
            name: name.into(),
        }
    }

    /// An interpreter in a pod, in the pod's cgroup.
    pub fn in_pod(&self, pod: &TestPod) -> Actor {
        self.actor(Some(&pod.name), &format!("pods/{}", pod.name))
    }

    /// An interpreter in a namespace of the box (none: the node's), in a cgroup of the box.
    pub fn actor(&self, netns: Option<&str>, cgroup: &str) -> Actor {
        Actor::start(|command| self.boxes.inside(command, netns, cgroup))
    }

    /// An interpreter in a virtual machine inside a pod (172.20.0.2), behind an interface of the pod's; what it does is
    /// none of the kernel's business, so it is in no pod's cgroup.
    pub fn guest(&self, pod: &str, interface: &str) -> Actor {
        self.boxes.make_guest(pod, interface);
        self.actor(Some("guest"), "elsewhere")
    }

    /// An interpreter outside, beyond the node.
    pub fn outside(&self) -> Actor {
        self.actor(Some("out"), "elsewhere")
    }

    /// An interpreter in the node's namespace, as a kubelet has it.
    pub fn kubelet(&self) -> Actor {
        self.actor(None, "kubelet")
    }

    /// Runs a program, in a namespace of the box (none: the node's).
    pub fn run(&self, netns: Option<&str>, command: &str) -> String {
        self.boxes.run(netns, command)
    }

    /// The rules of iptables in a namespace of the box (none: the node's), without tables, policies and counters.
    pub fn rules(&self, netns: Option<&str>) -> String {
        let saved = self.run(netns, "iptables-save") + &self.run(netns, "ip6tables-save");
        saved
            .lines()
            .filter(|line| line.starts_with('-'))
            .collect::<Vec<_>>()
            .join("\n")
    }

    /// What capture changes in the pod `a`: rules, routes, settings.
    pub fn settings(&self) -> String {
        [
            "ip -4 rule",
            "ip -6 rule",
            "ip -4 route show table all",
            "ip -6 route show table all",
            "sysctl net.ipv4.tcp_fwmark_accept net.ipv4.fwmark_reflect net.ipv6.fwmark_reflect",
            "sysctl net.ipv4.conf.all.rp_filter",
        ]
        .map(|command| self.run(Some("a"), command))
        .join("")
        .lines()
        // The kernel adds it by itself, when it has seen that nobody else has the address.
        .filter(|line| !line.starts_with("local fe80:"))
        .collect::<Vec<_>>()
        .join("\n")
    }

    pub fn links(&self) -> Vec<PathBuf> {
        let mut found = files_below(&self.pin_dir());
        found.sort();
        found
    }

    /// The device names on the node of a pod's veth.
    pub fn host_side(&self, pod: &TestPod) -> String {
        format!("v-{}", pod.name)
    }

    pub fn id(&self) -> &str {
        self.boxes.id()
    }
}

pub const OUTSIDE4: &str = "10.78.0.2";
pub const OUTSIDE6: &str = "fd78::2";

/// Outside, for iptables: the last part of a handshake with port 8080 does not arrive.
pub const HOLD_BACK: &str = "OUTPUT -p tcp --dport 8080 --tcp-flags SYN,ACK ACK -j DROP";

/// From one port of the client's a connection after another, each at once after the one before, and never two.
pub fn a_port_serves_again_but_never_two(
    app: &mut Actor,
    socket: impl Fn(SocketAddr) -> std::io::Result<socket2::Socket>,
    target: SocketAddr,
    client: SocketAddr,
) {
    let source = SocketAddr::new(client.ip(), 61500);
    let dial = || connect(socket(source)?, target);
    for _ in 0..3 {
        let one = dial().unwrap();
        assert_eq!(one.local_addr().unwrap().port(), 61500);
        let two = dial().unwrap_err();
        assert_eq!(two.kind(), std::io::ErrorKind::AddrNotAvailable, "{two}");
        // In order, so that its end waits (TIME_WAIT).
        drop(one);
        app.must("l.accept()[0].close()");
    }
}

/// That address, and whichever port the kernel chooses.
pub fn any_port(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), 0)
}

fn files_below(directory: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().unwrap().is_dir() {
            found.extend(files_below(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found
}

/// Accepts within [`PATIENCE`].
pub fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    let (stream, peer) = until("a connection comes", || listener.accept().ok());
    stream.set_nonblocking(false).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, peer)
}

/// That nobody has connected.
pub fn nobody_came(listener: &TcpListener) -> bool {
    listener.accept().is_err()
}

/// Connects a nonblocking socket within [`PATIENCE`].
pub fn connect(socket: socket2::Socket, target: SocketAddr) -> std::io::Result<TcpStream> {
    socket.set_nonblocking(false)?;
    socket.connect_timeout(&target.into(), PATIENCE)?;
    let stream: TcpStream = socket.into();
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// Asks until there is an answer, and fails after [`PATIENCE`].
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "waited {PATIENCE:?} in vain until {what}");
        std::thread::yield_now();
    }
}

/// What forbids a pod all that is not TCP.
pub fn forbidding() -> PodSettings {
    PodSettings {
        forbid_non_tcp: true,
        ..PodSettings::default()
    }
}

/// Captures a pod and returns its handle and listeners.
pub async fn captured(node: &Node, pod: &TestPod) -> (PodHandle, capture::PodListeners) {
    let handle = node
        .capture(pod.spec.clone(), PodSettings::default())
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let listeners = handle.listeners().unwrap();
    (handle, listeners)
}

/// The same by iptables.
pub async fn captured_by_rules(
    node: &IptablesNode,
    pod: &TestPod,
) -> (capture::IptablesPodHandle, capture::PodListeners) {
    let handle = node.capture(pod.spec.clone(), PodSettings::default()).await;
    let handle = handle.unwrap_or_else(|error| panic!("{error}"));
    (handle.clone(), handle.listeners().unwrap())
}

/// Whether two descriptors are open on the same thing is not asked here; only that the number is one.
pub fn fd_of(stream: &TcpStream) -> i32 {
    stream.as_raw_fd()
}
