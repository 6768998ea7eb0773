//! What an object's author is told: findings and agents' answers to a condition, or to an Event. Pure.
//!
//! The condition is Istio's `ZtunnelAccepted`: True once the object is in force at every agent that is connected to
//! this replica, False when it does not hold as written, with the field and what to do.

use std::time::Duration;

use k8s::{Effect, Finding, ObjectRef, Problem, live::Kind};
use serde_json::{Map, Value, json};

/// The condition's type.
pub const TYPE: &str = "ZtunnelAccepted";
/// The longest message: the API takes 32,768 characters, people fewer.
const LONGEST: usize = 1024;
/// How long agents may take before it is said that they do.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How far the agents are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// All that are connected have it: so many.
    InForce(usize),
    /// Some have not answered yet: so many, of so many.
    Waiting(usize, usize),
    /// An agent refused it.
    Rejected {
        /// Which.
        node: String,
        /// What it said.
        message: String,
    },
}

/// A condition without its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// `True`, `False` or `Unknown`.
    pub status: &'static str,
    /// One word.
    pub reason: &'static str,
    /// For people.
    pub message: String,
}

/// The condition of an object.
pub fn condition(findings: &[Finding], progress: &Progress) -> Condition {
    let worst = findings
        .iter()
        .filter(|finding| finding.effect != Effect::Note)
        .max_by_key(|finding| finding.effect);
    if let Some(worst) = worst {
        let reason = reason(&worst.problem);
        return told("False", reason, describe(findings));
    }
    match progress {
        Progress::Rejected { node, message } => told(
            "False",
            "Rejected",
            format!("the agent {node} refused it and keeps what it had before: {message}"),
        ),
        Progress::Waiting(waiting, all) => told(
            "Unknown",
            "Pending",
            format!(
                "{waiting} of {all} agents connected to this replica have not confirmed it yet; see /debug/syncz on port 15014"
            ),
        ),
        Progress::InForce(agents) => {
            let mut message = match agents {
                0 => "accepted; no agent is connected to this replica of the control plane".to_owned(),
                1 => "in force at the agent connected to this replica of the control plane".to_owned(),
                agents => format!("in force at all {agents} agents connected to this replica of the control plane"),
            };
            if !findings.is_empty() {
                message = format!("{message}; {}", describe(findings));
            }
            told("True", "Accepted", message)
        }
    }
}

fn told(status: &'static str, reason: &'static str, message: String) -> Condition {
    Condition {
        status,
        reason,
        message: shortened(message),
    }
}

/// One word for a problem, as a reason of a condition or an Event.
pub fn reason(problem: &Problem) -> &'static str {
    match problem {
        Problem::Unsupported(_) | Problem::NotActedUpon => "UnsupportedValue",
        Problem::Conflict(_) | Problem::Overlap { .. } | Problem::Duplicate(_) => "Conflict",
        Problem::Missing(_) => "NotFound",
        _ => "Invalid",
    }
}

/// All findings of an object in one text, the worst first.
pub fn describe(findings: &[Finding]) -> String {
    let mut sorted: Vec<_> = findings.iter().collect();
    sorted.sort_by_key(|finding| std::cmp::Reverse(finding.effect));
    let texts = sorted.iter().map(|finding| {
        let consequence = match finding.effect {
            Effect::Note | Effect::Elsewhere | Effect::Divided => "",
            Effect::Narrowed if is_policy(&finding.object) => " (what is left of it is stricter)",
            Effect::Narrowed => " (the rest of it holds)",
            Effect::Refused => " (it has no effect)",
            Effect::Closed if is_policy(&finding.object) => " (what it selects is closed until this is mended)",
            Effect::Closed => " (closed until this is mended)",
        };
        match finding.field.is_empty() {
            true => format!("{}{consequence}", finding.problem),
            false => format!("{}: {}{consequence}", finding.field, finding.problem),
        }
    });
    shortened(texts.collect::<Vec<_>>().join("; "))
}

pub fn is_policy(object: &ObjectRef) -> bool {
    let mut kinds = Kind::ALL.into_iter();
    kinds.any(|kind| kind.is_policy() && kind.name() == object.kind)
}

