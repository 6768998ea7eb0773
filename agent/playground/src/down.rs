//! `down`: ends and removes everything of the playground's, whatever state it is in. What it removes it finds by its own
//! records, by its cgroups, and by the names that are only its own.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::{
    agent::{self, PINS},
    cgroup::{self, Cgroup},
    cluster::Places,
    files::absent_is_fine,
    layout::{CONTROL_NETNS, FABRIC, Layout, node_netns, pod_netns},
    netns, owner, preflight,
    process::Process,
    progress::Progress,
    state::State,
    up::bpffs_is_mounted,
};

pub(crate) fn run(layout: &Layout) -> Result<()> {
    preflight::root()?;
    let held = owner::hold(layout)?;
    let mut progress = Progress::new();
    progress.step("taking the playground down");
    let state = State::load(layout).ok().flatten();
    let root = cgroup::root()?;
    let nodes = nodes(layout, &root);
    // Kubelets first, or they would start again what ends.
    for name in ["cluster", "control"] {
        if let Some(process) = Process::read(&layout.process(name)) {
            process.signal(Signal::SIGKILL);
        }
        root.child(name).kill()?;
    }
    for name in std::iter::once("kubelet").chain(agent::CGROUPS) {
        for node in &nodes {
            if let Some(process) = Process::read(&layout.node(node).process(name)) {
                process.signal(Signal::SIGKILL);
            }
            root.child(node).child(name).kill()?;
        }
    }
    let mut namespaces = namespaces(layout, &root, &nodes);
    let places = Places::load(layout).unwrap_or_default();
    let of_pods = places.pods.iter().filter(|(_, slot)| slot.host.is_some());
    namespaces.extend(of_pods.filter_map(|(name, _)| {
        let (namespace, pod) = name.split_once('/')?;
        Some(pod_netns(namespace, pod))
    }));
    for node in &nodes {
        root.child(node).remove()?;
    }
    for name in ["fabric", "cluster", "control"] {
        root.child(name).remove()?;
    }
    root.remove_if_empty();
    for name in namespaces {
        netns::delete(&name)?;
    }
    for node in &nodes {
        remove_pins(&Path::new(PINS).join(node))?;
    }
    // Only if nobody else has pins there.
    let _ = fs::remove_dir(PINS);
    if state.is_some_and(|state| state.mounted_bpffs) && bpffs_is_mounted() && is_unused(Path::new("/sys/fs/bpf")) {
        nix::mount::umount("/sys/fs/bpf").context("cannot unmount /sys/fs/bpf")?;
    }
    absent_is_fine(fs::remove_dir_all(&layout.root))
        .with_context(|| format!("cannot remove {}", layout.root.display()))?;
    if let Some(parent) = layout.root.parent().filter(|parent| parent.ends_with("undercurrent")) {
        // Only if nobody else keeps something there.
        let _ = fs::remove_dir(parent);
    }
    owner::release(held)?;
    progress.done();
    Ok(())
}

fn is_node(name: &str) -> bool {
    name.strip_prefix("node-")
        .is_some_and(|number| number.parse::<u8>().is_ok())
}

/// The nodes that there is any trace of.
fn nodes(layout: &Layout, root: &Cgroup) -> Vec<String> {
    let directory = |path: &Path| {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect::<Vec<_>>()
    };
    let mut nodes = directory(&layout.root.join("nodes"));
    nodes.extend(root.children());
    nodes.extend(directory(Path::new(PINS)));
    nodes.extend(
        netns::list()
            .iter()
            .filter_map(|name| name.strip_prefix("uc-").map(str::to_owned)),
    );
    nodes.retain(|name| is_node(name));
    nodes.sort();
    nodes.dedup();
    nodes
}

/// The network namespaces of the nodes and their pods, and the fabric.
fn namespaces(layout: &Layout, root: &Cgroup, nodes: &[String]) -> Vec<String> {
    let mut names = vec![FABRIC.to_owned(), CONTROL_NETNS.to_owned()];
    for node in nodes {
        names.push(node_netns(node));
        let mut pods = root.child(node).child("pods").children();
        let entries = fs::read_dir(layout.node(node).root.join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        pods.extend(entries.filter_map(|entry| entry.file_name().into_string().ok()));
        names.extend(pods.into_iter().map(|id| format!("uc-{id}")));
    }
    names.sort();
    names.dedup();
    names
}

/// Pins are files in a bpffs: what they hold ends with them.
fn remove_pins(path: &Path) -> Result<()> {
    absent_is_fine(fs::remove_dir_all(path)).with_context(|| format!("cannot remove {}", path.display()))
}

/// Whether nobody has pins there: every bpffs has these two files of its own.
fn is_unused(path: &Path) -> bool {
    let own = |name: &std::ffi::OsStr| name == "maps.debug" || name == "progs.debug";
    fs::read_dir(path).is_ok_and(|entries| entries.flatten().all(|entry| own(&entry.file_name())))
}
