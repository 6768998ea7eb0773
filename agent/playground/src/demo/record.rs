//! A line of an agent's access log (text form): `time level access message key=value …`, tab-separated up to the fields.

use std::collections::BTreeMap;

/// One connection, as an agent saw it.
#[derive(Debug)]
pub(super) struct Record {
    fields: BTreeMap<String, String>,
}

impl Record {
    /// Reads a line; none if it is no such line.
    pub fn parse(node: &str, line: &str) -> Option<Self> {
        let mut parts = line.splitn(5, '\t');
        let (_, _, scope, _) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        if scope != "access" {
            return None;
        }
        let mut fields = fields(parts.next()?);
        fields.insert("node".to_owned(), node.to_owned());
        Some(Self { fields })
    }

    /// A field; `-` where it is missing.
    pub fn get(&self, name: &str) -> &str {
        self.fields.get(name).map_or("-", String::as_str)
    }

    pub fn is_inbound(&self) -> bool {
        self.get("direction") == "inbound"
    }

    /// Whether it was let in by policy, however it ended.
    pub fn is_allowed(&self) -> bool {
        self.get("rule").starts_with("allowed")
    }

    /// Whether policy refused it.
    pub fn is_denied(&self) -> bool {
        self.get("rule").starts_with("denied")
    }
}

/// `key=value` or `key="value"`, in which `\` escapes.
fn fields(text: &str) -> BTreeMap<String, String> {
    let mut fields = BTreeMap::new();
    let mut rest = text;
    while let Some((key, after)) = rest.split_once('=') {
        let (value, left) = match after.strip_prefix('"') {
            None => {
                let end = after.find(' ').unwrap_or(after.len());
                (after[..end].to_owned(), &after[end..])
            }
            Some(quoted) => unquote(quoted),
        };
        fields.insert(key.trim().to_owned(), value);
        rest = left;
    }
    fields
}

fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut escaped = false;
    for (at, character) in text.char_indices() {
        match (escaped, character) {
            (false, '\\') => escaped = true,
            (false, '"') => return (value, &text[at + 1..]),
            _ => {
                escaped = false;
                value.push(character);
            }
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read() {
        let line = "2026-01-01T00:00:00Z\terror\taccess\tconnection complete\tsrc.addr=[fd00::1]:5 src.workload=\"a\" \
                    direction=\"inbound\" bytes_sent=7 rule=\"said \\\"no\\\": why=because\"";
        let record = Record::parse("node-1", line).unwrap();
        assert!(record.is_inbound() && !record.is_allowed() && !record.is_denied());
        assert_eq!(record.get("src.addr"), "[fd00::1]:5");
        assert_eq!(record.get("bytes_sent"), "7");
        assert_eq!(record.get("rule"), "said \"no\": why=because");
        assert_eq!(record.get("nothing"), "-");
        assert!(Record::parse("node-1", "something else").is_none());
    }
}
