//! Namespaces, devices and cgroups of a box; made, entered, and cleared away.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicU32, Ordering},
};

use nix::sched::{CloneFlags, setns};

const PREFIX: &str = "uccap-";

/// The things that a test's box is made of. The process that made them removes them.
pub struct Boxes {
    id: String,
    owner: bool,
}

impl Boxes {
    pub fn existing(id: String) -> Self {
        Self { id, owner: false }
    }

    pub fn make(test: &str) -> Self {
        clear_stale();
        // Names of tests may begin alike.
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let short: String = test.chars().take(22).collect();
        let boxes = Self {
            id: format!("{PREFIX}{}-{number}-{short}", std::process::id()),
            owner: true,
        };
        boxes.clear();
        for cgroup in ["agent", "kubelet", "elsewhere", "pods", "pods/hostnet"] {
            fs::create_dir_all(boxes.cgroup(cgroup)).unwrap();
        }
        for netns in ["node", "out"] {
            sh(&format!("ip netns add {}", boxes.netns(netns)));
            boxes.run(Some(netns), "ip link set lo up");
        }
        let (node, out) = (boxes.netns("node"), boxes.netns("out"));
        sh(&format!(
            "ip -n {node} link add eth0 type veth peer name eth0 netns {out}"
        ));
        for (netns, number) in [(&node, 1), (&out, 2)] {
            sh(&format!("ip -n {netns} addr add 10.78.0.{number}/24 dev eth0"));
            sh(&format!("ip -n {netns} addr add fd78::{number}/64 dev eth0 nodad"));
            sh(&format!("ip -n {netns} link set eth0 up"));
        }
        sh(&format!("ip -n {out} route add 10.77.0.0/16 via 10.78.0.1"));
        sh(&format!("ip -n {out} route add fd77::/64 via fd78::1"));
        boxes.run(
            Some("node"),
            "sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1",
        );
        boxes
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn cgroup(&self, name: &str) -> PathBuf {
        cgroups().join(&self.id).join(name)
    }

    pub fn pin_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(&self.id)
    }

    fn netns(&self, name: &str) -> String {
        format!("{}.{name}", self.id)
    }

    pub fn netns_path(&self, name: &str) -> PathBuf {
        Path::new("/run/netns").join(self.netns(name))
    }

    /// A pod's namespace, routed on the node as CNI plugins do it.
    pub fn make_pod(&self, name: &str, number: u8) {
        fs::create_dir_all(self.cgroup(&format!("pods/{name}"))).unwrap();
        let (pod, node, veth) = (self.netns(name), self.netns("node"), format!("v-{name}"));
        sh(&format!("ip netns add {pod}"));
        sh(&format!(
            "ip -n {node} link add {veth} type veth peer name eth0 netns {pod}"
        ));
        sh(&format!("ip -n {node} addr add 10.77.0.1/32 dev {veth}"));
        sh(&format!("ip -n {node} addr add fe80::1/64 dev {veth} nodad"));
        sh(&format!("ip -n {node} link set {veth} up"));
        sh(&format!("ip -n {pod} link set lo up"));
        sh(&format!("ip -n {pod} addr add 10.77.1.{number}/32 dev eth0"));
        sh(&format!("ip -n {pod} addr add fd77::{number}/128 dev eth0 nodad"));
        sh(&format!("ip -n {pod} link set eth0 up"));
        sh(&format!("ip -n {pod} route add 10.77.0.1 dev eth0"));
        sh(&format!("ip -n {pod} route add default via 10.77.0.1 dev eth0"));
        sh(&format!("ip -n {pod} route add default via fe80::1 dev eth0"));
        sh(&format!("ip -n {node} route add 10.77.1.{number}/32 dev {veth}"));
        sh(&format!("ip -n {node} route add fd77::{number}/128 dev {veth}"));
    }

    /// A namespace whose only way out is through a pod, as a virtual machine or a container in it has.
    pub fn make_guest(&self, pod: &str, interface: &str) {
        let (pod, guest) = (self.netns(pod), self.netns("guest"));
        sh(&format!("ip netns add {guest}"));
        sh(&format!(
            "ip -n {pod} link add {interface} type veth peer name eth0 netns {guest}"
        ));
        sh(&format!("ip -n {pod} addr add 172.20.0.1/24 dev {interface}"));
        sh(&format!("ip -n {pod} link set {interface} up"));
        sh(&format!("ip -n {guest} addr add 172.20.0.2/24 dev eth0"));
        sh(&format!("ip -n {guest} link set eth0 up"));
        sh(&format!("ip -n {guest} route add default via 172.20.0.1"));
    }

    /// The command, to be run in a namespace and a cgroup of the box.
    pub fn inside(&self, mut command: Command, netns: Option<&str>, cgroup: &str) -> Command {
        let netns = fs::File::open(self.netns_path(netns.unwrap_or("node"))).unwrap();
        let procs = self.cgroup(cgroup).join("cgroup.procs");
        // SAFETY: between fork and exec only system calls, and a write to a file.
        #[expect(unsafe_code, reason = "pre_exec")]
        unsafe {
            command.pre_exec(move || {
                fs::write(&procs, "0")?;
                setns(&netns, CloneFlags::CLONE_NEWNET)?;
                Ok(())
            });
        }
        command
    }

    pub fn run(&self, netns: Option<&str>, command: &str) -> String {
        let path = self.netns_path(netns.unwrap_or("node"));
        sh(&format!("nsenter --net={} {command}", path.display()))
    }

    fn clear(&self) {
        let tree = cgroups().join(&self.id);
        let _ = fs::write(tree.join("cgroup.kill"), "1");
        let _ = capture::uninstall(&self.pin_dir());
        for name in names("/run/netns").filter(|name| name.starts_with(&format!("{}.", self.id))) {
            let _ = Command::new("ip").args(["netns", "del", &name]).output();
        }
        let deadline = std::time::Instant::now() + super::PATIENCE;
        while tree.exists() && std::time::Instant::now() < deadline {
            remove_cgroups(&tree);
        }
    }
}

impl Drop for Boxes {
    fn drop(&mut self) {
        if self.owner {
            self.clear();
        }
    }
}

/// What a killed run left behind.
fn clear_stale() {
    let ids: Vec<String> = names("/run/netns")
        .filter_map(|name| Some(name.split_once('.')?.0.to_owned()))
        .chain(names(cgroups()))
        .chain(names("/sys/fs/bpf"))
        .filter(|id| {
            let pid = id.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
            pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
        })
        .collect();
    for id in ids {
        Boxes { id, owner: false }.clear();
    }
}

fn cgroups() -> PathBuf {
    capture::cgroup_mount().unwrap()
}

fn remove_cgroups(tree: &Path) {
    for entry in fs::read_dir(tree).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(tree);
}

fn names(directory: impl AsRef<Path>) -> impl Iterator<Item = String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
}

pub fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    assert!(
        output.status.success(),
        "{command}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
