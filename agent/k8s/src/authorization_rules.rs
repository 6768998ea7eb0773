//! The rules of an AuthorizationPolicy: what of each L4 can check, and what it can't.
//!
//! A field that L4 can't check is taken to match and told ([`Flaw::NeedsHttp`]); what follows depends on the policy's
//! action, and is `authorization_policy`'s to decide. A value that can't be read closes the policy ([`Flaw::Invalid`]).

use ipnet::IpNet;
use model::{Match, Policy, Rule, ServiceAccountMatch, StringMatch};
use serde::{Deserialize, Serialize};

use crate::meta::null_is_empty;

/// A field that L4 can't check, or a value that can't be.
pub(crate) enum Flaw {
    /// The field, which needs HTTP.
    NeedsHttp(String),
    /// The field and what is wrong with it.
    Invalid(String, String),
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct IstioRule {
    #[serde(default)]
    from: Option<Vec<From>>,
    #[serde(default)]
    to: Option<Vec<To>>,
    #[serde(default)]
    when: Option<Vec<When>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct From {
    source: Source,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct To {
    operation: Operation,
}

type Texts = Vec<String>;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Source {
    principals: Texts,
    not_principals: Texts,
    request_principals: Texts,
    not_request_principals: Texts,
    namespaces: Texts,
    not_namespaces: Texts,
    service_accounts: Texts,
    not_service_accounts: Texts,
    ip_blocks: Texts,
    not_ip_blocks: Texts,
    remote_ip_blocks: Texts,
    not_remote_ip_blocks: Texts,
    trust_domains: Texts,
    not_trust_domains: Texts,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Operation {
    hosts: Texts,
    not_hosts: Texts,
    ports: Texts,
    not_ports: Texts,
    methods: Texts,
    not_methods: Texts,
    paths: Texts,
    not_paths: Texts,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct When {
    key: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    values: Texts,
    #[serde(default, deserialize_with = "null_is_empty")]
    not_values: Texts,
}

impl IstioRule {
    /// The clauses that L4 can check. A field that it can't is taken to match, and is among the flaws.
    pub(crate) fn compile(&self, at: &str, flaws: &mut Vec<Flaw>) -> Rule {
        let mut rule = Rule::new();
        if let Some(from) = &self.from {
            let matches = from.iter().enumerate().map(|(index, from)| {
                let at = format!("{at}.from[{index}].source");
                from.source.compile(&at, flaws)
            });
            let matches: Vec<_> = matches.collect();
            clause(&mut rule, matches, &format!("{at}.from"), flaws);
        }
        if let Some(to) = &self.to {
            let matches = to.iter().enumerate().map(|(index, to)| {
                let at = format!("{at}.to[{index}].operation");
                to.operation.compile(&at, flaws)
            });
            let matches: Vec<_> = matches.collect();
            clause(&mut rule, matches, &format!("{at}.to"), flaws);
        }
        for (index, when) in self.when.iter().flatten().enumerate() {
            let at = format!("{at}.when[{index}]");
            let matches = vec![when.compile(&at, flaws)];
            clause(&mut rule, matches, &at, flaws);
        }
        rule
    }
}

/// Adds a clause of alternatives; one that is taken to match always makes the whole clause do so.
fn clause(rule: &mut Rule, matches: Vec<Match>, at: &str, flaws: &mut Vec<Flaw>) {
    if matches.is_empty() {
        flaws.push(Flaw::Invalid(at.to_owned(), "must not be empty".to_owned()));
    } else if !matches.contains(&Match::default()) {
        rule.push(matches);
    }
}

impl Source {
    fn compile(&self, at: &str, flaws: &mut Vec<Flaw>) -> Match {
        if *self == Self::default() {
            flaws.push(Flaw::Invalid(at.to_owned(), "must name a source".to_owned()));
        }
        let http = [
            ("requestPrincipals", &self.request_principals),
            ("notRequestPrincipals", &self.not_request_principals),
            ("remoteIpBlocks", &self.remote_ip_blocks),
            ("notRemoteIpBlocks", &self.not_remote_ip_blocks),
        ];
        needs_http(&http, at, flaws);
        let mut read = Reader { at, flaws };
        let mut principals = read.patterns("principals", &self.principals);
        let mut not_principals = read.patterns("notPrincipals", &self.not_principals);
        not_principals.extend(read.trust_domains("notTrustDomains", &self.not_trust_domains));
        if principals.is_empty() {
            principals = read.trust_domains("trustDomains", &self.trust_domains);
        } else if !self.trust_domains.is_empty() {
            // Both have to hold, and what is sent has one list for the two.
            read.flaws.push(Flaw::NeedsHttp(format!("{at}.trustDomains")));
        }
        Match {
            principals,
            not_principals,
            namespaces: read.patterns("namespaces", &self.namespaces),
            not_namespaces: read.patterns("notNamespaces", &self.not_namespaces),
            service_accounts: read.service_accounts("serviceAccounts", &self.service_accounts),
            not_service_accounts: read.service_accounts("notServiceAccounts", &self.not_service_accounts),
            source_ips: read.blocks("ipBlocks", &self.ip_blocks),
            not_source_ips: read.blocks("notIpBlocks", &self.not_ip_blocks),
            ..Match::default()
        }
    }
}

impl Operation {
    fn compile(&self, at: &str, flaws: &mut Vec<Flaw>) -> Match {
        if *self == Self::default() {
            flaws.push(Flaw::Invalid(at.to_owned(), "must name an operation".to_owned()));
        }
        let http = [
            ("hosts", &self.hosts),
            ("notHosts", &self.not_hosts),
            ("methods", &self.methods),
            ("notMethods", &self.not_methods),
            ("paths", &self.paths),
            ("notPaths", &self.not_paths),
        ];
        needs_http(&http, at, flaws);
        let mut read = Reader { at, flaws };
        Match {
            destination_ports: read.ports("ports", &self.ports),
            not_destination_ports: read.ports("notPorts", &self.not_ports),
            ..Match::default()
        }
    }
}

fn needs_http(fields: &[(&str, &Texts)], at: &str, flaws: &mut Vec<Flaw>) {
    let given = fields.iter().filter(|(_, values)| !values.is_empty());
    flaws.extend(given.map(|(name, _)| Flaw::NeedsHttp(format!("{at}.{name}"))));
}

impl When {
    fn compile(&self, at: &str, flaws: &mut Vec<Flaw>) -> Match {
        if self.values.is_empty() && self.not_values.is_empty() {
            flaws.push(Flaw::Invalid(
                at.to_owned(),
                "values or notValues must be given".to_owned(),
            ));
        }
        let (yes, no) = (&self.values, &self.not_values);
        let mut read = Reader { at, flaws };
        let mut found = Match::default();
        match self.key.as_str() {
            "source.ip" => {
                found.source_ips = read.blocks("values", yes);
                found.not_source_ips = read.blocks("notValues", no);
            }
            "source.namespace" => {
                found.namespaces = read.patterns("values", yes);
                found.not_namespaces = read.patterns("notValues", no);
            }
            "source.principal" => {
                found.principals = read.patterns("values", yes);
                found.not_principals = read.patterns("notValues", no);
            }
            "source.serviceAccount" => {
                found.service_accounts = read.service_accounts("values", yes);
                found.not_service_accounts = read.service_accounts("notValues", no);
            }
            "source.trustDomain" => {
                found.principals = read.trust_domains("values", yes);
                found.not_principals = read.trust_domains("notValues", no);
            }
            "destination.ip" => {
                found.destination_ips = read.blocks("values", yes);
                found.not_destination_ips = read.blocks("notValues", no);
            }
            "destination.port" => {
                found.destination_ports = read.ports("values", yes);
                found.not_destination_ports = read.ports("notValues", no);
            }
            _ => flaws.push(Flaw::NeedsHttp(format!("{at}.key"))),
        }
        found
    }
}

/// Reads the values of one source, operation or condition. A value that can't be read is a flaw that closes the policy.
struct Reader<'a> {
    at: &'a str,
    flaws: &'a mut Vec<Flaw>,
}

impl Reader<'_> {
    fn each<T>(&mut self, name: &str, texts: &Texts, read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let mut values = Vec::with_capacity(texts.len());
        for (index, text) in texts.iter().enumerate() {
            match read(text) {
                Ok(value) => values.push(value),
                Err(why) => self
                    .flaws
                    .push(Flaw::Invalid(format!("{}.{name}[{index}]", self.at), why)),
            }
        }
        values
    }

    fn patterns(&mut self, name: &str, texts: &Texts) -> Vec<StringMatch> {
        self.each(name, texts, |text| {
            let inner = text.strip_prefix('*').or(text.strip_suffix('*')).unwrap_or(text);
            if text.is_empty() || inner.contains('*') {
                return Err(format!("{text:?}: * may only stand at the beginning or at the end"));
            }
            Ok(StringMatch::from_istio(text))
        })
    }

    fn blocks(&mut self, name: &str, texts: &Texts) -> Vec<IpNet> {
        self.each(name, texts, |text| {
            let address = || text.parse::<std::net::IpAddr>().map(IpNet::from).ok();
            let block = text.parse::<IpNet>().ok().or_else(address).map(canonical);
            block.ok_or_else(|| format!("{text:?} is neither an address nor a block of them"))
        })
    }

    /// As principals: everybody of such a domain. A suffix can't be said so.
    fn trust_domains(&mut self, name: &str, texts: &Texts) -> Vec<StringMatch> {
        let patterns = self.patterns(name, texts);
        let mut principals = Vec::with_capacity(patterns.len());
        for (index, pattern) in patterns.into_iter().enumerate() {
            match pattern {
                StringMatch::Exact(domain) => principals.push(StringMatch::Prefix(format!("{domain}/").into())),
                // With a slash it would reach into what follows the domain, and no domain has one.
                StringMatch::Prefix(text) if text.contains('/') => {
                    let why = format!("{text:?} is no trust domain");
                    self.flaws
                        .push(Flaw::Invalid(format!("{}.{name}[{index}]", self.at), why));
                }
                StringMatch::Prefix(_) | StringMatch::Presence => principals.push(pattern),
                StringMatch::Suffix(_) => self.flaws.push(Flaw::NeedsHttp(format!("{}.{name}[{index}]", self.at))),
            }
        }
        principals
    }

    fn ports(&mut self, name: &str, texts: &Texts) -> Vec<u16> {
        self.each(name, texts, |text| {
            text.parse()
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| format!("{text:?} is no port"))
        })
    }

    fn service_accounts(&mut self, name: &str, texts: &Texts) -> Vec<ServiceAccountMatch> {
        self.each(name, texts, |text| {
            // Without a namespace it is one of the policy's own: filled in by `with_namespace`.
            let (namespace, service_account) = text.split_once('/').unwrap_or(("", text));
            if service_account.is_empty() || text.contains('*') || service_account.contains('/') {
                return Err(format!("{text:?} is not [namespace/]name"));
            }
            Ok(ServiceAccountMatch {
                namespace: namespace.into(),
                service_account: service_account.into(),
            })
        })
    }
}

/// A block of v4-mapped addresses is one of IPv4, which is what connections are judged by.
fn canonical(block: IpNet) -> IpNet {
    let mapped = |block: &ipnet::Ipv6Net| Some((block.addr().to_ipv4_mapped()?, block.prefix_len().checked_sub(96)?));
    match block {
        IpNet::V6(v6) => match mapped(&v6) {
            Some((ip, length)) => ipnet::Ipv4Net::new(ip, length).map_or(block, IpNet::V4),
            None => block,
        },
        IpNet::V4(_) => block,
    }
}

/// Service accounts without a namespace are of the policy's.
pub(crate) fn with_namespace(policy: &mut Policy) {
    let namespace = policy.namespace.clone();
    for found in policy.rules.iter_mut().flatten().flatten() {
        for account in found.service_accounts.iter_mut().chain(&mut found.not_service_accounts) {
            if account.namespace.is_empty() {
                account.namespace = namespace.clone();
            }
        }
    }
}
