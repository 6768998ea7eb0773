//! AuthorizationPolicy: its L4 part, as istiod compiles it for ztunnel, but never wider open than it is written.
//!
//! | written | becomes |
//! | --- | --- |
//! | ALLOW rule with a field that L4 can't check | a rule that never holds: it allows nothing |
//! | DENY rule with such a field | the field is dropped: it denies more (also where nothing else is left) |
//! | AUDIT | refused: nothing here writes an audit |
//! | CUSTOM, and what can't be read | what it selects is closed |
//! | `targetRefs` | not for L4: `control` says which waypoint it is for, and closes the target where there is none |
//! | dry run (`istio.io/dry-run`) of what can be enforced | evaluated, told of, never enforced |
//! | dry run of what would close | refused: a rehearsal closes nothing |
//!
//! Rules keep their places, so that `rules[2]` in a log is `spec.rules[2]` (`rules_keep_their_places`).
//!
//! <https://istio.io/latest/docs/reference/config/security/authorization-policy/>

use model::{Action, Match, Policy, Rule, Scope};
use serde::{Deserialize, Serialize};
use serde_yaml_ng::Value;

use crate::{
    Effect, Finding, Metadata, ObjectRef, Place, Problem, Selector,
    authorization_rules::{Flaw, IstioRule, with_namespace},
    meta::null_is_empty,
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
    target_refs: Vec<TargetRef>,
    #[serde(default)]
    target_ref: Option<TargetRef>,
    #[serde(default)]
    action: IstioAction,
    #[serde(default)]
    provider: Option<Value>,
    #[serde(default, deserialize_with = "null_is_empty")]
    rules: Vec<IstioRule>,
}

/// What a policy for a waypoint or gateway is attached to.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TargetRef {
    /// The API group; empty for Kubernetes' own kinds.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub group: String,
    /// Such as `Service`.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Its namespace; only the policy's own is possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
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

