//! `istio.security.Authorization`; and what stands for one that can't be read.

use std::sync::Arc;

use ipnet::IpNet;
use model::{Action, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
use proto::{Message, security as wire};

use super::{DecodeError, Interner, ip, known, not_empty, port, wrong};

/// Istio's name for what a workload's port levels of mutual TLS become.
const CONVERTED: &str = "converted_peer_authentication_";
/// Istio's name for what STRICT becomes.
const STATIC_STRICT: &str = "istio_converted_static_strict";

pub(super) fn read(read: wire::Authorization, interner: &mut Interner) -> Result<Policy, DecodeError> {
    let name = interner.get(not_empty("name", &read.name)?);
    Ok(Policy {
        origin: origin(&read.namespace, &name),
        namespace: interner.get(&read.namespace),
        name,
        scope: scope(read.scope)?,
        action: action(read.action)?,
        rules: read
            .rules
            .iter()
            .map(|rule| self::rule(rule, interner))
            .collect::<Result<_, _>>()?,
        dry_run: read.dry_run,
    })
}

/// What stands for a policy that can't be read and was not known before, so that nothing is open for the lack of it: it
/// denies, within the scope that it names. None where nothing is needed: a workload that names a policy which is not
/// known is closed anyway.
pub(crate) fn closing(name: &str, message: &[u8]) -> Option<Policy> {
    let (namespace, own_name) = name.split_once('/')?;
    let read = wire::Authorization::decode(message).unwrap_or_default();
    let readable = !message.is_empty() && wire::Authorization::decode(message).is_ok();
    let scope = match scope(read.scope) {
        Ok(Scope::WorkloadSelector) if readable => return None,
        Ok(scope) if readable => scope,
        // Nobody says how far it reaches: at least as far as its namespace.
        _ => Scope::Namespace,
    };
    // An ALLOW without rules allows nothing, and what others allow stays allowed.
    let (action, rules) = match action(read.action) {
        Ok(Action::Allow) if readable => (Action::Allow, Vec::new()),
        _ => (Action::Deny, vec![Vec::new()]),
    };
    Some(Policy {
        name: own_name.into(),
        namespace: namespace.into(),
        scope,
        action,
        rules,
        dry_run: false,
        origin: Some(format!("policy {name}, which this agent can not read and closes for").into()),
    })
}

fn origin(namespace: &str, name: &str) -> Option<Arc<str>> {
    if name == STATIC_STRICT {
        return Some("PeerAuthentication (mode STRICT)".into());
    }
    let converted = name.strip_prefix(CONVERTED)?;
    Some(format!("PeerAuthentication {namespace}/{converted}").into())
}

fn scope(value: i32) -> Result<Scope, DecodeError> {
    Ok(match known("scope", value)? {
        wire::Scope::Global => Scope::Global,
        wire::Scope::Namespace => Scope::Namespace,
        wire::Scope::WorkloadSelector => Scope::WorkloadSelector,
    })
}

fn action(value: i32) -> Result<Action, DecodeError> {
    Ok(match known("action", value)? {
        wire::Action::Allow => Action::Allow,
        wire::Action::Deny => Action::Deny,
    })
}

fn rule(rule: &wire::Rule, interner: &mut Interner) -> Result<Rule, DecodeError> {
    let mut clause = |clause: &wire::Clause| clause.matches.iter().map(|one| one_match(one, interner)).collect();
    rule.clauses.iter().map(&mut clause).collect()
}

fn one_match(read: &wire::Match, interner: &mut Interner) -> Result<Match, DecodeError> {
    Ok(Match {
        namespaces: texts("namespaces", &read.namespaces, interner)?,
        not_namespaces: texts("not_namespaces", &read.not_namespaces, interner)?,
        service_accounts: accounts(&read.service_accounts, interner),
        not_service_accounts: accounts(&read.not_service_accounts, interner),
        principals: texts("principals", &read.principals, interner)?,
        not_principals: texts("not_principals", &read.not_principals, interner)?,
        source_ips: blocks("source_ips", &read.source_ips)?,
        not_source_ips: blocks("not_source_ips", &read.not_source_ips)?,
        destination_ips: blocks("destination_ips", &read.destination_ips)?,
        not_destination_ips: blocks("not_destination_ips", &read.not_destination_ips)?,
        destination_ports: ports("destination_ports", &read.destination_ports)?,
        not_destination_ports: ports("not_destination_ports", &read.not_destination_ports)?,
    })
}

fn texts(field: &str, read: &[wire::StringMatch], interner: &mut Interner) -> Result<Vec<StringMatch>, DecodeError> {
    use wire::string_match::MatchType;
    let one = |text: &wire::StringMatch| {
        Ok(match &text.match_type {
            Some(MatchType::Exact(text)) => StringMatch::Exact(interner.get(text)),
            Some(MatchType::Prefix(text)) => StringMatch::Prefix(interner.get(text)),
            Some(MatchType::Suffix(text)) => StringMatch::Suffix(interner.get(text)),
            Some(MatchType::Presence(())) => StringMatch::Presence,
            None => return wrong(field, "a kind of pattern that this version does not know"),
        })
    };
    read.iter().map(one).collect()
}

fn accounts(read: &[wire::ServiceAccountMatch], interner: &mut Interner) -> Vec<ServiceAccountMatch> {
    let one = |account: &wire::ServiceAccountMatch| ServiceAccountMatch {
        namespace: interner.get(&account.namespace),
        service_account: interner.get(&account.service_account),
    };
    read.iter().map(one).collect()
}

fn blocks(field: &str, read: &[wire::Address]) -> Result<Vec<IpNet>, DecodeError> {
    let one = |block: &wire::Address| {
        let address = ip(field, &block.address)?;
        let length = u8::try_from(block.length).ok();
        let net = length.and_then(|length| IpNet::new(address, length).ok());
        net.map_or_else(|| wrong(field, format_args!("a prefix of {} bits", block.length)), Ok)
    };
    read.iter().map(one).collect()
}

fn ports(field: &str, read: &[u32]) -> Result<Vec<u16>, DecodeError> {
    read.iter().map(|number| port(field, *number)).collect()
}
