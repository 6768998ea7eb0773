//! Checks on a file's text alone.

use std::path::Path;

use super::Finding;

/// Longer than this is said, and allowed.
const LONG: usize = 400;
/// Longer than this is not allowed: split it.
const TOO_LONG: usize = 600;

/// Words that may not be committed, each with what to do instead. Put together here, so that this file has none.
fn forbidden() -> Vec<(String, &'static str)> {
    let host = |name: &str, domain: &str| format!("{name}.{domain}");
    vec![
        (
            ["to", "do!"].concat(),
            "finish it, or return an error that says what is missing",
        ),
        (
            ["unimple", "mented!"].concat(),
            "finish it, or return an error that says what is missing",
        ),
        (["db", "g!"].concat(), "use tracing"),
        (host("static", "crates.io"), "name packages, not the host of a registry"),
        (host("index", "crates.io"), "name packages, not the host of a registry"),
        (host("deb", "debian.org"), "name packages, not the host of a registry"),
        (
            host("files", "pythonhosted.org"),
            "name packages, not the host of a registry",
        ),
        (
            ["https://", "pypi", ".org"].concat(),
            "name packages, not the host of a registry",
        ),
        (
            ["registry", ".npmjs.org"].concat(),
            "name packages, not the host of a registry",
        ),
    ]
}

/// Paths that exist only for whoever works here: the checkout and the home directory.
pub fn personal_paths(root: &Path) -> Vec<String> {
    let home = std::env::var("HOME").ok();
    let paths = [Some(root.to_string_lossy().into_owned()), home];
    // Short ones ("/", "/root") are parts of too many innocent words.
    paths
        .into_iter()
        .flatten()
        .filter(|path| path.matches('/').count() > 1)
        .collect()
}

/// All findings in one file.
pub fn check(path: &str, content: &str, personal: &[String]) -> Vec<Finding> {
    let mut findings = Vec::new();
    if generated(path) {
        return findings;
    }
    let rust = path.ends_with(".rs");
    if rust && !has_header(content) {
        findings.push(Finding::error(
            path,
            "has no header (`//!`): say what it is, and what it does not know",
        ));
    }
    let lines = content.lines().count();
    if rust && lines > TOO_LONG {
        findings.push(Finding::error(
            path,
            format!("{lines} lines: split it ({TOO_LONG} at the most)"),
        ));
    } else if rust && lines > LONG {
        findings.push(Finding::warning(path, format!("{lines} lines: aim at {LONG}")));
    }
    if !content.is_empty() && !content.ends_with('\n') {
        findings.push(Finding::error(path, "does not end with a newline"));
    }
    let forbidden = forbidden();
    for (number, line) in content.lines().enumerate() {
        let mut found = |what: String| findings.push(Finding::error(format!("{path}:{}", number + 1), what));
        if line.ends_with([' ', '\t']) {
            found("trailing whitespace".to_owned());
        }
        for (word, instead) in &forbidden {
            if line.contains(word.as_str()) {
                found(format!("`{word}`: {instead}"));
            }
        }
        for own in personal {
            if line.contains(own.as_str()) {
                found(format!("a path of this machine, {own}"));
            }
        }
    }
    findings
}

/// A header comes first, but for attributes of the whole file.
fn has_header(content: &str) -> bool {
    let first = content
        .lines()
        .map(str::trim)
        .find(|line| !line.is_empty() && !line.starts_with("#!["));
    first.is_some_and(|line| line.starts_with("//!"))
}

/// Not written by hand: lock files, licences, snapshots, corpora, what is made from .proto files.
fn generated(path: &str) -> bool {
    path.ends_with("Cargo.lock")
        || path.ends_with(".snap")
        || path.rsplit('/').next().is_some_and(|name| name.starts_with("LICENSE"))
        || path.contains("/corpus/")
        || path.starts_with("proto/src/generated/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whats(path: &str, content: &str) -> Vec<String> {
        check(path, content, &["/home/me/src".to_owned()])
            .into_iter()
            .map(|finding| finding.what)
            .collect()
    }

    #[test]
    fn a_plain_file_passes() {
        assert_eq!(whats("a.rs", "//! A.\nfn a() {}\n"), Vec::<String>::new());
        assert_eq!(whats("a.rs", "#![no_main]\n\n//! A.\n"), Vec::<String>::new());
        assert_eq!(whats("a.md", "words\n"), Vec::<String>::new());
    }

    #[test]
    fn each_fault_is_found_where_it_is() {
        let word = ["to", "do!"].concat();
        let content = format!("fn a() {{ {word}() }} \n// see /home/me/src/x");
        let findings = check("a.rs", &content, &["/home/me/src".to_owned()]);
        let places: Vec<&str> = findings.iter().map(|finding| finding.place.as_str()).collect();
        assert_eq!(places, ["a.rs", "a.rs", "a.rs:1", "a.rs:1", "a.rs:2"], "{findings:?}");
    }

    #[test]
    fn a_long_file_warns_and_a_too_long_one_fails() {
        let file = |lines: usize| format!("//! A.\n{}", "fn a() {}\n".repeat(lines));
        assert!(check("a.rs", &file(LONG), &[]).iter().all(|finding| !finding.error));
        assert_eq!(check("a.rs", &file(LONG), &[]).len(), 1);
        assert!(check("a.rs", &file(TOO_LONG), &[]).iter().any(|finding| finding.error));
        assert!(check("a.yaml", &"a: b\n".repeat(1000), &[]).is_empty());
    }
}
