//! The node's own pods, as the Kubernetes API has them: who they are, and whether they are to be in the mesh.
//!
//! ```text
//! watch pods of this node ─┐
//! watch namespaces ────────┴─► Table ─► Cluster::pod (who, in the mesh or not) ─► the reconciler of pods
//! GET, if a pod is not there yet ──────► Cluster::resolve (cmdadd) ┘
//! ```
//! Knows nothing of sandboxes or capture. What it answers was said by the API; it never guesses: a pod that nobody can
//! vouch for is refused (`a_pod_that_the_api_does_not_have_is_refused`), and so is one that has the name of another
//! (`the_predecessor_of_a_pod_does_not_stand_for_it`).
//!
//! The API away: what was known stays, and pods' records on disk remember it across a restart of the agent; the watches
//! begin again with back-off (0.8 to 30 s).

use std::{
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures_util::StreamExt;
use k8s::Enablement;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{
    Api, Client, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, watcher},
    },
};
use model::{NamespacedName, NonTcp, PodSettings};
use serde::{Deserialize, Serialize};
use tokio::{sync::watch, time::Instant};

use super::watched::Watched;

/// What Istio's control plane reads, and its CNI agent writes.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// One request for a pod that is about to start.
const GET_TIMEOUT: Duration = Duration::from_secs(3);
const GET_AGAIN: Duration = Duration::from_millis(250);

/// A pod as the API vouches for it; kept in its record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ApiPod {
    /// The object's uid: a pod of the same name with another one is another pod.
    pub uid: String,
    /// Half of its identity.
    pub service_account: Arc<str>,
    /// Whether its traffic is to be captured.
    pub in_mesh: bool,
    /// Why not, where it asks to be.
    #[serde(default)]
    pub left_out: Option<String>,
    /// What becomes of its traffic that is not TCP.
    pub non_tcp: NonTcp,
    /// How it is captured.
    #[serde(default)]
    pub settings: PodSettings,
    /// What of its annotations is not done, and why.
    #[serde(default)]
    pub problems: Vec<String>,
}

/// A pod of the table, with what others need to know of it.
#[derive(Clone, Debug, PartialEq)]
pub struct ListedPod {
    pub metadata: k8s::Metadata,
    pub service_account: Arc<str>,
    /// As far as its status has them.
    pub addresses: Vec<IpAddr>,
    pub host_network: bool,
    pub running: bool,
    pub ended: bool,
}

/// A pod that has its network, and nobody told of.
#[derive(Clone, Debug, PartialEq)]
pub struct UntoldPod {
    pub pod: NamespacedName,
    pub addresses: Vec<IpAddr>,
    pub running: bool,
    pub api: ApiPod,
}

impl ListedPod {
    /// Whether it has a network of its own, as far as its status says.
    fn has_network(&self) -> bool {
        !self.host_network && !self.ended && !self.addresses.is_empty()
    }
}

/// The cluster, as seen from this node.
#[derive(Clone)]
pub struct Cluster(Arc<Inner>);

struct Inner {
    client: Client,
    node: String,
    rules: Rules,
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
}

/// What this node's agent was told of which pods to capture, and how.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Namespaces whose pods are never captured.
    pub excluded_namespaces: Vec<String>,
    /// What pods may ask to be left out of the mesh, where their namespace does not say.
    pub exclusions: k8s::ExclusionsPermission,
}

#[derive(Default)]
struct Table {
    pods: Watched<ListedPod>,
    namespaces: Watched<k8s::Metadata>,
}

impl Table {
    /// Only with its namespace, whose label may be what enrols it.
    fn pod(&self, name: &NamespacedName, rules: &Rules) -> Option<ApiPod> {
        let pod = self.pods.get(name)?;
        let namespace = self.namespaces.get(&cluster_wide(&name.namespace))?;
        Some(rules.api_pod(pod, namespace))
    }
}

