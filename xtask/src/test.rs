//! `cargo xtask test`: every check and every test, for a person and for CI alike.
//!
//! A failed check does not keep the others from running; what could not run is said with its reason, and the last line
//! is the sum of all tests. Cost: see the crate's header.
//!
//! A test that can't run on this machine appends a line `test: why` to the file that `UNDERCURRENT_NOT_RUN` names, and
//! they are all shown at the end. Under `CI=true` such a line is a failure, unless it begins with `optional `: for what the
//! project does not promise on every kernel.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};

use crate::setup::Purpose;
use crate::step::{Steps, done, failed, note};
use crate::workspace::Workspace;
use crate::{build, preflight, setup, tidy};

/// Tests append a line here when they can't run.
const NOT_RUN: &str = "UNDERCURRENT_NOT_RUN";
/// The release binary, for tests that start it.
const BINARY: &str = "UNDERCURRENT_BINARY";

struct Checks {
    workspace: Workspace,
    steps: Steps,
    failed: Vec<String>,
    not_run: Vec<String>,
}

/// Runs everything; `filter` goes to `cargo test`.
pub fn run(workspace: &Workspace, filter: &[String]) -> Result<()> {
    setup::run(workspace, Purpose::TEST)?;
    let mut checks = Checks {
        workspace: workspace.clone(),
        steps: Steps::new(workspace),
        failed: Vec::new(),
        not_run: Vec::new(),
    };
    checks.formatting();
    checks.attempt("tidy", |_| tidy::run(workspace));
    let built = checks.attempt("build-ebpf", |_| build::ebpf(workspace));
    checks.clippy();
    checks.deny();
    let built = built && checks.attempt("build", |_| build::binary(workspace));
    let tests = if built { checks.tests(filter)? } else { Sum::default() };
    if !built {
        checks.not_run.push("all tests: the build failed".to_owned());
    }
    checks.conclude(&tests)
}

impl Checks {
    fn attempt(&mut self, name: &str, check: impl FnOnce(&Steps) -> Result<()>) -> bool {
        let outcome = check(&self.steps);
        if let Err(error) = &outcome {
            failed(&format!("{name}: {error:#}"));
            self.failed.push(name.to_owned());
        }
        outcome.is_ok()
    }

    fn formatting(&mut self) {
        let mut ours = build::cargo(&self.workspace);
        ours.args(["fmt", "--all", "--check", "--", "--color=never"]);
        self.attempt("formatting", |steps| steps.run("fmt", "check formatting", &mut ours));
        let mut ebpf = build::cargo(&self.workspace);
        ebpf.args([
            "fmt",
            "--check",
            "--manifest-path",
            "ebpf/Cargo.toml",
            "--",
            "--color=never",
        ]);
        self.attempt("formatting of ebpf", |steps| {
            steps.run("fmt-ebpf", "check formatting of ebpf", &mut ebpf)
        });
    }

    fn clippy(&mut self) {
        let mut clippy = build::cargo(&self.workspace);
        clippy.args([
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "--deny",
            "warnings",
        ]);
        self.attempt("clippy", |steps| steps.run("clippy", "lint with clippy", &mut clippy));
    }

