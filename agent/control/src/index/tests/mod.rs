//! The index from outside: objects as JSON in, decoded resources out.
//!
//! [`Mesh`] keeps what a subscriber would have, and checks at every step what must hold of each state: an alias names one
//! resource in each namespace, or a service and its endpoint; a policy that a workload lists is there.

mod convergence;
mod policies;
mod services;
mod size;
mod waypoints;
mod workloads;

use std::collections::BTreeMap;

use k8s::{
    Finding, ObjectRef,
    live::{Kind, read},
};
use proto::{Message, security, workload::address};
use serde_json::{Value, json};

use super::{Config, Index, ObjectChange, Outcome};
use crate::resources::{Change, Resource, Type};

/// An index, and what it has said so far.
pub(super) struct Mesh {
    pub index: Index,
    pub resources: BTreeMap<(Type, String), Resource>,
    pub findings: BTreeMap<ObjectRef, Vec<Finding>>,
}

impl Mesh {
    pub fn new() -> Self {
        Self {
            index: Index::new(Config {
                cluster: "c".into(),
                ..Config::default()
            }),
            resources: BTreeMap::new(),
            findings: BTreeMap::new(),
        }
    }

    pub fn with(objects: impl IntoIterator<Item = Value>) -> Self {
        let mut mesh = Self::new();
        mesh.apply(objects.into_iter().map(|object| put(&object)).collect());
        mesh
    }

    pub fn put(&mut self, object: Value) -> Outcome {
        self.apply(vec![put(&object)])
    }

    pub fn delete(&mut self, kind: Kind, namespace: &str, name: &str) -> Outcome {
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        self.apply(vec![ObjectChange::Delete { kind, namespace, name }])
    }

    pub fn apply(&mut self, changes: Vec<ObjectChange>) -> Outcome {
        let outcome = self.index.apply(changes);
        for change in &outcome.changes {
            match change.clone() {
                Change::Put(resource) => {
                    let key = (resource.type_, resource.name.to_string());
                    self.resources.insert(key, resource);
                }
                Change::Remove { type_, name } => {
                    let removed = self.resources.remove(&(type_, name.to_string()));
                    assert!(removed.is_some(), "{name} is removed and was not there");
                }
            }
        }
        for (object, findings) in outcome.findings.clone() {
            assert!(findings.iter().all(|finding| finding.object == object), "{findings:?}");
            let before = match findings.is_empty() {
                true => self.findings.remove(&object),
                false => self.findings.insert(object.clone(), findings.clone()),
            };
            assert_ne!(before.unwrap_or_default(), findings, "{object} has them already");
        }
        outcome
    }

    /// What must hold of every state.
    pub fn check(&self) {
        let mut names: BTreeMap<(String, Option<String>), String> = BTreeMap::new();
        for ((_, name), resource) in &self.resources {
            for alias in &resource.aliases {
                let other = names.insert((alias.to_string(), self.kept_to(name)), name.clone());
                let share = |other: &String| self.is_endpoint(other, name) || self.is_endpoint(name, other);
                assert!(other.iter().all(share), "{alias} is {name}'s and {other:?}'s");
            }
        }
        for workload in self.workloads() {
            for policy in &workload.authorization_policies {
                let key = (Type::Authorization, policy.clone());
                assert!(
                    self.resources.contains_key(&key),
                    "{}: {policy} is not there",
                    workload.uid
                );
            }
        }
    }

    fn is_endpoint(&self, workload: &str, service: &str) -> bool {
        let workload = self.find_workload(workload);
        workload.is_some_and(|workload| workload.services.contains_key(service))
    }

    /// The namespace that a ServiceEntry's host is kept to, if it is.
    fn kept_to(&self, name: &str) -> Option<String> {
        let service = self.find_service(name)?;
        let is_kept = service.visibility() == proto::workload::Visibility::Namespace;
        let of_kubernetes = format!("{}.{}.svc.", service.name, service.namespace);
        (is_kept && !service.hostname.starts_with(&of_kubernetes)).then_some(service.namespace)
    }

    fn address(&self, name: &str) -> Option<address::Type> {
        let resource = self.resources.get(&(Type::Address, name.to_owned()))?;
        let address = proto::workload::Address::decode(resource.message.clone()).unwrap();
        address.r#type
    }