impl Rules {
    fn enablement(&self, pod: &ListedPod, namespace: Option<&k8s::Metadata>) -> Enablement {
        k8s::enablement_of(&pod.metadata, pod.host_network, namespace, &self.excluded_namespaces)
    }

    fn api_pod(&self, pod: &ListedPod, namespace: &k8s::Metadata) -> ApiPod {
        let (settings, problems) = k8s::capture_of(&pod.metadata, Some(namespace), self.exclusions);
        // Whose containers have all ended has nothing to capture.
        let enablement = self.enablement(pod, Some(namespace));
        let in_mesh = enablement == Enablement::Captured && !pod.ended;
        let left_out = left_out(enablement).filter(|_| !pod.ended);
        ApiPod {
            uid: pod.metadata.uid.clone(),
            service_account: pod.service_account.clone(),
            in_mesh,
            left_out: left_out.map(|(_, why)| why.to_owned()),
            non_tcp: k8s::non_tcp_of(&pod.metadata, Some(namespace)).0,
            settings,
            // Of a pod that is not captured there is nothing to exclude.
            problems: if in_mesh { problems } else { Vec::new() },
        }
    }
}

/// Why a pod that asks to be in the mesh can't be: the Event's reason, and a text.
pub fn left_out(enablement: Enablement) -> Option<(&'static str, &'static str)> {
    match enablement {
        Enablement::HostNetwork => Some((
            "HostNetworkNotCaptured",
            "asked to be in the mesh, but it has the node's network, which is not its own to capture",
        )),
        Enablement::Sidecar => Some((
            "SidecarNotCaptured",
            "asked to be in the mesh, but it has a sidecar: remove the sidecar or the label istio.io/dataplane-mode",
        )),
        Enablement::ExcludedNamespace => Some((
            "NamespaceNotCaptured",
            "asked to be in the mesh, but its namespace is one whose pods the agent never captures (--exclude-namespaces)",
        )),
        Enablement::Captured | Enablement::NotAsked => None,
    }
}

fn cluster_wide(name: &str) -> NamespacedName {
    NamespacedName::new("", name)
}

impl Cluster {
    /// Nothing is asked before [`Cluster::run`] or [`Cluster::resolve`].
    pub fn new(client: Client, node: &str, rules: Rules) -> Self {
        Self(Arc::new(Inner {
            client,
            node: node.to_owned(),
            rules,
            table: Mutex::default(),
            changed: watch::Sender::new(0),
        }))
    }

    /// The API, for what is written there.
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// Watches until dropped.
    pub async fn run(&self) {
        let of_node = watcher::Config::default().fields(&format!("spec.nodeName={}", self.0.node));
        let pods = watcher(Api::<Pod>::all(self.0.client.clone()), of_node).default_backoff();
        let pods = pods.for_each(|event| {
            self.learn(|table| table.pods.take(event, listed_pod));
            std::future::ready(())
        });
        let namespaces = Api::<Namespace>::all(self.0.client.clone());
        let namespaces = watcher(namespaces, watcher::Config::default()).default_backoff();
        let namespaces = namespaces.for_each(|event| {
            self.learn(|table| table.namespaces.take(event, listed_namespace));
            std::future::ready(())
        });
        tokio::join!(pods, namespaces);
    }

    /// Wakes when something changed.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// A pod of this node as the API vouches for it, if that is known.
    pub fn pod(&self, name: &NamespacedName) -> Option<ApiPod> {
        self.table().pod(name, &self.0.rules)
    }

    /// Whether the API says that this very pod is on its way out.
    pub fn is_leaving(&self, name: &NamespacedName, uid: &str) -> bool {
        let table = self.table();
        let pod = table.pods.get(name).filter(|pod| pod.metadata.uid == uid);
        pod.is_some_and(|pod| pod.metadata.deletion_timestamp.is_some())
    }

