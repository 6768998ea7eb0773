//! Addresses for the hosts of ServiceEntries that have none, so that a name that the mesh's DNS answers means exactly one
//! service: `status.addresses`, from Istio's own ranges. <https://istio.io/latest/docs/ops/configuration/traffic-management/dns-proxy/>
//!
//! A reconciler, on the replica that leads: woken by a changed ServiceEntry, it compares ([`plan`]) and writes what differs,
//! one after the other. Nothing is written before all entries were listed, else two might get one address. What is there
//! stays: an address once given is an entry's for as long as the entry is, over restarts and changes of the leader. The
//! status is written on the version that was read, so that a change of somebody else's is never overwritten. With the API
//! away nothing is allotted, and what was is served. Switched off for an entry by the label
//! `networking.istio.io/enable-autoallocate-ip: "false"`; where somebody wrote addresses there are none. With no address left
//! (65,534 hosts have one of IPv4) a host has none of that family.

mod plan;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use k8s::live::{self, Kind, Object};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use model::NamespacedName;
use serde_json::{Value, json};
use tasks::{DrainMode, DrainSignal};
use tokio::sync::{Notify, watch};

use self::plan::{Entry, plan};
use crate::watch::{Raw, View, resource};

pub(crate) use plan::wants;

const MANAGER: &str = "undercurrent-control";
const RETRY: Duration = Duration::from_secs(2);
/// How long the API may take for one entry.
const PATIENCE: Duration = Duration::from_secs(10);

/// The ServiceEntries, as the watch brings them.
#[derive(Default)]
pub struct ServiceEntries {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<NamespacedName, Entry>,
    /// What a status is written on: the API's version of the kind, and of the object.
    versions: BTreeMap<NamespacedName, (String, String)>,
    synced: bool,
}

impl View for ServiceEntries {
    fn put(&self, kind: Kind, namespace: &str, name: &str, object: &Value) {
        if kind != Kind::ServiceEntry {
            return;
        }
        let name = NamespacedName::new(namespace, name);
        let Object::ServiceEntry(read) = live::read(kind, object).object else {
            return self.forget(&name);
        };
        let entry = Entry::new(&read);
        let text = |pointer: &str| object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        let version = (
            text("/apiVersion").to_owned(),
            text("/metadata/resourceVersion").to_owned(),
        );
        let mut state = self.state();
        state.versions.insert(name.clone(), version);
        state.entries.insert(name, entry);
        drop(state);
        self.changed.notify_one();
    }

    fn gone(&self, kind: Kind, namespace: &str, name: &str) {
        if kind == Kind::ServiceEntry {
            self.forget(&NamespacedName::new(namespace, name));
        }
    }

    fn synced(&self, kind: Kind) {
        if kind == Kind::ServiceEntry {
            self.state().synced = true;
            self.changed.notify_one();
        }
    }
}

impl ServiceEntries {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&self, name: &NamespacedName) {
        let mut state = self.state();
        state.entries.remove(name);
        state.versions.remove(name);
    }

    /// The entries whose status has to be other than it is, with the version to write it on.
    #[expect(clippy::type_complexity, reason = "taken apart at once")]
    fn open(&self) -> Vec<(NamespacedName, (String, String), Vec<(String, std::net::IpAddr)>)> {
        let state = self.state();
        if !state.synced {
            return Vec::new();
        }
        let open = plan(&state.entries).into_iter();
        open.filter_map(|(name, addresses)| {
            let version = state.versions.get(&name)?.clone();
            Some((name, version, addresses))
        })
        .collect()
    }
}

/// Allots until drained.
pub async fn run(
    client: Client,
    entries: Arc<ServiceEntries>,
    mut leads: watch::Receiver<bool>,
    mut drain: DrainSignal,
) {
    let mut again = false;
    loop {
        tokio::select! {
            _ = drain.reached(DrainMode::Graceful) => return,
            () = entries.changed.notified() => {}
            changed = leads.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if again => {}
        }
        if !*leads.borrow_and_update() {
            continue;
        }
        again = false;
        for (name, version, addresses) in entries.open() {
            let written = tokio::time::timeout(PATIENCE, write(&client, &entries, &name, &version, addresses)).await;
            match written {
                Ok(Ok(())) => {}
                // The watch brings what is newer, or that it is gone.
                Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {}
                Ok(Err(error)) => {
                    tracing::warn!(service_entry = %name, %error, "cannot allot addresses; trying again");
                    again = true;
                }
                Err(_elapsed) => again = true,
            }
        }
    }
}

async fn write(
    client: &Client,
    entries: &ServiceEntries,
    name: &NamespacedName,
    (api_version, version): &(String, String),
    addresses: Vec<(String, std::net::IpAddr)>,
) -> Result<(), kube::Error> {
    let api_version = api_version
        .rsplit('/')
        .next()
        .filter(|version| !version.is_empty())
        .unwrap_or("v1");
    let resource = resource(Kind::ServiceEntry, api_version);
    let api = Api::<Raw>::namespaced_with(client.clone(), &name.namespace, &resource);
    let addresses: Vec<_> = addresses
        .into_iter()
        .map(|(host, ip)| json!({"value": ip, "host": host}))
        .collect();
    let patch = json!({"metadata": {"resourceVersion": version}, "status": {"addresses": addresses}});
    let params = PatchParams {
        field_manager: Some(MANAGER.into()),
        ..PatchParams::default()
    };
    let written = api.patch_status(&name.name, &params, &Patch::Merge(&patch)).await?;
    tracing::info!(service_entry = %name, addresses = addresses.len(), "addresses allotted");
    // As the watch will say, too; until then it is not to be written once more.
    entries.put(Kind::ServiceEntry, &name.namespace, &name.name, &written.value);
    Ok(())
}
