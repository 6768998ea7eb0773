//! Commands that ask running agents: `status`, `get`, `why`. They only read; what they show comes from the agents' own code.
//!
//! An agent that does not answer is named, with what to do; of several (a playground's) the others are asked still.

mod get;
mod page;
mod status;
mod table;
mod why;

use std::{
    io::IsTerminal,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

pub use get::{GetArgs, run as get};
pub use status::{StatusArgs, run as status};
pub use why::{WhyArgs, run as why};

/// Columns of a terminal that texts are made for.
const WIDTH: usize = 100;

/// Which agents are asked.
#[derive(clap::Args, Clone, Debug)]
#[command(next_help_heading = "Which agent")]
pub struct Reach {
    /// The state directory of this node's agent.
    #[arg(
        long,
        env = "UNDERCURRENT_STATE_DIR",
        value_name = "DIR",
        default_value = "/var/run/undercurrent"
    )]
    state_dir: PathBuf,
    /// The agents of a playground instead [default DIR: /var/lib/undercurrent/playground]; so too where this node has no
    /// agent and there is a playground.
    #[arg(long, env = "UNDERCURRENT_PLAYGROUND", value_name = "DIR", num_args = 0..=1, default_missing_value = playground::STATE)]
    playground: Option<PathBuf>,
    /// Of a playground's, only this node's agent.
    #[arg(long, value_name = "NODE")]
    node: Option<String>,
}

/// An agent that can be asked.
pub struct Agent {
    /// Its node, where that is known before it is asked.
    node: Option<String>,
    socket: PathBuf,
}

impl Reach {
    fn agents(&self) -> Result<Vec<Agent>> {
        let own = self.state_dir.join("agent.sock");
        let directory = match &self.playground {
            Some(directory) => directory.clone(),
            None if own.exists() => {
                return Ok(vec![Agent {
                    node: None,
                    socket: own,
                }]);
            }
            None if Path::new(playground::STATE).exists() => PathBuf::from(playground::STATE),
            None => bail!(
                "no agent runs on this node, as {} is not there: give --state-dir as the agent has it, or --playground",
                own.display()
            ),
        };
        let mut agents = playground::agent_sockets(&directory)?;
        if let Some(wanted) = &self.node {
            let names: Vec<_> = agents.iter().map(|(node, _)| node.clone()).collect();
            agents.retain(|(node, _)| node == wanted);
            if agents.is_empty() {
                bail!("there is no node {wanted}; there are {}", names.join(", "));
            }
        }
        let agent = |(node, socket)| Agent {
            node: Some(node),
            socket,
        };
        Ok(agents.into_iter().map(agent).collect())
    }
}

impl Agent {
    fn name(&self) -> String {
        let node = self.node.as_deref().map(|node| format!("the agent of {node}"));
        node.unwrap_or_else(|| "this node's agent".to_owned())
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let text = ask(admin::get(&self.socket, path)).with_context(|| self.trouble())?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} answers what can't be read: another version?", self.name()))
    }

    fn post<T: DeserializeOwned>(&self, path: &str, what: &impl serde::Serialize) -> Result<T, admin::ClientError> {
        let text = ask(admin::post(&self.socket, path, what))?;
        serde_json::from_str(&text).map_err(|error| admin::ClientError::Broken(error.to_string()))
    }

    fn trouble(&self) -> String {
        format!("{} can't be asked", self.name())
    }
}

fn ask<T>(future: impl Future<Output = Result<T, admin::ClientError>>) -> Result<T, admin::ClientError> {
    let broken = |error: std::io::Error| admin::ClientError::Broken(format!("cannot start a runtime: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(broken)?.block_on(future)
}

/// Whether standard output is a terminal that takes colours.
fn colours() -> bool {
    std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Writes to standard output; a reader that has seen enough (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    use std::io::Write;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// `35 s`, `12 min`, `3 h 20 min`, `5 d`.
pub fn duration(seconds: u64) -> String {
    match seconds {
        ..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// `512 B`, `1.5 KiB`, …
fn bytes(count: u64) -> String {
    let mut size = count as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if size < 1024.0 {
            return match unit {
                "B" => format!("{count} B"),
                _ => format!("{size:.1} {unit}"),
            };
        }
        size /= 1024.0;
    }
    format!("{size:.1} TiB")
}
