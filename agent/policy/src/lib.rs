//! May it? L4 verdicts with the rule that made them; pure.
//!
//! ```text
//! a policy that is named but unknown ─► deny     (Istio's ztunnel skips it; a missing DENY must not open)
//! any DENY that matches              ─► deny
//! no ALLOW at all                    ─► allow
//! any ALLOW that matches             ─► allow
//! otherwise                          ─► deny
//! ```
//! Dry-run policies are evaluated for their name only and never change a verdict.
//!
//! Deliberately unknown here: which policies concern a workload (`mesh` says), and how a refusal looks on the wire
//! (`l4` does that). The order of the policies never matters: held by `order_does_not_matter` and by the comparison
//! with a specification in `tests/specification.rs`.
//!
//! Semantics: <https://istio.io/latest/docs/reference/config/security/authorization-policy/>, empty values as in
//! [`model::Policy`].

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use model::{Action, Identity, Match, NamespacedName, Policy, Rule, StringMatch};

/// What is known of a connection when it is judged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Who the peer proved to be; `None` for plaintext.
    pub identity: Option<Identity>,
    /// The peer's address, as the workload would see it.
    pub source: IpAddr,
    /// The workload's own address and the application's port.
    pub destination: SocketAddr,
}

/// What was decided, and by what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Verdict {
    /// Whether the connection may be.
    pub allowed: bool,
    /// What decided.
    pub reason: Reason,
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
}

/// The object that a person wrote and that led to a policy.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin(Arc<str>);

impl From<&Policy> for Origin {
    fn from(policy: &Policy) -> Self {
        match &policy.origin {
            Some(origin) => Self(origin.clone()),
            None => Self(format!("AuthorizationPolicy {}", policy.key()).into()),
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NothingRestricts => f.write_str("allowed: no policy restricts the workload"),
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
        Self { allowed: true, reason }
    }

    /// A verdict that denies.
    pub fn deny(reason: Reason) -> Self {
        Self { allowed: false, reason }
    }
}

/// Judges a connection by the policies that concern its workload; `Err` names one that is meant to, but is not known.
pub fn decide<'a>(facts: &Facts, policies: impl Iterator<Item = Result<&'a Policy, NamespacedName>>) -> Verdict {
    let mut unknown: Option<NamespacedName> = None;
    let mut denied: Option<&Policy> = None;
    let mut allowed: Option<&Policy> = None;
    let mut allowing: Vec<&Policy> = Vec::new();
    for policy in policies {
        let policy = match policy {
            Ok(policy) => policy,
            Err(name) => {
                unknown = Some(unknown.map_or(name.clone(), |other| other.min(name)));
                continue;
            }
        };
        if policy.dry_run {
            continue;
        }
        let matched = matches(facts, policy);
        match policy.action {
            // The reason does not depend on the order either: of several, the first by name is told.
            Action::Deny if matched => denied = first(denied, policy),
            Action::Deny => {}
            Action::Allow => {
                allowing.push(policy);
                if matched {
                    allowed = first(allowed, policy);
                }
            }
        }
    }
    if let Some(policy) = denied {
        return Verdict::deny(Reason::DeniedBy(policy.into(), facts.into()));
    }
    if let Some(name) = unknown {
        return Verdict::deny(Reason::UnknownPolicy(name));
    }
    if let Some(policy) = allowed {
        return Verdict::allow(Reason::AllowedBy(policy.into()));
    }
    if allowing.is_empty() {
        return Verdict::allow(Reason::NothingRestricts);
    }
    allowing.sort_by_key(|policy| policy.key());
    Verdict::deny(Reason::NoneAllowed(
        allowing.into_iter().map(Origin::from).collect(),
        facts.into(),
    ))
}

fn first<'a>(one: Option<&'a Policy>, other: &'a Policy) -> Option<&'a Policy> {
    match one {
        Some(one) if one.key() <= other.key() => Some(one),
        _ => Some(other),
    }
}

/// Whether any rule of the policy holds; its action and dry run play no part.
pub fn matches(facts: &Facts, policy: &Policy) -> bool {
    policy.rules.iter().any(|rule| rule_holds(facts, rule))
}

fn rule_holds(facts: &Facts, rule: &Rule) -> bool {
    rule.iter()
        .all(|clause| clause.is_empty() || clause.iter().any(|one| match_holds(facts, one)))
}

