//! `metav1.LabelSelector`.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// Which labels an object has to have.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(crate) struct LabelSelector {
    match_labels: BTreeMap<String, String>,
    match_expressions: Vec<Expression>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct Expression {
    key: String,
    operator: Operator,
    #[serde(default)]
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
enum Operator {
    In,
    NotIn,
    Exists,
    DoesNotExist,
}

impl LabelSelector {
    /// Reads one; the error says what is wrong with it.
    pub(crate) fn parse(value: &Value) -> Result<Self, String> {
        serde_json::from_value(value.clone()).map_err(|error| error.to_string())
    }

    /// Whether it selects everything.
    pub(crate) fn is_empty(&self) -> bool {
        self.match_labels.is_empty() && self.match_expressions.is_empty()
    }

    /// Whether an object with these labels is selected.
    pub(crate) fn matches(&self, labels: &Value) -> bool {
        let label = |key: &str| labels.get(key).and_then(Value::as_str);
        let mut equal = self.match_labels.iter();
        equal.all(|(key, value)| label(key) == Some(value))
            && self.match_expressions.iter().all(|expression| {
                let found = label(&expression.key);
                let is_one = found.is_some_and(|found| expression.values.iter().any(|value| value == found));
                match expression.operator {
                    Operator::In => is_one,
                    Operator::NotIn => !is_one,
                    Operator::Exists => found.is_some(),
                    Operator::DoesNotExist => found.is_none(),
                }
            })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn selectors_select() {
        let labels = json!({"app": "a", "tier": "web"});
        let check = |selector: Value| LabelSelector::parse(&selector).unwrap().matches(&labels);
        assert!(check(json!({})));
        assert!(check(json!({"matchLabels": {"app": "a"}})));
        assert!(!check(json!({"matchLabels": {"app": "b"}})));
        let expression = |operator: &str, values: Value| {
            check(json!({"matchExpressions": [{"key": "tier", "operator": operator, "values": values}]}))
        };
        assert!(expression("In", json!(["web", "db"])) && !expression("NotIn", json!(["web"])));
        assert!(expression("Exists", json!([])) && !expression("DoesNotExist", json!([])));
        assert!(LabelSelector::parse(&json!({"matchLabels": 3})).is_err());
    }
}
