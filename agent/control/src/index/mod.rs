//! Objects of the Kubernetes API to resources for agents, incrementally: objects in, changes out; pure.
//!
//! ```text
//! object ─ records ─> what is kept of it ─ tables ─> dirty parts ─ workloads, services, policies ─> model value
//!                                          (look-ups, claims)                                          │ wire
//!                     Outcome { changes, findings } <─ what is other than before ──────────────────────┘
//! ```
//! The semantics are those of istiod's ambient index (`pilot/pkg/serviceregistry/ambient`). It knows nothing of watches,
//! clients and clocks, and keeps no JSON.
//!
//! Invariants:
//! - Any sequence of changes gives what an index made from the final objects has
//!   (`any_sequence_gives_what_a_fresh_index_has`).
//! - A change costs what depends on it, not what there is (`one_endpoint_is_one_workload`).
//! - HBONE goes to nobody who is not said to take it (`nobody_is_hbone_without_redirection`).
//! - An address, and within a namespace a host name, has one owner (`an_address_has_one_owner`): a pod before a Service
//!   before what somebody writes into an entry, the older before the younger. Who loses is told. Entries that namespaces keep to
//!   themselves are each the owner there (`namespaces_may_keep_entries_of_one_address_to_themselves`). An entry and its own
//!   endpoint may be at one address (`an_entrys_endpoints_may_have_its_address`): agents then see both, a service and a
//!   workload that it lists.
//! - Fail closed: a policy that can't be enforced denies what it selects; a waypoint that can't be used is refused by
//!   agents, where istiod lets traffic around it (see `waypoints`).
//!
//! Findings are of one object each; the list is complete and replaces the one before.

mod entries;
mod intake;
mod labels;
mod marks;
mod names;
mod owners;
mod parts;
mod policies;
mod records;
mod service_records;
mod services;
mod slices;
mod tables;
mod targets;
#[cfg(test)]
mod tests;
mod waypoints;
mod workloads;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use k8s::{
    Finding, ObjectRef, Place,
    live::{Kind, Read},
};
use model::TrustDomain;

use self::{
    entries::Note,
    intake::settings,
    parts::{Part, PartKind, Source},
    tables::Tables,
};
use crate::{
    resources::{Change, Resource, Type},
    wire,
};

/// What no object says.
#[derive(Clone, Debug)]
pub struct Config {
    /// The cluster's name (`Kubernetes`).
    pub cluster: Arc<str>,
    /// The trust domain, where the mesh configuration names none.
    pub trust_domain: TrustDomain,
    /// Where the mesh configuration is, and the policies for the mesh unless it names another namespace.
    pub root_namespace: Arc<str>,
    /// The network of what names none; empty for the default one.
    pub network: Arc<str>,
    /// What services' host names end with.
    pub domain: Arc<str>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            trust_domain: TrustDomain::default(),
            root_namespace: k8s::ROOT_NAMESPACE.into(),
            network: "".into(),
            domain: "cluster.local".into(),
        }
    }
}

/// What holds for the mesh, by its configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The cluster's name.
    pub cluster: Arc<str>,
    /// The domain of every identity.
    pub trust_domain: TrustDomain,
    /// Domains that count as the trust domain.
    pub trust_domain_aliases: Vec<TrustDomain>,
    /// Where the policies for the mesh stand.
    pub root_namespace: Arc<str>,
}

/// A step of the objects.
#[derive(Clone, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly every one is the large one, and is moved once"
)]
pub enum ObjectChange {
    /// It is new, or other than before.
    Put(Read),
    /// It is gone.
    Delete {
        /// Its kind.
        kind: Kind,
        /// Its namespace; empty for what has none.
        namespace: String,
        /// Its name.
        name: String,
    },
}

/// What follows from changes of objects.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outcome {
    /// The resources that are other than before; removals first, then by type and name.
    pub changes: Vec<Change>,
    /// The objects whose findings are other than before, each with all that it has now.
    pub findings: Vec<(ObjectRef, Vec<Finding>)>,
    /// How many parts of objects were made anew: what the changes cost.
    pub recomputed: usize,
}

/// The objects and what they come to.
#[derive(Debug)]
pub struct Index {
    config: Config,
    settings: Settings,
    tables: Tables,
    resources: HashMap<Part, Resource>,
    /// Of the objects themselves, and of the parts; empty lists are left out.
    read: BTreeMap<Source, Vec<Finding>>,
    made: BTreeMap<Part, Vec<Finding>>,
    told: BTreeMap<Source, Vec<Finding>>,
}

impl Index {
    /// An index without objects.
    pub fn new(config: Config) -> Self {
        let settings = settings(&config, None);
        Self {
            tables: Tables::new(config.network.clone(), settings.root_namespace.clone()),
            settings,
            config,
            resources: HashMap::new(),
            read: BTreeMap::new(),
            made: BTreeMap::new(),
            told: BTreeMap::new(),
        }
    }

    /// What holds for the mesh.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes the changes in, in their order, and says what follows from all of them together.
    pub fn apply(&mut self, changes: Vec<ObjectChange>) -> Outcome {
        let mut touched = BTreeSet::new();
        for change in changes {
            match change {
                ObjectChange::Put(read) => touched.extend(self.put(read)),
                ObjectChange::Delete { kind, namespace, name } => {
                    let namespace = if kind.is_namespaced() { &*namespace } else { "" };
                    let name = self.tables.names.name(namespace, &name);
                    touched.insert(self.delete(kind, name));
                }
            }
        }
        self.settle(touched)
    }

