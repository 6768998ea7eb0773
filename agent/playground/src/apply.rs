//! Applying manifests, as `kubectl apply --server-side --prune` would: each object on its own, so that a bad one spoils no
//! other.
//!
//! A pod's specification can't change while it runs; here it is deleted and made anew, since that is what whoever edits a
//! manifest of a playground means.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use kube::{
    Client, ResourceExt,
    api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams},
    core::GroupVersionKind,
    discovery::{self, Scope},
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::manifests::Document;

const MANAGER: &str = "playground-up";

/// An object that `up` wrote.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Applied {
    pub api_version: String,
    pub kind: String,
    pub namespace: String,
    pub name: String,
}

/// The kinds of the API, as they are asked for.
struct Kinds {
    client: Client,
    known: HashMap<(String, String), (ApiResource, Scope)>,
}

impl Kinds {
    async fn find(&mut self, api_version: &str, kind: &str) -> Result<(ApiResource, Scope)> {
        let key = (api_version.to_owned(), kind.to_owned());
        if let Some(found) = self.known.get(&key) {
            return Ok(found.clone());
        }
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let wanted = GroupVersionKind::gvk(group, version, kind);
        let found = discovery::pinned_kind(&self.client, &wanted).await;
        let (resource, capabilities) = found.with_context(|| format!("the API has no {kind} of {api_version}"))?;
        let found = (resource, capabilities.scope);
        self.known.insert(key, found.clone());
        Ok(found)
    }

    async fn api(&mut self, of: &Applied) -> Result<Api<DynamicObject>> {
        let (resource, scope) = self.find(&of.api_version, &of.kind).await?;
        Ok(match scope {
            Scope::Cluster => Api::all_with(self.client.clone(), &resource),
            Scope::Namespaced => Api::namespaced_with(self.client.clone(), &of.namespace, &resource),
        })
    }
}

/// What became of the manifests.
#[derive(Default)]
pub(crate) struct Outcome {
    /// What is there now, and would have to go when it is no longer written.
    pub applied: Vec<Applied>,
    /// What was refused, and why.
    pub refused: Vec<String>,
}

/// Applies all documents, then deletes what an earlier call applied and is no longer written.
pub(crate) async fn apply(
    client: &Client,
    documents: &[Document],
    before: &[Applied],
    at_most: Duration,
) -> Result<Outcome> {
    let mut kinds = Kinds {
        client: client.clone(),
        known: HashMap::new(),
    };
    let mut outcome = Outcome::default();
    let mut named: Vec<_> = documents
        .iter()
        .filter_map(|document| Some((identify(&document.value)?, document)))
        .collect();
    add_namespaces(&mut named, &mut outcome.applied, &mut kinds).await?;
    // What others refer to goes first; policies before the pods that they are for.
    named.sort_by_key(|(object, _)| rank(&object.kind));
    let deadline = Instant::now() + at_most;
    for (object, document) in named {
        match write(&mut kinds, &object, &document.value, deadline).await {
            Ok(()) => outcome.applied.push(object),
            Err(error) => {
                let (kind, name) = (&object.kind, &object.name);
                outcome.refused.push(format!(
                    "{}: {kind} {}/{name}: {error:#}",
                    document.file, object.namespace
                ));
                // What is there from before stays as it was.
                outcome
                    .applied
                    .extend(before.iter().find(|other| **other == object).cloned());
            }
        }
    }
    outcome.applied.sort();
    outcome.applied.dedup();
    let kept: BTreeSet<_> = outcome.applied.iter().collect();
    let mut gone: Vec<_> = before.iter().filter(|object| !kept.contains(object)).collect();
    gone.sort_by_key(|object| std::cmp::Reverse(rank(&object.kind)));
    for object in gone {
        match kinds
            .api(object)
            .await?
            .delete(&object.name, &DeleteParams::background())
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            deleted => drop(deleted.with_context(|| format!("cannot delete {} {}", object.kind, object.name))?),
        }
    }
    Ok(outcome)
}

fn rank(kind: &str) -> u8 {
    match kind {
        "Namespace" => 0,
        "ServiceAccount" | "ConfigMap" | "Secret" => 1,
        "Pod" | "Deployment" | "ReplicaSet" => 3,
        _ => 2,
    }
}

fn identify(value: &Value) -> Option<Applied> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let kind = text(&value["kind"])?;
    let namespace = match kind.as_str() {
        "Namespace" | "Node" | "GatewayClass" => String::new(),
        _ => text(&value["metadata"]["namespace"]).unwrap_or_else(|| "default".to_owned()),
    };
    Some(Applied {
        api_version: text(&value["apiVersion"])?,
        namespace,
        name: text(&value["metadata"]["name"])?,
        kind,
    })
}

/// Namespaces that objects are in and nobody wrote: made, as a playground should.
async fn add_namespaces(
    named: &mut [(Applied, &Document)],
    applied: &mut Vec<Applied>,
    kinds: &mut Kinds,
) -> Result<()> {
    let written: BTreeSet<_> = named
        .iter()
        .filter(|(object, _)| object.kind == "Namespace")
        .map(|(object, _)| object.name.clone())
        .collect();
    let used: BTreeSet<_> = named.iter().map(|(object, _)| object.namespace.clone()).collect();
    for name in used.difference(&written).filter(|name| !name.is_empty()) {
        let namespace = Applied {
            api_version: "v1".to_owned(),
            kind: "Namespace".to_owned(),
            namespace: String::new(),
            name: name.clone(),
        };
        let api = kinds.api(&namespace).await?;
        if api.get_opt(name).await?.is_none() {
            patch(&api, &namespace, &json!({"metadata": {}})).await?;
            applied.push(namespace);
        }
    }
    Ok(())
}

async fn patch(api: &Api<DynamicObject>, object: &Applied, value: &Value) -> kube::Result<()> {
    let mut value = value.clone();
    value["apiVersion"] = object.api_version.as_str().into();
    value["kind"] = object.kind.as_str().into();
    value["metadata"]["name"] = object.name.as_str().into();
    if !object.namespace.is_empty() {
        value["metadata"]["namespace"] = object.namespace.as_str().into();
    }
    let params = PatchParams::apply(MANAGER).force();
    api.patch(&object.name, &params, &Patch::Apply(&value)).await.map(drop)
}

async fn write(kinds: &mut Kinds, object: &Applied, value: &Value, deadline: Instant) -> Result<()> {
    let api = kinds.api(object).await?;
    loop {
        let refused = match patch(&api, object, value).await {
            Ok(()) => return Ok(()),
            Err(kube::Error::Api(status)) => status,
            Err(error) => return Err(error.into()),
        };
        let there = match object.kind.as_str() {
            "Pod" => api.get_opt(&object.name).await?,
            _ => None,
        };
        let leaves = there
            .as_ref()
            .is_some_and(|pod| pod.metadata.deletion_timestamp.is_some());
        let cannot_change = there.is_some() && refused.code == 422;
        if !(leaves || cannot_change) {
            bail!("{}", refused.message);
        }
        if let Some(pod) = there {
            replace(&api, &pod, deadline).await?;
        }
    }
}

/// Deletes a pod and waits until it is gone.
async fn replace(api: &Api<DynamicObject>, pod: &DynamicObject, deadline: Instant) -> Result<()> {
    let name = pod.name_any();
    if pod.metadata.deletion_timestamp.is_none() {
        api.delete(&name, &DeleteParams::default()).await?;
    }
    while api.get_opt(&name).await?.is_some_and(|found| found.uid() == pod.uid()) {
        if Instant::now() > deadline {
            bail!("it has to make way for its new specification and does not end");
        }
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
