//! `up`: makes what the manifests say, and only what is not so already.
//!
//! ```text
//! fabric and nodes ─> cluster (API) ─> control plane ─> agents ─> kubelets ─> manifests applied ─> pods ready ─> in force
//! ```
//! Every step is idempotent, so a second `up` converges, after a change of the manifests as after a crash.

use std::{
    env, fs,
    io::{IsTerminal, stderr},
    net::{Ipv4Addr, TcpListener},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use k8s::{Effect, Finding};
use nix::sys::signal::Signal;
use owo_colors::OwoColorize;

use crate::{
    agent, apply, cgroup, cluster, control,
    desired::{Phase, PodStatus},
    in_force,
    launch::Launch,
    layout::{Layout, node_name, node_netns},
    manifests,
    network::ensure_nodes,
    owner, preflight,
    process::{Process, last_lines, spawn_detached},
    progress::Progress,
    ready,
    state::State,
};

/// Options of `up`.
#[derive(clap::Args, Clone, Debug)]
pub struct UpArgs {
    /// A directory of Kubernetes YAML, or one file.
    #[arg(long, value_name = "DIR")]
    pub manifests: PathBuf,
    /// How many nodes [default: 2, or as many as there are].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=200))]
    pub nodes: Option<u8>,
    /// How the agents capture traffic, which can change while they run; `none` runs no agents: plain networking
    /// [default: ebpf, or as it is].
    #[arg(long, value_name = "MODE", value_parser = ["auto", "ebpf", "iptables", "none"])]
    pub capture: Option<String>,
    /// The agents' access log [default: text, or as it is].
    #[arg(long, value_name = "FORMAT", value_parser = ["off", "text", "json"])]
    pub access_log: Option<String>,
    /// Seconds until what is not ready counts as failed.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    pub timeout: u64,
}

pub(crate) fn run(layout: &Layout, args: &UpArgs) -> Result<()> {
    preflight::check()?;
    let _held = owner::hold(layout)?;
    let mut progress = Progress::new();
    progress.step("reading the manifests");
    let manifests = manifests::read(&args.manifests)?;
    let mut state = settle(layout, args)?;
    report(&progress, &manifests.objects.findings);
    if manifests.documents.is_empty() {
        bail!("{}: there is no object to apply", args.manifests.display());
    }
    state.mounted_bpffs |= state.capture != "none" && mount_bpffs()?;
    // Before anything is made: `down` goes by it.
    make_private(layout)?;
    state.save(layout)?;
    install_binary(layout)?;

    progress.step(&format!(
        "{} and the fabric between them",
        count(state.nodes.into(), "node")
    ));
    ensure_nodes(state.nodes)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start a runtime")?;
    let patience = Duration::from_secs(args.timeout);
    progress.step("the API");
    start_cluster(layout)?;
    let client = runtime.block_on(wait_for_api(layout, patience))?;
    if state.capture != "none" {
        progress.step("the control plane");
        wait_for_file(layout, &layout.control().join("kubeconfig"), patience)?;
        control::start(layout)?;
        control::wait_ready(layout, patience)?;
        progress.step("the nodes' agents");
        for node in state.node_names() {
            let files = layout.node(&node);
            for file in [files.token(), files.kubeconfig(), files.roots()] {
                wait_for_file(layout, &file, patience)?;
            }
            agent::start(layout, &state, &node)?;
        }
        for node in state.node_names() {
            agent::wait_ready(layout, &node, patience)?;
        }
    }
    for index in 1..=state.nodes {
        start_kubelet(layout, &state, index)?;
    }
    progress.step(&count(manifests.documents.len(), "object"));
    let applied = runtime.block_on(apply::apply(&client, &manifests.documents, &state.applied, patience));
    let applied = applied.or_else(|error| cluster_runs(layout).and(Err(error)))?;
    for refused in &applied.refused {
        progress.say(&format!("refused: {refused}"));
    }
    if applied.applied.is_empty() {
        bail!("{}: no object was taken", args.manifests.display());
    }
    state.applied = applied.applied;
    state.save(layout)?;
    progress.step("the pods");
    let pods = runtime.block_on(ready::wait_for_pods(layout, &state, &client, &progress, patience));
    let pods = pods.or_else(|error| cluster_runs(layout).and(Err(error)))?;
    if state.capture != "none" {
        progress.step("until every agent knows");
        in_force::wait(&runtime, layout, &state, &client, patience)?;
    }
    progress.done();
    eprintln!("{}", done(&state, pods));
    Ok(())
}

/// Tokens and keys are in it.
fn make_private(layout: &Layout) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::create_dir_all(&layout.root)
        .and_then(|()| fs::set_permissions(&layout.root, fs::Permissions::from_mode(0o700)))
        .with_context(|| format!("cannot make {}", layout.root.display()))
}

