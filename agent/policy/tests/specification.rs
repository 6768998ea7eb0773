//! The verdicts against a specification small enough to be read at a glance, over random policies and peers.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use ipnet::IpNet;
use model::{
    Action, Identity, Match, NamespacedName, Policy, Rule, Scope, ServiceAccountMatch, StringMatch, TrustDomain,
};
use policy::{Facts, Verdict, decide};
use proptest::{collection::vec, prelude::*};

/// The order of the reference: DENY, then a policy that should be there and is not, then "is there an ALLOW", then ALLOW.
/// And who is told: of those that decide the first by name, with the first of its rules that holds.
fn specified(facts: &Facts, policies: &[Known], dry_run: bool) -> (bool, String) {
    let mut known: Vec<&Policy> = policies.iter().filter_map(|known| known.as_ref().ok()).collect();
    known.sort_by_key(|policy| policy.name.clone());
    known.retain(|policy| dry_run || !policy.dry_run);
    let first = |action: Action| {
        let mut of = known.iter().filter(|policy| policy.action == action);
        of.find_map(|policy| {
            let rule = policy.rules.iter().position(|rule| rule_holds(facts, rule))?;
            let everything = policy.rules[rule].iter().all(Vec::is_empty);
            let everything = if everything { ", which matches everything" } else { "" };
            Some(format!(
                "AuthorizationPolicy shop/{} (rules[{rule}]{everything})",
                policy.name
            ))
        })
    };
    let peer = match &facts.identity {
        Some(identity) => format!("the peer is {identity}"),
        None => "the peer came in plaintext, without an identity".to_owned(),
    };
    if let Some(by) = first(Action::Deny) {
        return (false, format!("denied by {by}: {peer}"));
    }
    if let Some(name) = policies.iter().filter_map(|known| known.as_ref().err()).min() {
        return (
            false,
            format!("denied: the workload is under AuthorizationPolicy {name}, which is not known here yet"),
        );
    }
    let allows = known.iter().filter(|policy| policy.action == Action::Allow);
    let allows: Vec<_> = allows
        .map(|policy| format!("AuthorizationPolicy shop/{}", policy.name))
        .collect();
    if allows.is_empty() {
        return (true, "allowed: no policy forbids it".to_owned());
    }
    match first(Action::Allow) {
        Some(by) => (true, format!("allowed by {by}")),
        None => (
            false,
            format!("denied: none of {} allows it: {peer}", allows.join(", ")),
        ),
    }
}

/// A policy, or the name of one that is not there.
type Known = Result<Policy, NamespacedName>;

fn decided(facts: &Facts, policies: &[Known]) -> Verdict {
    decide(facts, policies.iter().map(|known| known.as_ref().map_err(Clone::clone)))
}

fn rule_holds(facts: &Facts, rule: &Rule) -> bool {
    rule.iter()
        .all(|clause| clause.is_empty() || clause.iter().any(|one| match_holds(facts, one)))
}

/// Each field as a table row: its positive list, its negative list, and whether one value fits.
fn match_holds(facts: &Facts, one: &Match) -> bool {
    let namespace = facts.identity.as_ref().map(|peer| peer.namespace.to_string());
    // The names that a peer goes by: one for each trust domain that is as good as its own.
    let principals: Vec<String> = facts.identity.iter().flat_map(names(facts)).collect();
    let account = facts
        .identity
        .as_ref()
        .map(|peer| (peer.namespace.clone(), peer.service_account.clone()));
    let text = |pattern: &StringMatch, value: &Option<String>| match (pattern, value) {
        (_, None) => false,
        (StringMatch::Presence, Some(_)) => true,
        (StringMatch::Exact(exact), Some(value)) => **exact == **value,
        (StringMatch::Prefix(prefix), Some(value)) => value.starts_with(&**prefix),
        (StringMatch::Suffix(suffix), Some(value)) => value.ends_with(&**suffix),
    };
    let principal = |pattern: &StringMatch| principals.iter().any(|name| text(pattern, &Some(name.clone())));
    let given = |values: Vec<bool>| values.is_empty() || values.contains(&true);
    let each = [
        given(one.namespaces.iter().map(|p| text(p, &namespace)).collect()),
        !one.not_namespaces.iter().any(|p| text(p, &namespace)),
        given(one.principals.iter().map(&principal).collect()),
        !one.not_principals.iter().any(principal),
        given(one.service_accounts.iter().map(|a| same(a, &account)).collect()),
        !one.not_service_accounts.iter().any(|a| same(a, &account)),
        given(one.source_ips.iter().map(|net| net.contains(&facts.source)).collect()),
        !one.not_source_ips.iter().any(|net| net.contains(&facts.source)),
        given(
            one.destination_ips
                .iter()
                .map(|net| net.contains(&facts.destination.ip()))
                .collect(),
        ),
        !one.not_destination_ips
            .iter()
            .any(|net| net.contains(&facts.destination.ip())),
        given(
            one.destination_ports
                .iter()
                .map(|port| *port == facts.destination.port())
                .collect(),
        ),
        !one.not_destination_ports.contains(&facts.destination.port()),
    ];
    *one != Match::default() && !each.contains(&false)
}

