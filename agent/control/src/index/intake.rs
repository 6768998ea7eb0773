//! Objects into the tables: which record of which table an object is, and what the mesh's configuration says.

use std::sync::Arc;

use k8s::{
    Effect, Problem,
    live::{Kind, MeshConfig, Object, Read, Unreadable, WorkloadEntry},
};
use model::{NamespacedName, TrustDomain};

use super::{
    Config, Index, Settings,
    entries::{Note, used_for},
    finding,
    parts::Source,
    records::{Age, Endpoint, Entry, Gateway, Namespace, Node, Pod, ServiceEntry},
    service_records::{Service, Slice},
    tables::{Authentication, Policy},
};

impl Index {
    pub(super) fn put(&mut self, read: Read) -> Option<Source> {
        let Read { object, findings } = read;
        let kind = object.kind();
        let metadata = object.metadata();
        let is_mesh_config = MeshConfig::is_named(&metadata.name) && *metadata.namespace == *self.config.root_namespace;
        if kind == Kind::ConfigMap && !is_mesh_config {
            return None;
        }
        let namespace = if kind.is_namespaced() { &*metadata.namespace } else { "" };
        let name = self.tables.names.name(namespace, &metadata.name);
        let source = Source { kind, name };
        let mut notes = Vec::new();
        self.record(&source, object, &mut notes);
        let mut findings = findings;
        findings.extend(notes.into_iter().map(|note| finding(&source, note)));
        match findings.is_empty() {
            true => self.read.remove(&source),
            false => self.read.insert(source.clone(), findings),
        };
        Some(source)
    }

    fn record(&mut self, source: &Source, object: Object, notes: &mut Vec<Note>) {
        let (tables, name) = (&mut self.tables, &source.name);
        match object {
            Object::Namespace(read) => {
                let record = Namespace::new(&read, &mut tables.names);
                tables.put_namespace(&name.name, Some(record));
            }
            Object::Node(read) => {
                let record = Node::new(&read, &mut tables.names);
                tables.put_node(&name.name, Some(record));
            }
            Object::Pod(read) => {
                let record = Pod::new(&read, &mut tables.names);
                tables.put_pod(name, record);
            }
            Object::Service(read) => self.service(name, &read, notes),
            Object::EndpointSlice(read) => {
                let record = Slice::new(&read, &mut tables.names);
                tables.put_slice(name, record);
            }
            Object::WorkloadEntry(read) => self.entry(name, &read, notes),
            Object::ServiceEntry(read) => {
                let record = ServiceEntry::new(&read, &mut tables.names, notes);
                tables.put_service_entry(name, Some(record));
            }
            Object::Gateway(read) => {
                let record = Gateway::new(&read, &self.config.network, &mut tables.names);
                tables.put_gateway(name, Some(record));
            }
            Object::GatewayClass(read) => tables.put_gateway_class(&name.name, Some(used_for(&read.metadata))),
            Object::AuthorizationPolicy(read) => {
                let sent = read.l4(&self.settings.root_namespace).0.is_some();
                let record = Policy {
                    selector: read
                        .selector()
                        .map(|selector| tables.names.labels(&selector.match_labels)),
                    sent,
                    written: Some(Box::new(read)),
                };
                tables.put_policy(name, Some(record));
            }
            Object::PeerAuthentication(read) => {
                let record = Authentication {
                    selector: read
                        .selector()
                        .map(|selector| tables.names.labels(&selector.match_labels)),
                    written: Some(Box::new(read)),
                };
                tables.put_authentication(name, Some(record));
            }
            Object::MeshConfig(read) => self.configure(Some(&read)),
            // Who an account is for is asked elsewhere.
            Object::ServiceAccount(_) => {}
            Object::Unreadable(read) => self.unreadable(source, &read),
        }
    }

    fn service(&mut self, name: &NamespacedName, read: &k8s::Service, notes: &mut Vec<Note>) {
        let record = Service::new(read, &self.config.domain, &mut self.tables.names);
        if record.is_none() {
            let problem = Problem::Unsupported("ExternalName; it is a name and no more".to_owned());
            notes.push(("spec.type".to_owned(), problem, Effect::Note));
        }
        self.tables.put_service(name, record);
    }

