//! What is held, by name and version, and what each response makes of it. The protocol's decisions: no sockets, no time.
//!
//! ```text
//! opening ─► requests with what is held (initial_resource_versions)
//! response ─► each resource read on its own ─► staged ─ last part ─► Delta for the mesh, changes for the disk, ACK
//!                │ can't be read: NACK by name, the last good stays and is what we say we hold
//! ```
//! A response whose `system_version_info` ends in `+` is a part of a state, and the rest follows: our own control plane
//! cuts large states so (istiod never does). The mesh sees states, not parts (`a_state_in_parts_is_one_delta`).
//!
//! Invariants:
//! - a resource that was refused is not among what we say we hold (`a_bad_resource_is_refused_by_name_and_not_held`);
//! - nothing is told to the mesh before the first policies *and* the first addresses are there, since half of it would be
//!   open (`nothing_is_known_before_both_types_are`);
//! - a policy that can't be read and was not known before is stood for by one that closes, until it is gone or read
//!   (`an_unreadable_policy_closes_until_it_is_gone`);
//! - where a workload or service is that can't be read, nothing is passed through in plaintext, until it is gone or read
//!   (`an_unreadable_address_is_closed_until_it_is_gone`); the last good version goes on where it is
//!   (`the_last_good_version_stays_and_what_the_bad_one_adds_is_closed`).

use std::collections::BTreeMap;

use mesh::{Delta, Wanted};
use model::MeshSettings;
use proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Resource, Status};

use crate::{
    config::Mode,
    decode::{self, DecodeError, Interner, Object},
    demanded::Demanded,
    held::Held,
    state::Change,
};

/// Names told in one refusal.
const NAMES_TOLD: usize = 16;
/// Of each reason, in a refusal and in the status.
const REASON_LENGTH: usize = 300;
/// gRPC's INVALID_ARGUMENT.
const INVALID: i32 = 3;

/// The types that are subscribed to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) enum Type {
    Authorization,
    Address,
}

impl Type {
    pub(crate) const ALL: [Self; 2] = [Self::Authorization, Self::Address];

    pub(crate) fn url(self) -> &'static str {
        match self {
            Self::Authorization => proto::AUTHORIZATION_TYPE,
            Self::Address => proto::ADDRESS_TYPE,
        }
    }

    pub(crate) fn of_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|type_| type_.url() == url)
    }

    fn read(self, name: &str, message: &[u8], interner: &mut Interner) -> Result<Object, DecodeError> {
        match self {
            Self::Authorization => decode::authorization(name, message, interner),
            Self::Address => decode::address(name, message, interner),
        }
    }
}

/// What a response leads to, in this order: the mesh, the disk, the answer.
#[derive(Debug, Default)]
pub(crate) struct Step {
    pub(crate) delta: Option<Delta>,
    pub(crate) changes: Vec<Change>,
    pub(crate) requests: Vec<DeltaDiscoveryRequest>,
}

/// What the control plane said that the protocol does not allow. The connection is given up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the control plane sent a response of type {0:?}, which was not asked for")]
pub(crate) struct NotAskedFor(String);

/// A resource that was refused, for the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RejectedResource {
    /// Its type.
    pub type_url: &'static str,
    /// Its name.
    pub name: String,
    /// Which field, and what is wrong with it.
    pub reason: String,
}

/// What is held.
pub(crate) struct Books {
    mode: Mode,
    interner: Interner,
    held: [Held; 2],
    demanded: Demanded,
    /// What the mesh is to be told with the first state.
    settings: Option<MeshSettings>,
    /// What came before everything was there that must be.
    first: Option<Delta>,
    ready: bool,
}

impl Books {
    pub(crate) fn new(mode: Mode, settings: MeshSettings) -> Self {
        Self {
            mode,
            interner: Interner::default(),
            held: Default::default(),
            demanded: Demanded::default(),
            settings: Some(settings),
            first: None,
            ready: false,
        }
    }

    fn held(&mut self, type_: Type) -> &mut Held {
        &mut self.held[type_ as usize]
    }

    /// How many resources of a type are held.
    pub(crate) fn count(&self, type_: Type) -> usize {
        self.held[type_ as usize].len()
    }