    /// Makes the dirty parts anew.
    fn settle(&mut self, mut touched: BTreeSet<Source>) -> Outcome {
        let mut dirty = std::mem::take(&mut self.tables.dirty);
        let stand_ins: Vec<_> = dirty
            .iter()
            .filter_map(|part| self.tables.stand_ins(part).cloned())
            .collect();
        dirty.extend(stand_ins);
        let mut outcome = Outcome {
            recomputed: dirty.len(),
            ..Outcome::default()
        };
        let mut removed: BTreeSet<(Type, Arc<str>)> = BTreeSet::new();
        let mut put: BTreeMap<(Type, Arc<str>), Resource> = BTreeMap::new();
        for part in dirty {
            let mut findings = Vec::new();
            let resource = self.make(&part, &mut findings);
            let source = part.source();
            if self.made.get(&part).map_or(&[][..], Vec::as_slice) != findings {
                touched.insert(source);
                match findings.is_empty() {
                    true => self.made.remove(&part),
                    false => self.made.insert(part.clone(), findings),
                };
            }
            if self.resources.get(&part) == resource.as_ref() {
                continue;
            }
            let old = match resource {
                Some(resource) => {
                    put.insert((resource.type_, resource.name.clone()), resource.clone());
                    self.resources.insert(part, resource)
                }
                None => self.resources.remove(&part),
            };
            removed.extend(old.map(|old| (old.type_, old.name)));
        }
        // A name may have gone from one part to another.
        let gone = removed.into_iter().filter(|key| !put.contains_key(key));
        let gone: Vec<_> = gone.map(|(type_, name)| Change::Remove { type_, name }).collect();
        outcome.changes = gone;
        outcome.changes.extend(put.into_values().map(Change::Put));
        outcome.findings = touched.into_iter().filter_map(|source| self.tell(source)).collect();
        outcome
    }

    fn make(&self, part: &Part, findings: &mut Vec<Finding>) -> Option<Resource> {
        let (tables, settings) = (&self.tables, &self.settings);
        let mut notes = Vec::new();
        let resource = match part.kind {
            PartKind::Pod => tables
                .pod_workload(part, settings, &mut notes)
                .map(|made| wire::workload(&made)),
            PartKind::Entry => tables
                .entry_workload(part, settings, &mut notes)
                .map(|made| wire::workload(&made)),
            PartKind::Endpoint => tables
                .inline_workload(part, settings, &mut notes)
                .map(|made| wire::workload(&made)),
            PartKind::SliceEndpoint => tables
                .slice_workload(part, settings, &mut notes)
                .map(|made| wire::workload(&made)),
            PartKind::Service => tables
                .kubernetes_service(part, &mut notes)
                .map(|made| wire::service(&made)),
            PartKind::Host => tables.host_service(part, &mut notes).map(|made| wire::service(&made)),
            PartKind::Policy => tables.authorization(part, findings).map(|made| wire::policy(&made)),
            PartKind::PeerAuthentication => tables.authentication(part, findings).map(|made| wire::policy(&made)),
            PartKind::Namespace => {
                notes = tables.namespace_notes(&part.of.name);
                None
            }
        };
        let source = part.source();
        findings.extend(notes.into_iter().map(|note| finding(&source, note)));
        resource
    }

    /// All findings of an object, if they are other than before.
    fn tell(&mut self, source: Source) -> Option<(ObjectRef, Vec<Finding>)> {
        let mut all = self.read.get(&source).cloned().unwrap_or_default();
        for kind in parts_of(source.kind) {
            let parts = Part::at(*kind, &source.name, 0)..=Part::at(*kind, &source.name, usize::MAX);
            all.extend(
                self.made
                    .range(parts)
                    .flat_map(|(_, findings)| findings.iter().cloned()),
            );
        }
        all.dedup();
        if self.told.get(&source).map_or(&[][..], Vec::as_slice) == all {
            return None;
        }
        let object = source.object();
        match all.is_empty() {
            true => self.told.remove(&source),
            false => self.told.insert(source, all.clone()),
        };
        Some((object, all))
    }
}

fn finding(source: &Source, (field, problem, effect): Note) -> Finding {
    Finding {
        place: Place::default(),
        object: source.object(),
        field,
        problem,
        effect,
    }
}

/// The kinds of parts that objects of a kind have.
fn parts_of(kind: Kind) -> &'static [PartKind] {
    match kind {
        Kind::Pod => &[PartKind::Pod],
        Kind::Service => &[PartKind::Service],
        Kind::WorkloadEntry => &[PartKind::Entry],
        Kind::ServiceEntry => &[PartKind::Host, PartKind::Endpoint],
        Kind::EndpointSlice => &[PartKind::SliceEndpoint],
        Kind::AuthorizationPolicy => &[PartKind::Policy],
        Kind::PeerAuthentication => &[PartKind::PeerAuthentication],
        Kind::Namespace => &[PartKind::Namespace],
        Kind::Node | Kind::ServiceAccount | Kind::ConfigMap | Kind::Gateway | Kind::GatewayClass => &[],
    }
}
