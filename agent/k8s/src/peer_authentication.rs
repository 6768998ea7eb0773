//! PeerAuthentication: whether a peer without an identity may talk to a workload, as istiod compiles it for ztunnel.
//!
//! Scopes, the narrower first: workload (with a selector), namespace, mesh (in the root namespace). UNSET asks the next
//! wider one; nothing said anywhere is PERMISSIVE. Inside a scope the oldest wins, for each workload by itself
//! (`where_two_overlap_the_older_wins_and_the_younger_is_told`). DISABLE is PERMISSIVE: there is
//! nothing to disable on the accepting side. Ports are the workload's own. What can't be said where it stands never opens:
//! `portLevelMtls` without a selector has no meaning, but a STRICT in it holds, for every port
//! (`a_strict_port_that_can_not_be_is_every_port`). <https://istio.io/latest/docs/reference/config/security/peer_authentication/>

use std::collections::BTreeMap;

use model::{Action, Match, NamespacedName, Policy, Rule, Scope, StringMatch};
use serde::{Deserialize, Serialize};

use crate::{Effect, Finding, Metadata, ObjectRef, Place, Problem, Selector, finding::Shared, meta::null_is_empty};

/// A PeerAuthentication.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PeerAuthentication {
    /// Name and namespace.
    pub metadata: Metadata,
    /// What it says.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub spec: PeerAuthenticationSpec,
}

/// What a PeerAuthentication says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerAuthenticationSpec {
    /// The workloads; all of the namespace (or of the mesh) where nothing is said.
    #[serde(default)]
    pub selector: Option<Selector>,
    /// For every port.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub mtls: MutualTls,
    /// For single ports of the workload, over `mtls`.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub port_level_mtls: BTreeMap<u16, MutualTls>,
}

/// Mutual TLS settings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MutualTls {
    /// The mode.
    #[serde(default)]
    pub mode: TlsMode,
}

/// Whether a peer needs an identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum TlsMode {
    /// As the wider scope says.
    #[default]
    Unset,
    /// As PERMISSIVE.
    Disable,
    /// It does not.
    Permissive,
    /// It does.
    Strict,
}

/// The PeerAuthentications in force, sorted into their scopes.
pub struct PeerAuthentications<'a> {
    mesh: Option<&'a PeerAuthentication>,
    namespaces: BTreeMap<&'a str, &'a PeerAuthentication>,
    workloads: Vec<&'a PeerAuthentication>,
}

impl<'a> PeerAuthentications<'a> {
    /// Sorts them; what can't have effect becomes a finding.
    pub fn new(
        all: impl IntoIterator<Item = (&'a Place, &'a PeerAuthentication)>,
        root: &str,
        findings: &mut Vec<Finding>,
    ) -> Self {
        let mut oldest_first: Vec<_> = all.into_iter().collect();
        oldest_first.sort_by_key(|(_, policy)| policy.metadata.age());
        let mut scopes = Self {
            mesh: None,
            namespaces: BTreeMap::new(),
            workloads: Vec::new(),
        };
        for (place, policy) in oldest_first {
            let mut find = |field: &str, problem: Problem, effect: Effect| {
                findings.push(Finding::of(policy.object(), place, (field, problem, effect)));
            };
            let namespace = policy.metadata.namespace.as_str();
            let selects = policy
                .spec
                .selector
                .as_ref()
                .is_some_and(|selector| !selector.match_labels.is_empty());
            for (field, problem, effect) in policy.remarks(selects) {
                find(field, problem, effect);
            }
            let takes_all = |other: &&&PeerAuthentication| {
                selects && other.metadata.namespace == namespace && other.selects_all_of(policy)
            };
            if let Some(older) = scopes.workloads.iter().find(takes_all) {
                find("spec.selector", Problem::Conflict(older.object()), Effect::Refused);
            }
            if selects && namespace == root {
                let why = format!("a selector in the root namespace {root}");
                find("spec.selector", Problem::Unsupported(why), Effect::Refused);
            } else if selects {
                scopes.workloads.push(policy);
            } else {
                let slot = if namespace == root {
                    scopes.mesh
                } else {
                    scopes.namespaces.get(namespace).copied()
                };
                match slot {
                    Some(older) => find("", Problem::Conflict(older.object()), Effect::Refused),
                    None if namespace == root => scopes.mesh = Some(policy),
                    None => _ = scopes.namespaces.insert(namespace, policy),
                }
            }
        }
        scopes
    }