    /// The pods of this node with what enrols them; none before all are known.
    pub fn listed(&self) -> Option<Vec<(ListedPod, Enablement, Vec<String>)>> {
        let table = self.table();
        if !table.pods.synced || !table.namespaces.synced {
            return None;
        }
        let listed = table.pods.iter().map(|(name, pod)| {
            let namespace = table.namespaces.get(&cluster_wide(&name.namespace));
            let enablement = self.0.rules.enablement(pod, namespace);
            let api = namespace.map(|namespace| self.0.rules.api_pod(pod, namespace));
            (pod.clone(), enablement, api.map(|api| api.problems).unwrap_or_default())
        });
        Some(listed.collect())
    }

    /// The pods of this node that have a network of their own and are to keep it, but for those that were told of; none
    /// before all are known.
    pub fn untold(&self, is_told: impl Fn(&NamespacedName) -> bool) -> Vec<UntoldPod> {
        let table = self.table();
        if !table.pods.synced || !table.namespaces.synced {
            return Vec::new();
        }
        let untold = table
            .pods
            .iter()
            .filter(|(name, pod)| pod.has_network() && pod.metadata.deletion_timestamp.is_none() && !is_told(name));
        let untold = untold.filter_map(|(name, pod)| {
            Some(UntoldPod {
                pod: name.clone(),
                addresses: pod.addresses.clone(),
                running: pod.running,
                api: table.pod(name, &self.0.rules)?,
            })
        });
        untold.collect()
    }

    /// Who has which addresses on this node, of those that have a network of their own.
    pub fn holders(&self) -> Vec<(NamespacedName, Vec<IpAddr>)> {
        let table = self.table();
        let holders = table.pods.iter().filter(|(_, pod)| pod.has_network());
        holders
            .map(|(name, pod)| (name.clone(), pod.addresses.clone()))
            .collect()
    }

    /// Whether the API has said that there is no such pod with these addresses (any more).
    pub fn denies(&self, name: &NamespacedName, uid: &str, addresses: &[IpAddr]) -> bool {
        let table = self.table();
        let same = |pod: &ListedPod| {
            let listed = &pod.addresses;
            pod.metadata.uid == uid && (listed.is_empty() || listed == addresses)
        };
        table.pods.synced && !table.pods.get(name).is_some_and(same)
    }

    /// What the pod's annotation says.
    pub fn redirection(&self, name: &NamespacedName) -> Option<String> {
        let table = self.table();
        let pod = table.pods.get(name)?;
        pod.metadata.annotations.get(REDIRECTION).cloned()
    }

    /// Takes over what an answer of the API says of a pod, unless the watch has said something newer meanwhile
    /// (`an_answer_that_comes_late_is_not_taken_for_news`).
    pub fn learn_pod(&self, pod: Pod) {
        self.learn(|table| table.pods.answered(pod, listed_pod));
    }

    /// Who a pod is that is about to start, from what is known, else by asking for it until `within` is over.
    ///
    /// `uid` is empty where the runtime does not say; then the API is asked first, and if it is away, what is known of
    /// another address is its predecessor's.
    pub async fn resolve(
        &self,
        name: &NamespacedName,
        uid: &str,
        addresses: &[IpAddr],
        within: Duration,
    ) -> Result<ApiPod, String> {
        let end = Instant::now() + within;
        let known = || {
            let table = self.table();
            let listed = &table.pods.get(name)?.addresses;
            let same = listed.is_empty() || listed.iter().any(|ip| addresses.contains(ip));
            let pod = table.pod(name, &self.0.rules)?;
            (if uid.is_empty() { same } else { pod.uid == uid }).then_some(pod)
        };
        if let Some(pod) = known().filter(|_| !uid.is_empty()) {
            return Ok(pod);
        }
        loop {
            let problem = match tokio::time::timeout(GET_TIMEOUT, self.fetch(name)).await {
                Ok(Ok(pod)) if uid.is_empty() || pod.uid == uid => return Ok(pod),
                Ok(Ok(other)) => format!("the API has another pod of this name ({}, not {uid})", other.uid),
                Ok(Err(error)) => error,
                Err(_elapsed) => format!("the API did not answer within {} s", GET_TIMEOUT.as_secs()),
            };
            if let Some(pod) = known() {
                return Ok(pod);
            }
            if Instant::now() + GET_AGAIN > end {
                return Err(format!("who pod {name} is cannot be known: {problem}"));
            }
            tokio::time::sleep(GET_AGAIN).await;
        }
    }

