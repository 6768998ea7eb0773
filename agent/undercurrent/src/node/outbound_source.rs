//! Where this node's pods may go that the mesh does not know: `outboundTrafficPolicy` of the mesh configuration and of
//! namespaces' `Sidecar`s, asked of the Kubernetes API, since the workload API does not carry it. So it holds under
//! istiod, too.
//!
//! ```text
//! watch ConfigMap istio (key mesh) ─┐
//! watch Sidecars ───────────────────┴─► what is in force ─► mesh
//!                                       └ on the disk ──────┘ at start
//! ```
//! A Sidecar for a whole namespace stands for that namespace, the one in the root namespace for all others; of several
//! the oldest. No ConfigMap, or one that does not say, is ALLOW_ANY; an API without Sidecars has none.
//!
//! The API away: what held stays in force, over a restart of the agent, too (`what_held_is_found_again_with_the_api_away`).
//! A text that can't be read changes nothing (`what_can_not_be_read_changes_nothing`). Never heard from and nothing on the
//! disk: not known, and pods reach only what the mesh knows. All of it is said in the status.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use futures_util::StreamExt;
use k8s::live::{self, Kind, Object, Sidecar};
use kube::{
    Api, Client,
    api::{ApiResource, DynamicObject, GroupVersionKind},
    runtime::{
        WatchStreamExt,
        watcher::{self, watcher},
    },
};
use mesh::Outbound;
use model::{OutboundMode, OutboundTrafficPolicy};

/// Where it is kept, in the state directory.
pub const KEPT: &str = "outbound.json";

/// Follows what the API says.
#[derive(Clone)]
pub struct OutboundSource(Arc<Inner>);

struct Inner {
    client: Client,
    root_namespace: String,
    config_map: String,
    kept: PathBuf,
    outbound: Outbound,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Another agent keeps it.
    held: bool,
    in_force: Option<OutboundTrafficPolicy>,
    /// The last that could be read; none before the ConfigMap, or that there is none, was heard of.
    mesh: Option<OutboundMode>,
    mesh_problem: Option<String>,
    sidecars: BTreeMap<Key, Spec>,
    listing: BTreeMap<Key, Spec>,
    sidecars_heard: bool,
    sidecars_problem: Option<String>,
    disk_problem: Option<String>,
}

/// Namespace, time of creation, name: of a namespace the oldest comes first.
type Key = (String, String, String);
type Spec = Result<Sidecar, String>;

impl OutboundSource {
    /// With what was kept in the state directory; `config_map` is the mesh configuration's name in the root namespace.
    pub fn new(client: Client, root_namespace: &str, config_map: &str, state_dir: &Path, outbound: Outbound) -> Self {
        let kept = state_dir.join(KEPT);
        let mut state = State::default();
        match read(&kept) {
            Ok(Some(policy)) => {
                outbound.set(policy.clone());
                state.in_force = Some(policy);
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(file = %kept.display(), error, "what pods may reach is not known before the API says so");
                state.disk_problem = Some(format!("{}: {error}", kept.display()));
            }
        }
        Self(Arc::new(Inner {
            client,
            root_namespace: root_namespace.to_owned(),
            config_map: config_map.to_owned(),
            kept,
            outbound,
            state: Mutex::new(state),
        }))
    }

    /// Whether this agent keeps on the disk what is in force: of two that follow each other on a node only one may.
    pub fn keep(&self, keeps: bool) {
        let mut state = self.0.state();
        state.held = !keeps;
        if let Some(policy) = state.in_force.clone() {
            self.0.keep(&mut state, &policy);
        }
    }

