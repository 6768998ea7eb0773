//! Waiting until what the API says is in force everywhere: every pod that is to be in the mesh is, the control plane has
//! seen every object as it is now, and every agent has acknowledged what came of that.
//!
//! The control plane tells of each kind how many objects it has and the last revision that it saw; when the API has as many
//! and none that is newer, nothing is on its way any more.

use std::{collections::BTreeMap, thread::sleep, time::Duration};

use anyhow::{Context, Result, bail};
use k8s::{Enablement, Metadata};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client, ResourceExt, api::ListParams, core::DynamicObject};
use serde_json::Value;
use tokio::{runtime::Runtime, time::Instant};

use crate::{
    cluster::{agent_pod, is_own},
    control,
    layout::Layout,
    process::last_lines,
    state::State,
};

const LOOK_EVERY: Duration = Duration::from_millis(20);
const REDIRECTION: &str = "ambient.istio.io/redirection";

/// The kinds that policies and addresses are made of: API version, kind, plural.
const KINDS: &[(&str, &str, &str)] = &[
    ("v1", "Namespace", "namespaces"),
    ("v1", "Pod", "pods"),
    ("v1", "Service", "services"),
    ("discovery.k8s.io/v1", "EndpointSlice", "endpointslices"),
    ("networking.istio.io/v1", "ServiceEntry", "serviceentries"),
    ("networking.istio.io/v1", "WorkloadEntry", "workloadentries"),
    ("security.istio.io/v1", "PeerAuthentication", "peerauthentications"),
    ("security.istio.io/v1", "AuthorizationPolicy", "authorizationpolicies"),
    ("gateway.networking.k8s.io/v1", "Gateway", "gateways"),
];

/// Waits; fails with what is still missing.
pub(crate) fn wait(
    runtime: &Runtime,
    layout: &Layout,
    state: &State,
    client: &Client,
    at_most: Duration,
) -> Result<()> {
    let deadline = runtime.block_on(async { Instant::now() }) + at_most;
    loop {
        let missing = match runtime.block_on(not_captured(client))? {
            pods if !pods.is_empty() => format!("not captured yet, or not released: {}", pods.join(", ")),
            _ => match runtime.block_on(behind(client, state))? {
                None => return Ok(()),
                Some(missing) => missing,
            },
        };
        if Instant::now() > deadline {
            bail!(
                "not everything is in force: {missing}\n{}",
                last_lines(&layout.log("control"), 10)
            );
        }
        sleep(LOOK_EVERY);
    }
}

/// The pods that should be in the mesh and are not, or the other way round.
async fn not_captured(client: &Client) -> Result<Vec<String>> {
    let namespaces = Api::<Namespace>::all(client.clone())
        .list(&ListParams::default())
        .await?;
    let metadata = |value: Value| serde_json::from_value::<Metadata>(value["metadata"].clone());
    let mut by_name = BTreeMap::new();
    for namespace in namespaces {
        by_name.insert(namespace.name_any(), metadata(serde_json::to_value(&namespace)?)?);
    }
    let mut missing = Vec::new();
    for pod in Api::<Pod>::all(client.clone()).list(&ListParams::default()).await? {
        let ended = pod.status.as_ref().and_then(|status| status.phase.as_deref()) == Some("Succeeded");
        if is_own(&pod) || ended {
            continue;
        }
        let read: k8s::Pod = serde_json::from_value(serde_json::to_value(&pod)?)?;
        let namespace = by_name.get(&pod.namespace().unwrap_or_default());
        let wanted = k8s::enablement(&read, namespace) == Enablement::Captured;
        let is = pod
            .annotations()
            .get(REDIRECTION)
            .is_some_and(|value| value == "enabled");
        if wanted != is {
            missing.push(format!("{}/{}", pod.namespace().unwrap_or_default(), pod.name_any()));
        }
    }
    Ok(missing)
}

/// What the control plane or an agent does not know yet.
async fn behind(client: &Client, state: &State) -> Result<Option<String>> {
    let before = control::clients()?;
    for (api_version, kind, plural) in KINDS {
        let (count, revision) = of_api(client, api_version, kind, plural).await?;
        let seen = &before["inputs"][kind];
        let is_current = seen["revision"].as_u64().is_some_and(|seen| seen >= revision);
        if seen["count"] != count || !is_current {
            return Ok(Some(format!(
                "of {kind} the control plane has {} up to revision {}, the API {count} up to {revision}",
                seen["count"], seen["revision"]
            )));
        }
    }
    // Asked again: what it has seen is in this generation, or in one before.
    let now = control::clients()?;
    let generation = now["generation"]
        .as_u64()
        .context("the control plane names no generation")?;
    let clients = now["clients"].as_array().cloned().unwrap_or_default();
    for node in state.node_names() {
        // Node identifiers are `ztunnel~IP~POD.NAMESPACE~DOMAIN`.
        let pod = format!("~{}.", agent_pod(&node));
        let is_its = |client: &&Value| client["node"].as_str().is_some_and(|id| id.contains(&pod));
        let acknowledged = clients
            .iter()
            .filter(is_its)
            .filter_map(|client| client["acknowledged"].as_u64())
            .max();
        match acknowledged {
            None => return Ok(Some(format!("the agent of {node} is not connected"))),
            Some(acknowledged) if acknowledged < generation => {
                return Ok(Some(format!(
                    "the agent of {node} has acknowledged generation {acknowledged} of {generation}"
                )));
            }
            Some(_) => {}
        }
    }
    Ok(None)
}

/// How many objects of a kind there are, and the last revision among them.
async fn of_api(client: &Client, api_version: &str, kind: &str, plural: &str) -> Result<(usize, u64)> {
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let resource = kube::api::ApiResource {
        group: group.to_owned(),
        version: version.to_owned(),
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        plural: plural.to_owned(),
    };
    let api: Api<DynamicObject> = Api::all_with(client.clone(), &resource);
    let objects = api.list_metadata(&ListParams::default()).await?;
    let revision = |metadata: &kube::core::PartialObjectMeta<DynamicObject>| {
        metadata.metadata.resource_version.as_ref()?.parse().ok()
    };
    Ok((
        objects.items.len(),
        objects.iter().filter_map(revision).max().unwrap_or(0),
    ))
}
