//! May it? L4 verdicts with the rule that made them; pure.
//!
//! ```text
//! any DENY that matches              ─► deny
//! a policy that is named but unknown ─► deny     (Istio's ztunnel skips it; a missing DENY must not open)
//! no ALLOW at all                    ─► allow
//! any ALLOW that matches             ─► allow
//! otherwise                          ─► deny
//! ```
//! Policies in dry run are evaluated and never change a verdict: it carries, apart, what would be decided with them
//! ([`Verdict::dry_run`]; `a_dry_run_is_told_and_changes_nothing`).
//!
//! Deliberately unknown here: which policies concern a workload (`mesh` says), and how a refusal looks on the wire
//! (`l4` does that). Neither the order of the policies nor that of their values matters, to the verdict or to its words:
//! held by `order_does_not_matter` and by the comparison with a specification in `tests/specification.rs`.
//!
//! Semantics: <https://istio.io/latest/docs/reference/config/security/authorization-policy/>, empty values as in
//! [`model::Policy`].

mod matching;
mod reason;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use model::{Action, Identity, NamespacedName, Policy, TrustDomain};

pub use matching::matches;
pub use reason::{Origin, Peer, Reason, Verdict};

/// What is known of a connection when it is judged.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// Who the peer proved to be, an alias's identity as one of the mesh's own trust domain; `None` for plaintext.
    pub identity: Option<Identity>,
    /// Trust domains that count as the mesh's own: a policy that names one of them means the peer as well.
    pub aliases: Arc<[TrustDomain]>,
    /// The peer's address, as the workload would see it.
    pub source: IpAddr,
    /// The workload's own address and the application's port.
    pub destination: SocketAddr,
}

/// Judges a connection by the policies that concern its workload; `Err` names one that is meant to, but is not known.
pub fn decide<'a>(facts: &Facts, policies: impl Iterator<Item = Result<&'a Policy, NamespacedName>>) -> Verdict {
    let mut tally = Tally::default();
    let mut rehearsed: Vec<(&Policy, Option<usize>)> = Vec::new();
    for policy in policies {
        match policy {
            Err(name) => {
                let unknown = tally.unknown.take();
                tally.unknown = Some(unknown.map_or(name.clone(), |other| other.min(name)));
            }
            Ok(policy) if policy.dry_run => rehearsed.push((policy, matching::matched(facts, policy))),
            Ok(policy) => tally.count(policy, matching::matched(facts, policy)),
        }
    }
    let dry_run = (!rehearsed.is_empty()).then(|| {
        let mut tally = tally.clone();
        rehearsed
            .iter()
            .for_each(|(policy, matched)| tally.count(policy, *matched));
        Box::new(tally.verdict(facts))
    });
    Verdict {
        dry_run,
        ..tally.verdict(facts)
    }
}

/// What the policies say, whatever order they are looked at in: of several that match, the first by name is told.
#[derive(Clone, Default)]
struct Tally<'a> {
    unknown: Option<NamespacedName>,
    denied: Option<(&'a Policy, usize)>,
    allowed: Option<(&'a Policy, usize)>,
    /// Those that allow somebody or nobody.
    allowing: Vec<&'a Policy>,
}

impl<'a> Tally<'a> {
    fn count(&mut self, policy: &'a Policy, matched: Option<usize>) {
        let told = match policy.action {
            Action::Deny => &mut self.denied,
            Action::Allow => {
                self.allowing.push(policy);
                &mut self.allowed
            }
        };
        if let Some(rule) = matched
            && told.is_none_or(|(other, _)| before(policy, other))
        {
            *told = Some((policy, rule));
        }
    }

    fn verdict(mut self, facts: &Facts) -> Verdict {
        if let Some((policy, rule)) = self.denied {
            return Verdict::deny(Reason::DeniedBy(Origin::rule(policy, rule), facts.into()));
        }
        if let Some(name) = self.unknown {
            return Verdict::deny(Reason::UnknownPolicy(name));
        }
        if let Some((policy, rule)) = self.allowed {
            return Verdict::allow(Reason::AllowedBy(Origin::rule(policy, rule)));
        }
        if self.allowing.is_empty() {
            return Verdict::allow(Reason::NothingRestricts);
        }
        self.allowing.sort_by(|one, other| key(one).cmp(&key(other)));
        let origins = self.allowing.into_iter().map(Origin::from);
        Verdict::deny(Reason::NoneAllowed(origins.collect(), facts.into()))
    }
}

fn before(one: &Policy, other: &Policy) -> bool {
    key(one) < key(other)
}

fn key(policy: &Policy) -> (&str, &str) {
    (&policy.namespace, &policy.name)
}

#[cfg(test)]
mod tests {
    use model::{Match, Rule, Scope, StringMatch};

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
            aliases: Arc::new([]),
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
            "denied by AuthorizationPolicy shop/strict (rules[0]): the peer came in plaintext, without an identity"
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
    fn a_policy_that_is_dry_run_and_one_that_is_not_are_told_apart() {
        let mut deny_all = policy("all", Action::Deny, vec![vec![]]);
        deny_all.dry_run = true;
        let verdict = verdict(&facts(None), &[deny_all]);
        assert!(verdict.allowed);
        let told = verdict.dry_run.unwrap();
        assert!(!told.allowed);
        assert_eq!(
            told.reason.to_string(),
            "denied by AuthorizationPolicy shop/all (rules[0], which matches everything): the peer came in plaintext, \
             without an identity"
        );
    }

    #[test]
    fn the_rule_that_decided_is_named() {
        let port = |port| {
            let one = Match {
                destination_ports: vec![port],
                ..Match::default()
            };
            vec![vec![one]]
        };
        let allow = policy("ports", Action::Allow, vec![port(1), port(8080), port(8080)]);
        let verdict = verdict(&facts(None), &[allow]);
        assert_eq!(
            verdict.reason.to_string(),
            "allowed by AuthorizationPolicy shop/ports (rules[1])"
        );
    }

    #[test]
    fn a_policy_that_names_an_alias_means_the_mesh() {
        let mut peer = facts(Some("spiffe://cluster.local/ns/shop/sa/web"));
        let holds = |peer: &Facts, pattern: &str| {
            let one = Match {
                principals: vec![StringMatch::from_istio(pattern)],
                ..Match::default()
            };
            matches(peer, &policy("p", Action::Deny, vec![vec![vec![one]]]))
        };
        for pattern in [
            "old.example/ns/shop/sa/web",
            "old.example/*",
            "*old.example/ns/shop/sa/web",
        ] {
            peer.aliases = Arc::new([]);
            assert!(!holds(&peer, pattern), "{pattern}");
            peer.aliases = Arc::new([TrustDomain::new("other"), TrustDomain::new("old.example")]);
            assert!(holds(&peer, pattern), "{pattern}");
        }
        assert!(!holds(&peer, "else.where/ns/shop/sa/web"));
    }
}
