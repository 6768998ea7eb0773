//! The mesh's API, asked without a program between: for scenarios that change many objects quickly, and need to know when
//! a change has arrived.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
};

use anyhow::{Context, Result, ensure};
use http::{Method, Request, header::CONTENT_TYPE};
use kube::{
    Client,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde_json::Value;
use tokio::runtime::Runtime;

use crate::{Mesh, netns, wait};

const MONITORING: ([u8; 4], u16) = ([172, 30, 0, 254], 15014);

/// The API, as its administrator.
pub struct Api {
    runtime: Runtime,
    client: Client,
}

impl Api {
    /// With the playground's own kubeconfig.
    pub fn of(mesh: &Mesh) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let kubeconfig = Kubeconfig::read_from(mesh.file("kubeconfig"))?;
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
            anyhow::Ok(Client::try_from(config)?)
        })?;
        Ok(Self { runtime, client })
    }

    fn send(&self, method: Method, path: &str, content: &str, body: Vec<u8>) -> Result<Value> {
        let what = format!("{method} {path}");
        let request = Request::builder().method(method).uri(path);
        let request = request.header(CONTENT_TYPE, content).body(body)?;
        self.runtime.block_on(self.client.request(request)).context(what)
    }

    /// What is there.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.send(Method::GET, path, "application/json", Vec::new())
    }

    /// Makes an object in a collection.
    pub fn create(&self, path: &str, object: &Value) -> Result<Value> {
        self.send(Method::POST, path, "application/json", serde_json::to_vec(object)?)
    }

    /// Changes an object by a JSON merge patch.
    pub fn patch(&self, path: &str, patch: &Value) -> Result<Value> {
        let content = "application/merge-patch+json";
        self.send(Method::PATCH, path, content, serde_json::to_vec(patch)?)
    }

    /// Deletes an object; its pods and the like go later.
    pub fn delete(&self, path: &str) -> Result<()> {
        self.send(Method::DELETE, path, "application/json", Vec::new())
            .map(drop)
    }

    /// Whether an object is there.
    pub fn is_there(&self, path: &str) -> Result<bool> {
        let request = Request::get(path).body(Vec::new())?;
        match self.runtime.block_on(self.client.request::<Value>(request)) {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until every agent has acknowledged what the API says now of these kinds (name and collection).
    pub fn until_in_force(&self, kinds: &[(&str, &str)]) -> Result<()> {
        let mut missing = String::new();
        let waited = wait::until_true("every agent has what the API says", || {
            missing = self.missing(kinds)?;
            Ok(missing.is_empty())
        });
        waited.with_context(|| missing.clone())
    }

    fn missing(&self, kinds: &[(&str, &str)]) -> Result<String> {
        let seen = synchronised()?;
        for (kind, collection) in kinds {
            let list = self.get(collection)?;
            let objects = list["items"].as_array().map_or(&[][..], Vec::as_slice);
            let revision = |object: &Value| object["metadata"]["resourceVersion"].as_str()?.parse::<u64>().ok();
            let (count, last) = (objects.len(), objects.iter().filter_map(revision).max().unwrap_or(0));
            let input = &seen["inputs"][kind];
            if input["count"] != count || input["revision"].as_u64().is_none_or(|seen| seen < last) {
                return Ok(format!(
                    "of {kind} the control plane has {input}, the API {count}, up to {last}"
                ));
            }
        }
        // Asked again: what it has seen is in this generation, or in one before.
        let now = synchronised()?;
        let generation = now["generation"].as_u64().context("no generation")?;
        let clients = now["clients"].as_array().context("no clients")?;
        let behind = |client: &&Value| client["acknowledged"].as_u64().is_none_or(|has| has < generation);
        Ok(match clients.iter().find(behind) {
            Some(client) => format!("of generation {generation}: {client}"),
            None if clients.len() < 2 => format!("{} agents are connected", clients.len()),
            None => String::new(),
        })
    }
}

/// Who has acknowledged what, as the control plane tells it.
fn synchronised() -> Result<Value> {
    let address = SocketAddr::from(MONITORING);
    let answer = netns::inside("uc-control", || {
        let mut stream = TcpStream::connect_timeout(&address, wait::LONG)?;
        stream.set_read_timeout(Some(wait::LONG))?;
        write!(stream, "GET /debug/syncz HTTP/1.0\r\nHost: control\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .context("the control plane speaks no HTTP")?;
    ensure!(head.split(' ').nth(1) == Some("200"), "{head}");
    Ok(serde_json::from_str(body)?)
}