    /// Whether everything that must be known before anything is decided was known at least once.
    pub(crate) fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether this connection has brought a whole state of everything.
    pub(crate) fn is_synchronised(&self) -> bool {
        Type::ALL.into_iter().all(|type_| !self.is_awaited(type_))
    }

    /// What was refused and not yet replaced, by name; the first few.
    pub(crate) fn rejected(&self, most: usize) -> Vec<RejectedResource> {
        let of = |type_: Type| {
            let rejected = self.held[type_ as usize].rejected();
            rejected.map(move |(name, reason)| RejectedResource {
                type_url: type_.url(),
                name: name.to_owned(),
                reason: reason.to_owned(),
            })
        };
        Type::ALL.into_iter().flat_map(of).take(most).collect()
    }

    /// What an earlier run left on the disk: as if it had come in one response each, but not to be answered.
    pub(crate) fn restore(&mut self, resources: BTreeMap<Type, Vec<(String, String, Vec<u8>)>>) -> Delta {
        let mut delta = Delta {
            settings: self.settings.take(),
            ..Delta::default()
        };
        for (type_, resources) in resources {
            for (name, version, message) in resources {
                if let Err(reason) = self.take(type_, &name, version, &message, &[]) {
                    tracing::warn!("the state on the disk: {name} can not be read: {reason}");
                }
            }
            let (_, taken) = self.held(type_).commit(false);
            merge(&mut delta, taken);
        }
        self.ready = true;
        delta
    }

    /// The first requests of a connection.
    pub(crate) fn open(&mut self, node: &Node) -> Vec<DeltaDiscoveryRequest> {
        self.held.iter_mut().for_each(Held::disconnected);
        let mut requests: Vec<_> = Type::ALL
            .into_iter()
            .map(|type_| DeltaDiscoveryRequest {
                node: Some(node.clone()),
                type_url: type_.url().to_owned(),
                initial_resource_versions: self.held(type_).versions(),
                ..Default::default()
            })
            .collect();
        if self.mode == Mode::OnDemand {
            // Everything and at once nothing: how a subscription by name begins, rather than to everything.
            let addresses = &mut requests[Type::Address as usize];
            addresses.resource_names_subscribe = vec!["*".to_owned()];
            addresses.resource_names_unsubscribe = vec!["*".to_owned()];
            requests.extend(subscription(self.demanded.reopen(), Vec::new()));
        }
        requests
    }

    /// Asks for what is wanted and not asked for yet.
    pub(crate) fn want(&mut self, wanted: impl IntoIterator<Item = Wanted>) -> Option<DeltaDiscoveryRequest> {
        if self.mode != Mode::OnDemand {
            return None;
        }
        let names = wanted
            .into_iter()
            .filter_map(|wanted| self.demanded.want(&wanted))
            .collect();
        subscription(names, Vec::new())
    }

    fn is_awaited(&self, type_: Type) -> bool {
        // Who asks for nothing is not always answered.
        let needed = type_ == Type::Authorization || self.mode == Mode::Wildcard;
        needed && !self.held[type_ as usize].is_synchronised()
    }

    /// Takes a response.
    pub(crate) fn response(&mut self, response: DeltaDiscoveryResponse) -> Result<Step, NotAskedFor> {
        let Some(type_) = Type::of_url(&response.type_url) else {
            return Err(NotAskedFor(response.type_url.chars().take(REASON_LENGTH).collect()));
        };
        for name in &response.removed_resources {
            self.held(type_).stage_removal(name);
            if type_ == Type::Address {
                self.demanded.answered_absent(name);
            }
        }
        let mut refused = Vec::new();
        for resource in response.resources {
            if let Err(reason) = self.take_resource(type_, &resource) {
                refused.push((resource.name, reason));
            }
        }
        let whole = !response.system_version_info.ends_with('+');
        let mut step = Step {
            requests: vec![answer(type_, response.nonce, &refused)],
            ..Step::default()
        };
        if whole {
            self.complete(type_, &mut step);
        }
        Ok(step)
    }

