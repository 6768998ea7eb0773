//! Whether a policy matches: rules, clauses, matches and fields as [`model::Policy`] has them.
//!
//! A principal is compared piece by piece, so that nothing is allocated for a connection.

use model::{Identity, Match, Policy, Rule, StringMatch, TrustDomain};

use crate::Facts;

/// Whether any rule of the policy holds; its action and dry run play no part.
pub fn matches(facts: &Facts, policy: &Policy) -> bool {
    matched(facts, policy).is_some()
}

/// The first rule that holds.
pub(crate) fn matched(facts: &Facts, policy: &Policy) -> Option<usize> {
    policy.rules.iter().position(|rule| rule_holds(facts, rule))
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
    let principal = |pattern: &StringMatch| identity.is_some_and(|peer| principal_matches(facts, peer, pattern));
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

/// By the peer's own trust domain, or by any that counts as the same.
fn principal_matches(facts: &Facts, peer: &Identity, pattern: &StringMatch) -> bool {
    named(&peer.trust_domain, peer, pattern) || facts.aliases.iter().any(|alias| named(alias, peer, pattern))
}

fn named(domain: &TrustDomain, peer: &Identity, pattern: &StringMatch) -> bool {
    let (namespace, account) = (&*peer.namespace, &*peer.service_account);
    let pieces = [SCHEME, domain.as_str(), "/ns/", namespace, "/sa/", account];
    match pattern {
        StringMatch::Presence => true,
        StringMatch::Exact(text) => rest_behind(without_scheme(text), &pieces[1..]) == Some(""),
        StringMatch::Prefix(text) => begin_with(without_scheme(text), &pieces[1..]),
        StringMatch::Suffix(text) => end_with(text, &pieces),
    }
}

const SCHEME: &str = "spiffe://";

fn without_scheme(text: &str) -> &str {
    text.strip_prefix(SCHEME).unwrap_or(text)
}

/// What of the text comes behind all of the pieces, if it begins with them.
fn rest_behind<'a>(text: &'a str, pieces: &[&str]) -> Option<&'a str> {
    pieces.iter().try_fold(text, |rest, piece| rest.strip_prefix(piece))
}

/// Whether the pieces, put together, begin with the text.
fn begin_with(mut text: &str, pieces: &[&str]) -> bool {
    for piece in pieces {
        match text.strip_prefix(piece) {
            Some(rest) => text = rest,
            None => return piece.starts_with(text),
        }
    }
    text.is_empty()
}

/// Whether the pieces, put together, end with the text.
fn end_with(mut text: &str, pieces: &[&str]) -> bool {
    for piece in pieces.iter().rev() {
        match text.strip_suffix(piece) {
            Some(rest) => text = rest,
            None => return piece.ends_with(text),
        }
    }
    text.is_empty()
}

fn any_or_empty<T>(values: &[T], holds: impl Fn(&T) -> bool) -> bool {
    values.is_empty() || values.iter().any(holds)
}

fn none<T>(values: &[T], holds: impl Fn(&T) -> bool) -> bool {
    !values.iter().any(holds)
}
