//! One container: started, watched, probed, and started again after a pause that doubles.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use k8s::{Container, RestartPolicy};
use nix::sys::signal::Signal;

use super::{
    pod::Run,
    probe::{Prober, Target, Verdict},
    sandbox::Sandbox,
};
use crate::{
    desired::ContainerStatus,
    launch::{Launch, spawn_in_pod},
    pause::BINARY_DIRECTORY,
    process::{Process, open_log},
};

/// Less patient than a cluster, where it is 10 s to 5 min: somebody is watching.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// After this long a crash is a new one.
const STEADY: Duration = Duration::from_secs(60);

/// Without a probe, a container that still runs after this long counts as ready: its program was there at least.
const SETTLED: Duration = Duration::from_millis(100);

/// A container of a running pod.
pub(super) struct Runner<'a> {
    run: &'a Run,
    container: &'a Container,
    pause: i32,
    env: BTreeMap<String, String>,
    child: Option<Child>,
    started: Instant,
    next_start: Option<Instant>,
    pause_time: Duration,
    probes: Probes,
    /// Whether a probe is why it ends.
    ended_by_probe: bool,
    pub status: ContainerStatus,
}

struct Probes {
    startup: Option<Prober>,
    readiness: Option<Prober>,
    liveness: Option<Prober>,
}

impl<'a> Runner<'a> {
    pub fn new(run: &'a Run, sandbox: &Sandbox, container: &'a Container, env: &[(String, String)]) -> Self {
        Self {
            run,
            container,
            pause: sandbox.pause.pid,
            env: container_environment(run, container, env),
            child: None,
            started: Instant::now(),
            next_start: Some(Instant::now()),
            pause_time: FIRST_PAUSE,
            probes: Probes {
                startup: None,
                readiness: None,
                liveness: None,
            },
            ended_by_probe: false,
            status: ContainerStatus {
                name: container.name.clone(),
                ..ContainerStatus::default()
            },
        }
    }

    /// Does what is due.
    pub fn step(&mut self, policy: RestartPolicy) {
        if let Some(code) = self.ended() {
            self.status.exit_code = Some(code);
            self.status.running = false;
            self.status.ready = false;
            let again = policy == RestartPolicy::Always || (policy == RestartPolicy::OnFailure && code != 0);
            if again {
                if self.started.elapsed() > STEADY {
                    self.pause_time = FIRST_PAUSE;
                }
                self.next_start = Some(Instant::now() + self.pause_time);
                let why = Some(&self.status.message).filter(|why| self.ended_by_probe && !why.is_empty());
                let why = why.map_or(String::new(), |why| format!(" ({why})"));
                self.status.message = format!("ended with {code}{why}; starts again");
                self.pause_time = (self.pause_time * 2).min(LONGEST_PAUSE);
            } else {
                self.status.message = format!("ended with {code}");
            }
        }
        if self.next_start.is_some_and(|at| Instant::now() >= at) {
            self.next_start = None;
            self.start();
        }
        if self.status.running {
            self.probe();
        }
    }

    fn ended(&mut self) -> Option<i32> {
        let status = self.child.as_mut()?.try_wait().ok().flatten()?;
        self.child = None;
        use std::os::unix::process::ExitStatusExt;
        Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    }

    fn start(&mut self) {
        if self.status.exit_code.is_some() {
            self.status.restarts += 1;
        }
        self.started = Instant::now();
        match self.spawn() {
            Ok(child) => {
                self.child = Some(child);
                self.status.running = true;
                self.ended_by_probe = false;
                let target = Target {
                    address: self.run.desired.addresses.first().copied(),
                    run: self.exec(),
                };
                let prober = |probe: &Option<k8s::Probe>| {
                    probe
                        .clone()
                        .map(|probe| Prober::new(probe, self.container.clone(), target.clone()))
                };
                self.probes = Probes {
                    startup: prober(&self.container.startup_probe),
                    readiness: prober(&self.container.readiness_probe),
                    liveness: prober(&self.container.liveness_probe),
                };
            }
            Err(error) => {
                self.status.message = format!("{error:#}");
                self.status.exit_code = Some(128);
                self.next_start = Some(Instant::now() + self.pause_time);
                self.pause_time = (self.pause_time * 2).min(LONGEST_PAUSE);
            }
        }
    }

    fn probe(&mut self) {
        let unprobed = self.probes.startup.is_none() && self.probes.readiness.is_none();
        if unprobed && !self.status.ready && self.started.elapsed() > SETTLED {
            self.status.ready = true;
            self.status.message.clear();
        }
        if let Some(startup) = &mut self.probes.startup {
            match startup.step() {
                Verdict::Undecided => {}
                Verdict::Well => {
                    self.probes.startup = None;
                }
                Verdict::Unwell(why) => return self.unwell("startup probe", &why),
            }
            return;
        }
        if let Some(liveness) = &mut self.probes.liveness
            && let Verdict::Unwell(why) = liveness.step()
        {
            return self.unwell("liveness probe", &why);
        }
        if let Some(readiness) = &mut self.probes.readiness {
            match readiness.step() {
                Verdict::Undecided => {}
                Verdict::Well => {
                    self.status.ready = true;
                    self.status.message.clear();
                }
                Verdict::Unwell(why) => {
                    self.status.ready = false;
                    self.status.message = format!("readiness probe: {why}");
                }
            }
        }
    }