impl AuthorizationPolicy {
    /// What is sent to agents, if anything, and what its author is to know. A policy that can't be enforced as written is
    /// sent as one that denies everything that it selects ([`closing`]): an agent that is told nothing would let it in.
    pub fn l4(&self, root: &str) -> (Option<Policy>, Vec<Finding>) {
        let find = |condition: Condition| Finding::of(self.object(), &Place::default(), condition);
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

    /// What it is attached to, for a waypoint or gateway to enforce; none for a policy of L4.
    pub fn targets(&self) -> impl Iterator<Item = &TargetRef> {
        self.spec.target_refs.iter().chain(&self.spec.target_ref)
    }

    /// Whether it denies anybody anything where it is enforced: neither a dry run nor an audit.
    pub fn restricts(&self) -> bool {
        self.spec.action != IstioAction::Audit && !self.metadata.is_dry_run()
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
        match self.compile_in_force(root) {
            Compiled::Closed((field, problem, _)) if self.metadata.is_dry_run() => {
                Compiled::Nothing((field, problem, Effect::Refused))
            }
            compiled => compiled,
        }
    }

    /// Likewise, but for the dry run of what closes.
    fn compile_in_force(&self, root: &str) -> Compiled {
        let spec = &self.spec;
        let closed = |field: &str, problem| Compiled::Closed((field.to_owned(), problem, Effect::Closed));
        if self.targets().next().is_some() {
            if self.has_selector() {
                let why = "only goes without selector".to_owned();
                return closed("spec.targetRefs", Problem::Invalid(why));
            }
            let why = "only a waypoint or gateway enforces it, not the node's agent".to_owned();
            return Compiled::Nothing((
                "spec.targetRefs".to_owned(),
                Problem::Unsupported(why),
                Effect::Elsewhere,
            ));
        }
        let action = match spec.action {
            IstioAction::Allow => Action::Allow,
            IstioAction::Deny => Action::Deny,
            IstioAction::Audit => {
                let why = "AUDIT: nothing writes an audit at L4; connections are as without this policy".to_owned();
                return Compiled::Nothing(("spec.action".to_owned(), Problem::Unsupported(why), Effect::Refused));
            }
            IstioAction::Custom => {
                let why = "CUSTOM: no external authorizer can be asked at L4".to_owned();
                return closed("spec.action", Problem::Unsupported(why));
            }
        };
        if spec.provider.is_some() {
            let why = "only goes with CUSTOM".to_owned();
            return closed("spec.provider", Problem::Invalid(why));
        }
        let mut conditions: Vec<Condition> = self.remarks(action).collect();
        let rules = match compile_rules(&spec.rules, action, &mut conditions) {
            Ok(rules) => rules,
            Err((field, why)) => return closed(&field, Problem::Invalid(why)),
        };
        let policy = Policy {
            name: self.metadata.name.as_str().into(),
            namespace: self.metadata.namespace.as_str().into(),
            scope: scope(self.has_selector(), &self.metadata.namespace, root),
            action,
            rules,
            dry_run: self.metadata.is_dry_run(),
            origin: Some(self.object().to_string().into()),
        };
        Compiled::Policy(policy, conditions)
    }

    /// What does what it says, and perhaps not what was meant.
    fn remarks(&self, action: Action) -> impl Iterator<Item = Condition> {
        let never = action == Action::Deny && self.spec.rules.is_empty();
        let never = never.then(|| {
            let why = "DENY without rules never denies; a rule {} denies everything".to_owned();
            ("spec.rules".to_owned(), Problem::Invalid(why), Effect::Note)
        });
        let annotation = self.metadata.annotations.get(DRY_RUN);
        let unreadable = annotation.filter(|text| parse_bool(text).is_none()).map(|text| {
            let why = format!("{text:?} is neither true nor false, so the policy is in force");
            let field = format!("metadata.annotations[{DRY_RUN}]");
            (field, Problem::Invalid(why), Effect::Narrowed)
        });
        let rehearsed = self.metadata.is_dry_run().then(|| {
            let why = "true: the policy is evaluated and told of in the access log (dry_run), and never enforced";
            let field = format!("metadata.annotations[{DRY_RUN}]");
            (field, Problem::Invalid(why.to_owned()), Effect::Note)
        });
        never.into_iter().chain(unreadable).chain(rehearsed)
    }
}

const DRY_RUN: &str = "istio.io/dry-run";

impl Metadata {
    /// Whether a policy is only to say what it would do (`istio.io/dry-run`).
    pub fn is_dry_run(&self) -> bool {
        self.annotations.get(DRY_RUN).and_then(|text| parse_bool(text)) == Some(true)
    }
}

/// Go's `strconv.ParseBool`, which Istio reads the annotation with.
fn parse_bool(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// The rules, each in its place; what L4 can't check is among the conditions. `Err`: a field, and why it closes the policy.
fn compile_rules(
    written: &[IstioRule],
    action: Action,
    conditions: &mut Vec<Condition>,
) -> Result<Vec<Rule>, (String, String)> {
    let mut rules = Vec::new();
    // How many are worth to be sent: what never holds is there only to keep the places of those behind it.
    let mut worth = 0;
    for (index, rule) in written.iter().enumerate() {
        let mut flaws = Vec::new();
        let compiled = rule.compile(&format!("spec.rules[{index}]"), &mut flaws);
        let mut needs_http = false;
        for flaw in flaws {
            match flaw {
                Flaw::Invalid(field, why) => return Err((field, why)),
                Flaw::NeedsHttp(field) => {
                    needs_http = true;
                    conditions.push((field, cannot_check(action), Effect::Narrowed));
                }
            }
        }
        if needs_http && action == Action::Allow {
            rules.push(never());
        } else {
            rules.push(compiled);
            worth = rules.len();
        }
    }
    rules.truncate(worth);
    Ok(rules)
}

/// A rule that never holds, to ztunnel neither: an empty match.
fn never() -> Rule {
    vec![vec![Match::default()]]
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
