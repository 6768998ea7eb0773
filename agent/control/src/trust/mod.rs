//! The trust bundle where pods find it: ConfigMap `istio-ca-root-cert`, key `root-cert.pem`, in every namespace.
//!
//! A reconciler, on the replica that leads: woken by a changed bundle, a namespace, or one of the ConfigMaps (edited,
//! deleted, of somebody else), it compares and applies what differs, a few at a time; what fails is tried again with
//! back-off. Only that key and label are ours (server-side apply). A namespace that is ending is left alone.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use aws_lc_rs::digest;
use futures_util::StreamExt;
use k8s::live::Kind;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, ResourceExt,
    api::{Patch, PatchParams},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use serde_json::{Value, json};
use tasks::{DrainMode, DrainSignal};
use tokio::sync::{Notify, watch};

use crate::watch::View;

/// The ConfigMap, as in Istio.
const NAME: &str = "istio-ca-root-cert";
const KEY: &str = "root-cert.pem";
const MANAGER: &str = "undercurrent-control";
const AT_ONCE: usize = 8;
const RETRY: Duration = Duration::from_secs(5);

type Hash = [u8; 32];

/// The namespaces that are not ending.
#[derive(Default)]
pub struct Namespaces {
    names: Mutex<BTreeSet<Box<str>>>,
    changed: Notify,
}

impl View for Namespaces {
    fn put(&self, kind: Kind, _namespace: &str, name: &str, object: &Value) {
        if kind == Kind::Namespace {
            let ending = object.pointer("/metadata/deletionTimestamp").is_some();
            self.change(|names| match ending {
                true => names.remove(name),
                false => names.insert(name.into()),
            });
        }
    }

    fn gone(&self, kind: Kind, _namespace: &str, name: &str) {
        if kind == Kind::Namespace {
            self.change(|names| names.remove(name));
        }
    }
}

impl Namespaces {
    fn change(&self, change: impl FnOnce(&mut BTreeSet<Box<str>>) -> bool) {
        if change(&mut self.names.lock().unwrap_or_else(PoisonError::into_inner)) {
            self.changed.notify_one();
        }
    }

    fn all(&self) -> Vec<Box<str>> {
        self.names
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
            .cloned()
            .collect()
    }
}

/// Keeps the ConfigMaps right until drained.
pub async fn run(
    client: Client,
    namespaces: Arc<Namespaces>,
    mut bundle: watch::Receiver<Option<Arc<str>>>,
    mut leads: watch::Receiver<bool>,
    mut drain: DrainSignal,
) {
    let of_name = watcher::Config::default().fields(&format!("metadata.name={NAME}"));
    let mut events = watcher(Api::<ConfigMap>::all(client.clone()), of_name)
        .default_backoff()
        .boxed();
    let mut found = Found::default();
    let mut again = false;
    loop {
        tokio::select! {
            _ = drain.reached(DrainMode::Graceful) => return,
            event = events.next() => match event {
                Some(Ok(event)) => found.take(event),
                Some(Err(error)) => tracing::debug!(%error, "the watch of the trust bundles broke; it is started again"),
                None => return,
            },
            () = namespaces.changed.notified() => {}
            changed = bundle.changed() => if changed.is_err() { return },
            changed = leads.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if again => {}
        }
        let text = bundle.borrow_and_update().clone();
        let (Some(text), true, true) = (text, *leads.borrow_and_update(), found.synced) else {
            continue;
        };
        again = !reconcile(&client, &namespaces, &mut found, &text).await;
    }
}

/// Whether all is right now.
async fn reconcile(client: &Client, namespaces: &Namespaces, found: &mut Found, bundle: &Arc<str>) -> bool {
    let right = hash(bundle);
    let wrong = found.wrong(&namespaces.all(), right);
    let mut applied = futures_util::stream::iter(wrong)
        .map(|namespace| async {
            let applied = tokio::time::timeout(RETRY, apply(client, &namespace, bundle)).await;
            (namespace, applied)
        })
        .buffer_unordered(AT_ONCE);
    let mut good = true;
    while let Some((namespace, result)) = applied.next().await {
        match result {
            Ok(Ok(())) => {
                found.hashes.insert(namespace, right);
            }
            Err(_) => {
                tracing::warn!(%namespace, "the API did not answer about the trust bundle in time; trying again");
                good = false;
            }
            // It went meanwhile, or is about to.
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 403 | 404) => {
                tracing::debug!(%namespace, error = %status, "no trust bundle for a namespace");
                good = status.code == 404 && good;
            }
            Ok(Err(error)) => {
                tracing::warn!(%namespace, %error, "cannot write the trust bundle; trying again");
                good = false;
            }
        }
    }
    good
}

async fn apply(client: &Client, namespace: &str, bundle: &str) -> Result<(), kube::Error> {
    let map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": NAME, "labels": {"istio.io/config": "true"}},
        "data": {KEY: bundle},
    });
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    maps.patch(NAME, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&map))
        .await?;
    Ok(())
}

fn hash(text: &str) -> Hash {
    let mut hash = Hash::default();
    hash.copy_from_slice(digest::digest(&digest::SHA256, text.as_bytes()).as_ref());
    hash
}

/// The ConfigMaps as they are.
#[derive(Default)]
struct Found {
    hashes: HashMap<Box<str>, Hash>,
    listing: BTreeMap<Box<str>, Hash>,
    synced: bool,
}

impl Found {
    fn take(&mut self, event: Event<ConfigMap>) {
        match event {
            Event::Init => self.listing.clear(),
            Event::InitApply(map) => {
                if map.name_any() == NAME {
                    self.listing
                        .insert(map.namespace().unwrap_or_default().into(), hash_of(&map));
                }
            }
            Event::InitDone => {
                self.hashes = std::mem::take(&mut self.listing).into_iter().collect();
                self.synced = true;
            }
            Event::Apply(map) => {
                if map.name_any() == NAME {
                    self.hashes
                        .insert(map.namespace().unwrap_or_default().into(), hash_of(&map));
                }
            }
            Event::Delete(map) => {
                if map.name_any() == NAME {
                    self.hashes.remove(&*map.namespace().unwrap_or_default());
                }
            }
        }
    }

    fn wrong(&self, namespaces: &[Box<str>], right: Hash) -> Vec<Box<str>> {
        let wrong = namespaces
            .iter()
            .filter(|namespace| self.hashes.get(*namespace) != Some(&right));
        wrong.cloned().collect()
    }
}

fn hash_of(map: &ConfigMap) -> Hash {
    let text = map.data.as_ref().and_then(|data| data.get(KEY));
    hash(text.map(String::as_str).unwrap_or_default())
}
