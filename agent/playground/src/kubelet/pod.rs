//! One pod: from its network to its end, on a thread of its own.

use std::{
    fs,
    net::IpAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::{
    cni,
    container::{Runner, environment},
    sandbox::Sandbox,
};
use crate::{
    cgroup::{self, Cgroup},
    desired::{Desired, KubeletArgs, Phase, PodStatus},
    layout::{Layout, NodeLayout, PodLayout, node_addresses, node_name, node_netns, pod_netns},
    netns,
};

const TICK: Duration = Duration::from_millis(20);

/// What a pod's thread has to know of its node.
#[derive(Clone)]
pub(super) struct Node {
    pub name: String,
    pub addresses: [IpAddr; 2],
    pub layout: NodeLayout,
    pub state_directory: PathBuf,
    pub binary: PathBuf,
    pub pods_cgroup: Cgroup,
    pub agent_socket: Option<PathBuf>,
}

impl Node {
    pub fn new(args: &KubeletArgs) -> Result<Self> {
        let name = node_name(args.node);
        let root = Layout::new(args.state_directory.clone());
        let layout = root.node(&name);
        Ok(Self {
            addresses: node_addresses(args.node),
            agent_socket: args.with_agent.then(|| layout.agent_socket()),
            layout,
            binary: root.binary(),
            state_directory: args.state_directory.clone(),
            pods_cgroup: cgroup::root()?.child(&name).child("pods"),
            name,
        })
    }

    /// Ends what a kubelet before this one left running: nobody watches it any more.
    pub fn sweep(&self) -> Result<()> {
        self.pods_cgroup.kill()?;
        for id in self.pods_cgroup.children() {
            self.pods_cgroup.child(&id).remove()?;
        }
        let entries = fs::read_dir(self.layout.root.join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        for entry in entries {
            let Ok(id) = entry.file_name().into_string() else {
                continue;
            };
            let pod = self.layout.pod(&id);
            if let Some(of) = PodStatus::read(&pod).and_then(|status| status.of) {
                netns::delete(&pod_netns(&of.pod.metadata.namespace, &of.pod.metadata.name))?;
            }
            PodStatus::default().write(&pod)?;
        }
        Ok(())
    }

    /// Removes the directories of pods that were taken back before anybody began with them.
    pub fn forget(&self, is_nobodys: impl Fn(&String) -> bool) {
        let entries = fs::read_dir(self.layout.root.join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        let ids = entries.filter_map(|entry| entry.file_name().into_string().ok());
        for id in ids.filter(is_nobodys) {
            // It is tried again at the next look.
            let _ = fs::remove_dir_all(self.layout.pod(&id).root);
        }
    }
}

/// A pod's thread.
pub(super) struct Worker {
    pub desired: Desired,
    pub stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Worker {
    pub fn start(node: &Node, desired: Desired) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run {
            layout: node.layout.pod(&desired.id()),
            cgroup: node.pods_cgroup.child(&desired.id()),
            netns: match desired.pod.spec.host_network {
                true => node_netns(&node.name),
                false => pod_netns(&desired.pod.metadata.namespace, &desired.pod.metadata.name),
            },
            node: node.clone(),
            desired: desired.clone(),
            stop: stop.clone(),
        };
        Self {
            desired,
            stop,
            thread: std::thread::spawn(move || run.run()),
        }
    }

    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// One pod, while it is to be.
pub(super) struct Run {
    pub node: Node,
    pub desired: Desired,
    pub layout: PodLayout,
    pub cgroup: Cgroup,
    pub netns: String,
    stop: Arc<AtomicBool>,
}

impl Run {
    fn run(&self) {
        let mut wait = Duration::from_millis(200);
        // Why it does not run stays to be read while it is tried again.
        let mut failed: Option<String> = None;
        while !self.stopped() {
            let error = self.attempt(failed.as_deref()).err();
            failed = error.map(|error| format!("{error:#}"));
            if let Some(why) = &failed {
                eprintln!("{}: {why}", self.desired.id());
                self.tell(Phase::Pending, None, why, &[]);
                self.pause(wait);
                wait = (wait * 2).min(Duration::from_secs(5));
            }
        }
        if let Err(error) = self.tear_down() {
            eprintln!("{}: cannot be removed: {error:#}", self.desired.id());
        }
    }

    /// Runs the pod until it is to end, or its sandbox did.
    fn attempt(&self, failed: Option<&str>) -> Result<()> {
        let state = |now| failed.unwrap_or(now);
        self.tell(Phase::Pending, None, state("its network is being made"), &[]);
        // As a kubelet does: the sandbox that is gone is deleted (CNI DEL) before another is added under its name. The
        // agent would otherwise hold on to the old one's network.
        self.tell_agent_it_is_gone()?;
        let sandbox = Sandbox::create(self)?;
        self.tell(
            Phase::Pending,
            Some(&sandbox),
            state("waiting for the node's agent to capture it"),
            &[],
        );
        self.ask_agent()?;
        let env = environment(self);
        for container in &self.desired.pod.spec.init_containers {
            if !self.run_to_end(&sandbox, container, &env) {
                return Ok(());
            }
        }
        let containers = self.desired.pod.spec.containers.iter();
        let mut runners: Vec<_> = containers
            .map(|container| Runner::new(self, &sandbox, container, &env))
            .collect();
        while !self.stopped() && sandbox.is_alive() {
            for runner in &mut runners {
                runner.step(self.desired.pod.spec.restart_policy);
            }
            self.tell(phase(&runners), Some(&sandbox), "", &runners);
            sleep(TICK);
        }
        if self.stopped() {
            self.terminate(&mut runners);
        }
        Ok(())
    }

    /// Runs an init container until it ended well. False if the pod is to end before that.
    fn run_to_end(&self, sandbox: &Sandbox, container: &k8s::Container, env: &[(String, String)]) -> bool {
        let mut runner = [Runner::new(self, sandbox, container, env)];
        while !self.stopped() && sandbox.is_alive() {
            runner[0].step(k8s::RestartPolicy::OnFailure);
            if runner[0].status.exit_code == Some(0) && !runner[0].status.running {
                return true;
            }
            let message = format!("init container {} runs", container.name);
            self.tell(Phase::Pending, Some(sandbox), &message, &runner);
            sleep(TICK);
        }
        false
    }

    /// Runs the CNI plugin, as a container runtime does: the pod is captured when it answers, or known not to be.
    fn ask_agent(&self) -> Result<()> {
        self.cni("ADD").context("the node's agent does not take the pod")
    }

    /// Tells the agent, by the CNI plugin, that the pod's network is gone, or never was.
    fn tell_agent_it_is_gone(&self) -> Result<()> {
        self.cni("DEL")
            .context("the node's agent was not told that the pod's network is gone")
    }

    fn cni(&self, command: &str) -> Result<()> {
        let (Some(socket), false) = (&self.node.agent_socket, self.desired.pod.spec.host_network) else {
            return Ok(());
        };
        cni::run(&self.node.binary, socket, command, &self.desired, &self.netns)
    }

    /// SIGTERM, then what is left is ended with the sandbox.
    fn terminate(&self, runners: &mut [Runner<'_>]) {
        for runner in &mut *runners {
            runner.terminate();
        }
        let grace = self.desired.pod.spec.termination_grace_period_seconds.unwrap_or(5);
        let deadline = Instant::now() + Duration::from_secs(grace);
        while runners.iter_mut().any(Runner::is_running) && Instant::now() < deadline {
            sleep(TICK);
        }
    }

    fn tear_down(&self) -> Result<()> {
        self.cgroup.remove()?;
        if !self.desired.pod.spec.host_network {
            if let Err(error) = self.tell_agent_it_is_gone() {
                eprintln!("{}: {error:#}", self.desired.id());
            }
            netns::delete(&self.netns)?;
        }
        crate::files::absent_is_fine(fs::remove_dir_all(&self.layout.root)).context("cannot remove its directory")
    }

    pub fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn pause(&self, time: Duration) {
        let end = Instant::now() + time;
        while !self.stopped() && Instant::now() < end {
            sleep(TICK);
        }
    }

    fn tell(&self, phase: Phase, sandbox: Option<&Sandbox>, message: &str, runners: &[Runner<'_>]) {
        let status = PodStatus {
            phase,
            pause: sandbox.map(|sandbox| sandbox.pause),
            message: message.to_owned(),
            containers: runners.iter().map(|runner| runner.status.clone()).collect(),
            of: Some(self.desired.clone()),
        };
        if PodStatus::read(&self.layout).as_ref() != Some(&status)
            && let Err(error) = status.write(&self.layout)
        {
            eprintln!("{}: {error:#}", self.desired.id());
        }
    }
}

fn phase(runners: &[Runner<'_>]) -> Phase {
    if runners.iter().any(|runner| !runner.is_done()) {
        Phase::Running
    } else if runners.iter().all(|runner| runner.status.exit_code == Some(0)) {
        Phase::Succeeded
    } else {
        Phase::Failed
    }
}
