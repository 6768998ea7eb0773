//! The cluster at the API: its objects, its agents' tokens, and changes of its pods.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use futures_util::{StreamExt, TryStreamExt, stream};
use k8s::live::Kind;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, ServiceAccount};
use kube::{
    Api, Client,
    api::{Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use store::{Engine, Key, Part, kinds};

use crate::{
    child::BOUND,
    world::{Object, World, readiness},
};

const SYSTEM: &str = "istio-system";
const ACCOUNT: &str = "undercurrent-node";

/// Puts everything into the store's directory, before the store starts: a hundred thousand pods by HTTPS would take
/// minutes that nobody wants to know of.
pub async fn fill(data: &Path, world: World, agents: usize) -> Result<()> {
    let engine = Engine::open(data)?;
    let system = (
        Kind::Namespace,
        json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM}}),
    );
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount",
        "metadata": {"name": ACCOUNT, "namespace": SYSTEM}});
    let mut first = vec![system, (Kind::ServiceAccount, account)];
    first.extend((0..agents).map(|agent| agent_pod(agent, world)));
    let groups = std::iter::once(first).chain(world.objects());
    stream::iter(groups.map(Ok))
        .try_for_each_concurrent(512, |objects| write(&engine, objects))
        .await
}

/// The pod of the agent on a node; with few nodes, some have more than one.
fn agent_pod(agent: usize, world: World) -> Object {
    let object = json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": format!("{ACCOUNT}-{agent}"), "namespace": SYSTEM, "labels": {"app": ACCOUNT}},
        "spec": {"nodeName": format!("node-{}", agent % world.nodes()), "serviceAccountName": ACCOUNT,
            "hostNetwork": true, "containers": [{"name": "agent", "image": "agent"}]},
        "status": {"phase": "Running"}});
    (Kind::Pod, object)
}

async fn write(engine: &Engine, objects: Vec<Object>) -> Result<()> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mut owner = None;
    for (_, mut object) in objects {
        // Pods of an owner that is not there would be collected as garbage.
        if object["metadata"]["ownerReferences"].is_array() {
            let uid = match &owner {
                Some(uid) => uid,
                None => owner.insert(replica_set(engine, &object).await?),
            };
            object["metadata"]["ownerReferences"][0]["uid"] = uid.clone();
        }
        let kind = kinds::of_object(&text(&object["apiVersion"]), &text(&object["kind"]));
        let kind = kind.with_context(|| format!("the store does not know {object}"))?;
        let (namespace, name) = (
            text(&object["metadata"]["namespace"]),
            text(&object["metadata"]["name"]),
        );
        let failed = |error| anyhow!("{kind} {namespace}/{name}: {error}");
        let status = object.get("status").cloned();
        engine.create(kind, &namespace, object, false).await.map_err(failed)?;
        let Some(status) = status else { continue };
        let mut change = |value: &Value| {
            let mut value = value.clone();
            value["status"] = status.clone();
            Ok(value)
        };
        let key = Key::new(kind, &namespace, &name);
        let changed = engine.change(&key, Part::Status, false, &mut change).await;
        changed.map_err(failed)?;
    }
    Ok(())
}

/// Makes the owner of a pod; its uid.
async fn replica_set(engine: &Engine, pod: &Value) -> Result<Value> {
    let (metadata, labels) = (&pod["metadata"], &pod["metadata"]["labels"]);
    let kind = kinds::of_object("apps/v1", "ReplicaSet").context("the store does not know ReplicaSets")?;
    let namespace = metadata["namespace"].as_str().unwrap_or_default();
    let object = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet",
        "metadata": {"name": metadata["ownerReferences"][0]["name"], "namespace": namespace},
        "spec": {"replicas": 10, "selector": {"matchLabels": labels}, "template": {"metadata": {"labels": labels},
            "spec": {"containers": [{"name": "app", "image": "app"}]}}}});
    let made = engine.create(kind, namespace, object, false).await;
    let made = made.map_err(|error| anyhow!("a ReplicaSet: {error}"))?;
    Ok(made.object.value()["metadata"]["uid"].clone())
}

/// Agents' tokens, bound to their pods, in a file with one a line.
pub async fn tokens(client: &Client, agents: usize, file: &Path) -> Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), SYSTEM);
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), SYSTEM);
    let token = |agent: usize| {
        let (pods, accounts) = (&pods, &accounts);
        async move {
            let name = format!("{ACCOUNT}-{agent}");
            let uid = pods.get(&name).await?.metadata.uid;
            let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid});
            let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
                "spec": {"audiences": ["istio-ca"], "expirationSeconds": 3600, "boundObjectRef": bound}});
            let made: Value = accounts
                .create_subresource("token", ACCOUNT, &PostParams::default(), &request)
                .await?;
            let token = made["status"]["token"].as_str();
            anyhow::Ok(token.context("no token")?.to_owned())
        }
    };
    let tokens: Vec<String> = stream::iter((0..agents).map(token)).buffered(16).try_collect().await?;
    Ok(std::fs::write(file, tokens.join("\n"))?)
}

/// The roots that the control plane has published, in a file.
pub async fn roots(client: &Client, file: PathBuf) -> Result<PathBuf> {
    let maps = Api::<ConfigMap>::namespaced(client.clone(), SYSTEM);
    let look = async {
        loop {
            let map = maps.get_opt("istio-ca-root-cert").await?;
            if let Some(pem) = map.and_then(|map| map.data?.remove("root-cert.pem")) {
                return anyhow::Ok(pem);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let pem = tokio::time::timeout(BOUND, look).await.context("no trust bundle")??;
    std::fs::write(&file, pem)?;
    Ok(file)
}

/// Makes pods ready and unready, one after the other: an endpoint of another service each time.
pub struct Changes {
    client: Client,
    world: World,
    made: AtomicUsize,
}

/// One that is to be written.
pub struct Change {
    api: Api<Pod>,
    name: String,
    ready: bool,
    /// The resource by which agents know the pod.
    pub resource: String,
}

impl Changes {
    /// None so far.
    pub fn new(client: Client, world: World) -> Self {
        Self {
            client,
            world,
            made: AtomicUsize::new(0),
        }
    }

    /// The next.
    pub fn next(&self) -> Change {
        let (made, pods) = (self.made.fetch_add(1, Relaxed), self.world.pods());
        let (namespace, name) = self.world.pod_of(made * 7919 % pods);
        Change {
            api: Api::namespaced(self.client.clone(), &namespace),
            resource: format!("Kubernetes//v1/Pod/{namespace}/{name}"),
            ready: made / pods % 2 == 1,
            name,
        }
    }
}

impl Change {
    /// PATCHes the pod's status, as a kubelet does; the revision that this made.
    pub async fn write(&self) -> Result<u64> {
        let patch = json!({"status": readiness(self.ready)});
        let written = self
            .api
            .patch_status(&self.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await?;
        let revision = written.metadata.resource_version.context("no revision")?;
        Ok(revision.parse()?)
    }
}
