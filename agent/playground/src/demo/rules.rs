//! The firewall rules in a pod's network namespace, as every program that could have made some sees them.

use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::{netns, preflight};

pub(super) const RULES: [(&str, &[&str]); 3] = [
    ("iptables-save", &[]),
    ("ip6tables-save", &[]),
    ("nft", &["list", "ruleset"]),
];
pub(super) const MISSING: &str = "not installed";

/// How many rules a pod's network namespace has, as that program sees it.
pub(super) fn count_rules(netns: &str, program: &str, arguments: &[&str]) -> Result<String> {
    if !preflight::has_program(program) {
        return Ok(MISSING.to_owned());
    }
    let output = netns::inside(netns, || {
        Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}"))
    })?;
    if !output.status.success() {
        return Ok(format!("failed: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    // iptables-save writes rules as `-A …`; nft, whatever is inside a chain's braces.
    let is_rule = |line: &&str| match program {
        "nft" => {
            let line = line.trim();
            !line.is_empty()
                && line != "}"
                && !line.ends_with('{')
                && !line.starts_with("type ")
                && !line.starts_with('#')
        }
        _ => line.starts_with("-A"),
    };
    Ok(format!("{} rules", text.lines().filter(is_rule).count()))
}
