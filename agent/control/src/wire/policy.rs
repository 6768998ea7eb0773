//! `istio.security.Authorization`.

use ipnet::IpNet;
use model::{Action, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
use proto::security as wire;

use super::octets;

pub(super) fn message(policy: &Policy) -> wire::Authorization {
    wire::Authorization {
        name: policy.name.to_string(),
        namespace: policy.namespace.to_string(),
        scope: match policy.scope {
            Scope::Global => wire::Scope::Global,
            Scope::Namespace => wire::Scope::Namespace,
            Scope::WorkloadSelector => wire::Scope::WorkloadSelector,
        }
        .into(),
        action: match policy.action {
            Action::Allow => wire::Action::Allow,
            Action::Deny => wire::Action::Deny,
        }
        .into(),
        rules: policy.rules.iter().map(rule).collect(),
        dry_run: policy.dry_run,
    }
}

fn rule(rule: &Rule) -> wire::Rule {
    let clause = |matches: &Vec<Match>| wire::Clause {
        matches: matches.iter().map(one_match).collect(),
    };
    wire::Rule {
        clauses: rule.iter().map(clause).collect(),
    }
}

fn one_match(found: &Match) -> wire::Match {
    wire::Match {
        namespaces: texts(&found.namespaces),
        not_namespaces: texts(&found.not_namespaces),
        service_accounts: accounts(&found.service_accounts),
        not_service_accounts: accounts(&found.not_service_accounts),
        principals: texts(&found.principals),
        not_principals: texts(&found.not_principals),
        source_ips: blocks(&found.source_ips),
        not_source_ips: blocks(&found.not_source_ips),
        destination_ips: blocks(&found.destination_ips),
        not_destination_ips: blocks(&found.not_destination_ips),
        destination_ports: found.destination_ports.iter().copied().map(u32::from).collect(),
        not_destination_ports: found.not_destination_ports.iter().copied().map(u32::from).collect(),
    }
}

fn texts(texts: &[StringMatch]) -> Vec<wire::StringMatch> {
    use wire::string_match::MatchType;
    let one = |text: &StringMatch| wire::StringMatch {
        match_type: Some(match text {
            StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
            StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
            StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    };
    texts.iter().map(one).collect()
}

fn accounts(accounts: &[ServiceAccountMatch]) -> Vec<wire::ServiceAccountMatch> {
    let one = |account: &ServiceAccountMatch| wire::ServiceAccountMatch {
        namespace: account.namespace.to_string(),
        service_account: account.service_account.to_string(),
    };
    accounts.iter().map(one).collect()
}

fn blocks(blocks: &[IpNet]) -> Vec<wire::Address> {
    // A block of v4-mapped addresses keeps its 16 bytes and its length; only whole addresses are made canonical.
    let one = |block: &IpNet| match (block.addr(), block.prefix_len()) {
        (std::net::IpAddr::V6(ip), 128) if ip.to_ipv4_mapped().is_some() => wire::Address {
            address: octets(ip.into()),
            length: 32,
        },
        (std::net::IpAddr::V6(ip), length) => wire::Address {
            address: bytes::Bytes::copy_from_slice(&ip.octets()),
            length: length.into(),
        },
        (ip, length) => wire::Address {
            address: octets(ip),
            length: length.into(),
        },
    };
    blocks.iter().map(one).collect()
}
