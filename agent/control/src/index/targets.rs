//! AuthorizationPolicies with `targetRefs`: whether anything enforces them.
//!
//! A node's agent does not: they are for the waypoint (or gateway) that the target's traffic goes through, and are not sent
//! to agents. **Unlike istiod**, which accepts such a policy for a Service without a waypoint and lets everybody in: here
//! what is dialled by that Service's address is refused until there is a waypoint, or until the policy is gone
//! (`a_policy_for_a_waypoint_closes_a_target_without_one`). That is the traffic that the policy is about: what is dialled by a
//! pod's own address passes no service's waypoint with Istio either, and a policy with a selector is for that.
//!
//! An audit or a dry run closes nothing.

use std::sync::Arc;

use k8s::{AuthorizationPolicy, Effect, Finding, ObjectRef, Problem, TargetRef, live::Kind};
use model::{GatewayAddress, NamespacedName, Unusable};

use super::{
    entries::Note,
    finding,
    names::Labels,
    parts::{Part, PartKind, Source, within},
    tables::{Policy, Tables},
    waypoints::{self, Traffic},
};

const GATEWAYS: &str = "gateway.networking.k8s.io";
const ISTIO: &str = "networking.istio.io";

/// The kind whose traffic a target's policy is about, if that is one that is dialled.
fn dialled(target: &TargetRef) -> Option<Kind> {
    match (target.group.as_str(), target.kind.as_str()) {
        ("" | "core", "Service") => Some(Kind::Service),
        (ISTIO, "ServiceEntry") => Some(Kind::ServiceEntry),
        _ => None,
    }
}

fn is_elsewhere(target: &TargetRef, namespace: &str) -> bool {
    target.namespace.as_deref().is_some_and(|other| other != namespace)
}

impl Tables {
    /// The waypoint of a Service or ServiceEntry; where it has none and a policy needs one, one that nobody can resolve.
    pub(super) fn waypoint_of_service(
        &self,
        part: &Part,
        labels: &Labels,
        notes: &mut Vec<Note>,
    ) -> Option<GatewayAddress> {
        let waypoint = self.waypoint(labels, &part.of.namespace, Traffic::Services, notes);
        if waypoint.is_some() {
            return waypoint;
        }
        let source = part.source();
        let (policy, _) = within(&self.policies, &part.of.namespace).find(|(_, policy)| closes(policy, &source))?;
        let why = format!(
            "AuthorizationPolicy {policy} is for its waypoint, and it has none; what is dialled by its address is refused"
        );
        notes.push((String::new(), Problem::Invalid(why), Effect::Closed));
        Some(GatewayAddress::unusable(policy, Unusable::PolicyAlone))
    }

    /// What to tell the author of a policy with targets, of each.
    pub(super) fn targeted(&self, part: &Part, written: &AuthorizationPolicy) -> Vec<Finding> {
        let source = part.source();
        let targets = written.targets().enumerate().map(|(index, target)| {
            let (problem, effect) = self.enforced(&part.of.namespace, target, written.restricts());
            finding(&source, (format!("spec.targetRefs[{index}]"), problem, effect))
        });
        targets.collect()
    }

    fn enforced(&self, namespace: &Arc<str>, target: &TargetRef, restricts: bool) -> (Problem, Effect) {
        let object = ObjectRef {
            kind: target.kind.clone(),
            namespace: namespace.to_string(),
            name: target.name.clone(),
        };
        if is_elsewhere(target, namespace) {
            let why = format!("{object}: a policy is for targets of its own namespace");
            return (Problem::Invalid(why), Effect::Refused);
        }
        let name = NamespacedName::new(&**namespace, target.name.as_str());
        let by = |whom: &str| {
            let why = format!("{whom} has to enforce it, and this control plane does not configure waypoints");
            (Problem::Unsupported(why), Effect::Elsewhere)
        };
        match (dialled(target), target.group.as_str(), target.kind.as_str()) {
            (Some(kind), ..) => match self.labels_of(kind, &name) {
                None => (Problem::Missing(object), Effect::Refused),
                Some(labels) => match self.goes_through(labels, namespace) {
                    Some(waypoint) => by(&format!("waypoint {waypoint}, which {object} goes through,")),
                    None if restricts => {
                        let why = format!(
                            "{object} has no waypoint to enforce it; what is dialled by its address is refused"
                        );
                        (Problem::Invalid(why), Effect::Closed)
                    }
                    None => {
                        let why = format!("{object} has no waypoint to enforce it");
                        (Problem::Invalid(why), Effect::Refused)
                    }
                },
            },
            (None, GATEWAYS, "Gateway") if self.gateways.contains_key(&name) => by(&object.to_string()),
            (None, GATEWAYS, "Gateway") => (Problem::Missing(object), Effect::Refused),
            (None, GATEWAYS, "GatewayClass") if *namespace == self.root_namespace => {
                by(&format!("every gateway of class {}", target.name))
            }
            (None, GATEWAYS, "GatewayClass") => {
                let why = format!(
                    "a GatewayClass is a target only in the root namespace {}",
                    self.root_namespace
                );
                (Problem::Invalid(why), Effect::Refused)
            }
            _ => {
                let why = format!("{object}: only a Service, ServiceEntry, Gateway or GatewayClass can be a target");
                (Problem::Invalid(why), Effect::Refused)
            }
        }
    }

    fn labels_of(&self, kind: Kind, name: &NamespacedName) -> Option<&Labels> {
        match kind {
            Kind::Service => Some(&*self.services.get(name)?.labels),
            _ => Some(&*self.service_entries.get(name)?.labels),
        }
    }

    /// The waypoint that these labels lead services' traffic to, there or not.
    fn goes_through(&self, labels: &Labels, namespace: &Arc<str>) -> Option<NamespacedName> {
        self.waypoint(labels, namespace, Traffic::Services, &mut Vec::new())?;
        let of_namespace = || waypoints::named(&self.namespaces.get(namespace)?.labels, namespace);
        waypoints::named(labels, namespace).or_else(of_namespace)
    }

    /// A policy came, changed or went: its targets may close or open.
    pub(super) fn mark_targets(&mut self, name: &NamespacedName, policy: &Policy) {
        let Some(written) = &policy.written else { return };
        for target in written
            .targets()
            .filter(|target| !is_elsewhere(target, &name.namespace))
        {
            let of = NamespacedName::new(&*name.namespace, target.name.as_str());
            if let Some(kind) = dialled(target) {
                self.mark_source(&Source { kind, name: of });
            }
        }
    }

    /// A possible target changed, or what leads to its waypoint: what the policies of its namespace (of all, where none is
    /// given) are told may be another.
    pub(super) fn mark_targeting(&mut self, namespace: Option<&Arc<str>>) {
        let of = |name: &&NamespacedName| namespace.is_none_or(|namespace| name.namespace == *namespace);
        let parts = self.targeting.iter().filter(of);
        self.dirty.extend(parts.map(|name| Part::new(PartKind::Policy, name)));
    }
}

/// Whether the policy wants to be enforced for what is dialled by this object's address.
fn closes(policy: &Policy, source: &Source) -> bool {
    let Some(written) = policy.written.as_ref().filter(|written| written.restricts()) else {
        return false;
    };
    let selected = written.selector().is_some();
    let is_it = |target: &TargetRef| {
        dialled(target) == Some(source.kind)
            && *target.name == *source.name.name
            && !is_elsewhere(target, &source.name.namespace)
    };
    !selected && written.targets().any(is_it)
}
