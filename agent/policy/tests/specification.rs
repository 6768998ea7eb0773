//! The verdicts against a specification small enough to be read at a glance, over random policies and peers.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use ipnet::IpNet;
use model::{Action, Identity, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
use policy::{Facts, decide};
use proptest::{collection::vec, prelude::*};

/// The order of the reference: DENY, then "is there an ALLOW", then ALLOW.
fn specified(facts: &Facts, policies: &[Policy]) -> bool {
    let live = || policies.iter().filter(|policy| !policy.dry_run);
    let holds = |policy: &&Policy| policy.rules.iter().any(|rule| rule_holds(facts, rule));
    if live()
        .filter(|policy| policy.action == Action::Deny)
        .any(|policy| holds(&policy))
    {
        return false;
    }
    let mut allows = live().filter(|policy| policy.action == Action::Allow).peekable();
    allows.peek().is_none() || allows.any(|policy| holds(&policy))
}

fn rule_holds(facts: &Facts, rule: &Rule) -> bool {
    rule.iter()
        .all(|clause| clause.is_empty() || clause.iter().any(|one| match_holds(facts, one)))
}

/// Each field as a table row: its positive list, its negative list, and whether one value fits.
fn match_holds(facts: &Facts, one: &Match) -> bool {
    let namespace = facts.identity.as_ref().map(|peer| peer.namespace.to_string());
    let principal = facts
        .identity
        .as_ref()
        .map(|peer| peer.to_string().replacen("spiffe://", "", 1));
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
    let given = |values: Vec<bool>| values.is_empty() || values.contains(&true);
    let each = [
        given(one.namespaces.iter().map(|p| text(p, &namespace)).collect()),
        !one.not_namespaces.iter().any(|p| text(p, &namespace)),
        given(one.principals.iter().map(|p| text(p, &principal)).collect()),
        !one.not_principals.iter().any(|p| text(p, &principal)),
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
        prop_oneof![name(), Just("cluster.local/ns/a".into())].prop_map(StringMatch::Prefix),
        prop_oneof![name(), Just("sa/b".into())].prop_map(StringMatch::Suffix),
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
    let few = || 0..2usize;
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

fn some_facts() -> impl Strategy<Value = Facts> {
    let identity = (name(), name()).prop_map(|(namespace, account)| {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}")
            .parse::<Identity>()
            .unwrap()
    });
    let ip = || prop_oneof![Just("10.0.0.1"), Just("10.0.0.9"), Just("fd00::1")].prop_map(|text| text.parse().unwrap());
    (
        proptest::option::of(identity),
        ip(),
        (ip(), 80u16..83).prop_map(std::net::SocketAddr::from),
    )
        .prop_map(|(identity, source, destination)| Facts {
            identity,
            source,
            destination,
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    #[test]
    fn verdicts_follow_the_specification(facts in some_facts(), policies in vec(some_policy(), 0..5)) {
        prop_assert_eq!(decide(&facts, policies.iter().map(Ok)).allowed, specified(&facts, &policies));
    }

    #[test]
    fn order_does_not_matter(facts in some_facts(), policies in vec(some_policy(), 0..5), seed in any::<u64>()) {
        let mut numbered: Vec<Policy> = policies;
        for (index, policy) in numbered.iter_mut().enumerate() {
            policy.name = format!("p{index}").into();
        }
        let before = decide(&facts, numbered.iter().map(Ok));
        let mut shuffled: Vec<&Policy> = numbered.iter().collect();
        shuffled.sort_by_key(|policy| policy.name.bytes().fold(seed, |hash, byte| hash.rotate_left(7) ^ u64::from(byte) ^ seed));
        prop_assert_eq!(before, decide(&facts, shuffled.into_iter().map(Ok)));
    }
}