    fn entry(&mut self, name: &NamespacedName, read: &WorkloadEntry, notes: &mut Vec<Note>) {
        let names = &mut self.tables.names;
        let age = Age::of(&read.metadata, names);
        let endpoint = Endpoint::new(&read.spec, &read.metadata, names);
        let endpoint = endpoint.map_err(|why| {
            notes.push(("spec.address".to_owned(), Problem::Unsupported(why), Effect::Refused));
        });
        let record = endpoint.ok().map(|endpoint| Entry { age, endpoint });
        self.tables.put_entry(name, record);
    }

    /// What can't be read is not there; but a policy closes, and of the mesh's configuration the last good one holds.
    fn unreadable(&mut self, source: &Source, read: &Unreadable) {
        let labels = &read.selector.match_labels;
        let selector = (!labels.is_empty()).then(|| self.tables.names.labels(labels));
        match source.kind {
            Kind::AuthorizationPolicy => {
                let record = Policy {
                    written: None,
                    selector,
                    // A dry run closes nothing.
                    sent: !read.metadata.is_dry_run(),
                };
                self.tables.put_policy(&source.name, Some(record));
            }
            Kind::PeerAuthentication => {
                let record = Authentication {
                    written: None,
                    selector,
                };
                self.tables.put_authentication(&source.name, Some(record));
            }
            Kind::ConfigMap => {}
            kind => self.remove(kind, &source.name),
        }
    }

    pub(super) fn delete(&mut self, kind: Kind, name: NamespacedName) -> Source {
        let is_mesh_config = MeshConfig::is_named(&name.name) && name.namespace == self.config.root_namespace;
        if kind == Kind::ConfigMap && is_mesh_config {
            self.configure(None);
        }
        self.remove(kind, &name);
        let source = Source { kind, name };
        self.read.remove(&source);
        source
    }

    fn remove(&mut self, kind: Kind, name: &NamespacedName) {
        let tables = &mut self.tables;
        match kind {
            Kind::Namespace => tables.put_namespace(&name.name, None),
            Kind::Node => tables.put_node(&name.name, None),
            Kind::Pod => tables.put_pod(name, None),
            Kind::Service => tables.put_service(name, None),
            Kind::EndpointSlice => tables.put_slice(name, None),
            Kind::WorkloadEntry => tables.put_entry(name, None),
            Kind::ServiceEntry => tables.put_service_entry(name, None),
            Kind::Gateway => tables.put_gateway(name, None),
            Kind::GatewayClass => tables.put_gateway_class(&name.name, None),
            Kind::AuthorizationPolicy => tables.put_policy(name, None),
            Kind::PeerAuthentication => tables.put_authentication(name, None),
            Kind::ServiceAccount | Kind::ConfigMap => {}
        }
    }

    fn configure(&mut self, mesh: Option<&MeshConfig>) {
        let settings = settings(&self.config, mesh);
        if settings != self.settings {
            self.settings = settings;
            self.tables.root_namespace = self.settings.root_namespace.clone();
            self.tables.mark_all();
        }
    }
}

pub(super) fn settings(config: &Config, mesh: Option<&MeshConfig>) -> Settings {
    let written = |text: &Option<String>| text.as_deref().filter(|text| !text.is_empty()).map(Arc::<str>::from);
    let domain = mesh.and_then(|mesh| written(&mesh.trust_domain));
    let root = mesh.and_then(|mesh| written(&mesh.root_namespace));
    let aliases = mesh.iter().flat_map(|mesh| &mesh.trust_domain_aliases);
    Settings {
        cluster: config.cluster.clone(),
        trust_domain: domain.map_or_else(|| config.trust_domain.clone(), TrustDomain::new),
        trust_domain_aliases: aliases.map(|alias| TrustDomain::new(alias.as_str())).collect(),
        root_namespace: root.unwrap_or_else(|| config.root_namespace.clone()),
    }
}
