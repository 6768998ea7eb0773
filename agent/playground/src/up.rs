//! `up`: makes what the manifests say, and only what is not so already.
//!
//! ```text
//! manifests ─ k8s ─> allot places ─> mesh.yaml, authority ─> fabric and nodes ─> agents ─> kubelets ─> pods ─> ready
//! ```
//! Every step is idempotent, so a second `up` converges, after a change of the manifests as after a crash.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    io::{IsTerminal, stderr},
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use k8s::{Effect, Finding, Objects, PodPlace};
use owo_colors::OwoColorize;
use serde::Serialize;

use crate::{
    agent,
    desired::{Desired, Phase, PodStatus},
    files::{rewrite_in_place, write_if_changed},
    hosts::{Name, hosts, resolv_conf},
    launch::Launch,
    layout::{Layout, node_name, node_netns},
    manifests,
    network::ensure_nodes,
    owner, preflight,
    process::{Process, spawn_detached},
    progress::Progress,
    proxy,
    ready::wait_for_pods,
    state::{State, key},
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
    /// How the agents capture traffic; `none` runs no agents: plain networking [default: ebpf, or as it is].
    #[arg(long, value_name = "MODE", value_parser = ["ebpf", "iptables", "none"])]
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
    let mut objects = manifests::read(&args.manifests)?;
    let mut state = settle(layout, args)?;
    let refused = state.allot(&mut objects)?;
    let mesh = k8s::translate(&objects, &context(&state, &objects));
    report(&progress, &objects, &mesh.findings, &refused);
    if objects.pods.is_empty() && objects.findings.iter().any(|finding| finding.effect >= Effect::Refused) {
        bail!("{}: no pod is left to run", args.manifests.display());
    }
    state.mounted_bpffs |= state.capture != "none" && mount_bpffs()?;
    // Before anything is made: `down` goes by it.
    state.save(layout)?;
    write_authority(layout, &mesh.settings.trust_domain)?;
    write_mesh(layout, &mesh)?;
    install_binary(layout)?;

    progress.step(&format!(
        "{} and the fabric between them",
        count(state.nodes.into(), "node")
    ));
    ensure_nodes(state.nodes)?;
    let names = names(&state, &objects);
    for index in 1..=state.nodes {
        proxy::apply(index, &proxy::rules(&state, &objects))?;
    }
    if state.capture != "none" {
        progress.step("the nodes' agents");
        for node in state.node_names() {
            agent::start(layout, &state, &node)?;
        }
        for node in state.node_names() {
            agent::wait_ready(layout, &node, Duration::from_secs(args.timeout))?;
        }
    }
    progress.step(&count(objects.pods.len(), "pod"));
    let desired = write_desired(layout, &state, &objects, &names)?;
    for index in 1..=state.nodes {
        start_kubelet(layout, &state, index)?;
    }
    wait_for_pods(layout, &state, &desired, &progress, Duration::from_secs(args.timeout))?;
    progress.done();
    eprintln!("{}", done(&state, desired.len()));
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
        bail!(
            "the agents capture with {}: to change that, take the playground down first",
            state.capture
        );
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

fn context(state: &State, objects: &Objects) -> k8s::Context {
    let split = |name: &str| name.split_once('/').map(|(a, b)| (a.to_owned(), b.to_owned()));
    let pods = state.pods.iter().filter_map(|(name, slot)| {
        let place = PodPlace {
            node: node_name(slot.node),
            addresses: slot.addresses().to_vec(),
        };
        Some((split(name)?, place))
    });
    let vips = objects
        .services
        .iter()
        .filter_map(|(_, service)| Some((split(&key(&service.metadata))?, state.vips(service))));
    k8s::Context {
        pods: pods.collect(),
        vips: vips.collect(),
        ..k8s::Context::default()
    }
}

fn report(progress: &Progress, objects: &Objects, findings: &[Finding], refused: &[String]) {
    for finding in objects.findings.iter().chain(findings) {
        let text = finding.to_string();
        let colour = stderr().is_terminal();
        progress.say(&match finding.effect {
            _ if !colour => text,
            Effect::Note => text.dimmed().to_string(),
            Effect::Narrowed => text.yellow().to_string(),
            _ => text.red().to_string(),
        });
    }
    for text in refused {
        progress.say(&format!("refused: {text}"));
    }
}

#[derive(Serialize)]
struct StaticFile<'a> {
    settings: &'a model::MeshSettings,
    workloads: &'a [model::Workload],
    services: &'a [model::Service],
    policies: &'a [model::Policy],
}