    /// Licences, bans and sources always; advisories where their database can be had.
    fn deny(&mut self) {
        for (name, manifest) in [("cargo-deny", "Cargo.toml"), ("cargo-deny-ebpf", "ebpf/Cargo.toml")] {
            let mut deny = build::cargo(&self.workspace);
            deny.args(["deny", "--manifest-path", manifest, "--config"])
                .arg(self.workspace.path("deny.toml"));
            deny.args(["check", "--hide-inclusion-graph", "bans", "licenses", "sources"]);
            let title = format!("check licences, bans and sources of {manifest}");
            self.attempt(name, |steps| steps.run(name, &title, &mut deny));
        }
        let mut advisories = Command::new("timeout");
        advisories.args(["90", "cargo", "deny", "check", "advisories", "--hide-inclusion-graph"]);
        advisories.current_dir(self.workspace.root());
        match advisories.output() {
            Ok(output) if output.status.success() => done("check advisories"),
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                match advisories_unavailable(output.status.code(), &text) {
                    Some(why) => note(&format!("not run: advisories: {why}")),
                    None => {
                        eprintln!("{text}");
                        failed("check advisories");
                        self.failed.push("advisories".to_owned());
                    }
                }
            }
            Err(error) => note(&format!("not run: advisories: {error}")),
        }
    }

    fn tests(&mut self, filter: &[String]) -> Result<Sum> {
        for line in preflight::missing() {
            self.not_run.push(format!("system tests: missing {line}"));
        }
        let not_run = self.workspace.target("xtask/not-run.txt");
        let _ = std::fs::remove_file(&not_run);
        let mut test = build::cargo(&self.workspace);
        test.args(["test", "--workspace", "--locked", "--no-fail-fast"])
            .args(filter);
        test.env(NOT_RUN, &not_run).env(BINARY, self.workspace.binary());
        test.env("PATH", path_with(&self.workspace));
        let mut sum = Sum::default();
        self.show("tests", "run all tests", &mut test, &mut sum)?;
        if filter.is_empty() {
            // A workspace of its own, since fuzzing wants other flags.
            let mut fuzz = build::cargo(&self.workspace);
            fuzz.args([
                "test",
                "--locked",
                "--manifest-path",
                "tests/fuzz/Cargo.toml",
                "--target-dir",
            ])
            .arg(self.workspace.target("fuzz"));
            self.show("fuzz", "run every fuzz target for a moment", &mut fuzz, &mut sum)?;
        }
        self.not_run.extend(lines(&not_run));
        Ok(sum)
    }

    fn show(&mut self, name: &str, title: &str, test: &mut Command, sum: &mut Sum) -> Result<()> {
        if !self.steps.show(name, title, test, |line| sum.add(line))? {
            self.failed.push(name.to_owned());
        }
        Ok(())
    }

    fn conclude(self, tests: &Sum) -> Result<()> {
        for line in &self.not_run {
            note(&format!("not run: {line}"));
        }
        let strict = std::env::var_os("CI").is_some_and(|value| value == "true");
        let due = self
            .not_run
            .iter()
            .filter(|line| !line.starts_with("optional "))
            .count();
        let skipped = strict && due > 0;
        if self.failed.is_empty() && !skipped {
            println!("{} passed, {} failed", tests.passed, tests.failed);
            return Ok(());
        }
        println!("{} passed, {} failed", tests.passed, tests.failed);
        if skipped {
            bail!("in CI every test must run; {due} did not, see above");
        }
        bail!("failed: {}", self.failed.join(", "))
    }
}

/// Tests that ran, as libtest says it at the end of each binary.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
}

impl Sum {
    fn add(&mut self, line: &str) {
        let Some(rest) = line.trim().strip_prefix("test result:") else {
            return;
        };
        let words: Vec<&str> = rest.split_whitespace().collect();
        for pair in words.windows(2) {
            let Ok(count) = pair[0].parse::<u64>() else { continue };
            match pair[1].trim_end_matches(';') {
                "passed" => self.passed += count,
                "failed" => self.failed += count,
                _ => {}
            }
        }
    }
}

/// The search path, and behind it what setup put under target/tools.
fn path_with(workspace: &Workspace) -> std::ffi::OsString {
    let mut path = std::env::var_os("PATH").unwrap_or_default();
    if let Some(directory) = workspace.kubectl().parent() {
        path.push(":");
        path.push(directory);
    }
    path
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// Why the advisories could not be checked; `None` if they were, and said something.
fn advisories_unavailable(code: Option<i32>, output: &str) -> Option<String> {
    if code == Some(124) {
        return Some("their database did not come within 90 s".to_owned());
    }
    output
        .contains("failed to fetch advisory database")
        .then(|| "their database can't be fetched from here".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_of_all_binaries_are_added_up() {
        let mut sum = Sum::default();
        sum.add("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.00s");
        sum.add("test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out");
        sum.add("4 passed; 4 failed");
        assert_eq!(sum, Sum { passed: 5, failed: 1 });
    }

    #[test]
    fn an_advisory_is_not_taken_for_a_missing_database() {
        assert_eq!(advisories_unavailable(Some(1), "error[vulnerability]: bad"), None);
        assert!(advisories_unavailable(Some(1), "failed to fetch advisory database").is_some());
    }
}
