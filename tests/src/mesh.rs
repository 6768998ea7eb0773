//! The mesh under test: two nodes on this machine, made and taken down by `undercurrent playground`.

use std::{
    fs::{self, File},
    net::IpAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Mutex,
};

use admin::Status;
use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::{Leftovers, Pod, machine, manifests::Manifests, wait};

/// Where the playground of the tests keeps its things. Fixed, so that the next run finds what a killed one left.
const STATE: &str = "/var/lib/undercurrent/system-tests";

/// The mesh. One for each machine: its names are global.
pub struct Mesh {
    binary: PathBuf,
    manifests: Mutex<Manifests>,
    /// What there was before.
    before: Leftovers,
    /// How traffic is captured: `ebpf` or `iptables`.
    capture: &'static str,
    /// False while it may be somebody else's playground that is up.
    is_ours: bool,
    _lock: Flock<File>,
}

impl Mesh {
    /// Takes down what an earlier run left, and brings up the mesh of `tests/manifests`.
    pub fn up(capture: &'static str) -> Result<Self> {
        let binary = machine::binary().map_err(|why| anyhow!(why))?;
        let mut mesh = Self {
            binary,
            manifests: Mutex::new(Manifests::load()?),
            before: Leftovers::default(),
            is_ours: false,
            capture,
            _lock: lock()?,
        };
        mesh.down()?;
        mesh.is_ours = true;
        mesh.before = Leftovers::now()?;
        mesh.bring_up()?;
        Ok(mesh)
    }

    /// `up` with the manifests as they are now: makes what is not there and changes what is different.
    pub fn bring_up(&self) -> Result<()> {
        let manifests = self
            .manifests
            .lock()
            .map_err(|_| anyhow!("a scenario panicked while it changed manifests"))?;
        // `none` shows which of the scenarios can fail.
        let capture = std::env::var("UNDERCURRENT_TESTS_CAPTURE").unwrap_or(self.capture.to_owned());
        let directory = manifests.directory().to_string_lossy();
        self.playground(&["up", "--nodes", "2", "--capture", &capture, "--manifests", &directory])
            .map(drop)
    }

    /// Changes the way of capture of the nodes, whose agents are replaced one by one.
    pub fn capture_by(&self, way: &str) -> Result<()> {
        let manifests = self
            .manifests
            .lock()
            .map_err(|_| anyhow!("a scenario panicked while it changed manifests"))?;
        let directory = manifests.directory().to_string_lossy();
        self.playground(&["up", "--capture", way, "--manifests", &directory])
            .map(drop)
    }

    /// Changes a manifest, and makes it so.
    pub fn change(&self, file: &str, change: impl FnOnce(String) -> String) -> Result<()> {
        self.manifests
            .lock()
            .map_err(|_| anyhow!("a scenario panicked while it changed manifests"))?
            .edit(file, change)?;
        self.bring_up()
    }

    /// Takes a pod of the namespace `late` into the mesh, or out of it, by its label and while it runs.
    pub fn enrol(&self, pod: &str, into: bool) -> Result<()> {
        let mode = |into: bool| if into { "ambient" } else { "none" };
        let labelled = |into: bool| {
            format!(
                "{{name: {pod}, namespace: late, labels: {{istio.io/dataplane-mode: {}}}",
                mode(into)
            )
        };
        self.change("escape.yaml", |text| text.replace(&labelled(!into), &labelled(into)))?;
        wait::until_true(&format!("{pod} is captured: {into}"), || {
            let status = self.node("node-1").status()?;
            Ok(status.pods.iter().any(|one| one.name == pod && one.captured == into))
        })
    }

    /// Ends the control plane as a crash would.
    pub fn kill_control(&self) -> Result<()> {
        self.playground(&["kill-control"]).map(drop)
    }

    /// Starts the control plane again; returns when it says that it is ready.
    pub fn start_control(&self) -> Result<()> {
        self.playground(&["start-control"]).map(drop)
    }

    /// The process of the API and the controllers, or of the control plane: `cluster`, `control`.
    pub fn pid_of(&self, process: &str) -> Result<i32> {
        pid_in(&self.file(&format!("{process}.json")))
    }

    /// The log of one of these, from here on.
    pub fn log_of(&self, process: &str) -> Result<Log> {
        Log::at_end(self.file(&format!("{process}.log")))
    }

    /// Takes it down.
    pub fn down(&self) -> Result<()> {
        self.playground(&["down"]).map(drop)
    }

    /// What is there now and was not before the mesh came up.
    pub fn left_over(&self) -> Result<Leftovers> {
        Ok(Leftovers::now()?.without(&self.before))
    }

    /// A command of the playground; its standard output.
    pub fn playground(&self, arguments: &[&str]) -> Result<String> {
        self.playground_told(arguments, &[])
    }

