//! What the kubelets are told: which pods to run, and what their resolvers find.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;

use super::places::PodSlot;
use crate::{
    desired::Desired,
    files::{absent_is_fine, rewrite_in_place},
    hosts::{hosts, resolv_conf},
    layout::{Layout, node_name},
};

/// A pod as a kubelet is told of it, or why it can't be run as it is written.
pub(super) fn desired(pod: &Pod, slot: PodSlot, path: &str) -> Result<Desired> {
    let value = serde_json::to_value(pod).context("it can't be written as JSON")?;
    Ok(Desired {
        uid: pod.metadata.uid.clone().unwrap_or_default(),
        pod: serde_json::from_value(value)?,
        addresses: slot.addresses(),
        path: path.to_owned(),
    })
}

/// Tells the kubelets what to run, and no more than that.
pub(super) fn tell(layout: &Layout, nodes: u8, all: &[(u8, Desired)]) -> Result<()> {
    let mut wanted: BTreeMap<u8, BTreeSet<String>> = (1..=nodes).map(|node| (node, BTreeSet::new())).collect();
    for (node, desired) in all {
        let files = layout.node(&node_name(*node));
        let metadata = &desired.pod.metadata;
        let (namespace, id) = (&metadata.namespace, desired.id());
        let hostname = desired.pod.spec.hostname.as_deref().unwrap_or(&metadata.name);
        rewrite_in_place(&files.pod(&id).hosts(), &hosts(hostname, &desired.addresses))?;
        rewrite_in_place(
            &files.pod(&id).resolv_conf(),
            &resolv_conf(namespace, &desired.addresses),
        )?;
        wanted.entry(*node).or_default().insert(format!("{id}.json"));
    }
    for (node, keep) in wanted {
        let directory = layout.node(&node_name(node)).desired();
        fs::create_dir_all(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        for entry in fs::read_dir(&directory)?.flatten() {
            if !keep.contains(&*entry.file_name().to_string_lossy()) {
                absent_is_fine(fs::remove_file(entry.path()))?;
            }
        }
    }
    for (node, desired) in all {
        desired.write(&layout.node(&node_name(*node)))?;
    }
    Ok(())
}