    fn unwell(&mut self, probe: &str, why: &str) {
        self.status.message = format!("{probe}: {why}");
        self.status.ready = false;
        self.ended_by_probe = true;
        eprintln!(
            "{}: container {} is ended: {probe}: {why}",
            self.run.desired.id(),
            self.container.name
        );
        if let Some(child) = &mut self.child {
            // It is ours until it was waited for.
            let _ = child.kill();
        }
        (self.probes.startup, self.probes.liveness) = (None, None);
    }

    fn spawn(&self) -> Result<Child> {
        let words = self.container.command.iter().chain(&self.container.args);
        let words: Vec<_> = words.map(|word| k8s::expand(word, &self.env)).collect();
        let log = open_log(&self.run.layout.log(&self.container.name)).context("cannot open its log")?;
        let errors = log.try_clone().context("cannot open its log")?;
        let mut command = self.exec().command(&words);
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        spawn_in_pod(self.pause, command)
    }

    fn exec(&self) -> InPod {
        let (own, pod) = (
            &self.container.security_context,
            &self.run.desired.pod.spec.security_context,
        );
        InPod {
            binary: self.run.node.binary.clone(),
            cgroup: self.run.cgroup.0.clone(),
            netns: self.run.netns.clone(),
            pause: self.pause,
            user: own.run_as_user.or(pod.run_as_user),
            group: own.run_as_group.or(pod.run_as_group),
            directory: self.container.working_dir.clone().map(PathBuf::from),
            env: self.env.clone(),
        }
    }

    /// Asks it to end.
    pub fn terminate(&mut self) {
        if let Some(process) = self
            .child
            .as_ref()
            .and_then(|child| Process::of(i32::try_from(child.id()).ok()?))
        {
            process.signal(Signal::SIGTERM);
        }
    }

    /// Whether its process is there.
    pub fn is_running(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Whether it ended for good.
    pub fn is_done(&self) -> bool {
        self.child.is_none() && self.next_start.is_none() && self.status.exit_code.is_some()
    }
}

/// A process that its parent, which is this one, has not waited for holds up the end of its pod's process namespace.
impl Drop for Runner<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // One that ended by itself is as good.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How to run a program in a container.
#[derive(Clone)]
pub(super) struct InPod {
    binary: PathBuf,
    cgroup: PathBuf,
    netns: String,
    pub pause: i32,
    user: Option<u32>,
    group: Option<u32>,
    directory: Option<PathBuf>,
    env: BTreeMap<String, String>,
}

impl InPod {
    pub fn command(&self, words: &[String]) -> Command {
        let mut launch = Launch::new(&self.cgroup);
        launch.netns = Some(&self.netns);
        launch.pod = Some(self.pause);
        launch.user = self.user;
        launch.group = self.group;
        launch.directory = self.directory.as_deref();
        launch.session = true;
        let mut command = launch.command(&self.binary, words);
        command.env_clear().envs(&self.env);
        command
    }
}

/// The environment that every container of the pod has.
pub(super) fn environment(run: &Run) -> Vec<(String, String)> {
    pod_environment(
        &run.desired.pod,
        &run.node.name,
        &run.desired.addresses,
        &run.desired.path,
    )
}

/// The environment of a pod's programs.
pub(crate) fn pod_environment(pod: &k8s::Pod, node: &str, addresses: &[IpAddr], path: &str) -> Vec<(String, String)> {
    let first = addresses.first().map(ToString::to_string).unwrap_or_default();
    let metadata = &pod.metadata;
    [
        ("PATH", format!("{BINARY_DIRECTORY}:{path}")),
        ("HOME", "/root".to_owned()),
        (
            "HOSTNAME",
            pod.spec.hostname.clone().unwrap_or_else(|| metadata.name.clone()),
        ),
        ("POD_NAME", metadata.name.clone()),
        ("POD_NAMESPACE", metadata.namespace.clone()),
        ("POD_IP", first),
        ("NODE_NAME", node.to_owned()),
        ("SERVICE_ACCOUNT", pod.service_account().to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

fn container_environment(run: &Run, container: &Container, pod: &[(String, String)]) -> BTreeMap<String, String> {
    let mut env: BTreeMap<_, _> = pod.iter().cloned().collect();
    let addresses: Vec<_> = run.desired.addresses.iter().map(ToString::to_string).collect();
    let first = addresses.first().cloned().unwrap_or_default();
    for variable in &container.env {
        let value = match &variable.value_from {
            Some(from) => {
                let field = &from.field_ref.field_path;
                run.desired
                    .pod
                    .field(field, &run.node.name, &first, &addresses.join(","))
                    .unwrap_or_default()
            }
            None => k8s::expand(variable.value.as_deref().unwrap_or_default(), &env),
        };
        env.insert(variable.name.clone(), value);
    }
    env
}
