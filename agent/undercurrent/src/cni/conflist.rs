//! A chain's configuration (`*.conflist`) with this plugin at its end, and without it; pure.
//!
//! Everything else in it stays as it is (`the_rest_of_a_chain_is_left_alone`).

use serde_json::Value;

use super::PLUGIN;

/// Why a file is not a chain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    #[error("it is not JSON: {0}")]
    Json(String),
    #[error("it has no list of plugins")]
    NoPlugins,
    #[error("it holds no other plugin to chain after")]
    Alone,
}

/// The chain with `entry` last; nothing if it is so already.
pub fn chained(text: &str, entry: &Value) -> Result<Option<String>, ConflistError> {
    let (mut list, mut plugins) = parse(text)?;
    if plugins.last() == Some(entry) && plugins.iter().filter(|plugin| is_ours(plugin)).count() == 1 {
        return Ok(None);
    }
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.is_empty() {
        return Err(ConflistError::Alone);
    }
    plugins.push(entry.clone());
    list["plugins"] = Value::Array(plugins);
    Ok(Some(pretty(&list)))
}

/// The chain without this plugin; nothing if it is not in it.
pub fn unchained(text: &str) -> Result<Option<String>, ConflistError> {
    let (mut list, mut plugins) = parse(text)?;
    let before = plugins.len();
    plugins.retain(|plugin| !is_ours(plugin));
    if plugins.len() == before {
        return Ok(None);
    }
    list["plugins"] = Value::Array(plugins);
    Ok(Some(pretty(&list)))
}

fn parse(text: &str) -> Result<(Value, Vec<Value>), ConflistError> {
    let list: Value = serde_json::from_str(text).map_err(|error| ConflistError::Json(error.to_string()))?;
    let plugins = list.get("plugins").and_then(Value::as_array).cloned();
    Ok((list, plugins.ok_or(ConflistError::NoPlugins)?))
}

fn is_ours(plugin: &Value) -> bool {
    plugin.get("type").and_then(Value::as_str) == Some(PLUGIN)
}

fn pretty(list: &Value) -> String {
    format!("{list:#}\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHAIN: &str = r#"{"cniVersion":"1.0.0","name":"k8s","disableGC":true,"plugins":[{"type":"ptp","mtu":1400},{"type":"portmap"}]}"#;

    #[test]
    fn the_rest_of_a_chain_is_left_alone() {
        let entry = json!({"type": PLUGIN, "timeoutSeconds": 30});
        let with = chained(CHAIN, &entry).unwrap().unwrap();
        let value: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(value["plugins"].as_array().unwrap().len(), 3);
        assert_eq!(value["plugins"][2], entry);
        assert_eq!(chained(&with, &entry), Ok(None));
        let other = json!({"type": PLUGIN, "timeoutSeconds": 5});
        let changed: Value = serde_json::from_str(&chained(&with, &other).unwrap().unwrap()).unwrap();
        assert_eq!(changed["plugins"].as_array().unwrap().len(), 3);
        let without: Value = serde_json::from_str(&unchained(&with).unwrap().unwrap()).unwrap();
        assert_eq!(without, serde_json::from_str::<Value>(CHAIN).unwrap());
        assert_eq!(unchained(CHAIN), Ok(None));
    }

    #[test]
    fn another_plugin_that_puts_itself_last_is_noticed() {
        let entry = json!({"type": PLUGIN});
        let with = chained(CHAIN, &entry).unwrap().unwrap();
        let mut value: Value = serde_json::from_str(&with).unwrap();
        value["plugins"].as_array_mut().unwrap().push(json!({"type": "late"}));
        let again: Value = serde_json::from_str(&chained(&value.to_string(), &entry).unwrap().unwrap()).unwrap();
        assert_eq!(again["plugins"][3]["type"], PLUGIN);
        assert_eq!(again["plugins"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn what_is_no_chain_is_refused() {
        let entry = json!({"type": PLUGIN});
        assert!(matches!(chained("{", &entry), Err(ConflistError::Json(_))));
        for text in ["{}", "[]", "7", r#"{"plugins":{}}"#] {
            assert_eq!(chained(text, &entry), Err(ConflistError::NoPlugins), "{text}");
        }
        assert_eq!(chained(r#"{"plugins":[]}"#, &entry), Err(ConflistError::Alone));
    }
}
