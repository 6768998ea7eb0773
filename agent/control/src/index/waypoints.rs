//! Which waypoint an object's traffic goes through.
//!
//! The object's label over its namespace's; `none` is none. Whether the waypoint is for this traffic is the Gateway's
//! label `istio.io/waypoint-for`, else its GatewayClass's, else it is for services. A value that means nothing closes
//! both.
//!
//! **Unlike istiod**, which leaves the waypoint out while its Gateway is missing, not ready, or closed to the namespace,
//! and so lets traffic pass around every policy that it enforces: here the resource names a waypoint that nobody can
//! resolve (`<why>.<name>.<namespace>.waypoint.invalid`, [`GatewayAddress::unusable`]), and agents refuse, saying so; and the object whose label
//! it is has a finding (`a_missing_waypoint_closes`). What a Gateway that is not there would be for is not known, so
//! until it is there both are closed: what was dialled by a service's address, and by a workload's.

use std::sync::Arc;

use k8s::{Effect, Problem};
use model::{GatewayAddress, NamespacedName, Unusable};

use super::{
    entries::Note,
    labels,
    names::Labels,
    records::{Allowed, UsedFor},
    tables::Tables,
};

/// What is sent to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Traffic {
    /// What was dialled by a service's address.
    Services,
    /// What was dialled by a workload's own address.
    Workloads,
}

/// The waypoint that these labels name, whoever's they are.
pub(super) fn named(labels: &Labels, namespace: &Arc<str>) -> Option<NamespacedName> {
    let name = labels.get(labels::USE_WAYPOINT).filter(|name| &***name != "none")?;
    Some(NamespacedName {
        namespace: labels.get(labels::USE_WAYPOINT_NAMESPACE).unwrap_or(namespace).clone(),
        name: name.clone(),
    })
}

impl Tables {
    /// The waypoint for an object's traffic, and what is wrong with it if the object's own label names it.
    pub(super) fn waypoint(
        &self,
        labels: &Labels,
        namespace: &Arc<str>,
        traffic: Traffic,
        notes: &mut Vec<Note>,
    ) -> Option<GatewayAddress> {
        if labels.get(labels::MANAGED).map(|by| &**by) == Some(labels::WAYPOINT_CONTROLLER) {
            return None;
        }
        let own = labels.get(labels::USE_WAYPOINT).is_some();
        let name = match own {
            true => named(labels, namespace)?,
            false => named(&self.namespaces.get(namespace)?.labels, namespace)?,
        };
        if labels.get(labels::GATEWAY_NAME) == Some(&name.name) && *namespace == name.namespace {
            return None;
        }
        match self.usable(&name, namespace, traffic) {
            Ok(address) => address,
            Err(why) => {
                if own {
                    notes.push(note(&name, why));
                }
                Some(GatewayAddress::unusable(&name, why))
            }
        }
    }

    /// What is wrong with the waypoint that a namespace names.
    pub(super) fn namespace_notes(&self, namespace: &Arc<str>) -> Vec<Note> {
        let record = self.namespaces.get(namespace);
        let name = record.and_then(|record| named(&record.labels, namespace));
        let mut notes = Vec::new();
        if let Some(name) = name {
            let services = self.usable(&name, namespace, Traffic::Services);
            let why = services.and_then(|_| self.usable(&name, namespace, Traffic::Workloads));
            notes.extend(why.err().map(|why| note(&name, why)));
        }
        notes
    }

    fn usable(
        &self,
        name: &NamespacedName,
        namespace: &Arc<str>,
        traffic: Traffic,
    ) -> Result<Option<GatewayAddress>, Unusable> {
        let gateway = self.gateways.get(name).ok_or(Unusable::NotThere)?;
        let of_class = || self.gateway_classes.get(&gateway.class).copied().flatten();
        match (gateway.used_for.or_else(of_class).unwrap_or(UsedFor::Services), traffic) {
            (UsedFor::Unreadable, _) => return Err(Unusable::WrongPurpose),
            (UsedFor::All, _) | (UsedFor::Services, Traffic::Services) | (UsedFor::Workloads, Traffic::Workloads) => {}
            _ => return Ok(None),
        }
        let labels = self.namespaces.get(namespace).map(|record| &record.labels);
        let allowed = match &gateway.allowed {
            Allowed::All => true,
            Allowed::Same => *namespace == name.namespace,
            Allowed::Selector(selector) => labels.is_some_and(|labels| labels.matches(selector)),
            Allowed::Nobody => false,
        };
        if !allowed {
            return Err(Unusable::NotAllowed);
        }
        gateway.address.clone().map(Some)
    }
}

fn note(name: &NamespacedName, why: Unusable) -> Note {
    (
        format!("metadata.labels[{}]", labels::USE_WAYPOINT),
        Problem::Invalid(format!("waypoint {name}: {why}; what would go through it is refused")),
        Effect::Closed,
    )
}
