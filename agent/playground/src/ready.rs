//! Waiting until what the API says is so: until all pods are ready, or it is clear that they will not be, and why; and
//! until everybody who routes has learned of it.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Pod, discovery::v1::EndpointSlice};
use kube::{Api, Client, api::ListParams};
use tokio::time::{Instant, sleep};

use crate::{
    cluster::{addresses, is_own, is_ready},
    desired::{Phase, PodStatus},
    layout::{Layout, pod_id},
    process::{Process, last_lines},
    progress::Progress,
    state::State,
};

const LOOK_EVERY: Duration = Duration::from_millis(40);

/// Waits until every pod is ready and the ones that are no longer wanted are gone; else says which is not, and why.
/// Returns how many there are.
pub(crate) async fn wait_for_pods(
    layout: &Layout,
    state: &State,
    client: &Client,
    progress: &Progress,
    at_most: Duration,
) -> Result<usize> {
    let deadline = Instant::now() + at_most;
    loop {
        let pods = list::<Pod>(client).await?;
        let pods: Vec<_> = pods.into_iter().filter(|pod| !is_own(pod)).collect();
        let mut pending: Vec<_> = pods.iter().filter(|pod| !is_settled(layout, pod)).map(key).collect();
        for deployment in list::<Deployment>(client).await? {
            if let Some(why) = unfinished(&deployment) {
                pending.push(why);
            }
        }
        if pending.is_empty() && are_served(client, &pods).await? {
            return Ok(pods.len());
        }
        let waits_for = match pending.is_empty() {
            true => "the services' endpoints".to_owned(),
            false => pending.join(", "),
        };
        let settled = pods.iter().filter(|pod| is_settled(layout, pod)).count();
        progress.detail(&format!("{settled} of {} ready, waiting for {waits_for}", pods.len()));
        let failed = pods.iter().any(|pod| phase(pod) == "Failed");
        if failed || Instant::now() > deadline {
            let unsettled = pods.iter().filter(|pod| !is_settled(layout, pod));
            let why: String = unsettled.map(|pod| explain(layout, pod)).collect();
            bail!("not everything is ready: {waits_for}{why}");
        }
        still_runs("cluster", &layout.process("cluster"), &layout.log("cluster"))?;
        for node in state.node_names() {
            let files = layout.node(&node);
            still_runs(
                &format!("kubelet of {node}"),
                &files.process("kubelet"),
                &files.kubelet_log(),
            )?;
        }
        sleep(LOOK_EVERY).await;
    }
}

fn still_runs(what: &str, record: &std::path::Path, log: &std::path::Path) -> Result<()> {
    if Process::read(record).is_some_and(|process| process.is_alive()) {
        return Ok(());
    }
    bail!("the {what} ended:\n{}", last_lines(log, 15))
}

async fn list<K>(client: &Client) -> Result<Vec<K>>
where
    K: kube::Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
{
    let found = Api::<K>::all(client.clone()).list(&ListParams::default()).await;
    Ok(found.with_context(|| format!("cannot list {}", K::plural(&())))?.items)
}

fn key(pod: &Pod) -> String {
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    let leaves = if pod.metadata.deletion_timestamp.is_some() {
        " (to end)"
    } else {
        ""
    };
    format!("{}/{}{leaves}", text(&pod.metadata.namespace), text(&pod.metadata.name))
}

fn phase(pod: &Pod) -> &str {
    let status = pod.status.as_ref();
    status.and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Ready, or done; and not on its way out. After a crash the API still says of a pod what was so before: what counts is what
/// its kubelet says as well, and that its first process lives.
fn is_settled(layout: &Layout, pod: &Pod) -> bool {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
    let id = pod_id(namespace.unwrap_or_default(), name.unwrap_or_default());
    let told = node.and_then(|node| PodStatus::read(&layout.node(node).pod(&id)));
    let lives = told.is_some_and(|told| {
        let is_of_it = told
            .of
            .as_ref()
            .is_some_and(|of| Some(&of.uid) == pod.metadata.uid.as_ref());
        let runs = told.phase == Phase::Running && told.pause.is_some_and(|pause| pause.is_alive());
        is_of_it && (runs || told.phase == Phase::Succeeded)
    });
    lives && pod.metadata.deletion_timestamp.is_none() && (is_ready(pod) || phase(pod) == "Succeeded")
}

fn unfinished(deployment: &Deployment) -> Option<String> {
    let status = deployment.status.clone().unwrap_or_default();
    let wanted = deployment.spec.replicas.unwrap_or(1);
    let counts = [status.replicas, status.updated_replicas, status.ready_replicas];
    let is_done = status.observed_generation >= deployment.metadata.generation
        && counts.iter().all(|count| count.unwrap_or(0) == wanted);
    (!is_done).then(|| format!("Deployment {}", deployment.metadata.name.as_deref().unwrap_or_default()))
}

/// Whether the EndpointSlices say of every pod that is in one what the pod itself says. Names and rules are written before
/// them.
async fn are_served(client: &Client, pods: &[Pod]) -> Result<bool> {
    let slices = list::<EndpointSlice>(client).await?;
    let endpoints = || slices.iter().flat_map(|slice| slice.endpoints.iter().flatten());
    let of = |pod: &Pod| {
        let uid = pod.metadata.uid.clone();
        endpoints().filter(move |endpoint| endpoint.target_ref.as_ref().is_some_and(|target| target.uid == uid))
    };
    let agree = |pod: &Pod| {
        let mut of = of(pod).map(|endpoint| endpoint.conditions.as_ref().and_then(|conditions| conditions.serving));
        addresses(pod).is_empty() || of.all(|serving| serving == Some(is_ready(pod)))
    };
    let known: Vec<_> = pods.iter().map(|pod| pod.metadata.uid.as_deref()).collect();
    let stale = endpoints().any(|endpoint| {
        let target = endpoint
            .target_ref
            .as_ref()
            .filter(|target| target.kind.as_deref() == Some("Pod"));
        target.is_some_and(|target| !known.contains(&target.uid.as_deref()))
    });
    Ok(!stale && pods.iter().all(agree))
}

fn explain(layout: &Layout, pod: &Pod) -> String {
    let node = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.node_name.as_deref())
        .unwrap_or("no node");
    let mut text = format!("\n  {} on {node}: ", key(pod));
    let (namespace, name) = (pod.metadata.namespace.as_deref(), pod.metadata.name.as_deref());
    let files = layout
        .node(node)
        .pod(&pod_id(namespace.unwrap_or_default(), name.unwrap_or_default()));
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
