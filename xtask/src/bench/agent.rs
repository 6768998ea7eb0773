//! How long a node agent takes from its start to being ready, with one captured pod's worth of knowledge.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::envoy::certificates;
use super::lab::{Lab, Scratch, in_netns};
use super::process::{Running, answers_ok, wait_ready};

/// Starts one in a namespace of its own, asks `/healthz/ready` until it is 200, and takes it away again.
pub fn time_to_ready(lab: &Lab, limit: Duration) -> Result<Duration> {
    certificates(lab)?;
    let _scratch = Scratch::new()?;
    let place = Place::new()?;
    let state = std::env::temp_dir().join(format!("uc-bench-{}", std::process::id()));
    std::fs::create_dir_all(&state)?;
    let knowledge = lab.path("scratch.yaml");
    std::fs::write(&knowledge, "workloads: []\npolicies: []\n")?;
    let mut agent = in_netns(Scratch::NAME, "sh");
    // The caller places the agent in its cgroup.
    agent
        .args(["-c", "echo $$ > \"$0/cgroup.procs\"; exec \"$@\""])
        .arg(place.path("agent"))
        .arg(lab.undercurrent());
    agent
        .args(["node", "--node", "bench", "--access-log", "off", "--static"])
        .arg(&knowledge);
    agent
        .arg("--ca-cert")
        .arg(lab.path("certificates/ca.pem"))
        .arg("--ca-key")
        .arg(lab.path("certificates/ca.key"));
    agent
        .arg("--state-dir")
        .arg(&state)
        .arg("--pods-cgroup")
        .arg(place.path("pods"));
    agent.arg("--pin-dir").arg(&place.pins);
    let start = Instant::now();
    let outcome = Running::start(&mut agent, &lab.path("agent-scratch.log")).and_then(|mut running| {
        wait_ready(start, limit, || {
            running.alive()?;
            Ok(answers_ok(&state.join("agent.sock"), "/healthz/ready"))
        })
    });
    let _ = std::fs::remove_dir_all(&state);
    outcome.context("a node agent of its own; see agent-scratch.log under target/bench/lab")
}

/// Cgroups and pins of an agent of our own; gone when dropped.
struct Place {
    cgroup: std::path::PathBuf,
    pins: std::path::PathBuf,
}

impl Place {
    fn new() -> Result<Self> {
        let mounts = std::fs::read_to_string("/proc/mounts")?;
        let of = |kind: &str| {
            let mount = mounts.lines().find(|mount| mount.split(' ').nth(2) == Some(kind));
            mount.and_then(|mount| mount.split(' ').nth(1)).map(str::to_owned)
        };
        let cgroup = of("cgroup2").context("no cgroup v2 is mounted")?;
        let pins = of("bpf").unwrap_or_else(|| "/sys/fs/bpf".to_owned());
        let place = Place {
            cgroup: std::path::Path::new(&cgroup).join("uc-bench"),
            pins: std::path::Path::new(&pins).join("uc-bench"),
        };
        for name in ["agent", "pods"] {
            std::fs::create_dir_all(place.path(name))?;
        }
        Ok(place)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.cgroup.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Pins are what holds the programs: without them they are gone.
        let _ = Command::new("rm").arg("-rf").arg(&self.pins).status();
        for directory in [self.path("agent"), self.path("pods"), self.cgroup.clone()] {
            let _ = std::fs::remove_dir(directory);
        }
    }
}
