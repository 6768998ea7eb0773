//! The rounds: what the API says, what is there, and the writes in between.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context, Result, bail};
use futures_util::StreamExt;
use k8s_openapi::api::{
    apps::v1::{DaemonSet, Deployment, ReplicaSet, StatefulSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Pod, Service},
    discovery::v1::EndpointSlice,
};
use kube::{
    Client, Resource,
    api::{DeleteParams, PostParams, Preconditions},
    runtime::{
        WatchStreamExt, reflector,
        reflector::{ObjectRef, Store},
        watcher,
    },
};
use serde_json::json;
use tokio::{sync::Notify, task::JoinSet};

use super::{
    api::{Api, Target},
    deployments::{self, Step, name, namespace},
    dns::Dns,
    events, kubelets,
    nodes::{self, Nodes, SYSTEM},
    places::{IpFamily, Places, PodSlot},
    pods, services,
};
use crate::{
    desired::{Desired, PodStatus},
    layout::{Layout, node_name, pod_id, pod_netns},
    proxy,
    state::State,
};

/// How often the kubelets' files are looked at.
const TICK: Duration = Duration::from_millis(50);

/// What the watches hold.
struct Watched {
    pods: Store<Pod>,
    services: Store<Service>,
    slices: Store<EndpointSlice>,
    deployments: Store<Deployment>,
    sets: Store<ReplicaSet>,
    config_maps: Store<ConfigMap>,
    daemon_sets: Store<DaemonSet>,
    stateful_sets: Store<StatefulSet>,
    jobs: Store<Job>,
}

struct Cluster<'a> {
    layout: &'a Layout,
    state: State,
    in_cluster: &'a str,
    dns: Dns,
    watched: Watched,
    api: Api,
    places: Places,
    nodes: Nodes,
    /// ReplicaSet → pods that were made for it and are not seen yet.
    expected: HashMap<String, HashSet<String>>,
    /// The rules that the nodes have.
    rules: String,
    /// What was last complained of.
    said: String,
}

/// Runs rounds until a watch ends for good.
pub(super) async fn run(layout: &Layout, state: State, client: Client, in_cluster: &str, dns: Dns) -> Result<()> {
    let changed = Arc::new(Notify::new());
    let mut tasks = JoinSet::new();
    let system = kube::Api::namespaced(client.clone(), SYSTEM);
    let watched = Watched {
        pods: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        services: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        slices: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        deployments: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        sets: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        config_maps: follow(system, &changed, &mut tasks),
        daemon_sets: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        stateful_sets: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
        jobs: follow(kube::Api::all(client.clone()), &changed, &mut tasks),
    };
    let mut cluster = Cluster {
        layout,
        in_cluster,
        dns,
        api: Api::new(client),
        places: Places::load(layout)?,
        nodes: Nodes::default(),
        expected: HashMap::new(),
        rules: String::new(),
        said: String::new(),
        state,
        watched,
    };
    let agents = cluster.state.capture != "none";
    nodes::register(&mut cluster.api, cluster.state.nodes, agents).await?;
    cluster.watched.ready().await?;
    let mut seen = String::new();
    loop {
        let told = cluster.told();
        let summary = serde_json::to_string(&told).unwrap_or_default();
        let complaints = cluster.round(&told).await;
        if complaints != cluster.said {
            eprint!("{complaints}");
            cluster.said = complaints;
        }
        let unchanged = summary == seen;
        seen = summary;
        if unchanged {
            tokio::select! {
                () = changed.notified() => {}
                () = tokio::time::sleep(TICK) => {}
                Some(ended) = tasks.join_next() => bail!("a watch of the API ended: {ended:?}"),
            }
        }
    }
}

fn follow<K>(api: kube::Api<K>, changed: &Arc<Notify>, tasks: &mut JoinSet<()>) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
{
    let (store, writer) = reflector::store();
    let changed = changed.clone();
    let stream = reflector(writer, watcher(api, watcher::Config::default()).default_backoff());
    tasks.spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            if let Err(error) = event {
                eprintln!("watching {}: {error}", K::plural(&()));
            }
            changed.notify_one();
        }
    });
    store
}

impl Watched {
    async fn ready(&self) -> Result<()> {
        let ended = "a watch of the API ended before it began";
        self.pods.wait_until_ready().await.context(ended)?;
        self.services.wait_until_ready().await.context(ended)?;
        self.slices.wait_until_ready().await.context(ended)?;
        self.deployments.wait_until_ready().await.context(ended)?;
        self.sets.wait_until_ready().await.context(ended)?;
        self.config_maps.wait_until_ready().await.context(ended)
    }
}

