//! `exec`, `logs`, `capture-packets`: looking into what runs.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::PathBuf,
    process::{Command, ExitStatus},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

use crate::{
    agent::node_cgroup,
    cgroup,
    cluster::Places,
    desired::{Desired, PodStatus},
    kubelet::pod_environment,
    launch::{Launch, spawn_in_pod},
    layout::{BRIDGE, FABRIC, Layout, PodLayout, node_name, node_netns, pod_id, pod_netns},
    netns, preflight,
    state::State,
};

/// A pod that runs.
pub(crate) struct Found {
    pub node: String,
    pub files: PodLayout,
    pub status: PodStatus,
    pub desired: Desired,
}

/// Finds a pod by `NAMESPACE/POD`.
pub(crate) fn find(layout: &Layout, name: &str) -> Result<Found> {
    preflight::root()?;
    State::expect(layout)?;
    let places = Places::load(layout)?;
    let Some(slot) = places.pods.get(name) else {
        let known: Vec<_> = places.pods.keys().map(String::as_str).collect();
        bail!("there is no pod {name}; there are {}", known.join(", "));
    };
    let (namespace, pod) = name
        .split_once('/')
        .with_context(|| format!("{name} is not NAMESPACE/POD"))?;
    let node = node_name(slot.node);
    let files = layout.node(&node).pod(&pod_id(namespace, pod));
    let status = PodStatus::read(&files).with_context(|| format!("{name} was not started yet"))?;
    let desired = status
        .of
        .clone()
        .with_context(|| format!("{name} was not started yet"))?;
    Ok(Found {
        node,
        files,
        status,
        desired,
    })
}

