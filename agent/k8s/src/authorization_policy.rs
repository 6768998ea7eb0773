//! AuthorizationPolicy: its L4 part, as istiod compiles it for ztunnel, but never wider open than it is written.
//!
//! | written | becomes |
//! | --- | --- |
//! | ALLOW rule with a field that L4 can't check | the rule is dropped: it allows nothing |
//! | DENY rule with such a field | the field is dropped: it denies more (also where nothing else is left) |
//! | AUDIT | refused: there is no log of it here |
//! | CUSTOM, and what can't be read | what it selects is closed |
//! | `targetRefs` | refused: there is no waypoint to enforce it |
//!
//! <https://istio.io/latest/docs/reference/config/security/authorization-policy/>

use ipnet::IpNet;
use model::{Action, Match, Policy, Rule, Scope, ServiceAccountMatch, StringMatch};
use serde::{Deserialize, Serialize};
use serde_yaml_ng::Value;

use crate::{
    Effect, Finding, Metadata, ObjectRef, Place, Problem, Selector, meta::null_is_empty,
    peer_authentication::policy_key,
};

/// An AuthorizationPolicy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AuthorizationPolicy {
    /// Name and namespace.
    pub metadata: Metadata,
    /// What it says.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(crate) spec: Spec,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    #[serde(default)]
    pub selector: Option<Selector>,
    #[serde(default, deserialize_with = "null_is_empty")]
    target_refs: Vec<Value>,
    #[serde(default)]
    target_ref: Option<Value>,
    #[serde(default)]
    action: IstioAction,
    #[serde(default)]
    provider: Option<Value>,
    #[serde(default, deserialize_with = "null_is_empty")]
    rules: Vec<IstioRule>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum IstioAction {
    #[default]
    Allow,
    Deny,
    Audit,
    Custom,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct IstioRule {
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

/// What to tell the author: field, why, and what follows.
pub(crate) type Condition = (String, Problem, Effect);

/// What a policy becomes.
pub(crate) enum Compiled {
    /// A policy for L4, with what was left out of it.
    Policy(Policy, Vec<Condition>),
    /// Nothing.
    Nothing(Condition),
    /// It can't be enforced, and so nothing that it selects may be reached.
    Closed(Condition),
}

/// A field that L4 can't check, or a value that can't be.
enum Flaw {
    /// The field, which needs HTTP.
    NeedsHttp(String),
    /// The field and what is wrong with it.
    Invalid(String, String),
}

impl AuthorizationPolicy {
    /// What is sent to agents, if anything, and what its author is to know. A policy that can't be enforced as written is
    /// sent as one that denies everything that it selects ([`closing`]): an agent that is told nothing would let it in.
    pub fn l4(&self, root: &str) -> (Option<Policy>, Vec<Finding>) {
        let find = |(field, problem, effect): Condition| Finding {
            place: Place::default(),
            object: self.object(),
            field,
            problem,
            effect,
        };
        match self.compile(root) {
            Compiled::Policy(mut policy, conditions) => {
                with_namespace(&mut policy);
                (Some(policy), conditions.into_iter().map(find).collect())
            }
            Compiled::Nothing(condition) => (None, vec![find(condition)]),
            Compiled::Closed(condition) => {
                let policy = closing(&self.object(), self.has_selector(), root);
                (Some(policy), vec![find(condition)])
            }
        }
    }

    /// Whom it selects by label; none: everybody in its namespace, or in the mesh if that is the root namespace.
    pub fn selector(&self) -> Option<&Selector> {
        self.spec
            .selector
            .as_ref()
            .filter(|selector| !selector.match_labels.is_empty())
    }

    /// How findings name it.
    pub(crate) fn object(&self) -> ObjectRef {
        ObjectRef {
            kind: "AuthorizationPolicy".to_owned(),
            namespace: self.metadata.namespace.clone(),
            name: self.metadata.name.clone(),
        }
    }

    /// Whether it names its workloads by label.
    pub(crate) fn has_selector(&self) -> bool {
        self.selector().is_some()
    }

    /// Whether it is for the workload with these labels in this namespace.
    pub(crate) fn selects(
        &self,
        root: &str,
        namespace: &str,
        labels: &std::collections::BTreeMap<String, String>,
    ) -> bool {
        let here = self.metadata.namespace == namespace || self.metadata.namespace == root;
        here && self
            .spec
            .selector
            .as_ref()
            .is_none_or(|selector| selector.matches(labels))
    }

    /// The L4 policy.
    pub(crate) fn compile(&self, root: &str) -> Compiled {
        let spec = &self.spec;
        if !spec.target_refs.is_empty() || spec.target_ref.is_some() {
            let why = "there is no waypoint to enforce it".to_owned();
            return Compiled::Nothing(("spec.targetRefs".to_owned(), Problem::Unsupported(why), Effect::Refused));
        }
        let action = match spec.action {
            IstioAction::Allow => Action::Allow,
            IstioAction::Deny => Action::Deny,
            IstioAction::Audit => {
                let why = "AUDIT at L4".to_owned();
                return Compiled::Nothing(("spec.action".to_owned(), Problem::Unsupported(why), Effect::Refused));
            }
            IstioAction::Custom => {
                let why = "CUSTOM at L4; what it selects is closed".to_owned();
                return Compiled::Closed(("spec.action".to_owned(), Problem::Unsupported(why), Effect::Closed));
            }
        };
        if spec.provider.is_some() {
            let why = "only goes with CUSTOM".to_owned();
            return Compiled::Closed(("spec.provider".to_owned(), Problem::Invalid(why), Effect::Closed));
        }
        let mut rules = Vec::new();
        let mut conditions = Vec::new();
        for (index, rule) in spec.rules.iter().enumerate() {
            let mut flaws = Vec::new();
            let compiled = rule.compile(&format!("spec.rules[{index}]"), &mut flaws);
            let mut needs_http = false;
            for flaw in flaws {
                match flaw {
                    Flaw::Invalid(field, why) => {
                        return Compiled::Closed((field, Problem::Invalid(why), Effect::Closed));
                    }
                    Flaw::NeedsHttp(field) => {
                        needs_http = true;
                        conditions.push((field, cannot_check(action), Effect::Narrowed));
                    }
                }
            }
            if !(needs_http && action == Action::Allow) {
                rules.push(compiled);
            }
        }
        let annotation = self.metadata.annotations.get("istio.io/dry-run");
        let policy = Policy {
            name: self.metadata.name.as_str().into(),
            namespace: self.metadata.namespace.as_str().into(),
            scope: scope(self.has_selector(), &self.metadata.namespace, root),
            action,
            rules,
            dry_run: annotation.is_some_and(|value| value == "true"),
            origin: Some(self.object().to_string().into()),
        };
        Compiled::Policy(policy, conditions)
    }
}

fn scope(has_selector: bool, namespace: &str, root: &str) -> Scope {
    match (has_selector, namespace == root) {
        (true, _) => Scope::WorkloadSelector,
        (false, true) => Scope::Global,
        (false, false) => Scope::Namespace,
    }
}

/// The policy in place of one that can't be enforced as written: it denies everything that that one may have selected.
pub fn closing(object: &ObjectRef, has_selector: bool, root: &str) -> Policy {
    let name = match object.kind.as_str() {
        "PeerAuthentication" => policy_key(object).name,
        _ => object.name.replace('/', "_").into(),
    };
    Policy {
        name,
        namespace: object.namespace.as_str().into(),
        scope: scope(has_selector, &object.namespace, root),
        action: Action::Deny,
        rules: vec![Rule::new()],
        dry_run: false,
        origin: Some(object.to_string().into()),
    }
}

fn cannot_check(action: Action) -> Problem {
    Problem::Unsupported(match action {
        Action::Allow => "it can't be checked at L4, so this rule allows nothing".to_owned(),
        Action::Deny => "it can't be checked at L4, so this rule denies whatever else it matches".to_owned(),
    })
}

impl IstioRule {
    /// The clauses that L4 can check. A field that it can't is taken to match, and is among the flaws.
    fn compile(&self, at: &str, flaws: &mut Vec<Flaw>) -> Rule {
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
            ("trustDomains", &self.trust_domains),
            ("notTrustDomains", &self.not_trust_domains),
        ];
        needs_http(&http, at, flaws);
        let mut read = Reader { at, flaws };
        Match {
            principals: read.patterns("principals", &self.principals),
            not_principals: read.patterns("notPrincipals", &self.not_principals),
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
            let block = text.parse::<IpNet>().ok().or_else(address);
            block.ok_or_else(|| format!("{text:?} is neither an address nor a block of them"))
        })
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