    /// What a policy with a selector does not get, since older ones select it, too: `workloads` are those of its
    /// namespace with their labels, and `has` says whether such labels have all that a selector asks for.
    pub fn overlaps<'w, L>(
        &self,
        policy: &PeerAuthentication,
        workloads: impl IntoIterator<Item = (&'w str, L)>,
        has: impl Fn(&L, &BTreeMap<String, String>) -> bool,
    ) -> Vec<(&'static str, Problem, Effect)> {
        let of_scope = |other: &&&PeerAuthentication| other.metadata.namespace == policy.metadata.namespace;
        let is_older = |other: &&PeerAuthentication| !std::ptr::eq(*other, policy);
        let scope: Vec<_> = self
            .workloads
            .iter()
            .copied()
            .filter(|other| of_scope(&other))
            .collect();
        let older: Vec<_> = scope.iter().copied().take_while(is_older).collect();
        // One that takes all of it was told of already; one that is not of the scope has nothing to get.
        if older.is_empty() || older.len() == scope.len() || older.iter().any(|older| older.selects_all_of(policy)) {
            return Vec::new();
        }
        let selects = |policy: &PeerAuthentication, labels: &L| {
            policy
                .selector()
                .is_some_and(|selector| has(labels, &selector.match_labels))
        };
        let mut has_own = false;
        let mut shared: BTreeMap<ObjectRef, Shared> = BTreeMap::new();
        for (name, labels) in workloads.into_iter().filter(|(_, labels)| selects(policy, labels)) {
            match older.iter().find(|older| selects(older, &labels)) {
                Some(older) => shared.entry(older.object()).or_default().extend([name.to_owned()]),
                None => has_own = true,
            }
        }
        let effect = if has_own { Effect::Divided } else { Effect::Refused };
        let told = |(older, shared)| ("spec.selector", Problem::Overlap { older, shared }, effect);
        shared.into_iter().map(told).collect()
    }

    /// The policy that a pod needs, if any: what is listed with its workload.
    pub fn policy_for(&self, namespace: &str, labels: &BTreeMap<String, String>) -> Option<Policy> {
        let selected = |policy: &&&PeerAuthentication| {
            policy.metadata.namespace == namespace
                && policy
                    .spec
                    .selector
                    .as_ref()
                    .is_some_and(|selector| selector.matches(labels))
        };
        let workload = self.workloads.iter().find(selected).copied();
        let wider = [self.namespaces.get(namespace).copied(), self.mesh];
        let (mode, said_by) = [workload, wider[0], wider[1]]
            .into_iter()
            .flatten()
            .find(|policy| policy.mode() != TlsMode::Unset)
            .map_or((TlsMode::Permissive, None), |policy| (policy.mode(), Some(policy)));
        match workload.filter(|policy| !policy.spec.port_level_mtls.is_empty()) {
            Some(policy) => policy.deny(mode, &policy.spec.port_level_mtls),
            None => said_by?.deny(mode, &BTreeMap::new()),
        }
    }
}

impl<'a> PeerAuthentications<'a> {
    /// The policy that a PeerAuthentication becomes, if it has effect: what [`Self::policy_for`] gives to somebody.
    pub fn converted(&self, policy: &'a PeerAuthentication) -> Option<Policy> {
        let namespace = policy.metadata.namespace.as_str();
        let is = |other: &&'a PeerAuthentication| std::ptr::eq(*other, policy);
        let wider = [self.namespaces.get(namespace).copied(), self.mesh];
        if self.workloads.iter().any(is) {
            let said = [Some(policy), wider[0], wider[1]].into_iter().flatten();
            let said: Vec<_> = said.filter(|policy| policy.mode() != TlsMode::Unset).collect();
            let mode = said.first().map_or(TlsMode::Permissive, |policy| policy.mode());
            return match policy.spec.port_level_mtls.is_empty() {
                false => policy.deny(mode, &policy.spec.port_level_mtls),
                true if said.first().is_some_and(is) => policy.deny(mode, &BTreeMap::new()),
                true => None,
            };
        }
        wider.iter().flatten().find(|other| is(other))?;
        policy.deny(policy.mode(), &BTreeMap::new())
    }
}

