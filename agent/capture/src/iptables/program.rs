//! The programs that read and change a namespace's rules: `iptables-save`, `iptables-restore` and those for IPv6.

use std::{
    io::{self, Write},
    path::PathBuf,
    process::{Command, Output, Stdio},
};

use super::plan::{Family, Saved};
use crate::{error::CaptureError, netns::Netns};

/// How the kernel keeps the rules. One for the node and all its pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    /// What the machine's `iptables` is.
    Default,
    Legacy,
    Nft,
}

impl Backend {
    const ALL: [Self; 3] = [Self::Default, Self::Nft, Self::Legacy];

    fn program(self, family: Family, verb: &str) -> String {
        let family = match family {
            Family::Ip4 => "iptables",
            Family::Ip6 => "ip6tables",
        };
        match self {
            Self::Default => format!("{family}-{verb}"),
            Self::Legacy => format!("{family}-legacy-{verb}"),
            Self::Nft => format!("{family}-nft-{verb}"),
        }
    }

    fn is_installed(self) -> bool {
        let programs = Family::ALL.map(|family| ["save", "restore"].map(|verb| self.program(family, verb)));
        programs.as_flattened().iter().all(|program| is_on_the_path(program))
    }
}

fn is_on_the_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// The programs of one backend.
#[derive(Debug, Clone)]
pub(crate) struct Iptables {
    pub(crate) backend: Backend,
}

impl Iptables {
    /// The backend that the node's own rules are in, else what the machine's `iptables` is.
    pub(crate) fn find(node: &Netns) -> Result<Self, CaptureError> {
        let installed: Vec<Backend> = Backend::ALL
            .into_iter()
            .filter(|backend| backend.is_installed())
            .collect();
        let Some(first) = installed.first() else {
            let missing = [
                "iptables-save",
                "iptables-restore",
                "ip6tables-save",
                "ip6tables-restore",
            ]
            .into_iter()
            .find(|program| !is_on_the_path(program));
            return Err(CaptureError::MissingProgram(missing.unwrap_or("iptables-restore")));
        };
        let in_use = |backend: Backend| {
            installed.contains(&backend)
                && Self { backend }
                    .saved(node, Family::Ip4, None)
                    .is_ok_and(|saved| saved.has_rules())
        };
        let backend = match (in_use(Backend::Legacy), in_use(Backend::Nft)) {
            (true, false) => Backend::Legacy,
            (false, true) => Backend::Nft,
            _ => *first,
        };
        Ok(Self { backend })
    }

    /// What a namespace has; of one table only, where that is asked for.
    pub(crate) fn saved(&self, netns: &Netns, family: Family, table: Option<&str>) -> Result<Saved, CaptureError> {
        let program = self.backend.program(family, "save");
        let words: Vec<&str> = table.into_iter().flat_map(|name| ["-t", name]).collect();
        let output = run(netns, &program, &words, "")?;
        Ok(Saved::parse(&String::from_utf8_lossy(&output.stdout)))
    }

    /// Makes changes in a namespace.
    pub(crate) fn restore(&self, netns: &Netns, family: Family, changes: &str) -> Result<(), CaptureError> {
        // Another program may hold the lock of the rules.
        let words = ["--noflush", "--wait", "5"];
        run(netns, &self.backend.program(family, "restore"), &words, changes).map(drop)
    }
}

/// Runs a program in a namespace. The child inherits the namespace of the thread that makes it.
fn run(netns: &Netns, program: &str, words: &[&str], input: &str) -> Result<Output, CaptureError> {
    let failed = |said: String| CaptureError::Iptables {
        program: program.to_owned(),
        netns: PathBuf::from(netns.path()),
        said,
    };
    let output = netns
        .enter(|| exchange(program, words, input))
        .and_then(|result| result)
        .map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(failed(format!("{} ({said})", output.status)))
}

fn exchange(program: &str, words: &[&str], input: &str) -> io::Result<Output> {
    let mut command = Command::new(program);
    command
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // If it ended early its standard error says why. What we write is smaller than a pipe holds.
        let _ = stdin.write_all(input.as_bytes());
    }
    child.wait_with_output()
}