fn write_mesh(layout: &Layout, mesh: &k8s::Mesh) -> Result<()> {
    let file = StaticFile {
        settings: &mesh.settings,
        workloads: &mesh.workloads,
        services: &mesh.services,
        policies: &mesh.policies,
    };
    write_if_changed(&layout.mesh(), &serde_yaml_ng::to_string(&file)?).map(drop)
}

fn write_authority(layout: &Layout, trust_domain: &model::TrustDomain) -> Result<()> {
    use std::{io::Write, os::unix::fs::OpenOptionsExt};
    if layout.ca_cert().exists() && layout.ca_key().exists() {
        return Ok(());
    }
    let (certificate, key) = identity::generate_root(trust_domain).context("cannot make the mesh's authority")?;
    let _ = fs::remove_file(layout.ca_key());
    let file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(layout.ca_key());
    file.and_then(|mut file| file.write_all(key.as_bytes()))
        .context("cannot write the authority's key")?;
    write_if_changed(&layout.ca_cert(), &certificate).map(drop)
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

/// The services' names, and where each leads.
fn names(state: &State, objects: &Objects) -> Vec<Name> {
    let services = objects.services.iter().map(|(_, service)| {
        let mut addresses = state.vips(service);
        if service.is_headless() {
            addresses = proxy::endpoints(state, objects, service)
                .into_iter()
                .flat_map(|(_, slot)| slot.addresses())
                .collect();
            let families = service.families();
            let of = |address: &IpAddr| {
                if address.is_ipv4() {
                    k8s::IpFamily::IPv4
                } else {
                    k8s::IpFamily::IPv6
                }
            };
            addresses.retain(|address| families.contains(&of(address)));
        }
        Name {
            namespace: service.metadata.namespace.clone(),
            name: service.metadata.name.clone(),
            addresses,
        }
    });
    services.collect()
}

/// Tells the kubelets what to run; returns it by node.
fn write_desired(layout: &Layout, state: &State, objects: &Objects, names: &[Name]) -> Result<Vec<(String, Desired)>> {
    let mut all = Vec::new();
    let mut wanted: BTreeMap<String, BTreeSet<String>> =
        state.node_names().map(|node| (node, BTreeSet::new())).collect();
    for (_, pod) in &objects.pods {
        let Some(slot) = state.pods.get(&key(&pod.metadata)) else {
            continue;
        };
        let node = node_name(slot.node);
        let files = layout.node(&node);
        let desired = Desired {
            pod: pod.clone(),
            addresses: slot.addresses().to_vec(),
            path: state.path.clone(),
        };
        let (namespace, id) = (&pod.metadata.namespace, desired.id());
        let hostname = pod.spec.hostname.as_deref().unwrap_or(&pod.metadata.name);
        rewrite_in_place(
            &files.pod(&id).hosts(),
            &hosts(namespace, hostname, &desired.addresses, names),
        )?;
        rewrite_in_place(&files.pod(&id).resolv_conf(), &resolv_conf(namespace))?;
        wanted.entry(node.clone()).or_default().insert(format!("{id}.json"));
        all.push((node, desired));
    }
    // A pod that moves must be gone from its old node before the new one announces its name.
    for (node, keep) in wanted {
        let files = layout.node(&node);
        fs::create_dir_all(files.desired()).with_context(|| format!("cannot create {}", files.desired().display()))?;
        for entry in fs::read_dir(files.desired())?.flatten() {
            if !keep.contains(&*entry.file_name().to_string_lossy()) {
                fs::remove_file(entry.path())?;
            }
        }
    }
    for (node, desired) in &all {
        desired.write(&layout.node(node))?;
    }
    Ok(all)
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