impl PeerAuthentication {
    /// Whom it selects by label; none: everybody in its namespace, or in the mesh if that is the root namespace.
    pub fn selector(&self) -> Option<&Selector> {
        self.spec
            .selector
            .as_ref()
            .filter(|selector| !selector.match_labels.is_empty())
    }

    /// Whether it selects whatever the other one does: it asks for nothing that the other does not ask for.
    fn selects_all_of(&self, other: &Self) -> bool {
        let (Some(own), Some(others)) = (self.selector(), other.selector()) else {
            return false;
        };
        let mut own = own.match_labels.iter();
        own.all(|(key, value)| others.match_labels.get(key) == Some(value))
    }

    /// What names it.
    pub fn object(&self) -> ObjectRef {
        ObjectRef {
            kind: "PeerAuthentication".to_owned(),
            namespace: self.metadata.namespace.clone(),
            name: self.metadata.name.clone(),
        }
    }

    /// The mode of every port that nothing narrower is said of. Without a selector a port has no mode of its own, and so a
    /// STRICT one makes all of them so.
    fn mode(&self) -> TlsMode {
        let strict_port = self
            .spec
            .port_level_mtls
            .values()
            .any(|tls| tls.mode == TlsMode::Strict);
        match self.selector().is_none() && strict_port {
            true => TlsMode::Strict,
            false => self.spec.mtls.mode,
        }
    }

    /// What the author is to know, whatever else there is.
    fn remarks(&self, selects: bool) -> Vec<(&'static str, Problem, Effect)> {
        let mut remarks = Vec::new();
        let ports = &self.spec.port_level_mtls;
        if !selects && !ports.is_empty() {
            let (why, effect) = match self.mode() == TlsMode::Strict {
                true => ("needs a selector; so its STRICT holds for every port", Effect::Narrowed),
                false => ("needs a selector; so it says nothing", Effect::Narrowed),
            };
            remarks.push(("spec.portLevelMtls", Problem::Invalid(why.to_owned()), effect));
        }
        let disabled = |tls: &MutualTls| tls.mode == TlsMode::Disable;
        if disabled(&self.spec.mtls) || ports.values().any(disabled) {
            let why = "DISABLE is as PERMISSIVE: between captured pods everything stays encrypted";
            remarks.push(("spec.mtls", Problem::Invalid(why.to_owned()), Effect::Note));
        }
        remarks
    }

    /// DENY what has no identity: on every port but the exceptions, or on the strict ports alone.
    fn deny(&self, mode: TlsMode, ports: &BTreeMap<u16, MutualTls>) -> Option<Policy> {
        let with_mode = |strict: bool| {
            let modes = ports.iter().filter(|(_, tls)| tls.mode != TlsMode::Unset);
            modes
                .filter(move |(_, tls)| (tls.mode == TlsMode::Strict) == strict)
                .map(|(port, _)| *port)
                .collect::<Vec<_>>()
        };
        let no_identity = Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        };
        let rule: Rule = if mode == TlsMode::Strict {
            let open = with_mode(false);
            let elsewhere = Match {
                not_destination_ports: open.clone(),
                ..Match::default()
            };
            let mut clauses = vec![vec![no_identity]];
            if !open.is_empty() {
                clauses.push(vec![elsewhere]);
            }
            clauses
        } else {
            let strict = with_mode(true);
            if strict.is_empty() {
                return None;
            }
            let there = Match {
                destination_ports: strict,
                ..Match::default()
            };
            vec![vec![no_identity], vec![there]]
        };
        let key = policy_key(&self.object());
        Some(Policy {
            name: key.name,
            namespace: key.namespace,
            scope: Scope::WorkloadSelector,
            action: Action::Deny,
            rules: vec![rule],
            dry_run: false,
            origin: Some(self.object().to_string().into()),
        })
    }
}

/// The name of the policy that is made from a PeerAuthentication (istiod's, for the port-level form).
pub(crate) fn policy_key(object: &ObjectRef) -> NamespacedName {
    NamespacedName::new(
        object.namespace.as_str(),
        format!("converted_peer_authentication_{}", object.name.replace('/', "_")),
    )
}