fn match_holds(facts: &Facts, one: &Match) -> bool {
    if *one == Match::default() {
        return false;
    }
    let identity = facts.identity.as_ref();
    let namespace = |pattern: &StringMatch| identity.is_some_and(|peer| pattern.matches(&peer.namespace));
    let principal = |pattern: &StringMatch| identity.is_some_and(|peer| principal_matches(peer, pattern));
    let account = |account: &model::ServiceAccountMatch| {
        identity
            .is_some_and(|peer| peer.namespace == account.namespace && peer.service_account == account.service_account)
    };
    let source = |net: &ipnet::IpNet| net.contains(&facts.source);
    let destination = |net: &ipnet::IpNet| net.contains(&facts.destination.ip());
    let port = |port: &u16| *port == facts.destination.port();

    any_or_empty(&one.namespaces, namespace)
        && none(&one.not_namespaces, namespace)
        && any_or_empty(&one.service_accounts, account)
        && none(&one.not_service_accounts, account)
        && any_or_empty(&one.principals, principal)
        && none(&one.not_principals, principal)
        && any_or_empty(&one.source_ips, source)
        && none(&one.not_source_ips, source)
        && any_or_empty(&one.destination_ips, destination)
        && none(&one.not_destination_ips, destination)
        && any_or_empty(&one.destination_ports, port)
        && none(&one.not_destination_ports, port)
}

fn principal_matches(peer: &Identity, pattern: &StringMatch) -> bool {
    if *pattern == StringMatch::Presence {
        return true;
    }
    let text = peer.to_string();
    let text = text.strip_prefix("spiffe://").unwrap_or(&text);
    match pattern {
        StringMatch::Exact(exact) => text == exact.strip_prefix("spiffe://").unwrap_or(exact),
        StringMatch::Prefix(prefix) => text.starts_with(prefix.strip_prefix("spiffe://").unwrap_or(prefix)),
        other => other.matches(text),
    }
}

fn any_or_empty<T>(values: &[T], holds: impl Fn(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(holds)
}

fn none<T>(values: &[T], holds: impl Fn(&T) -> bool) -> bool {
    !values.iter().any(holds)
}

#[cfg(test)]
mod tests {
    use model::Scope;

    use super::*;

    fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Policy {
        Policy {
            name: name.into(),
            namespace: "shop".into(),
            scope: Scope::Namespace,
            action,
            rules,
            dry_run: false,
            origin: None,
        }
    }

    fn facts(identity: Option<&str>) -> Facts {
        Facts {
            identity: identity.map(|text| text.parse().unwrap()),
            source: "10.0.0.1".parse().unwrap(),
            destination: "10.0.0.2:8080".parse().unwrap(),
        }
    }

    fn strict() -> Policy {
        let no_identity = Match {
            not_principals: vec![StringMatch::Presence],
            ..Match::default()
        };
        policy("strict", Action::Deny, vec![vec![vec![no_identity]]])
    }

    fn verdict(facts: &Facts, policies: &[Policy]) -> Verdict {
        decide(facts, policies.iter().map(Ok))
    }

    #[test]
    fn strict_denies_plaintext_and_passes_the_mesh() {
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        assert!(verdict(&facts(Some(web)), &[strict()]).allowed);
        let denied = verdict(&facts(None), &[strict()]);
        assert!(!denied.allowed);
        assert_eq!(
            denied.reason.to_string(),
            "denied by AuthorizationPolicy shop/strict: the peer came in plaintext, without an identity"
        );
    }

    #[test]
    fn an_allow_policy_without_rules_denies_everything() {
        let nothing = policy("nothing", Action::Allow, vec![]);
        assert!(!verdict(&facts(Some("spiffe://cluster.local/ns/a/sa/b")), &[nothing]).allowed);
    }

    #[test]
    fn empty_rule_always_and_empty_match_never_holds() {
        assert!(matches(&facts(None), &policy("p", Action::Allow, vec![vec![]])));
        assert!(matches(&facts(None), &policy("p", Action::Allow, vec![vec![vec![]]])));
        assert!(!matches(
            &facts(None),
            &policy("p", Action::Allow, vec![vec![vec![Match::default()]]])
        ));
    }

    #[test]
    fn principals_match_with_and_without_the_scheme() {
        let peer = facts(Some("spiffe://cluster.local/ns/shop/sa/web"));
        for pattern in [
            "cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/shop/sa/web",
            "cluster.local/ns/*",
            "*/sa/web",
            "*",
        ] {
            let one = Match {
                principals: vec![StringMatch::from_istio(pattern)],
                ..Match::default()
            };
            assert!(
                matches(&peer, &policy("p", Action::Allow, vec![vec![vec![one.clone()]]])),
                "{pattern}"
            );
            assert!(
                !matches(&facts(None), &policy("p", Action::Allow, vec![vec![vec![one]]])),
                "{pattern}"
            );
        }
    }

    #[test]
    fn an_unknown_policy_denies_and_is_named() {
        let verdict = decide(&facts(None), std::iter::once(Err(NamespacedName::new("shop", "later"))));
        assert_eq!(
            verdict,
            Verdict::deny(Reason::UnknownPolicy(NamespacedName::new("shop", "later")))
        );
    }

    #[test]
    fn dry_run_changes_nothing() {
        let mut deny_all = policy("all", Action::Deny, vec![vec![]]);
        deny_all.dry_run = true;
        assert!(verdict(&facts(None), &[deny_all]).allowed);
    }
}