    fn playground_told(&self, arguments: &[&str], options: &[(&str, &str)]) -> Result<String> {
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", "120"])
            .arg(&self.binary)
            .arg("playground")
            .args(arguments);
        let output = command
            .envs(self.environment())
            .envs(options.iter().copied())
            .stdin(Stdio::null())
            .output()
            .context("cannot run the binary")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = || text(&output.stdout) + &text(&output.stderr);
        ensure!(
            output.status.success(),
            "playground {} failed ({}): {}",
            arguments.join(" "),
            output.status,
            said()
        );
        Ok(text(&output.stdout))
    }

    /// A command of the binary that asks agents; how it ended, and its standard output.
    pub fn ask(&self, arguments: &[&str]) -> Result<(Option<i32>, String)> {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "60"]).arg(&self.binary).args(arguments);
        let output = command.envs(self.environment()).stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        Ok((output.status.code(), said.into_owned()))
    }

    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    pub(crate) fn environment(&self) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
        // Kept small, so that what a log says is what matters.
        [
            ("UNDERCURRENT_PLAYGROUND", STATE),
            ("RUST_LOG", "info"),
            ("RUST_BACKTRACE", "0"),
        ]
        .into_iter()
    }

    /// A pod, by namespace and name.
    pub fn pod<'m>(&'m self, namespace: &'m str, name: &'m str) -> Pod<'m> {
        Pod {
            mesh: self,
            namespace,
            name,
        }
    }

    /// As the playground allotted them: they are known whether an agent runs or not.
    pub(crate) fn addresses(&self, pod: &Pod<'_>) -> Result<[IpAddr; 2]> {
        let state: serde_json::Value = serde_json::from_str(&fs::read_to_string(self.file("places.json"))?)?;
        let slot = &state["pods"][pod.key()];
        let number = |name: &str| {
            slot[name]
                .as_u64()
                .with_context(|| format!("{} has no {name} in places.json", pod.key()))
        };
        let (node, host) = (number("node")?, number("host")?);
        Ok([
            format!("10.244.{node}.{host}").parse()?,
            format!("fd00:10:244:{node}::{host:x}").parse()?,
        ])
    }

    /// A node.
    pub fn node(&self, name: &'static str) -> Node<'_> {
        Node { mesh: self, name }
    }

    /// Where the playground keeps a file.
    pub fn file(&self, path: &str) -> PathBuf {
        Path::new(STATE).join(path)
    }

    /// Copies the logs of nodes and pods to where they outlive the mesh, and tells where that is.
    pub fn save_logs(&self, scenario: &str) -> Result<PathBuf> {
        let name: String = scenario
            .chars()
            .map(|c| if c.is_alphanumeric() { c } else { '-' })
            .collect();
        let to = machine::root().join("target/system-tests").join(name);
        let _ = fs::remove_dir_all(&to);
        for node in ["node-1", "node-2"] {
            let from = self.file("nodes").join(node);
            fs::create_dir_all(to.join(node))?;
            for file in ["agent.log", "access.log", "kubelet.log"] {
                // A log that is not there says nothing.
                let _ = fs::copy(from.join(file), to.join(node).join(file));
            }
        }
        for file in ["cluster.log", "control.log"] {
            let _ = fs::copy(self.file(file), to.join(file));
        }
        Ok(to)
    }
}

/// The end of the process is the end of the mesh, whatever happened.
impl Drop for Mesh {
    fn drop(&mut self) {
        if std::env::var_os("UNDERCURRENT_KEEP").is_some() {
            println!("the mesh stays up: UNDERCURRENT_PLAYGROUND={STATE} undercurrent playground down");
        } else if self.is_ours
            && let Err(error) = self.down()
        {
            eprintln!("cannot take the mesh down: {error:#}");
        }
    }
}

/// The process of a record that the playground keeps.
fn pid_in(path: &Path) -> Result<i32> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let record: serde_json::Value = serde_json::from_str(&text)?;
    let pid = record["pid"].as_i64();
    Ok(pid
        .with_context(|| format!("no process id in {}", path.display()))?
        .try_into()?)
}

fn lock() -> Result<Flock<File>> {
    let path = std::env::temp_dir().join("undercurrent-system-tests.lock");
    let file = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| anyhow!("cannot lock {}: {error}", path.display()))
}

/// A node, and the agent on it.
#[derive(Clone, Copy)]
pub struct Node<'m> {
    mesh: &'m Mesh,
    pub name: &'static str,
}

/// Where a log was when it was looked at: what comes later is news.
#[derive(Clone)]
pub struct Log {
    path: PathBuf,
    from: usize,
}