    /// Watches until dropped.
    pub async fn run(&self) {
        let inner = &self.0;
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk("", "v1", "ConfigMap"));
        let maps = Api::<DynamicObject>::namespaced_with(inner.client.clone(), &inner.root_namespace, &resource);
        let only = watcher::Config::default().fields(&format!("metadata.name={}", inner.config_map));
        let mut found = false;
        let mesh = watcher(maps, only).default_backoff().for_each(|event| {
            inner.learn(|state| take_mesh(state, event, &mut found));
            std::future::ready(())
        });
        let kind = GroupVersionKind::gvk("networking.istio.io", "v1", "Sidecar");
        let resource = ApiResource::from_gvk_with_plural(&kind, "sidecars");
        let sidecars = Api::<DynamicObject>::all_with(inner.client.clone(), &resource);
        let sidecars = watcher(sidecars, watcher::Config::default()).default_backoff();
        let sidecars = sidecars.for_each(|event| {
            inner.learn(|state| take_sidecar(state, event));
            std::future::ready(())
        });
        tokio::join!(mesh, sidecars);
    }

    /// What is wrong, for the status; empty when nothing is.
    pub fn problems(&self) -> Vec<String> {
        let state = self.0.state();
        let unknown = state
            .in_force
            .is_none()
            .then(|| "outboundTrafficPolicy is not known yet: pods reach only what the mesh knows".to_owned());
        let sidecars = state.sidecars.iter().filter_map(|((namespace, _, name), spec)| {
            let why = match spec {
                Ok(sidecar) => match sidecar.outbound() {
                    Ok(_) => sidecar.not_acted_upon()?.to_owned(),
                    Err(why) => format!("{why}; it closes its namespace to REGISTRY_ONLY"),
                },
                Err(why) => format!("{why}; it closes its namespace to REGISTRY_ONLY"),
            };
            Some(format!("Sidecar {namespace}/{name}: {why}"))
        });
        let config = format!("ConfigMap {}/{}", self.0.root_namespace, self.0.config_map);
        let mesh = state.mesh_problem.iter().map(|why| format!("{config}: {why}"));
        let of_sidecars = state.sidecars_problem.iter().map(|why| format!("Sidecars: {why}"));
        let disk = state.disk_problem.iter().cloned();
        unknown
            .into_iter()
            .chain(mesh)
            .chain(of_sidecars)
            .chain(disk)
            .chain(sidecars)
            .collect()
    }
}

fn take_mesh(state: &mut State, event: watcher::Result<watcher::Event<DynamicObject>>, found: &mut bool) {
    match event {
        Err(error) => state.mesh_problem = Some(error.to_string()),
        Ok(watcher::Event::Init) => *found = false,
        Ok(watcher::Event::InitApply(object) | watcher::Event::Apply(object)) => {
            *found = true;
            let value = serde_json::to_value(&object).unwrap_or_default();
            let read = match live::read(Kind::ConfigMap, &value) {
                live::Read {
                    object: Object::MeshConfig(config),
                    ..
                } => config.outbound(),
                unreadable => Err(unreadable.findings.first().map(ToString::to_string).unwrap_or_default()),
            };
            match read {
                Ok(mode) => (state.mesh, state.mesh_problem) = (Some(mode), None),
                Err(why) => state.mesh_problem = Some(format!("{why}; what held before stays in force")),
            }
        }
        Ok(watcher::Event::InitDone) if *found => {}
        Ok(watcher::Event::InitDone | watcher::Event::Delete(_)) => {
            (state.mesh, state.mesh_problem) = (Some(OutboundMode::AllowAny), None);
        }
    }
}

fn take_sidecar(state: &mut State, event: watcher::Result<watcher::Event<DynamicObject>>) {
    match event {
        Err(error) if is_absent(&error) => {
            state.sidecars.clear();
            (state.sidecars_heard, state.sidecars_problem) = (true, None);
        }
        Err(error) => state.sidecars_problem = Some(error.to_string()),
        Ok(watcher::Event::Init) => state.listing.clear(),
        Ok(watcher::Event::InitApply(object)) => {
            let (key, spec) = sidecar(&object);
            state.listing.insert(key, spec);
        }
        Ok(watcher::Event::InitDone) => {
            state.sidecars = std::mem::take(&mut state.listing);
            (state.sidecars_heard, state.sidecars_problem) = (true, None);
        }
        Ok(watcher::Event::Apply(object)) => {
            let (key, spec) = sidecar(&object);
            state.sidecars.insert(key, spec);
        }
        Ok(watcher::Event::Delete(object)) => drop(state.sidecars.remove(&sidecar(&object).0)),
    }
}

