//! What `up` tells a kubelet, and what the kubelet tells `up`: two files for each pod.

use std::{
    collections::BTreeMap,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    files::write_atomically,
    layout::{NodeLayout, PodLayout, pod_id},
    process::Process,
};

/// A pod that is to run on this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Desired {
    /// Which pod of this name: another one has to begin anew.
    pub uid: String,
    pub pod: k8s::Pod,
    pub addresses: Vec<IpAddr>,
    /// The search path of its programs.
    pub path: String,
}

impl Desired {
    pub fn id(&self) -> String {
        pod_id(&self.pod.metadata.namespace, &self.pod.metadata.name)
    }

    pub fn write(&self, node: &NodeLayout) -> Result<()> {
        let path = node.desired().join(format!("{}.json", self.id()));
        if Self::read(&path).is_ok_and(|old| old == *self) {
            return Ok(());
        }
        write_atomically(&path, &serde_json::to_string_pretty(self)?)
    }

    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
    }

    /// All of a node, by id.
    pub fn read_all(node: &NodeLayout) -> BTreeMap<String, Self> {
        let entries = fs::read_dir(node.desired()).into_iter().flatten().flatten();
        let paths = entries
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "json"));
        paths
            .filter_map(|path| Self::read(&path).ok())
            .map(|desired| (desired.id(), desired))
            .collect()
    }

    /// Whether the running pod has to make way for this one: labels alone do not.
    pub fn needs_restart(&self, running: &Self) -> bool {
        self.uid != running.uid
            || self.pod.spec != running.pod.spec
            || self.addresses != running.addresses
            || self.path != running.path
    }
}

/// How far a pod is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Phase {
    /// Its network or its first containers are not there yet.
    #[default]
    Pending,
    /// Its containers run.
    Running,
    /// Its containers ended well and are not started again.
    Succeeded,
    /// They ended, one not well, and are not started again.
    Failed,
}

/// What a kubelet tells of a pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct PodStatus {
    pub phase: Phase,
    /// The pod's first process.
    pub pause: Option<Process>,
    /// What it waits for, or what went wrong.
    pub message: String,
    pub containers: Vec<ContainerStatus>,
    /// The desired pod that this is the status of.
    pub of: Option<Desired>,
}

/// What a kubelet tells of a container.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct ContainerStatus {
    pub name: String,
    pub ready: bool,
    pub running: bool,
    pub restarts: u32,
    /// The last exit code.
    pub exit_code: Option<i32>,
    /// What it waits for, or what went wrong.
    pub message: String,
}

impl PodStatus {
    pub fn read(pod: &PodLayout) -> Option<Self> {
        serde_json::from_str(&fs::read_to_string(pod.status()).ok()?).ok()
    }

    pub fn write(&self, pod: &PodLayout) -> Result<()> {
        write_atomically(&pod.status(), &serde_json::to_string_pretty(self)?)
    }

    /// Whether it is as it should be: ready, or done.
    pub fn is_ready(&self, desired: &Desired) -> bool {
        let current = self.of.as_ref().is_some_and(|of| !desired.needs_restart(of));
        let alive = self.pause.is_some_and(|pause| pause.is_alive());
        let well = match self.phase {
            Phase::Running => alive && self.containers.iter().all(|container| container.ready),
            Phase::Succeeded => true,
            Phase::Pending | Phase::Failed => false,
        };
        current && well
    }

    /// Why it is not ready.
    pub fn why(&self) -> String {
        let mut why = vec![format!("{:?}", self.phase)];
        why.extend(Some(self.message.clone()).filter(|message| !message.is_empty()));
        for container in self.containers.iter().filter(|container| !container.ready) {
            let message = match (container.message.as_str(), container.running) {
                ("", true) => "not ready",
                ("", false) => "not running",
                (message, _) => message,
            };
            why.push(format!("container {}: {message}", container.name));
        }
        why.join("; ")
    }
}

/// What a kubelet has to know of itself.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct KubeletArgs {
    /// The node's number.
    #[arg(long)]
    pub node: u8,
    /// The node's agent takes part.
    #[arg(long)]
    pub with_agent: bool,
    /// The playground's state directory.
    #[arg(long)]
    pub state_directory: PathBuf,
}
