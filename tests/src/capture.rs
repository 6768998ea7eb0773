//! Every packet on the wire between the nodes, or in any other namespace.
//!
//! A capture is bracketed: it begins when tcpdump says that it listens, and ends when a packet that we send after
//! everything else is in the file. So what is not in the file was not on the wire.

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Child, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{netns, wait};

/// Where every packet between nodes can be seen.
pub const FABRIC: &str = "uc-fabric";

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A running capture.
pub struct Capture {
    child: Child,
    file: PathBuf,
    _directory: tempfile::TempDir,
    sentinel: Sentinel,
}

/// Who sends the last packet, and where to.
#[derive(Clone)]
struct Sentinel {
    netns: String,
    to: SocketAddr,
}

/// What was captured.
pub struct Packets {
    bytes: Vec<u8>,
    file: PathBuf,
    _directory: tempfile::TempDir,
}

impl Capture {
    /// Captures between the nodes.
    pub fn on_fabric() -> Result<Self> {
        let to = SocketAddr::from(([172, 30, 0, 2], 9));
        Self::start(
            FABRIC,
            Sentinel {
                netns: "uc-node-1".to_owned(),
                to,
            },
        )
    }

    /// Captures on a node: its side of its pods' links, and its link to the fabric.
    pub fn of_node(node: &str) -> Result<Self> {
        let netns = format!("uc-{node}");
        let to = SocketAddr::from(([172, 30, 0, if node == "node-1" { 2 } else { 1 }], 9));
        Self::start(
            &netns,
            Sentinel {
                netns: netns.clone(),
                to,
            },
        )
    }

    /// Captures everything that reaches a pod from its node.
    pub fn of_pod(netns: &str, node: &str, address: IpAddr) -> Result<Self> {
        Self::start(
            netns,
            Sentinel {
                netns: node.to_owned(),
                to: SocketAddr::new(address, 9),
            },
        )
    }

    fn start(namespace: &str, sentinel: Sentinel) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let file = directory.path().join("packets.pcap");
        // All interfaces: whatever enters a bridge port is seen, even if the bridge would not forward it.
        let mut child = netns::command(namespace, "tcpdump")
            .args([
                "-i",
                "any",
                "-n",
                "-U",
                "--immediate-mode",
                "-B",
                "65536",
                "-Z",
                "root",
                "-w",
            ])
            .arg(&file)
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start tcpdump")?;
        let stderr = child.stderr.take().context("standard error is piped")?;
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let ready = lines.any(|line| line.contains("listening on"));
        // What it says at its end must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        ensure!(ready, "tcpdump does not listen in {namespace}");
        Ok(Self {
            child,
            file,
            _directory: directory,
            sentinel,
        })
    }

    /// Ends the capture, once everything until now is in it.
    pub fn stop(mut self) -> Result<Packets> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let last = format!("end-of-capture-{}-{number}", std::process::id());
        wait::until_true("the last packet is in the capture", || {
            self.send(last.as_bytes())?;
            Ok(find(&fs::read(&self.file)?, last.as_bytes()))
        })?;
        let pid = Pid::from_raw(self.child.id().try_into()?);
        kill(pid, Signal::SIGTERM).context("cannot end tcpdump")?;
        self.child.wait()?;
        let directory = std::mem::replace(&mut self._directory, tempfile::tempdir()?);
        Ok(Packets {
            bytes: fs::read(&self.file)?,
            file: self.file.clone(),
            _directory: directory,
        })
    }

    fn send(&self, text: &[u8]) -> Result<()> {
        let Sentinel { netns, to } = self.sentinel.clone();
        netns::inside(&netns, || {
            let any: IpAddr = if to.is_ipv4() {
                [0, 0, 0, 0].into()
            } else {
                [0u16; 8].into()
            };
            let socket = UdpSocket::bind((any, 0))?;
            // The answer to an earlier one may be "connection refused".
            let _ = socket.send_to(text, to);
            Ok(())
        })
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Packets {
    /// Whether these bytes stand anywhere in it.
    pub fn contain(&self, bytes: &str) -> bool {
        find(&self.bytes, bytes.as_bytes())
    }

    /// The packets that a filter expression of tcpdump selects, a line each.
    pub fn matching(&self, filter: &str) -> Result<Vec<String>> {
        let mut tcpdump = std::process::Command::new("tcpdump");
        let output = tcpdump
            .args(["-n", "-Z", "root", "-r"])
            .arg(&self.file)
            .arg(filter)
            .output()?;
        if !output.status.success() {
            bail!("tcpdump {filter:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(str::to_owned)
            .collect())
    }
}

fn find(haystack: &[u8], needle: &[u8]) -> bool {
    let Some(first) = needle.first() else { return true };
    let mut rest = haystack;
    while let Some(at) = rest.iter().position(|byte| byte == first) {
        if rest[at..].starts_with(needle) {
            return true;
        }
        rest = &rest[at + 1..];
    }
    false
}
