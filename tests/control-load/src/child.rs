//! Other processes of this program. They end with this one: their input does.

use std::{collections::VecDeque, process::Stdio, time::Duration};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout},
};

/// The longest that anything may take.
pub const BOUND: Duration = Duration::from_secs(300);

/// Agents, simulated or a real one.
pub struct Agents {
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
    /// What came while an answer was waited for; few, as nothing changes then.
    applied: VecDeque<Applied>,
    /// What it said when it had everything.
    pub first: Value,
}

/// A resource that all agents have taken in.
#[derive(Debug)]
pub struct Applied {
    /// The resource.
    pub name: String,
    /// When, in seconds since 1970.
    pub at: f64,
}

impl Agents {
    /// Starts them, and waits until they have everything.
    pub async fn start(role: &str, arguments: &[String]) -> Result<Self> {
        let mut command = tokio::process::Command::new(std::env::current_exe()?);
        command.arg(role).args(arguments).kill_on_drop(true);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?).lines();
        let mut agents = Self {
            child,
            input,
            output,
            applied: VecDeque::new(),
            first: Value::Null,
        };
        agents.first = agents.answer().await?;
        Ok(agents)
    }

    async fn line(&mut self) -> Result<Value> {
        // Cancelled, this loses nothing: `next_line` keeps what it has read.
        let line = tokio::time::timeout(BOUND, self.output.next_line())
            .await
            .context("the agents took too long")??;
        Ok(serde_json::from_str(&line.context("the agents ended")?)?)
    }

    async fn answer(&mut self) -> Result<Value> {
        loop {
            let line = self.line().await?;
            match applied(&line) {
                Some(applied) => self.applied.push_back(applied),
                None => return Ok(line),
            }
        }
    }

    /// The next resource that all have taken in.
    pub async fn applied(&mut self) -> Result<Applied> {
        if let Some(applied) = self.applied.pop_front() {
            return Ok(applied);
        }
        let line = self.line().await?;
        applied(&line).with_context(|| format!("the agents said {line}"))
    }

    /// Those that remember leave.
    pub async fn leave(&mut self) -> Result<()> {
        Ok(self.input.write_all(b"leave\n").await?)
    }

    /// They come back.
    pub async fn again(&mut self) -> Result<Value> {
        self.input.write_all(b"again\n").await?;
        self.answer().await
    }

    /// Ends them.
    pub async fn stop(self) -> Result<()> {
        let Self { mut child, input, .. } = self;
        drop(input);
        child.wait().await?;
        Ok(())
    }
}

fn applied(line: &Value) -> Option<Applied> {
    Some(Applied {
        name: line["applied"].as_str()?.to_owned(),
        at: line["at"].as_f64()?,
    })
}
