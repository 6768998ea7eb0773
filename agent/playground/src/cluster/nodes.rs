//! Nodes as the API shows them, the pods that stand for their agents, and what a kubelet would put into those pods:
//! tokens, the mesh's roots, a way to the API.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result};
use k8s_openapi::api::{
    authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec},
    core::v1::{ConfigMap, Pod, ServiceAccount},
};
use kube::{
    api::PostParams,
    config::{AuthInfo, Kubeconfig},
};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::{
    api::{Api, Target},
    deployments::name,
};
use crate::{
    files::write_atomically,
    layout::{Layout, node_addresses, node_name, pod_networks},
};

/// The namespace of the mesh's own.
pub(crate) const SYSTEM: &str = "istio-system";
/// The service account of the node agents.
pub(crate) const AGENT_ACCOUNT: &str = "undercurrent-node";
/// The service account of the control plane.
const CONTROL_ACCOUNT: &str = "undercurrent-control";
/// Marks the pods that stand for what the playground itself runs.
const OWN: &str = "playground.undercurrent.io/runs-as";
/// What certificates are asked for with, as in Istio.
const CA_AUDIENCE: &str = "istio-ca";
const TOKEN_SECONDS: i64 = 12 * 3600;
const RENEW_EVERY: Duration = Duration::from_secs(3600);
const HEALTH_EVERY: Duration = Duration::from_secs(1);

/// What is kept right for the nodes.
#[derive(Default)]
pub(super) struct Nodes {
    renewed: Option<Instant>,
    looked: Option<Instant>,
    roots: String,
}

/// Whether a pod stands for what the playground itself runs: no kubelet runs it.
pub(crate) fn is_own(pod: &Pod) -> bool {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.is_some_and(|annotations| annotations.contains_key(OWN))
}

/// The name of the pod that stands for a node's agent.
pub(crate) fn agent_pod(node: &str) -> String {
    format!("{AGENT_ACCOUNT}-{node}")
}

/// The nodes and the accounts and pods of the agents; once at the start.
pub(super) async fn register(api: &mut Api, count: u8, agents: bool) -> Result<()> {
    for account in [AGENT_ACCOUNT, CONTROL_ACCOUNT] {
        let target = Target::core("ServiceAccount", "serviceaccounts", SYSTEM, account);
        api.ensure(target, json!({"metadata": {}}), true).await?;
    }
    for index in 1..=count {
        let node = node_name(index);
        let (object, status) = node_object(index);
        let target = Target::core("Node", "nodes", "", &node);
        api.ensure(target.clone(), object, true).await?;
        api.ensure(target.status(), status, true).await?;
        if agents {
            let target = Target::core("Pod", "pods", SYSTEM, &agent_pod(&node));
            api.ensure(target, agent_object(&node), true).await?;
        }
    }
    Ok(())
}

fn node_object(index: u8) -> (Value, Value) {
    let node = node_name(index);
    let networks = pod_networks(index).map(|(network, length)| format!("{network}/{length}"));
    let addresses = node_addresses(index).map(|address| json!({"type": "InternalIP", "address": address.to_string()}));
    let labels = json!({"kubernetes.io/hostname": node, "kubernetes.io/os": "linux"});
    let object = json!({
        "metadata": {"labels": labels},
        "spec": {"podCIDR": networks[0], "podCIDRs": networks},
    });
    let status = json!({"status": {
        "addresses": addresses,
        "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "a network namespace of the playground"}],
        "nodeInfo": {
            "kubeletVersion": concat!("undercurrent-", env!("CARGO_PKG_VERSION")), "operatingSystem": "linux",
            "architecture": std::env::consts::ARCH, "osImage": "playground", "kernelVersion": kernel(),
            "containerRuntimeVersion": "playground", "bootID": "", "machineID": "", "systemUUID": "", "kubeProxyVersion": "",
        },
    }});
    (object, status)
}

fn kernel() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    text.trim().to_owned()
}

fn agent_object(node: &str) -> Value {
    json!({
        "metadata": {"labels": {"app": "undercurrent-node"}, "annotations": {OWN: "agent"}},
        "spec": {
            "nodeName": node, "hostNetwork": true, "serviceAccountName": AGENT_ACCOUNT, "priorityClassName": "system-node-critical",
            "containers": [{"name": "undercurrent", "image": "undercurrent", "args": ["node"]}],
        },
    })
}