fn shortened(mut text: String) -> String {
    if text.len() > LONGEST {
        let end = (0..=LONGEST).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
    text
}

/// Whether ours is among an object's conditions.
pub fn stands(conditions: Option<&Value>) -> bool {
    let mut conditions = conditions.and_then(Value::as_array).into_iter().flatten();
    conditions.any(|condition| condition["type"] == TYPE)
}

/// An object's conditions with ours put in place; nothing if it stands there already. Those of others stay as they are.
pub fn merged(before: Option<&Value>, condition: &Condition, generation: i64, now: &str) -> Option<Vec<Value>> {
    let mut conditions: Vec<Value> = before.and_then(Value::as_array).cloned().unwrap_or_default();
    let ours = conditions.iter().position(|found| found["type"] == TYPE);
    let old = ours.map(|at| conditions[at].clone()).unwrap_or(Value::Null);
    let same = old["status"] == condition.status
        && old["reason"] == condition.reason
        && old["message"] == *condition.message
        && old["observedGeneration"] == generation;
    if same {
        return None;
    }
    let since = match &old["lastTransitionTime"] {
        Value::String(since) if old["status"] == condition.status => since.clone(),
        _ => now.to_owned(),
    };
    let mut new = match old {
        Value::Object(old) => old,
        _ => Map::new(),
    };
    let Value::Object(fields) = json!({
        "type": TYPE,
        "status": condition.status,
        "reason": condition.reason,
        "message": condition.message,
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }) else {
        return None;
    };
    new.extend(fields);
    match ours {
        Some(at) => conditions[at] = Value::Object(new),
        None => conditions.push(Value::Object(new)),
    }
    Some(conditions)
}

#[cfg(test)]
mod tests {
    use k8s::Place;

    use super::*;

    fn finding(effect: Effect, problem: Problem) -> Finding {
        Finding {
            place: Place::default(),
            object: ObjectRef::default(),
            field: "spec.rules[0]".into(),
            problem,
            effect,
        }
    }

    #[test]
    fn a_policy_is_accepted_once_it_is_in_force() {
        let of = |progress| condition(&[], &progress).status;
        assert_eq!(of(Progress::InForce(3)), "True");
        for progress in [
            Progress::InForce(0),
            Progress::InForce(1),
            Progress::InForce(3),
            Progress::Waiting(1, 3),
        ] {
            let message = condition(&[], &progress).message;
            assert!(message.contains("connected to this replica"), "{message}");
        }
        assert_eq!(of(Progress::Waiting(1, 3)), "Unknown");
        let rejected = Progress::Rejected {
            node: "n1".into(),
            message: "no".into(),
        };
        assert_eq!(of(rejected), "False");
    }

    #[test]
    fn the_worst_finding_gives_the_reason_and_all_are_told() {
        let findings = [
            finding(Effect::Narrowed, Problem::Unsupported("methods".into())),
            finding(Effect::Closed, Problem::Invalid("no number".into())),
        ];
        let told = condition(&findings, &Progress::InForce(1));
        assert_eq!((told.status, told.reason), ("False", "Invalid"));
        assert!(told.message.starts_with("spec.rules[0]: no number"), "{}", told.message);
        assert!(told.message.contains("methods"), "{}", told.message);
        let note = [finding(Effect::Note, Problem::NotActedUpon)];
        assert_eq!(condition(&note, &Progress::InForce(1)).status, "True");
    }

    #[test]
    fn conditions_of_others_stay() {
        let others = json!([{"type": "WaypointAccepted", "status": "True", "extra": 1}]);
        let accepted = condition(&[], &Progress::InForce(1));
        let first = merged(Some(&others), &accepted, 1, "t1").unwrap();
        assert_eq!((&first[0], first.len()), (&others[0], 2));
        assert_eq!(merged(Some(&json!(first)), &accepted, 1, "t2"), None);
        let again = merged(Some(&json!(first)), &accepted, 2, "t2").unwrap();
        assert_eq!(again[1]["lastTransitionTime"], "t1", "the status did not change");
        let waiting = condition(&[], &Progress::Waiting(1, 2));
        let other = merged(Some(&json!(again)), &waiting, 2, "t3").unwrap();
        assert_eq!(other[1]["lastTransitionTime"], "t3");
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        assert!(shortened("ä".repeat(2000)).len() < LONGEST + 4);
    }
}
