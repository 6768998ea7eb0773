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

use model::{Action, Policy, Rule, Scope};
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