    fn complete(&mut self, type_: Type, step: &mut Step) {
        let (changes, mut delta) = self.held(type_).commit(true);
        step.changes = changes.into_iter().map(|change| change.of(type_)).collect();
        if type_ == Type::Address {
            let (absent, given_up) = self.demanded.take_absent();
            delta.absent = absent;
            delta.not_absent = given_up.iter().filter_map(|(_, ip)| *ip).collect();
            let names = given_up.into_iter().map(|(name, _)| name).collect();
            step.requests.extend(subscription(Vec::new(), names));
        }
        if self.ready {
            step.delta = Some(delta);
            return;
        }
        merge(self.first.get_or_insert_default(), delta);
        if self.is_synchronised() {
            self.ready = true;
            let mut first = self.first.take().unwrap_or_default();
            first.settings = self.settings.take();
            step.delta = Some(first);
        }
    }

    fn take_resource(&mut self, type_: Type, resource: &Resource) -> Result<(), String> {
        let any = resource.resource.as_ref();
        let message = match any {
            Some(any) if any.type_url == type_.url() || any.type_url.is_empty() => any.value.as_slice(),
            Some(any) => {
                let reason: String = format!("it is of type {:?}", any.type_url)
                    .chars()
                    .take(REASON_LENGTH)
                    .collect();
                self.held(type_)
                    .stage_refusal(type_, &resource.name, &[], &resource.aliases, reason.clone());
                return Err(reason);
            }
            None => &[],
        };
        if type_ == Type::Address {
            self.demanded.answered(&resource.name);
            resource.aliases.iter().for_each(|alias| self.demanded.answered(alias));
        }
        let version = resource.version.clone();
        self.take(type_, &resource.name, version, message, &resource.aliases)
    }

    fn take(
        &mut self,
        type_: Type,
        name: &str,
        version: String,
        message: &[u8],
        aliases: &[String],
    ) -> Result<(), String> {
        match type_.read(name, message, &mut self.interner) {
            Ok(object) => {
                self.demanded.found(&object);
                self.held(type_).stage(object, version, message);
                Ok(())
            }
            Err(error) => {
                let reason: String = error.to_string().chars().take(REASON_LENGTH).collect();
                self.held(type_)
                    .stage_refusal(type_, name, message, aliases, reason.clone());
                Err(reason)
            }
        }
    }
}

fn subscription(subscribe: Vec<String>, unsubscribe: Vec<String>) -> Option<DeltaDiscoveryRequest> {
    let says_something = !subscribe.is_empty() || !unsubscribe.is_empty();
    says_something.then(|| DeltaDiscoveryRequest {
        type_url: Type::Address.url().to_owned(),
        resource_names_subscribe: subscribe,
        resource_names_unsubscribe: unsubscribe,
        ..Default::default()
    })
}

fn answer(type_: Type, nonce: String, refused: &[(String, String)]) -> DeltaDiscoveryRequest {
    let told = refused
        .iter()
        .take(NAMES_TOLD)
        .map(|(name, reason)| format!("{name}: {reason}"));
    let more = match refused.len().saturating_sub(NAMES_TOLD) {
        0 => String::new(),
        more => format!("; and {more} more"),
    };
    DeltaDiscoveryRequest {
        type_url: type_.url().to_owned(),
        response_nonce: nonce,
        error_detail: (!refused.is_empty()).then(|| Status {
            code: INVALID,
            message: told.collect::<Vec<_>>().join("; ") + &more,
            details: Vec::new(),
        }),
        ..Default::default()
    }
}

/// One delta for two: what the later says goes before what the earlier said of the same.
fn merge(delta: &mut Delta, later: Delta) {
    for uid in &later.removed_workloads {
        delta.workloads.retain(|workload| workload.uid != *uid);
    }
    for key in &later.removed_services {
        delta.services.retain(|service| service.key() != *key);
    }
    for key in &later.removed_policies {
        delta.policies.retain(|policy| policy.key() != *key);
    }
    delta.settings = later.settings.or(delta.settings.take());
    delta.workloads.extend(later.workloads);
    delta.removed_workloads.extend(later.removed_workloads);
    delta.services.extend(later.services);
    delta.removed_services.extend(later.removed_services);
    delta.policies.extend(later.policies);
    delta.removed_policies.extend(later.removed_policies);
    delta
        .unreadable
        .retain(|unreadable| !later.removed_unreadable.contains(&unreadable.name));
    delta.unreadable.extend(later.unreadable);
    delta.removed_unreadable.extend(later.removed_unreadable);
    delta.not_absent.extend(later.not_absent);
    delta.absent.extend(later.absent);
}

#[cfg(test)]
mod tests;