    async fn fetch(&self, name: &NamespacedName) -> Result<ApiPod, String> {
        let pods = Api::<Pod>::namespaced(self.0.client.clone(), &name.namespace);
        let pod = pods.get(&name.name).await.map_err(|error| said(&error))?;
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
        if node.as_ref() != Some(&self.0.node) {
            let node = node.unwrap_or_default();
            return Err(format!(
                "the API says that it runs on {node:?}, this is {:?}",
                self.0.node
            ));
        }
        let listed = self.table().namespaces.get(&cluster_wide(&name.namespace)).cloned();
        let namespace = match listed {
            Some(namespace) => namespace,
            None => {
                let namespaces = Api::<Namespace>::all(self.0.client.clone());
                let namespace = namespaces.get(&name.namespace).await.map_err(|error| said(&error))?;
                listed_namespace(namespace).1
            }
        };
        Ok(self.0.rules.api_pod(&listed_pod(pod).1, &namespace))
    }

    /// For the status.
    pub fn status(&self) -> admin::PodSourceStatus {
        let table = self.table();
        let problems = [&table.pods.problem, &table.namespaces.problem];
        admin::PodSourceStatus {
            synced: table.pods.synced && table.namespaces.synced,
            pods: table.pods.iter().len(),
            last_error: problems.into_iter().flatten().next().cloned(),
        }
    }

    fn learn(&self, change: impl FnOnce(&mut Table) -> bool) {
        let mut table = self.table();
        let before = (table.pods.problem.clone(), table.namespaces.problem.clone());
        if change(&mut table) {
            for problem in [&table.pods.problem, &table.namespaces.problem].into_iter().flatten() {
                if before.0.as_ref() != Some(problem) && before.1.as_ref() != Some(problem) {
                    tracing::warn!(
                        problem,
                        "the Kubernetes API cannot be watched; what was known stays in force"
                    );
                }
            }
            drop(table);
            self.0.changed.send_modify(|changes| *changes += 1);
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("the API answers {} {}", status.code, status.message),
        other => format!("the API cannot be asked: {other}"),
    }
}

fn metadata(object: &impl ResourceExt) -> k8s::Metadata {
    k8s::Metadata {
        name: object.name_any(),
        namespace: object.namespace().unwrap_or_default(),
        labels: object.labels().clone(),
        annotations: object.annotations().clone(),
        uid: object.uid().unwrap_or_default(),
        deletion_timestamp: object.meta().deletion_timestamp.as_ref().map(|time| time.0.to_string()),
        ..k8s::Metadata::default()
    }
}

fn listed_pod(pod: Pod) -> (NamespacedName, ListedPod) {
    let metadata = metadata(&pod);
    let spec = pod.spec.unwrap_or_default();
    let status = pod.status.unwrap_or_default();
    let phase = status.phase.unwrap_or_default();
    let addresses = status.pod_ips.unwrap_or_default().into_iter();
    let service_account = spec.service_account_name.filter(|name| !name.is_empty());
    let name = NamespacedName::new(metadata.namespace.as_str(), metadata.name.as_str());
    let listed = ListedPod {
        metadata,
        service_account: service_account.as_deref().unwrap_or("default").into(),
        addresses: addresses.filter_map(|address| address.ip.parse().ok()).collect(),
        host_network: spec.host_network.unwrap_or_default(),
        running: phase == "Running",
        ended: matches!(phase.as_str(), "Succeeded" | "Failed"),
    };
    (name, listed)
}

fn listed_namespace(namespace: Namespace) -> (NamespacedName, k8s::Metadata) {
    let metadata = metadata(&namespace);
    (cluster_wide(&metadata.name), metadata)
}
