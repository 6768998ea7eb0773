//! The API as this room uses it: objects as JSON, written by server-side apply (statuses by merge), and only when they differ from what was
//! written last.

use std::{collections::HashMap, net::IpAddr};

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Service;
use kube::{
    Client,
    api::{ApiResource, DynamicObject, Patch, PatchParams},
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;

use crate::layout::Layout;

/// Who writes, in managed fields.
const MANAGER: &str = "playground";

/// A client with every right.
pub(crate) async fn client(layout: &Layout) -> Result<Client> {
    let path = layout.kubeconfig();
    let kubeconfig = Kubeconfig::read_from(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .context("the kubeconfig can't be used")?;
    Client::try_from(config).context("cannot make a client of the API")
}

/// The addresses of a service, `namespace/name`.
pub(crate) async fn service_addresses(layout: &Layout, service: &str) -> Result<Vec<IpAddr>> {
    let (namespace, name) = service.split_once('/').unwrap_or(("default", service));
    let services: kube::Api<Service> = kube::Api::namespaced(client(layout).await?, namespace);
    let spec = services.get(name).await?.spec.unwrap_or_default();
    Ok(spec
        .cluster_ips
        .iter()
        .flatten()
        .filter_map(|ip| ip.parse().ok())
        .collect())
}

/// Which object.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Target {
    pub api_version: &'static str,
    pub kind: &'static str,
    pub plural: &'static str,
    /// Empty for what is in no namespace.
    pub namespace: String,
    pub name: String,
    /// The status subresource.
    pub status: bool,
}

impl Target {
    /// An object of the core group.
    pub fn core(kind: &'static str, plural: &'static str, namespace: &str, name: &str) -> Self {
        Self {
            api_version: "v1",
            kind,
            plural,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            status: false,
        }
    }

    /// Its status.
    pub fn status(mut self) -> Self {
        self.status = true;
        self
    }

    fn api(&self, client: &Client) -> kube::Api<DynamicObject> {
        let (group, version) = self.api_version.split_once('/').unwrap_or(("", self.api_version));
        let resource = ApiResource {
            group: group.to_owned(),
            version: version.to_owned(),
            api_version: self.api_version.to_owned(),
            kind: self.kind.to_owned(),
            plural: self.plural.to_owned(),
        };
        match self.namespace.as_str() {
            "" => kube::Api::all_with(client.clone(), &resource),
            namespace => kube::Api::namespaced_with(client.clone(), namespace, &resource),
        }
    }
}

/// Writes what differs.
pub(crate) struct Api {
    pub client: Client,
    written: HashMap<Target, Value>,
}

impl Api {
    /// Nothing is written yet.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            written: HashMap::new(),
        }
    }

    /// Makes an object so (`exists`: as far as the watch knows), unless it was made just so before. Tells whether it wrote.
    pub async fn ensure(&mut self, target: Target, value: Value, exists: bool) -> Result<bool> {
        if exists && self.written.get(&target) == Some(&value) {
            return Ok(false);
        }
        let mut object = value.clone();
        object["apiVersion"] = target.api_version.into();
        object["kind"] = target.kind.into();
        object["metadata"]["name"] = target.name.as_str().into();
        let api = target.api(&self.client);
        let written = match target.status {
            // A merge: the list of a node's addresses has no key that server-side apply could go by.
            true => {
                let params = PatchParams {
                    field_manager: Some(MANAGER.to_owned()),
                    ..PatchParams::default()
                };
                api.patch_status(&target.name, &params, &Patch::Merge(&object)).await
            }
            false => {
                let params = PatchParams::apply(MANAGER).force();
                api.patch(&target.name, &params, &Patch::Apply(&object)).await
            }
        };
        written.with_context(|| format!("cannot write {} {}/{}", target.kind, target.namespace, target.name))?;
        self.written.insert(target, value);
        Ok(true)
    }

    /// Forgets what is no longer there, so that it would be written again.
    pub fn forget(&mut self, gone: impl Fn(&Target) -> bool) {
        self.written.retain(|target, _| !gone(target));
    }
}