fn sidecar(object: &DynamicObject) -> (Key, Spec) {
    let metadata = &object.metadata;
    let created = metadata
        .creation_timestamp
        .as_ref()
        .and_then(|time| serde_json::to_value(time).ok());
    let created = created
        .as_ref()
        .and_then(serde_json::Value::as_str)
        .unwrap_or_default()
        .to_owned();
    let key = (
        metadata.namespace.clone().unwrap_or_default(),
        created,
        metadata.name.clone().unwrap_or_default(),
    );
    let empty = serde_json::Value::Object(serde_json::Map::new());
    (key, Sidecar::read(object.data.get("spec").unwrap_or(&empty)))
}

/// Whether the API does not have the kind.
fn is_absent(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404)
}

impl State {
    /// What is to be in force; none before all of it was heard of.
    fn policy(&self, root_namespace: &str) -> Option<OutboundTrafficPolicy> {
        let of_mesh = self.mesh.filter(|_| self.sidecars_heard)?;
        let mut mode = of_mesh;
        let mut namespaces: BTreeMap<Arc<str>, OutboundMode> = BTreeMap::new();
        for ((namespace, ..), spec) in &self.sidecars {
            let own = match spec {
                Ok(sidecar) if !sidecar.is_for_namespace() => continue,
                // One that can't be read may have been meant to close.
                Ok(sidecar) => sidecar.outbound().unwrap_or(Some(OutboundMode::RegistryOnly)),
                Err(_) => Some(OutboundMode::RegistryOnly),
            };
            namespaces
                .entry(namespace.as_str().into())
                .or_insert(own.unwrap_or(of_mesh));
        }
        if let Some(of_root) = namespaces.get(root_namespace) {
            mode = *of_root;
        }
        namespaces.retain(|_, own| *own != mode);
        Some(OutboundTrafficPolicy { mode, namespaces })
    }
}

impl Inner {
    fn learn(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state();
        let before = (state.mesh_problem.clone(), state.sidecars_problem.clone());
        change(&mut state);
        for (problem, old) in [(&state.mesh_problem, &before.0), (&state.sidecars_problem, &before.1)] {
            if let Some(problem) = problem.as_ref().filter(|_| problem != old) {
                tracing::warn!(problem, "outboundTrafficPolicy: what held before stays in force");
            }
        }
        let Some(policy) = state.policy(&self.root_namespace) else {
            return;
        };
        if state.in_force.as_ref() == Some(&policy) {
            return;
        }
        tracing::info!(mode = ?policy.mode, others = ?policy.namespaces, "outboundTrafficPolicy");
        // First the disk: what was in force is what an agent that starts now finds.
        self.keep(&mut state, &policy);
        state.in_force = Some(policy.clone());
        self.outbound.set(policy);
    }

    fn keep(&self, state: &mut State, policy: &OutboundTrafficPolicy) {
        if state.held {
            return;
        }
        state.disk_problem = keep(&self.kept, policy).err();
        if let Some(problem) = &state.disk_problem {
            tracing::error!(problem, "the outboundTrafficPolicy cannot be kept over a restart");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(file: &Path) -> Result<Option<OutboundTrafficPolicy>, String> {
    match fs::read(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.to_string()),
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| error.to_string()),
    }
}

/// One that can't be written is not left to stand for another.
fn keep(file: &Path, policy: &OutboundTrafficPolicy) -> Result<(), String> {
    let fresh = file.with_extension("new");
    let written = serde_json::to_vec(policy).map_err(std::io::Error::other);
    let directory = || file.parent().map_or(Ok(()), fs::create_dir_all);
    let written = written
        .and_then(|text| directory().and_then(|()| fs::write(&fresh, text)))
        .and_then(|()| fs::rename(&fresh, file));
    written.map_err(|error| {
        // Nothing is kept then: fails only if there is nothing to remove.
        let _ = fs::remove_file(file);
        format!("cannot write {}: {error}", file.display())
    })
}