fn names(facts: &Facts) -> impl Fn(&Identity) -> Vec<String> {
    let aliases = facts.aliases.clone();
    move |peer| {
        let domains = std::iter::once(&peer.trust_domain).chain(aliases.iter());
        let name = |domain| format!("{domain}/ns/{}/sa/{}", peer.namespace, peer.service_account);
        domains.map(name).collect()
    }
}

fn same(account: &ServiceAccountMatch, peer: &Option<(Arc<str>, Arc<str>)>) -> bool {
    *peer == Some((account.namespace.clone(), account.service_account.clone()))
}

fn name() -> impl Strategy<Value = Arc<str>> {
    prop_oneof![Just(Arc::from("a")), Just(Arc::from("b")), Just(Arc::from("ab"))]
}

fn pattern() -> impl Strategy<Value = StringMatch> {
    prop_oneof![
        name().prop_map(StringMatch::Exact),
        Just(StringMatch::Exact("cluster.local/ns/a/sa/b".into())),
        Just(StringMatch::Exact("old/ns/a/sa/b".into())),
        prop_oneof![name(), Just("cluster.local/ns/a".into()), Just("ol".into())].prop_map(StringMatch::Prefix),
        prop_oneof![
            name(),
            Just("sa/b".into()),
            Just("d/ns/a/sa/b".into()),
            Just("cluster.local/ns/a/sa/b".into())
        ]
        .prop_map(StringMatch::Suffix),
        Just(StringMatch::Presence),
    ]
}

fn net() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        Just("10.0.0.1/32"),
        Just("10.0.0.0/30"),
        Just("fd00::/8"),
        Just("0.0.0.0/0")
    ]
    .prop_map(|text| text.parse().unwrap())
}

fn account() -> impl Strategy<Value = ServiceAccountMatch> {
    (name(), name()).prop_map(|(namespace, service_account)| ServiceAccountMatch {
        namespace,
        service_account,
    })
}

fn one_match() -> impl Strategy<Value = Match> {
    let few = || 0..3usize;
    (
        (
            vec(pattern(), few()),
            vec(pattern(), few()),
            vec(pattern(), few()),
            vec(pattern(), few()),
        ),
        (vec(account(), few()), vec(account(), few())),
        (
            vec(net(), few()),
            vec(net(), few()),
            vec(net(), few()),
            vec(net(), few()),
        ),
        (vec(80u16..83, few()), vec(80u16..83, few())),
    )
        .prop_map(|(texts, accounts, nets, ports)| Match {
            namespaces: texts.0,
            not_namespaces: texts.1,
            principals: texts.2,
            not_principals: texts.3,
            service_accounts: accounts.0,
            not_service_accounts: accounts.1,
            source_ips: nets.0,
            not_source_ips: nets.1,
            destination_ips: nets.2,
            not_destination_ips: nets.3,
            destination_ports: ports.0,
            not_destination_ports: ports.1,
        })
}