    pub fn workloads(&self) -> impl Iterator<Item = proto::workload::Workload> {
        let names = self.resources.keys().filter(|(type_, _)| *type_ == Type::Address);
        names.filter_map(|(_, name)| self.find_workload(name))
    }

    pub fn find_workload(&self, uid: &str) -> Option<proto::workload::Workload> {
        match self.address(uid)? {
            address::Type::Workload(workload) => Some(workload),
            address::Type::Service(_) => None,
        }
    }

    pub fn workload(&self, uid: &str) -> proto::workload::Workload {
        self.find_workload(uid).unwrap_or_else(|| panic!("no workload {uid}"))
    }

    pub fn pod(&self, namespace: &str, name: &str) -> proto::workload::Workload {
        self.workload(&format!("c//v1/Pod/{namespace}/{name}"))
    }

    pub fn find_service(&self, name: &str) -> Option<proto::workload::Service> {
        match self.address(name)? {
            address::Type::Service(service) => Some(service),
            address::Type::Workload(_) => None,
        }
    }

    pub fn service(&self, name: &str) -> proto::workload::Service {
        self.find_service(name).unwrap_or_else(|| panic!("no service {name}"))
    }

    pub fn policy(&self, name: &str) -> Option<security::Authorization> {
        let resource = self.resources.get(&(Type::Authorization, name.to_owned()))?;
        Some(security::Authorization::decode(resource.message.clone()).unwrap())
    }

    pub fn aliases(&self, name: &str) -> Vec<String> {
        let resource = &self.resources[&(Type::Address, name.to_owned())];
        resource.aliases.iter().map(ToString::to_string).collect()
    }

    /// The findings of an object, as they are written.
    pub fn found(&self, kind: Kind, namespace: &str, name: &str) -> Vec<String> {
        let findings = self.findings.get(&kind.object(namespace, name));
        findings.into_iter().flatten().map(ToString::to_string).collect()
    }
}

/// The kind of an object by its `kind` alone.
pub(super) fn kind(object: &Value) -> Kind {
    let name = object["kind"].as_str().unwrap();
    Kind::ALL.into_iter().find(|kind| kind.name() == name).unwrap()
}

pub(super) fn put(object: &Value) -> ObjectChange {
    ObjectChange::Put(read(kind(object), object))
}

/// `into` with the fields of `more` in it, objects merged.
pub(super) fn merged(mut into: Value, more: Value) -> Value {
    match (&mut into, more) {
        (Value::Object(fields), Value::Object(more)) => {
            for (key, value) in more {
                let before = fields.remove(&key).unwrap_or(Value::Null);
                fields.insert(key, merged(before, value));
            }
            into
        }
        (_, more) => more,
    }
}

pub(super) fn object(kind: &str, namespace: &str, name: &str, more: Value) -> Value {
    let object = json!({"kind": kind, "metadata": {"name": name, "namespace": namespace}});
    merged(object, more)
}

/// A pod that is ready and captured.
pub(super) fn pod(namespace: &str, name: &str, ip: &str, more: Value) -> Value {
    let running = json!({
        "metadata": {"labels": {"app": name}, "annotations": {"ambient.istio.io/redirection": "enabled"}},
        "spec": {"nodeName": "n1", "serviceAccountName": "sa"},
        "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True"}]},
    });
    merged(object("Pod", namespace, name, running), more)
}

pub(super) fn service(namespace: &str, name: &str, ip: &str, more: Value) -> Value {
    let spec = json!({"spec": {"clusterIP": ip, "clusterIPs": [ip], "selector": {"app": name},
        "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
    merged(object("Service", namespace, name, spec), more)
}

pub(super) fn slice(namespace: &str, service: &str, port: u16, pods: &[&str]) -> Value {
    let endpoint = |pod: &&str| json!({"addresses": ["1.1.1.1"], "targetRef": {"kind": "Pod", "name": pod}});
    let endpoints: Vec<_> = pods.iter().map(endpoint).collect();
    let more = json!({"metadata": {"labels": {"kubernetes.io/service-name": service}}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": port, "protocol": "TCP"}], "endpoints": endpoints});
    object("EndpointSlice", namespace, &format!("{service}-1"), more)
}

pub(super) fn namespace(name: &str, labels: Value) -> Value {
    json!({"kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}