/// What went wrong in a round, a line each.
#[derive(Default)]
struct Complaints(String);

impl Complaints {
    fn hear<T>(&mut self, of: &str, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.0.push_str(&format!("{of}: {error:#}\n"));
                None
            }
        }
    }
}

impl Cluster<'_> {
    /// What the kubelets tell, by pod directory.
    fn told(&self) -> BTreeMap<String, PodStatus> {
        let mut told = BTreeMap::new();
        for node in self.state.node_names() {
            let files = self.layout.node(&node);
            let entries = std::fs::read_dir(files.root.join("pods"))
                .into_iter()
                .flatten()
                .flatten();
            for id in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
                let status = PodStatus::read(&files.pod(&id)).unwrap_or_default();
                told.insert(format!("{node}/{id}"), status);
            }
        }
        told
    }

    async fn round(&mut self, told: &BTreeMap<String, PodStatus>) -> String {
        let mut complaints = Complaints::default();
        let now = k8s_openapi::jiff::Timestamp::now();
        let now = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        self.controllers(&mut complaints).await;
        let pods: Vec<_> = self
            .watched
            .pods
            .state()
            .into_iter()
            .filter(|pod| !nodes::is_own(pod))
            .collect();
        self.schedule(&pods, &mut complaints).await;
        let placed = self.place(&pods, &mut complaints);
        self.tell_statuses(&placed, told, &now, &mut complaints).await;
        self.finish(&pods, told, &mut complaints).await;
        self.serve(&pods, &placed, &mut complaints).await;
        self.say_what_does_not_run(&now, &mut complaints).await;
        let (all, maps) = (self.watched.pods.state(), self.watched.config_maps.state());
        let kept = self
            .nodes
            .keep(
                self.layout,
                &mut self.api,
                self.state.nodes,
                &all,
                &maps,
                self.in_cluster,
            )
            .await;
        complaints.hear("nodes", kept);
        complaints.0
    }

    async fn controllers(&mut self, complaints: &mut Complaints) {
        let (sets, pods) = (self.watched.sets.state(), self.watched.pods.state());
        let (sets_by_owner, pods_by_owner) = (deployments::by_owner(&sets), deployments::by_owner(&pods));
        let uids: HashSet<_> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
        for expected in self.expected.values_mut() {
            expected.retain(|uid| !uids.contains(uid));
        }
        let mut steps = Vec::new();
        for deployment in self.watched.deployments.state() {
            let own = deployment
                .metadata
                .uid
                .as_deref()
                .and_then(|uid| sets_by_owner.get(uid));
            steps.extend(deployments::deployment(&deployment, own.map_or(&[], Vec::as_slice)));
        }
        for set in &sets {
            let uid = set.metadata.uid.as_deref().unwrap_or_default();
            let own = pods_by_owner.get(uid).map_or(&[][..], Vec::as_slice);
            let expected = self.expected.get(uid).map_or(0, HashSet::len);
            steps.extend(deployments::replicas(set, own, expected));
        }
        for step in steps {
            let done = self.step(step).await;
            complaints.hear("controllers", done);
        }
    }

    async fn step(&mut self, step: Step) -> Result<()> {
        match step {
            Step::Ensure(target, value) => {
                let key = ObjectRef::<ReplicaSet>::new(&target.name).within(&target.namespace);
                let exists = target.kind != "ReplicaSet" || self.watched.sets.get(&key).is_some();
                self.api.ensure(target, value, exists).await.map(drop)
            }
            Step::Create { of, namespace, pod } => {
                let pod: Pod = serde_json::from_value(pod).context("its template is no pod")?;
                let made = self.pods(&namespace).create(&PostParams::default(), &pod).await?;
                self.expected.entry(of).or_default().extend(made.metadata.uid);
                Ok(())
            }
            Step::Delete { namespace, name, uid } => self.delete(&namespace, &name, uid, None).await,
        }
    }

    fn pods(&self, namespace: &str) -> kube::Api<Pod> {
        kube::Api::namespaced(self.api.client.clone(), namespace)
    }

    /// Deletes this very pod; that it is gone is fine.
    async fn delete(&self, namespace: &str, name: &str, uid: String, grace: Option<u32>) -> Result<()> {
        let params = DeleteParams {
            grace_period_seconds: grace,
            preconditions: Some(Preconditions {
                uid: Some(uid),
                resource_version: None,
            }),
            ..DeleteParams::default()
        };
        match self.pods(namespace).delete(name, &params).await {
            Err(kube::Error::Api(status)) if status.code == 404 || status.code == 409 => Ok(()),
            result => result
                .map(drop)
                .with_context(|| format!("cannot delete {namespace}/{name}")),
        }
    }

    /// Gives a node to every pod that has none: the one with the fewest.
    async fn schedule(&mut self, pods: &[Arc<Pod>], complaints: &mut Complaints) {
        let mut load: BTreeMap<u8, usize> = (1..=self.state.nodes)
            .map(|node| (node, self.places.load_of(node)))
            .collect();
        for pod in pods {
            let metadata = &pod.metadata;
            let node = pod
                .spec
                .as_ref()
                .and_then(|spec| spec.node_name.as_deref())
                .unwrap_or_default();
            if !node.is_empty() || metadata.deletion_timestamp.is_some() {
                continue;
            }
            let Some((index, count)) = load.iter_mut().min_by_key(|(_, count)| **count) else {
                return;
            };
            *count += 1;
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding", "metadata": {"name": metadata.name, "namespace": metadata.namespace},
                "target": {"apiVersion": "v1", "kind": "Node", "name": node_name(*index)},
            });
            let bound = self
                .pods(namespace(metadata))
                .create_subresource::<_, serde_json::Value>("binding", name(metadata), &PostParams::default(), &binding)
                .await;
            match bound {
                // Bound already, and the watch does not know yet.
                Err(kube::Error::Api(status)) if status.code == 409 => {}
                bound => drop(complaints.hear(&key(pod), bound.map_err(Into::into))),
            }
        }
    }

    /// The pods that run or are to run here, with their places. Forgets the places of those that are gone.
    fn place(&mut self, pods: &[Arc<Pod>], complaints: &mut Complaints) -> Vec<(Arc<Pod>, PodSlot)> {
        let before = self.places.clone();
        let known: BTreeSet<_> = pods.iter().map(|pod| key(pod)).collect();
        self.places.pods.retain(|name, _| known.contains(name));
        let mut placed = Vec::new();
        let mut networks: BTreeMap<String, String> = BTreeMap::new();
        for pod in pods {
            let Some(spec) = &pod.spec else { continue };
            let Some(node) = spec.node_name.as_deref().filter(|node| !node.is_empty()) else {
                continue;
            };
            let place = || -> Result<PodSlot> {
                let index = (1..=self.state.nodes).find(|index| node_name(*index) == node);
                let index = index.with_context(|| format!("there is no node {node}"))?;
                let netns = pod_netns(namespace(&pod.metadata), name(&pod.metadata));
                if let Some(other) = networks.get(&netns) {
                    bail!("its network namespace would be {netns}, which is {other}'s: rename one");
                }
                networks.insert(netns, key(pod));
                let is_host = spec.host_network == Some(true);
                self.places
                    .take(&key(pod), index, is_host, IpFamily::of(pod)?)
                    .with_context(|| format!("{node} has no address left"))
            };
            let place = { place }();
            if let Some(slot) = complaints.hear(&key(pod), place) {
                placed.push((pod.clone(), slot));
            }
        }
        if self.places != before {
            complaints.hear("places", self.places.save(self.layout));
        }
        placed
    }

    async fn tell_statuses(
        &mut self,
        placed: &[(Arc<Pod>, PodSlot)],
        told: &BTreeMap<String, PodStatus>,
        now: &str,
        complaints: &mut Complaints,
    ) {
        for (pod, slot) in placed {
            let Some(said) = told.get(&directory(pod, *slot)) else {
                continue;
            };
            // What is told of an earlier pod of that name is not told of this one.
            let is_of_it = said
                .of
                .as_ref()
                .is_some_and(|of| Some(&of.uid) == pod.metadata.uid.as_ref());
            if !is_of_it {
                continue;
            }
            let status = pods::status(pod, *slot, said, now);
            let target = Target::core("Pod", "pods", namespace(&pod.metadata), name(&pod.metadata)).status();
            let value = json!({"metadata": {"uid": pod.metadata.uid}, "status": status});
            let written = self.api.ensure(target, value, true).await;
            complaints.hear(&key(pod), written);
        }
    }

    /// Lets go of the pods that are to be deleted and no longer run.
    async fn finish(&mut self, pods: &[Arc<Pod>], told: &BTreeMap<String, PodStatus>, complaints: &mut Complaints) {
        for pod in pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_some()) {
            let slot = self.places.pods.get(&key(pod));
            let runs = slot.is_some_and(|slot| {
                let said = told.get(&directory(pod, *slot)).and_then(|status| status.of.as_ref());
                said.is_some_and(|of| Some(&of.uid) == pod.metadata.uid.as_ref())
            });
            if !runs {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                let deleted = self
                    .delete(namespace(&pod.metadata), name(&pod.metadata), uid, Some(0))
                    .await;
                complaints.hear(&key(pod), deleted);
            }
        }
        let here: HashSet<_> = pods.iter().map(|pod| key(pod)).collect();
        self.api.forget(|target| {
            target.kind == "Pod"
                && target.namespace != SYSTEM
                && !here.contains(&format!("{}/{}", target.namespace, target.name))
        });
    }

    /// Services for everybody, and the pods for the kubelets.
    async fn serve(&mut self, pods: &[Arc<Pod>], placed: &[(Arc<Pod>, PodSlot)], complaints: &mut Complaints) {
        let services = self.watched.services.state();
        let backed = services::backed(&services, pods);
        let names: Vec<_> = backed.iter().map(services::Backed::name).collect();
        let mut desired: Vec<(u8, Desired)> = Vec::new();
        for (pod, slot) in placed
            .iter()
            .filter(|(pod, _)| pod.metadata.deletion_timestamp.is_none())
        {
            let made = kubelets::desired(pod, *slot, &self.state.path);
            desired.extend(complaints.hear(&key(pod), made).map(|desired| (slot.node, desired)));
        }
        self.dns.publish(&names);
        complaints.hear("kubelets", kubelets::tell(self.layout, self.state.nodes, &desired));
        let mut routes: Vec<_> = backed.iter().flat_map(services::Backed::routes).collect();
        let (slices, has_selector) = (self.watched.slices.state(), |service: &Service| {
            let spec = service.spec.as_ref();
            spec.is_some_and(|spec| spec.selector.as_ref().is_some_and(|selector| !selector.is_empty()))
        });
        for service in services.iter().filter(|service| !has_selector(service)) {
            routes.extend(services::written_routes(service, &slices));
        }
        let rules = proxy::rules(&routes);
        if rules != self.rules {
            let applied = (1..=self.state.nodes).try_for_each(|index| proxy::apply(index, &rules));
            if complaints.hear("services", applied).is_some() {
                self.rules = rules;
            }
        }
        // Last: who sees them may go by the rest.
        let mut wanted = HashSet::new();
        for (target, slice) in backed.iter().flat_map(services::Backed::slices) {
            let key = ObjectRef::<EndpointSlice>::new(&target.name).within(&target.namespace);
            wanted.insert(key.clone());
            let exists = self.watched.slices.get(&key).is_some();
            let written = self.api.ensure(target, slice, exists).await;
            complaints.hear("EndpointSlice", written);
        }
        self.remove_slices(&wanted, complaints).await;
    }

    async fn remove_slices(&mut self, wanted: &HashSet<ObjectRef<EndpointSlice>>, complaints: &mut Complaints) {
        for slice in self.watched.slices.state() {
            let labels = slice.metadata.labels.as_ref();
            let manager = labels.and_then(|labels| labels.get("endpointslice.kubernetes.io/managed-by"));
            let is_ours = manager.is_some_and(|manager| manager == "endpointslice-controller.k8s.io");
            if !is_ours || wanted.contains(&ObjectRef::from_obj(&*slice).clone()) {
                continue;
            }
            let api: kube::Api<EndpointSlice> =
                kube::Api::namespaced(self.api.client.clone(), namespace(&slice.metadata));
            match api.delete(name(&slice.metadata), &DeleteParams::default()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                deleted => drop(complaints.hear("EndpointSlice", deleted.map_err(Into::into))),
            }
        }
    }

    async fn say_what_does_not_run(&mut self, now: &str, complaints: &mut Complaints) {
        let mut found = Vec::new();
        found.extend(
            self.watched
                .daemon_sets
                .state()
                .iter()
                .map(|set| ("apps/v1", "DaemonSet", set.metadata.clone())),
        );
        found.extend(
            self.watched
                .stateful_sets
                .state()
                .iter()
                .map(|set| ("apps/v1", "StatefulSet", set.metadata.clone())),
        );
        found.extend(
            self.watched
                .jobs
                .state()
                .iter()
                .map(|job| ("batch/v1", "Job", job.metadata.clone())),
        );
        for (version, kind, metadata) in found {
            let said = events::not_run(&mut self.api, version, kind, &metadata, now).await;
            complaints.hear(kind, said);
        }
    }
}

fn key(pod: &Pod) -> String {
    format!("{}/{}", namespace(&pod.metadata), name(&pod.metadata))
}

/// Where the kubelet keeps it, as [`Cluster::told`] names it.
fn directory(pod: &Pod, slot: PodSlot) -> String {
    format!(
        "{}/{}",
        node_name(slot.node),
        pod_id(namespace(&pod.metadata), name(&pod.metadata))
    )
}