fn some_policy() -> impl Strategy<Value = Policy> {
    let rules = vec(vec(vec(one_match(), 0..3), 0..3), 0..3);
    (name(), any::<bool>(), any::<bool>(), rules).prop_map(|(name, deny, dry_run, rules)| Policy {
        name,
        namespace: "shop".into(),
        scope: Scope::Namespace,
        action: if deny { Action::Deny } else { Action::Allow },
        rules,
        dry_run,
        origin: None,
    })
}

/// Several of the same name are one: the last, as in the mesh.
fn some_policies() -> impl Strategy<Value = Vec<Known>> {
    let unknown = name().prop_map(|name| Err(NamespacedName::new("shop", name)));
    let known = some_policy().prop_map(Ok);
    vec(prop_oneof![9 => known, 1 => unknown], 0..6).prop_map(|mut policies: Vec<Known>| {
        for (index, policy) in policies.iter_mut().enumerate() {
            if let Ok(policy) = policy {
                // Names that do not sort as they were made.
                policy.name = format!("{}{index}", policy.name).into();
            }
        }
        policies
    })
}

fn some_facts() -> impl Strategy<Value = Facts> {
    let identity = (name(), name()).prop_map(|(namespace, account)| {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
            .parse::<Identity>()
            .unwrap()
    });
    let ip = || prop_oneof![Just("10.0.0.1"), Just("10.0.0.9"), Just("fd00::1")].prop_map(|text| text.parse().unwrap());
    let aliases = prop_oneof![Just(vec![]), Just(vec![TrustDomain::new("old")])];
    (
        proptest::option::of(identity),
        aliases,
        ip(),
        (ip(), 80u16..83).prop_map(std::net::SocketAddr::from),
    )
        .prop_map(|(identity, aliases, source, destination)| Facts {
            identity,
            aliases: aliases.into(),
            source,
            destination,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn verdicts_and_their_words_follow_the_specification(facts in some_facts(), policies in some_policies()) {
        let verdict = decided(&facts, &policies);
        prop_assert_eq!((verdict.allowed, verdict.reason.to_string()), specified(&facts, &policies, false));
    }

    #[test]
    fn a_dry_run_is_told_and_changes_nothing(facts in some_facts(), policies in some_policies()) {
        let verdict = decided(&facts, &policies);
        let enforced = policies.iter().filter(|known| known.as_ref().map_or(true, |policy| !policy.dry_run)).cloned();
        let without = decided(&facts, &enforced.collect::<Vec<_>>());
        prop_assert_eq!((verdict.allowed, &verdict.reason), (without.allowed, &without.reason));
        prop_assert_eq!(&without.dry_run, &None);
        let any = policies.iter().any(|known| known.as_ref().is_ok_and(|policy| policy.dry_run));
        let told = verdict.dry_run.map(|told| (told.allowed, told.reason.to_string()));
        prop_assert_eq!(told, any.then(|| specified(&facts, &policies, true)));
    }

    #[test]
    fn order_does_not_matter(
        facts in some_facts(),
        (policies, shuffled) in some_policies().prop_flat_map(|policies| {
            let values = policies.clone().into_iter().map(|known| known.map(turned)).collect::<Vec<_>>();
            (Just(policies), Just(values).prop_shuffle())
        }),
    ) {
        prop_assert_eq!(decided(&facts, &policies), decided(&facts, &shuffled));
    }
}

/// The same policy with the matches of its clauses, and their values, in another order.
fn turned(mut policy: Policy) -> Policy {
    for clause in policy.rules.iter_mut().flatten() {
        clause.reverse();
        for one in clause {
            one.namespaces.reverse();
            one.not_namespaces.reverse();
            one.service_accounts.reverse();
            one.not_service_accounts.reverse();
            one.principals.reverse();
            one.not_principals.reverse();
            one.source_ips.reverse();
            one.not_source_ips.reverse();
            one.destination_ips.reverse();
            one.not_destination_ips.reverse();
            one.destination_ports.reverse();
            one.not_destination_ports.reverse();
        }
    }
    policy.rules.iter_mut().for_each(|rule| rule.reverse());
    policy
}
