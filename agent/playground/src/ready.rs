//! Waiting for the pods: until all are ready, or it is clear that they will not be, and why.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

use crate::{
    desired::{Desired, Phase, PodStatus},
    layout::{Layout, pod_id},
    process::{Process, last_lines},
    progress::Progress,
    state::{State, key},
};

/// Waits until every pod is ready and the ones that are no longer wanted are gone; else says which is not, and why.
pub(crate) fn wait_for_pods(
    layout: &Layout,
    state: &State,
    desired: &[(String, Desired)],
    progress: &Progress,
    at_most: Duration,
) -> Result<()> {
    let deadline = Instant::now() + at_most;
    loop {
        let status = |node: &str, desired: &Desired| PodStatus::read(&layout.node(node).pod(&desired.id()));
        let ready =
            |node: &str, desired: &Desired| status(node, desired).is_some_and(|status| status.is_ready(desired));
        let pending: Vec<_> = desired.iter().filter(|(node, desired)| !ready(node, desired)).collect();
        let leaving = leaving(layout, state, desired);
        if pending.is_empty() && leaving.is_empty() {
            return Ok(());
        }
        let names: Vec<_> = pending
            .iter()
            .map(|(_, desired)| key(&desired.pod.metadata))
            .chain(leaving.iter().cloned())
            .collect();
        progress.detail(&format!(
            "{} of {} ready, waiting for {}",
            desired.len() - pending.len(),
            desired.len(),
            names.join(", ")
        ));
        let failed = pending
            .iter()
            .any(|(node, desired)| status(node, desired).is_some_and(|status| status.phase == Phase::Failed));
        if failed || Instant::now() > deadline {
            let mut why = String::new();
            for (node, desired) in &pending {
                why.push_str(&explain(layout, node, desired));
            }
            for name in leaving {
                why.push_str(&format!("\n  {name} is no longer wanted and does not end"));
            }
            bail!("not everything is ready:{why}");
        }
        for node in state.node_names() {
            let files = layout.node(&node);
            if !Process::read(&files.process("kubelet")).is_some_and(|process| process.is_alive()) {
                bail!("the kubelet of {node} ended:\n{}", last_lines(&files.kubelet_log(), 15));
            }
        }
        sleep(Duration::from_millis(30));
    }
}

/// The pods that still are and are no longer wanted.
fn leaving(layout: &Layout, state: &State, desired: &[(String, Desired)]) -> Vec<String> {
    let mut leaving = Vec::new();
    for node in state.node_names() {
        let wanted = |id: &str| desired.iter().any(|(of, desired)| *of == node && desired.id() == id);
        let entries = fs::read_dir(layout.node(&node).root.join("pods"))
            .into_iter()
            .flatten()
            .flatten();
        let ids = entries.filter_map(|entry| entry.file_name().into_string().ok());
        leaving.extend(ids.filter(|id| !wanted(id)));
    }
    leaving
}

fn explain(layout: &Layout, node: &str, desired: &Desired) -> String {
    let metadata = &desired.pod.metadata;
    let files = layout.node(node).pod(&pod_id(&metadata.namespace, &metadata.name));
    let mut text = format!("\n  {} on {node}: ", key(metadata));
    match PodStatus::read(&files) {
        None => text.push_str("the kubelet did not begin with it"),
        Some(status) => {
            text.push_str(&status.why());
            for container in status.containers.iter().filter(|container| !container.ready) {
                let lines = last_lines(&files.log(&container.name), 8);
                if !lines.is_empty() {
                    text.push_str(&format!("\n  last lines of {}:\n{}", container.name, lines.trim_end()));
                }
            }
        }
    }
    text
}