/// Starts the process with the API and the controllers, if it does not run.
fn start_cluster(layout: &Layout) -> Result<()> {
    let record = layout.process("cluster");
    if Process::read(&record).is_some_and(|process| process.is_alive()) {
        return Ok(());
    }
    let cgroup = cgroup::root()?.child("cluster");
    cgroup.kill()?;
    cgroup.create()?;
    let words = [
        layout.binary().to_string_lossy().into_owned(),
        "playground".to_owned(),
        "cluster".to_owned(),
        format!("--state-directory={}", layout.root.display()),
    ];
    let mut launch = Launch::new(&cgroup.0);
    launch.session = true;
    let command = launch.command(&layout.binary(), &words);
    let log = layout.log("cluster");
    spawn_detached(command, &log, &log)?.write(&record)
}

async fn wait_for_api(layout: &Layout, at_most: Duration) -> Result<kube::Client> {
    let deadline = Instant::now() + at_most;
    loop {
        let answered = async {
            let client = cluster::client(layout).await?;
            client.apiserver_version().await.context("the API does not answer")?;
            anyhow::Ok(client)
        };
        let error = match answered.await {
            Ok(client) => return Ok(client),
            Err(error) => error,
        };
        cluster_runs(layout)?;
        if Instant::now() > deadline {
            return Err(error);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn cluster_runs(layout: &Layout) -> Result<()> {
    if Process::read(&layout.process("cluster")).is_some_and(|process| process.is_alive()) {
        return Ok(());
    }
    bail!("the API ended:\n{}", last_lines(&layout.log("cluster"), 15))
}

/// Waits for a file that the cluster's process writes.
fn wait_for_file(layout: &Layout, path: &Path, at_most: Duration) -> Result<()> {
    let deadline = Instant::now() + at_most;
    while !path.exists() {
        cluster_runs(layout)?;
        if Instant::now() > deadline {
            bail!(
                "{} is not there yet:\n{}",
                path.display(),
                last_lines(&layout.log("cluster"), 15)
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// `1 node`, `2 nodes`.
fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

fn done(state: &State, pods: usize) -> String {
    let (pods, nodes) = (count(pods, "pod"), count(state.nodes.into(), "node"));
    let text = format!("{pods} on {nodes}: all ready. See: undercurrent playground status");
    if stderr().is_terminal() {
        text.bold().to_string()
    } else {
        text
    }
}

/// What was, with what is asked for now.
fn settle(layout: &Layout, args: &UpArgs) -> Result<State> {
    let before = State::load(layout)?;
    let was_up = before.is_some();
    let mut state = before.unwrap_or_else(|| State {
        nodes: args.nodes.unwrap_or(2),
        capture: args.capture.clone().unwrap_or_else(|| "ebpf".to_owned()),
        access_log: "text".to_owned(),
        ..State::default()
    });
    if state.api_port == 0 {
        state.api_port = free_port()?;
    }
    if let Some(nodes) = args.nodes {
        if was_up && nodes < state.nodes {
            bail!(
                "there are {} nodes: to have fewer, take the playground down first",
                state.nodes
            );
        }
        state.nodes = nodes;
    }
    if let Some(capture) = &args.capture
        && *capture != state.capture
    {
        if was_up && [capture, &state.capture].iter().any(|mode| *mode == "none") {
            bail!(
                "the agents capture with {}: to change that, take the playground down first",
                state.capture
            );
        }
        // Those that come next take over.
        for node in state.node_names() {
            agent::stop(layout, &node, Signal::SIGTERM, Duration::from_secs(args.timeout))?;
        }
        state.capture.clone_from(capture);
    }
    if let Some(access_log) = &args.access_log {
        state.access_log.clone_from(access_log);
    }
    state.manifests = fs::canonicalize(&args.manifests).unwrap_or_else(|_| args.manifests.clone());
    if state.path.is_empty() {
        let default = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned();
        state.path = env::var("PATH").map_or(default.clone(), |path| format!("{path}:{default}"));
    }
    Ok(state)
}

fn report(progress: &Progress, findings: &[Finding]) {
    for finding in findings {
        let text = finding.to_string();
        let colour = stderr().is_terminal();
        progress.say(&match finding.effect {
            _ if !colour => text,
            Effect::Note | Effect::Elsewhere => text.dimmed().to_string(),
            Effect::Narrowed | Effect::Divided => text.yellow().to_string(),
            _ => text.red().to_string(),
        });
    }
}

/// Kubernetes' own port, if nobody has it.
fn free_port() -> Result<u16> {
    let listen = |port| TcpListener::bind((Ipv4Addr::LOCALHOST, port));
    let listener = listen(cluster::API_PORT)
        .or_else(|_| listen(0))
        .context("no port is free on loopback")?;
    Ok(listener.local_addr()?.port())
}

/// A copy, so that building anew does not pull the binary away from what runs.
fn install_binary(layout: &Layout) -> Result<()> {
    let own = env::current_exe().context("cannot tell where this binary is")?;
    let target = layout.binary();
    if own == target {
        return Ok(());
    }
    let fresh = target.with_extension("new");
    fs::create_dir_all(layout.root.join("bin"))
        .and_then(|()| fs::copy(&own, &fresh))
        .and_then(|_| fs::rename(&fresh, &target))
        .with_context(|| format!("cannot copy {} to {}", own.display(), target.display()))
}

/// Mounts bpffs if it is not; tells whether it did.
fn mount_bpffs() -> Result<bool> {
    let path = Path::new("/sys/fs/bpf");
    if bpffs_is_mounted() {
        return Ok(false);
    }
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("bpf"), path, Some("bpf"), none, None::<&str>)
        .context("cannot mount bpffs on /sys/fs/bpf: does the kernel have eBPF?")?;
    Ok(true)
}

/// Whether something of that kind is mounted where it should be.
pub(crate) fn bpffs_is_mounted() -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts.lines().any(|line| line.contains(" /sys/fs/bpf bpf "))
}

fn start_kubelet(layout: &Layout, state: &State, index: u8) -> Result<()> {
    let node = node_name(index);
    let files = layout.node(&node);
    let record = files.process("kubelet");
    if Process::read(&record).is_some_and(|process| process.is_alive()) {
        return Ok(());
    }
    // What the one before told last holds no more: the new one starts every pod anew.
    for entry in fs::read_dir(files.root.join("pods")).into_iter().flatten().flatten() {
        let pod = files.pod(&entry.file_name().to_string_lossy());
        if let Some(mut status) = PodStatus::read(&pod) {
            status.phase = Phase::Pending;
            status.write(&pod)?;
        }
    }
    let cgroup = agent::node_cgroup(&node)?.child("kubelet");
    cgroup.kill()?;
    cgroup.create()?;
    agent::node_cgroup(&node)?.child("pods").create()?;
    let netns = node_netns(&node);
    let mut launch = Launch::new(&cgroup.0);
    launch.netns = Some(&netns);
    launch.session = true;
    let mut words = vec![
        layout.binary().to_string_lossy().into_owned(),
        "playground".to_owned(),
        "kubelet".to_owned(),
        format!("--node={index}"),
        format!("--state-directory={}", layout.root.display()),
    ];
    if state.capture != "none" {
        words.push("--with-agent".to_owned());
    }
    let command = launch.command(&layout.binary(), &words);
    spawn_detached(command, &files.kubelet_log(), &files.kubelet_log())?.write(&record)
}
