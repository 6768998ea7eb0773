//! Who may depend on whom. The table is the architecture; a new arrow is added here in the commit that argues for it.

use std::process::Command;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::Finding;
use crate::workspace::Workspace;

/// Everything of ours.
const ALL: &[&str] = &["*"];

/// Each crate with those of ours that it may use. Dev-dependencies count, too: a test may not reach where code may not.
const ARROWS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("tasks", &[]),
    ("proto", &[]),
    ("abi", &[]),
    ("heap", &[]),
    ("policy", &["model"]),
    ("routing", &["model"]),
    ("k8s", &["model"]),
    ("identity", &["model", "proto", "tasks"]),
    ("hbone", &["identity", "model", "tasks"]),
    ("mesh", &["policy", "model"]),
    ("telemetry", &["model", "tasks"]),
    ("capture", &["abi", "model", "tasks"]),
    ("admin", &["telemetry", "tasks"]),
    (
        "l4",
        &["hbone", "identity", "mesh", "model", "policy", "tasks", "telemetry"],
    ),
    (
        "l7",
        &[
            "hbone",
            "identity",
            "mesh",
            "model",
            "policy",
            "routing",
            "tasks",
            "telemetry",
        ],
    ),
    ("discovery", &["identity", "mesh", "model", "proto", "tasks"]),
    // The embedded API checks objects by the code that the webhook of a real cluster runs.
    ("store", &["k8s", "model", "tasks"]),
    (
        "control",
        &["identity", "k8s", "model", "proto", "store", "tasks", "telemetry"],
    ),
    // Until the store exists, the playground itself turns manifests into the agents' static files, and makes their CA.
    ("playground", &["abi", "admin", "identity", "k8s", "model", "store"]),
    ("undercurrent", ALL),
    // Scenarios start the binary; they speak its admin protocol, forge peers and parse what it writes.
    ("system-tests", ALL),
    ("load", &[]),
    // The control plane and agents of `bench control`, in processes of their own.
    ("control-load", ALL),
    ("xtask", &[]),
];

/// Rooms that decide and do nothing else: no runtime, no I/O.
const PURE: &[&str] = &["model", "policy", "routing", "k8s"];

/// What a pure room may not use.
const IMPURE: &[&str] = &[
    "tokio",
    "mio",
    "hyper",
    "hyper-util",
    "h2",
    "rustls",
    "tokio-rustls",
    "aya",
    "rtnetlink",
    "nix",
    "libc",
    "socket2",
];

/// External crates with one home each.
const HOMES: &[(&str, &[&str])] = &[
    // The binary embeds the object with aya's macro.
    // `abi` marks its layouts as plain old data for aya's maps.
    ("aya", &["capture", "undercurrent", "abi"]),
    ("aya-log", &["capture"]),
    // The playground makes the links of its nodes and pods.
    ("rtnetlink", &["capture", "playground"]),
    ("h2", &["hbone", "playground", "undercurrent", "system-tests"]),
];

/// A crate of the workspace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub name: String,
    /// Its directory in the repository.
    pub directory: String,
    /// Crates of ours that it uses.
    pub ours: Vec<String>,
    /// Crates of others that it uses, but for tests.
    pub others: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    manifest_path: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    path: Option<String>,
    kind: Option<String>,
}

/// The workspace as Cargo sees it.
pub fn members(workspace: &Workspace) -> Result<Vec<Member>> {
    let mut cargo = Command::new("cargo");
    cargo
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(workspace.root());
    let output = cargo.output().context("start cargo")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let root = format!("{}/", workspace.root().display());
    Ok(metadata
        .packages
        .into_iter()
        .map(|package| member(package, &root))
        .collect())
}

fn member(package: Package, root: &str) -> Member {
    let (ours, others): (Vec<_>, Vec<_>) = package.dependencies.into_iter().partition(|other| other.path.is_some());
    let manifest = package.manifest_path.trim_start_matches(root);
    Member {
        name: package.name,
        directory: manifest.trim_end_matches("/Cargo.toml").to_owned(),
        ours: ours.into_iter().map(|other| other.name).collect(),
        others: others
            .into_iter()
            .filter(|other| other.kind.is_none())
            .map(|other| other.name)
            .collect(),
    }
}

/// Arrows that the table does not have.
pub fn check(members: &[Member]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for member in members {
        let place = format!("{}/Cargo.toml", member.directory);
        let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == member.name) else {
            findings.push(Finding::error(
                place,
                format!("{} has no place in xtask's table of arrows", member.name),
            ));
            continue;
        };
        for other in &member.ours {
            if *allowed != ALL && !allowed.contains(&other.as_str()) && *other != member.name {
                findings.push(Finding::error(
                    &place,
                    format!("{} may not depend on {other}", member.name),
                ));
            }
        }
        for other in &member.others {
            let pure = PURE.contains(&member.name.as_str());
            if pure && IMPURE.contains(&other.as_str()) {
                findings.push(Finding::error(
                    &place,
                    format!("{} is pure: it may not use {other}", member.name),
                ));
            }
            let home = HOMES.iter().find(|(name, _)| name == other);
            if home.is_some_and(|(_, homes)| !homes.contains(&member.name.as_str())) {
                findings.push(Finding::error(&place, format!("{other} is not for {}", member.name)));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(name: &str, ours: &[&str], others: &[&str]) -> Member {
        let strings = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Member {
            name: name.to_owned(),
            directory: format!("agent/{name}"),
            ours: strings(ours),
            others: strings(others),
        }
    }

    #[test]
    fn allowed_arrows_pass() {
        let members = [
            member("l4", &["hbone", "policy"], &["tokio"]),
            member("undercurrent", &["l4", "capture"], &["clap"]),
            member("policy", &["model"], &["thiserror"]),
        ];
        assert_eq!(check(&members), []);
    }

    #[test]
    fn a_forbidden_arrow_is_named() {
        for (bad, says) in [
            (member("l4", &["capture"], &[]), "l4 may not depend on capture"),
            (
                member("policy", &["model"], &["tokio"]),
                "policy is pure: it may not use tokio",
            ),
            (member("l4", &[], &["aya"]), "aya is not for l4"),
            (member("utils", &[], &[]), "utils has no place"),
        ] {
            let findings = check(&[bad]);
            assert!(findings.len() == 1 && findings[0].what.contains(says), "{findings:?}");
        }
    }

    #[test]
    fn the_table_has_no_cycle() {
        let uses = |name: &str| {
            ARROWS
                .iter()
                .find(|(from, _)| *from == name)
                .map_or(&[][..], |(_, to)| to)
        };
        for (start, _) in ARROWS {
            let mut reached: Vec<&str> = uses(start).to_vec();
            let mut at = 0;
            while at < reached.len() {
                assert_ne!(reached[at], *start, "{start} reaches itself");
                for next in uses(reached[at]) {
                    if !reached.contains(next) {
                        reached.push(next);
                    }
                }
                at += 1;
            }
        }
    }
}