impl Nodes {
    /// Keeps tokens fresh, the mesh's roots on every node, and tells how the agents are. `config_maps` are those of the
    /// system namespace.
    pub async fn keep(
        &mut self,
        layout: &Layout,
        api: &mut Api,
        count: u8,
        pods: &[impl AsRef<Pod>],
        config_maps: &[impl AsRef<ConfigMap>],
        in_cluster: &str,
    ) -> Result<()> {
        self.spread_roots(layout, count, config_maps)?;
        if self.renewed.is_none_or(|at| at.elapsed() > RENEW_EVERY) {
            self.renew(layout, api, count, pods, in_cluster).await?;
            self.renewed = Some(Instant::now());
        }
        if self.looked.is_none_or(|at| at.elapsed() > HEALTH_EVERY) {
            self.looked = Some(Instant::now());
            for pod in pods.iter().map(AsRef::as_ref).filter(|pod| is_own(pod)) {
                self.tell(layout, api, pod).await?;
            }
        }
        Ok(())
    }

    fn spread_roots(&mut self, layout: &Layout, count: u8, config_maps: &[impl AsRef<ConfigMap>]) -> Result<()> {
        let mut maps = config_maps.iter().map(AsRef::as_ref);
        let found = maps.find(|map| name(&map.metadata) == "istio-ca-root-cert");
        let roots = found.and_then(|map| map.data.as_ref()?.get("root-cert.pem"));
        let Some(roots) = roots.filter(|roots| **roots != self.roots) else {
            return Ok(());
        };
        for index in 1..=count {
            write_atomically(&layout.node(&node_name(index)).roots(), roots)?;
        }
        self.roots.clone_from(roots);
        Ok(())
    }

    async fn renew(
        &self,
        layout: &Layout,
        api: &Api,
        count: u8,
        pods: &[impl AsRef<Pod>],
        in_cluster: &str,
    ) -> Result<()> {
        let control = token(api, CONTROL_ACCOUNT, None, None).await?;
        write_kubeconfig(&layout.control(), in_cluster, &control)?;
        for index in 1..=count {
            let node = node_name(index);
            let wanted = agent_pod(&node);
            let mut agents = pods.iter().map(AsRef::as_ref);
            let Some(pod) = agents.find(|pod| is_own(pod) && name(&pod.metadata) == wanted) else {
                continue;
            };
            let files = layout.node(&node);
            write_atomically(
                &files.token(),
                &token(api, AGENT_ACCOUNT, Some(pod), Some(CA_AUDIENCE)).await?,
            )?;
            write_kubeconfig(
                &files.root,
                in_cluster,
                &token(api, AGENT_ACCOUNT, Some(pod), None).await?,
            )?;
        }
        Ok(())
    }

    async fn tell(&self, layout: &Layout, api: &mut Api, pod: &Pod) -> Result<()> {
        let Some(node) = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()) else {
            return Ok(());
        };
        let said = admin::get(&layout.node(&node).agent_socket(), "/healthz/ready").await;
        let ready = if said.is_ok() { "True" } else { "False" };
        let index = (1..=u8::MAX).find(|index| node_name(*index) == node).unwrap_or(0);
        let [address, address_v6] = node_addresses(index).map(|address| address.to_string());
        let status = json!({"status": {
            "phase": "Running", "hostIP": address, "podIP": address, "podIPs": [{"ip": address}, {"ip": address_v6}],
            "conditions": [
                {"type": "Ready", "status": ready, "message": said.err().map(|error| error.to_string()).unwrap_or_default()},
            ],
            "containerStatuses": [{"name": "undercurrent", "image": "undercurrent", "imageID": "", "restartCount": 0, "ready": ready == "True"}],
        }});
        let target = Target::core("Pod", "pods", SYSTEM, name(&pod.metadata)).status();
        api.ensure(target, status, true).await.map(drop)
    }
}

async fn token(api: &Api, account: &str, pod: Option<&Pod>, audience: Option<&str>) -> Result<String> {
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: audience.map(|audience| vec![audience.to_owned()]),
            attestations: None,
            expiration_seconds: Some(TOKEN_SECONDS),
            bound_object_ref: pod.map(|pod| BoundObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
        }),
        ..TokenRequest::default()
    };
    let accounts: kube::Api<ServiceAccount> = kube::Api::namespaced(api.client.clone(), SYSTEM);
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await;
    let answer = answer.with_context(|| format!("cannot get a token for {SYSTEM}/{account}"))?;
    let token = answer.status.and_then(|status| status.token);
    token.context("the API gave no token")
}

/// `DIRECTORY/kubeconfig` with a token beside it, in place of the certificate of who may do everything.
fn write_kubeconfig(directory: &Path, in_cluster: &str, token: &str) -> Result<()> {
    let path = directory.join("api-token");
    write_atomically(&path, token)?;
    let mut kubeconfig = Kubeconfig::from_yaml(in_cluster).context("the API's own kubeconfig can't be read")?;
    for user in &mut kubeconfig.auth_infos {
        user.auth_info = Some(AuthInfo {
            token_file: Some(path.to_string_lossy().into_owned()),
            ..AuthInfo::default()
        });
    }
    let text = serde_yaml_ng::to_string(&kubeconfig).context("cannot write a kubeconfig")?;
    write_atomically(&directory.join("kubeconfig"), &text)
}
