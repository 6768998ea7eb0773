//! L4 authorization, as Istio's `istio.security.Authorization` expresses it.
//!
//! ```text
//! policy  = rule OR rule …       no rules: never matches
//! rule    = clause AND clause …  no clauses: always matches
//! clause  = match OR match …     no matches: always matches
//! match   = field AND field …    no fields: never matches
//! field   = value OR value …
//! ```
//! What they mean is decided in the `policy` crate.

use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::NamespacedName;

/// What a policy does when it matches.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Action {
    /// Allows; and where a workload has an allowing policy at all, what none of them matches is denied.
    Allow,
    /// Denies, whatever is allowed.
    Deny,
}

/// Which workloads a policy applies to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Scope {
    /// All of the mesh.
    Global,
    /// All of the policy's namespace.
    Namespace,
    /// Those that name it in `authorizationPolicies`.
    WorkloadSelector,
}

/// A text pattern.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum StringMatch {
    /// Equal.
    Exact(Arc<str>),
    /// Begins so.
    Prefix(Arc<str>),
    /// Ends so.
    Suffix(Arc<str>),
    /// There at all.
    Presence,
}

impl StringMatch {
    /// Whether a text is of this pattern.
    pub fn matches(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => text == &**exact,
            Self::Prefix(prefix) => text.starts_with(&**prefix),
            Self::Suffix(suffix) => text.ends_with(&**suffix),
            Self::Presence => true,
        }
    }

    /// Istio's writing: `*` for presence, `abc*` for a prefix, `*abc` for a suffix, anything else exact.
    pub fn from_istio(text: &str) -> Self {
        match (text.strip_prefix('*'), text.strip_suffix('*')) {
            _ if text == "*" => Self::Presence,
            (Some(suffix), _) => Self::Suffix(suffix.into()),
            (_, Some(prefix)) => Self::Prefix(prefix.into()),
            _ => Self::Exact(text.into()),
        }
    }
}

/// A service account; the trust domain does not matter.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceAccountMatch {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub service_account: Arc<str>,
}

/// Conditions of which all that are given must hold.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Match {
    /// The peer's namespace.
    pub namespaces: Vec<StringMatch>,
    /// None of these namespaces.
    pub not_namespaces: Vec<StringMatch>,
    /// The peer's service account.
    pub service_accounts: Vec<ServiceAccountMatch>,
    /// None of these service accounts.
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    /// The peer's identity without `spiffe://`, such as `cluster.local/ns/shop/sa/web`.
    pub principals: Vec<StringMatch>,
    /// None of these identities; a peer without identity has none of them.
    pub not_principals: Vec<StringMatch>,
    /// The peer's address.
    pub source_ips: Vec<IpNet>,
    /// None of these addresses.
    pub not_source_ips: Vec<IpNet>,
    /// The pod's address.
    pub destination_ips: Vec<IpNet>,
    /// None of these addresses.
    pub not_destination_ips: Vec<IpNet>,
    /// The pod's port.
    pub destination_ports: Vec<u16>,
    /// None of these ports.
    pub not_destination_ports: Vec<u16>,
}

/// A rule: clauses of which each must hold; a clause holds when one of its matches does.
pub type Rule = Vec<Vec<Match>>;

/// An L4 authorization policy.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Policy {
    /// The object's name.
    pub name: Arc<str>,
    /// The object's namespace.
    pub namespace: Arc<str>,
    /// Which workloads it applies to.
    pub scope: Scope,
    /// What it does when it matches.
    pub action: Action,
    /// Of which one must hold.
    #[serde(default)]
    pub rules: Vec<Rule>,
    /// Only logged, never enforced.
    #[serde(default)]
    pub dry_run: bool,
    /// The object that a person wrote, such as `PeerAuthentication shop/default`, where this was made from another kind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Arc<str>>,
}

impl Policy {
    /// `namespace/name`, its key everywhere.
    pub fn key(&self) -> NamespacedName {
        NamespacedName {
            namespace: self.namespace.clone(),
            name: self.name.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istio_patterns() {
        assert_eq!(StringMatch::from_istio("*"), StringMatch::Presence);
        assert_eq!(StringMatch::from_istio("a*"), StringMatch::Prefix("a".into()));
        assert_eq!(StringMatch::from_istio("*a"), StringMatch::Suffix("a".into()));
        assert_eq!(StringMatch::from_istio("a"), StringMatch::Exact("a".into()));
    }
}
