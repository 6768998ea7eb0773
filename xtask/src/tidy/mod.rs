//! `cargo xtask tidy`: what no compiler checks, in a second.
//!
//! [`text`] looks at every file that is committed (or would be), [`arrows`] at who depends on whom. Findings are errors,
//! but for files that are merely long.

mod arrows;
mod text;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::step::{done, failed, note};
use crate::workspace::Workspace;

/// Something found, and where.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Path in the repository, with a line number where there is one.
    place: String,
    /// What is wrong, and what to do.
    what: String,
    /// Fails the check.
    error: bool,
}

impl Finding {
    fn error(place: impl Into<String>, what: impl Into<String>) -> Self {
        Finding {
            place: place.into(),
            what: what.into(),
            error: true,
        }
    }

    fn warning(place: impl Into<String>, what: impl Into<String>) -> Self {
        Finding {
            place: place.into(),
            what: what.into(),
            error: false,
        }
    }
}

/// Runs all checks; prints what they found.
pub fn run(workspace: &Workspace) -> Result<()> {
    let mut findings = Vec::new();
    let files = files(workspace)?;
    let personal = text::personal_paths(workspace.root());
    for file in &files {
        let Ok(content) = std::fs::read_to_string(workspace.root().join(file)) else {
            continue;
        };
        findings.extend(text::check(&file.to_string_lossy(), &content, &personal));
    }
    findings.extend(arrows::check(&arrows::members(workspace)?));
    findings.extend(architecture(workspace)?);
    let errors = findings.iter().filter(|finding| finding.error).count();
    for finding in &findings {
        let line = format!("{}: {}", finding.place, finding.what);
        if finding.error { failed(&line) } else { note(&line) }
    }
    if errors > 0 {
        bail!("{errors} findings");
    }
    done(&format!("tidy: {} files", files.len()));
    Ok(())
}

/// Files that git has or would take.
fn files(workspace: &Workspace) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(workspace.root());
    let output = git.output().context("start git")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    }
    let mut files: Vec<PathBuf> = output
        .stdout
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| PathBuf::from(String::from_utf8_lossy(name).into_owned()))
        .collect();
    files.sort();
    files.dedup();
    Ok(files)
}

/// The description of what stands must know each room; a crate within one (`tests/load`) is the room's own affair.
fn architecture(workspace: &Workspace) -> Result<Vec<Finding>> {
    const PAGE: &str = "agent/ARCHITECTURE.md";
    let Ok(page) = std::fs::read_to_string(workspace.path(PAGE)) else {
        return Ok(vec![Finding::error(PAGE, "is missing")]);
    };
    Ok(arrows::members(workspace)?
        .into_iter()
        .map(|member| room(&member.directory))
        .filter(|directory| !page.contains(directory.as_str()))
        .map(|directory| Finding::error(PAGE, format!("does not mention {directory}")))
        .collect())
}

/// The room that a crate's directory is, or is in: `agent/l4`, `tests`.
fn room(directory: &str) -> String {
    match directory.split_once('/') {
        Some(("agent", _)) => directory.to_owned(),
        Some((top, _)) => top.to_owned(),
        None => directory.to_owned(),
    }
}
