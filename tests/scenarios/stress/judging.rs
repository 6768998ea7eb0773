//! What clients saw, held against what the objects said and what the agents told.

use std::collections::HashMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use system_tests::{
    mesh::Log,
    oracle::{Expected, History},
    wait,
};

use super::ROLLED;

/// What a client saw of a connection.
pub(super) struct Attempt {
    client: &'static str,
    from: u64,
    to: u64,
    target: String,
    answered: Option<String>,
    failed: Option<String>,
    source: String,
}

impl Attempt {
    /// None: the line is of something else.
    pub(super) fn of(client: &'static str, line: &str) -> Result<Option<Self>> {
        let value: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        let Some(fields) = value.as_array() else {
            return Ok(None);
        };
        let text = |index: usize| fields[index].as_str().map(str::to_owned);
        let (ip, port) = (fields[5][0].as_str().unwrap_or_default(), &fields[5][1]);
        let source = if ip.contains(':') {
            format!("[{ip}]:{port}")
        } else {
            format!("{ip}:{port}")
        };
        Ok(Some(Self {
            client,
            from: fields[0].as_u64().context("no time")?,
            to: fields[1].as_u64().context("no time")?,
            target: text(2).context("no target")?,
            answered: text(3),
            failed: text(4),
            source,
        }))
    }
}

impl std::fmt::Display for Attempt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            client,
            from,
            to,
            target,
            answered,
            failed,
            source,
        } = self;
        write!(
            f,
            "{client} ({source}) to {target} from {from} to {to} ms: {answered:?}, {failed:?}"
        )
    }
}

/// Holds what was seen against what the objects said; the attempts that failed and may have.
pub(super) fn judge<'a>(history: &History, attempts: &'a [Attempt]) -> Result<Vec<&'a Attempt>> {
    let (mut wrong, mut to_explain, mut lost) = (Vec::new(), Vec::new(), Vec::new());
    let mut first: HashMap<&str, u64> = HashMap::new();
    for attempt in attempts.iter().filter(|attempt| attempt.target == ROLLED) {
        let from = first.entry(&attempt.source).or_insert(attempt.from);
        *from = attempt.from.min(*from);
    }
    for attempt in attempts {
        // A rolled pod's name is its Deployment's with something behind it.
        let who = attempt.answered.as_deref().map(|name| match name.starts_with("web-") {
            true => ROLLED,
            false => name,
        });
        let server = who.unwrap_or(&attempt.target);
        let expected = history.expected(attempt.client, server, attempt.from, attempt.to);
        match (expected, &attempt.failed) {
            (Expected::Allowed, Some(_)) if went_astray(attempt, &first) => lost.push(attempt),
            (Expected::Allowed, Some(_)) => wrong.push(format!("should be allowed: {attempt}")),
            (Expected::Refused, None) => wrong.push(format!("should be refused: {attempt}")),
            (_, Some(_)) => to_explain.push(attempt),
            (_, None) => {}
        }
    }
    if !wrong.is_empty() {
        let count = wrong.len();
        wrong.truncate(20);
        bail!(
            "{count} of {} verdicts are wrong:\n{}",
            attempts.len(),
            wrong.join("\n")
        );
    }
    ensure!(
        lost.len() <= 1 + attempts.len() / 1000,
        "too many were sent to pods that are gone: {} of {}, such as {}",
        lost.len(),
        attempts.len(),
        lost[0]
    );
    Ok(to_explain)
}

/// Whether it did not come to the Service: who is not in the mesh reaches one by its node's NAT, which remembers a port for
/// seconds after its connection was reset, and sends the next one from there to the same pod's address, though that be gone,
/// or another pod's by now, which has policies of its own.
fn went_astray(attempt: &Attempt, first: &HashMap<&str, u64>) -> bool {
    let is_outside = [OUTSIDER, "roamer"].contains(&attempt.client);
    let is_again = first
        .get(&*attempt.source)
        .is_some_and(|earlier| *earlier < attempt.from);
    is_outside && attempt.target == ROLLED && is_again
}

/// The errors of both nodes' access logs, by where the connection came from.
fn errors(logs: &[Log]) -> Result<HashMap<String, Vec<String>>> {
    let mut found: HashMap<String, Vec<String>> = HashMap::new();
    for log in logs {
        for line in log.lines()? {
            let word = |name: &str| line.split([' ', '\t']).find_map(|word| word.strip_prefix(name));
            let error = line.split_once(" error=").map(|(_, error)| error.to_owned());
            if let (Some(source), Some(error)) = (word("src.addr="), error) {
                found.entry(source.to_owned()).or_default().push(error);
            }
        }
    }
    Ok(found)
}

/// Whether an error says that policy refused.
fn by_policy(error: &str) -> bool {
    ["policy", "401", "without an identity", "no longer allowed"]
        .iter()
        .any(|word| error.contains(word))
}

/// Who is never in the mesh.
const OUTSIDER: &str = "client";

/// Refusals by policy that are more than their source has failures, by its address: a node's NAT gave the connection another
/// port, which it does where two connections from one port would look the same behind a Service. That port may be nobody's,
/// or another connection's of the same client.
fn of_other_ports(attempts: &[Attempt], errors: &HashMap<String, Vec<String>>) -> HashMap<String, usize> {
    let mut own: HashMap<&str, usize> = HashMap::new();
    for attempt in attempts {
        let failures = own.entry(&attempt.source).or_default();
        // Who may be in the mesh is told of by both ends.
        *failures = match (attempt.client, &attempt.failed) {
            (OUTSIDER, None) => *failures,
            (OUTSIDER, Some(_)) => *failures + 1,
            _ => usize::MAX,
        };
    }
    let mut counts = HashMap::new();
    for (source, told) in errors {
        if let Some((address, _)) = source.rsplit_once(':') {
            let refusals = told.iter().filter(|error| by_policy(error)).count();
            let failures = own.get(&**source).copied().unwrap_or(0);
            *counts.entry(address.to_owned()).or_default() += refusals.saturating_sub(failures);
        }
    }
    counts
}

/// Every failure has a line that says why; a refusal by policy one that names policy, but for those of who came or went.
pub(super) fn are_explained(history: &History, attempts: &[Attempt], failed: &[&Attempt], logs: &[Log]) -> Result<()> {
    let mut missing = Vec::new();
    let waited = wait::until_true("every failure is told of in an access log", || {
        let errors = errors(logs)?;
        let mut others = of_other_ports(attempts, &errors);
        missing.clear();
        for attempt in failed {
            let told = errors.get(&attempt.source).map_or(&[][..], Vec::as_slice);
            let expected = history.expected(attempt.client, &attempt.target, attempt.from, attempt.to);
            let is_unsettled = |who| history.is_unsettled(who, attempt.from, attempt.to);
            // Who is between there and not there, or in and out of the mesh, may meet nobody at all.
            let fits = is_unsettled(attempt.client)
                || is_unsettled(&attempt.target)
                || told
                    .iter()
                    .any(|error| expected == Expected::Either || by_policy(error));
            let address = attempt.source.rsplit_once(':').map_or("", |(address, _)| address);
            let left = others.get_mut(address).filter(|left| !fits && **left > 0);
            if let Some(left) = left {
                *left -= 1;
            } else if !fits {
                missing.push(format!("{expected:?}: {attempt}: {told:?}"));
            }
        }
        Ok(missing.is_empty())
    });
    let count = missing.len();
    missing.truncate(20);
    waited.with_context(|| format!("{count} of {} are not:\n{}", failed.len(), missing.join("\n")))
}
