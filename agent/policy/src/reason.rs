//! What decided a verdict, in words that a person can act on: the object, the rule in it, and the peer.
//!
//! The same verdict has the same words, whatever the order of the policies (`order_does_not_matter`): of several policies
//! that match the first by name is told, and of a policy the first rule as it was written.

use std::{fmt, sync::Arc};

use model::{Identity, NamespacedName, Policy};

use crate::Facts;

/// What was decided, and by what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// Whether the connection may be.
    pub allowed: bool,
    /// What decided.
    pub reason: Reason,
    /// What would be decided if the policies in dry run were in force, too; none where none of them concerns the
    /// workload. Never enforced.
    pub dry_run: Option<Box<Verdict>>,
}

/// What decided a verdict; its text stands in the access log and in `undercurrent why`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Reason {
    /// No allowing policy applies to the workload.
    NothingRestricts,
    /// This ALLOW policy matched.
    AllowedBy(Origin),
    /// This DENY policy matched, for this peer.
    DeniedBy(Origin, Peer),
    /// Allowing policies apply, and none of them matched.
    NoneAllowed(Vec<Origin>, Peer),
    /// The workload names a policy that is not known (yet).
    UnknownPolicy(NamespacedName),
    /// Nothing is known of the workload or of the mesh (yet).
    NoKnowledge,
    /// The pod runs here and the mesh has not announced it as it is (yet), so that its policies are not known.
    NotAnnounced,
    /// The workload has this waypoint, and the peer is not it.
    PastWaypoint(Arc<str>, Peer),
}

/// The object that a person wrote and that led to a policy; where one of its rules decided, that rule.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    object: Arc<str>,
    rule: Option<Matched>,
}

/// The rule that held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Matched {
    /// As in `spec.rules[index]`.
    index: usize,
    /// It has no conditions: written so, or what it has can't be checked at L4.
    everything: bool,
}

impl From<&Policy> for Origin {
    fn from(policy: &Policy) -> Self {
        let object = match &policy.origin {
            Some(origin) => origin.clone(),
            None => format!("AuthorizationPolicy {}", policy.key()).into(),
        };
        Self { object, rule: None }
    }
}

impl Origin {
    /// A policy, and the rule of it that held.
    pub(crate) fn rule(policy: &Policy, index: usize) -> Self {
        let everything = policy
            .rules
            .get(index)
            .is_some_and(|rule| rule.iter().all(|clause| clause.is_empty()));
        let rule = Some(Matched { index, everything });
        Self {
            rule,
            ..Self::from(policy)
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        // Other kinds have no rules that their authors wrote.
        match self.rule.filter(|_| self.object.starts_with("AuthorizationPolicy ")) {
            None => Ok(()),
            Some(Matched { index, everything }) => {
                let everything = if everything { ", which matches everything" } else { "" };
                write!(f, " (rules[{index}]{everything})")
            }
        }
    }
}
/// Who was judged, in words.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// It came by mutual TLS and proved this identity.
    Identified(Identity),
    /// It came in plaintext.
    Plaintext,
}

impl From<&Facts> for Peer {
    fn from(facts: &Facts) -> Self {
        facts.identity.clone().map_or(Self::Plaintext, Self::Identified)
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Identified(identity) => write!(f, "the peer is {identity}"),
            Self::Plaintext => f.write_str("the peer came in plaintext, without an identity"),
        }
    }
}

impl Reason {
    /// Whether it was decided. Otherwise too little is known (yet) to decide, and whoever asks may ask elsewhere, or again.
    pub fn is_decided(&self) -> bool {
        match self {
            Self::NothingRestricts
            | Self::AllowedBy(_)
            | Self::DeniedBy(..)
            | Self::NoneAllowed(..)
            | Self::PastWaypoint(..) => true,
            Self::UnknownPolicy(_) | Self::NoKnowledge | Self::NotAnnounced => false,
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingRestricts => f.write_str("allowed: no policy forbids it"),
            Self::AllowedBy(origin) => write!(f, "allowed by {origin}"),
            Self::DeniedBy(origin, peer) => write!(f, "denied by {origin}: {peer}"),
            Self::NoneAllowed(origins, peer) => {
                f.write_str("denied: none of ")?;
                for (index, origin) in origins.iter().enumerate() {
                    write!(f, "{}{origin}", if index == 0 { "" } else { ", " })?;
                }
                write!(f, " allows it: {peer}")
            }
            Self::UnknownPolicy(name) => {
                write!(
                    f,
                    "denied: the workload is under AuthorizationPolicy {name}, which is not known here yet"
                )
            }
            Self::PastWaypoint(waypoint, peer) => write!(
                f,
                "denied: the workload is behind {waypoint} and takes only what comes through it: {peer}"
            ),
            Self::NoKnowledge => f.write_str("denied: nothing is known of this workload yet"),
            Self::NotAnnounced => {
                f.write_str("denied: the control plane has not announced this pod yet, so its policies are not known")
            }
        }
    }
}

impl Verdict {
    /// A verdict that allows.
    pub fn allow(reason: Reason) -> Self {
        Self {
            allowed: true,
            reason,
            dry_run: None,
        }
    }

    /// A verdict that denies.
    pub fn deny(reason: Reason) -> Self {
        Self {
            allowed: false,
            reason,
            dry_run: None,
        }
    }
}