impl Node<'_> {
    fn directory(&self) -> PathBuf {
        self.mesh.file("nodes").join(self.name)
    }

    /// Its network namespace.
    pub fn netns(&self) -> String {
        format!("uc-{}", self.name)
    }

    /// What its agent says of itself.
    pub fn status(&self) -> Result<Status> {
        let text = self.ask("/status")?;
        serde_json::from_str(&text).with_context(|| format!("the status of {} is not one: {text}", self.name))
    }

    /// The connections that its agent carries, as it lists them.
    pub fn connections(&self) -> Result<Vec<serde_json::Value>> {
        Ok(serde_json::from_str(&self.ask("/connections")?)?)
    }

    /// Whether its agent says that it is ready.
    pub fn is_ready(&self) -> bool {
        self.ask("/healthz/ready").is_ok()
    }

    fn ask(&self, path: &str) -> Result<String> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let socket = self.directory().join("agent/agent.sock");
        runtime
            .block_on(admin::get(&socket, path))
            .with_context(|| format!("the agent of {}", self.name))
    }

    /// Packets of a pod that the guard dropped, over all reasons.
    pub fn dropped(&self, pod: &Pod<'_>) -> Result<u64> {
        let status = self.status()?;
        let found = status
            .pods
            .iter()
            .find(|one| one.namespace == pod.namespace && one.name == pod.name);
        let found = found.with_context(|| format!("the agent of {} does not know {}", self.name, pod.key()))?;
        // What was captured or admitted is counted beside what was dropped.
        let harmless = ["captured", "probe_admitted"];
        Ok(found
            .counters
            .iter()
            .filter(|(reason, _)| !harmless.contains(&reason.as_str()))
            .map(|(_, count)| count)
            .sum())
    }

    /// The process that carries its agent's connections.
    pub fn agent_pid(&self) -> Result<i32> {
        Ok(self.status()?.pid.try_into()?)
    }

    /// The process that holds its listeners, and starts the other again.
    pub fn holder_pid(&self) -> Result<i32> {
        pid_in(&self.directory().join("agent.json"))
    }

    /// The agent's memory that is in use now, in KiB.
    pub fn agent_rss(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.agent_pid()?))?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .context("no VmRSS")?;
        Ok(line.trim().trim_end_matches("kB").trim().parse()?)
    }

    /// How many files the agent has open.
    pub fn agent_files(&self) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.agent_pid()?))?.count())
    }

    /// How many files a process has open.
    pub fn files_of(&self, pid: i32) -> Result<usize> {
        Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
    }

    /// Ends the agent, with all that could start it again.
    pub fn kill_agent(&self) -> Result<()> {
        let pid = self.holder_pid()?;
        self.mesh.playground(&["kill-agent", self.name])?;
        ensure!(
            !Path::new(&format!("/proc/{pid}/fd/0")).exists(),
            "the agent of {} is still there",
            self.name
        );
        Ok(())
    }

    /// Starts the agent again; nobody tells it of its pods. Returns when it says that it is ready.
    pub fn start_agent(&self) -> Result<()> {
        self.mesh.playground(&["start-agent", self.name]).map(drop)
    }

    /// Ends the agent as an upgrade does, and starts it with this option, by its name in the environment; none: as ever.
    pub fn restart_agent(&self, option: Option<(&str, &str)>) -> Result<()> {
        let restart = ["restart-agent", self.name];
        self.mesh.playground_told(&restart, option.as_slice()).map(drop)
    }

    /// The first process of a pod on this node.
    pub fn pause_pid(&self, pod: &Pod<'_>) -> Result<i32> {
        let path = self
            .directory()
            .join("pods")
            .join(format!("{}-{}", pod.namespace, pod.name))
            .join("status.json");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let status: serde_json::Value = serde_json::from_str(&text)?;
        Ok(status["pause"]["pid"]
            .as_i64()
            .context("the pod has no first process")?
            .try_into()?)
    }

    /// Its access log, from here on.
    pub fn access_log(&self) -> Result<Log> {
        Log::at_end(self.directory().join("access.log"))
    }

    /// Its agent's own log, from here on.
    pub fn agent_log(&self) -> Result<Log> {
        Log::at_end(self.directory().join("agent.log"))
    }
}

impl Log {
    fn at_end(path: PathBuf) -> Result<Self> {
        let from = fs::read(&path).map_or(0, |text| text.len());
        Ok(Self { path, from })
    }

    /// The lines since.
    pub fn lines(&self) -> Result<Vec<String>> {
        let text = fs::read(&self.path).with_context(|| format!("cannot read {}", self.path.display()))?;
        let news = String::from_utf8_lossy(text.get(self.from..).unwrap_or_default()).into_owned();
        Ok(news.lines().map(str::to_owned).collect())
    }

    /// Waits for a line that holds all of these words.
    pub fn line_with(&self, words: &[&str]) -> Result<String> {
        let found = wait::until(&format!("a line with {words:?} in {}", self.path.display()), || {
            Ok(self
                .lines()?
                .into_iter()
                .find(|line| words.iter().all(|word| line.contains(word))))
        });
        found.with_context(|| format!("the lines are: {}", self.lines().unwrap_or_default().join("\n")))
    }
}