/// Options of `exec`.
#[derive(clap::Args, Clone, Debug)]
pub struct ExecArgs {
    /// The pod, as NAMESPACE/POD.
    #[arg(value_name = "NAMESPACE/POD")]
    pub pod: String,
    /// Numeric user to run as [default: root].
    #[arg(long, short)]
    pub user: Option<u32>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// The command that runs a program in a pod, and the pod's first process, for [`spawn_in_pod`].
pub(crate) fn command_in_pod(layout: &Layout, args: &ExecArgs) -> Result<(i32, Command)> {
    let found = find(layout, &args.pod)?;
    let pause = found.status.pause.filter(|process| process.is_alive());
    let pause = pause.with_context(|| format!("{} does not run: {}", args.pod, found.status.why()))?;
    let metadata = &found.desired.pod.metadata;
    let cgroup = node_cgroup(&found.node)?.child("pods").child(&found.desired.id());
    let netns = match found.desired.pod.spec.host_network {
        true => node_netns(&found.node),
        false => pod_netns(&metadata.namespace, &metadata.name),
    };
    let mut launch = Launch::new(&cgroup.0);
    launch.netns = Some(&netns);
    launch.pod = Some(pause.pid);
    launch.user = args.user;
    let mut command = launch.command(&layout.binary(), &args.command);
    command.env_clear();
    if let Some(terminal) = std::env::var_os("TERM") {
        command.env("TERM", terminal);
    }
    command.envs(pod_environment(
        &found.desired.pod,
        &found.node,
        &found.desired.addresses,
        &found.desired.path,
    ));
    Ok((pause.pid, command))
}

/// Runs `exec`; the exit code is the program's.
pub(crate) fn run(layout: &Layout, args: &ExecArgs) -> Result<i32> {
    let (pause, command) = command_in_pod(layout, args)?;
    let mut child = spawn_in_pod(pause, command)?;
    // Ctrl-C is for the program in the pod, which has it from the terminal as we do; we only wait for it.
    let mut interrupts = SigSet::empty();
    interrupts.add(Signal::SIGINT);
    interrupts.add(Signal::SIGQUIT);
    interrupts.thread_block().context("cannot block signals")?;
    let status = child.wait().context("cannot wait for the program")?;
    Ok(code(status))
}

fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Options of `logs`.
#[derive(clap::Args, Clone, Debug)]
pub struct LogsArgs {
    /// The pod, as NAMESPACE/POD; a node, for its agent's log; `control` or `cluster`, for the control plane's or the API's.
    #[arg(value_name = "NAMESPACE/POD|NODE|control|cluster")]
    pub of: String,
    /// Go on with what is added.
    #[arg(long, short)]
    pub follow: bool,
    /// Which container [default: all, one after the other].
    #[arg(long, short)]
    pub container: Option<String>,
    /// Of a node: the access log, with one line for each connection.
    #[arg(long)]
    pub access: bool,
    /// Of a node: the kubelet's log.
    #[arg(long, conflicts_with = "access")]
    pub kubelet: bool,
}

/// Runs `logs`.
pub(crate) fn logs(layout: &Layout, args: &LogsArgs) -> Result<()> {
    preflight::root()?;
    let state = State::expect(layout)?;
    let paths: Vec<PathBuf> = if ["control", "cluster"].contains(&args.of.as_str()) {
        vec![layout.log(&args.of)]
    } else if state.node_names().any(|node| node == args.of) {
        let node = layout.node(&args.of);
        vec![match (args.access, args.kubelet) {
            (true, _) => node.access_log(),
            (_, true) => node.kubelet_log(),
            _ => node.agent_log(),
        }]
    } else {
        let found = find(layout, &args.of)?;
        let spec = &found.desired.pod.spec;
        let names: Vec<_> = spec
            .init_containers
            .iter()
            .chain(&spec.containers)
            .map(|container| &container.name)
            .collect();
        if let Some(asked) = &args.container
            && !names.contains(&asked)
        {
            bail!("{} has no container {asked}", args.of);
        }
        let asked = |name: &&&String| args.container.as_ref().is_none_or(|asked| asked == **name);
        names.iter().filter(asked).map(|name| found.files.log(name)).collect()
    };
    let mut files: Vec<_> = paths.iter().map(|path| (path, 0)).collect();
    loop {
        for (path, at) in &mut files {
            print_from(path, at)?;
        }
        if !args.follow {
            return Ok(());
        }
        sleep(Duration::from_millis(100));
    }
}

fn print_from(path: &PathBuf, at: &mut u64) -> Result<()> {
    let Ok(mut file) = File::open(path) else { return Ok(()) };
    file.seek(std::io::SeekFrom::Start(*at))?;
    let mut bytes = Vec::new();
    *at += file.read_to_end(&mut bytes)? as u64;
    let mut out = std::io::stdout();
    match out.write_all(&bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        result => result.context("cannot write"),
    }
}

/// Options of `capture-packets`.
#[derive(clap::Args, Clone, Debug)]
pub struct PacketsArgs {
    /// Write them to a file (pcap) instead of printing them.
    #[arg(short, long, value_name = "FILE")]
    pub write: Option<PathBuf>,
    /// End after so many.
    #[arg(short, long, value_name = "N")]
    pub count: Option<u64>,
    /// What tcpdump takes: options and a filter, such as `-X tcp port 15008`.
    #[arg(last = true, value_name = "TCPDUMP ARGUMENTS")]
    pub rest: Vec<String>,
}

/// The tcpdump on the bridge between the nodes, where every packet between them passes; in a cgroup of ours, so that
/// `down` ends it.
pub(crate) fn tcpdump(layout: &Layout, args: &PacketsArgs) -> Result<Command> {
    preflight::root()?;
    if !netns::exists(FABRIC) {
        bail!("the playground is not up: there is no network namespace {FABRIC}");
    }
    if !preflight::has_program("tcpdump") {
        bail!("this needs the program `tcpdump` (Debian: apt install tcpdump)");
    }
    let mut words: Vec<_> = ["tcpdump", "-n", "-i", BRIDGE, "-Z", "root"].map(str::to_owned).into();
    match &args.write {
        Some(file) => words.extend([
            "-U".to_owned(),
            "-w".to_owned(),
            std::path::absolute(file)?.display().to_string(),
        ]),
        None => words.push("-l".to_owned()),
    }
    if let Some(count) = args.count {
        words.extend(["-c".to_owned(), count.to_string()]);
    }
    words.extend(args.rest.iter().cloned());
    let cgroup = cgroup::root()?.child("fabric");
    cgroup.create()?;
    let mut launch = Launch::new(&cgroup.0);
    launch.netns = Some(FABRIC);
    Ok(launch.command(&layout.binary(), &words))
}

/// Runs `capture-packets`.
pub(crate) fn capture_packets(layout: &Layout, args: &PacketsArgs) -> Result<()> {
    Err(tcpdump(layout, args)?.exec()).context("cannot run tcpdump")
}
