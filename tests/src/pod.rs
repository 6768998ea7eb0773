//! A pod, from outside: what is run in it goes through `undercurrent playground exec`, as a person would do it.

use std::{
    io::{BufRead, BufReader, Write},
    net::IpAddr,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{Mesh, machine, wait};

/// A pod of the mesh under test.
#[derive(Clone, Copy)]
pub struct Pod<'m> {
    pub(crate) mesh: &'m Mesh,
    pub namespace: &'m str,
    pub name: &'m str,
}

/// What a program said and how it ended.
#[derive(Debug)]
pub struct Said {
    pub stdout: String,
    pub stderr: String,
    pub code: Option<i32>,
}

impl Said {
    /// The standard output of a program that succeeded.
    pub fn good(self) -> Result<String> {
        ensure!(
            self.code == Some(0),
            "ended with {:?}: {}{}",
            self.code,
            self.stdout,
            self.stderr
        );
        Ok(self.stdout)
    }
}

/// Longer than any single program in a pod takes.
const AT_MOST: &str = "90";

impl Pod<'_> {
    /// `namespace/name`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// The name of its network namespace.
    pub fn netns(&self) -> String {
        format!("uc-{}-{}", self.namespace, self.name)
    }

    /// Its IPv4 and IPv6 addresses.
    pub fn addresses(&self) -> Result<[IpAddr; 2]> {
        self.mesh.addresses(self)
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Result<IpAddr> {
        Ok(self.addresses()?[0])
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Result<IpAddr> {
        Ok(self.addresses()?[1])
    }

    fn command(&self, at_most: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=2", at_most]).arg(self.mesh.binary());
        command.args(["playground", "exec", &self.key(), "--"]).args(arguments);
        command.envs(self.mesh.environment());
        command
    }

    /// Runs a program in it to its end.
    pub fn exec(&self, arguments: &[&str]) -> Result<Said> {
        let output = self
            .command(AT_MOST, arguments)
            .stdin(Stdio::null())
            .output()
            .context("cannot run playground exec")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.code() != Some(124),
            "in {}, {arguments:?} did not end in {AT_MOST} s",
            self.key()
        );
        Ok(Said {
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
            code: output.status.code(),
        })
    }

    /// Runs a script of `tests/scripts` in it; the last line of what it prints is JSON.
    pub fn script(&self, script: &str, arguments: &[&str]) -> Result<Value> {
        let path = machine::scripts().join(script);
        let path = path.to_string_lossy();
        let said = self.exec(&[&[machine::python(), &path], arguments].concat())?;
        let about = || format!("in {}: {script} {arguments:?}: {said:?}", self.key());
        let last = said.stdout.lines().last().with_context(about)?;
        serde_json::from_str(last).with_context(about)
    }

    /// `client.py` in it: see there.
    pub fn client(&self, arguments: &[&str]) -> Result<Value> {
        self.script("client.py", arguments)
    }

    /// Starts a script of `tests/scripts` in it. It is ended with the value.
    pub fn start(&self, script: &str, arguments: &[&str]) -> Result<Background> {
        self.start_for(AT_MOST, script, arguments)
    }

    /// As [`Self::start`], for at most so many seconds.
    pub fn start_for(&self, seconds: &str, script: &str, arguments: &[&str]) -> Result<Background> {
        let path = machine::scripts().join(script);
        let path = path.to_string_lossy();
        let command = self.command(seconds, &[&[machine::python(), "-u", &path], arguments].concat());
        Background::start(command, format!("in {}: {script} {arguments:?}", self.key()))
    }
}

/// A program that runs while the scenario goes on.
pub struct Background {
    child: Child,
    lines: mpsc::Receiver<String>,
    what: String,
}

impl Background {
    fn start(mut command: Command, what: String) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {what}"))?;
        let stdout = child.stdout.take().context("standard output is piped")?;
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self { child, lines, what })
    }

    /// The next line that it prints, as JSON.
    pub fn next(&self) -> Result<Value> {
        self.next_within(wait::LONG)
    }

    /// As [`Self::next`], with a deadline of its own.
    pub fn next_within(&self, limit: Duration) -> Result<Value> {
        let line = self.next_line(limit)?;
        serde_json::from_str(&line).with_context(|| format!("{} said {line:?}", self.what))
    }

    /// The next line that it prints.
    pub fn next_line(&self, limit: Duration) -> Result<String> {
        let line = self.lines.recv_timeout(limit);
        line.with_context(|| format!("{} said nothing", self.what))
    }

    /// A line that it has printed by now, if there is one.
    pub fn line(&self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    /// Says a line to it.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its standard input is closed")?;
        writeln!(stdin, "{line}")
            .and_then(|()| stdin.flush())
            .with_context(|| format!("{} listens no more", self.what))
    }

    /// Closes its standard input, which is how it is told to end, and reads what it says then.
    pub fn finish(mut self) -> Result<Value> {
        drop(self.child.stdin.take());
        // A storm's last attempt may take two of its own time limits.
        self.next_within(wait::LONG * 2)
    }

    /// Closes its standard input; all that it prints from now on, to its end.
    pub fn rest(mut self) -> Result<Vec<String>> {
        drop(self.child.stdin.take());
        let mut lines = Vec::new();
        loop {
            match self.lines.recv_timeout(wait::LONG) {
                Ok(line) => lines.push(line),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Ok(lines),
                Err(mpsc::RecvTimeoutError::Timeout) => bail!("{} does not end", self.what),
            }
        }
    }

    /// Ends it without a goodbye.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("cannot kill")?;
        Ok(())
    }

    /// Whether it ended by itself.
    pub fn ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // Whoever is told to end by the end of its input has a moment to do so, and goes with its pod otherwise.
        drop(self.child.stdin.take());
        let gone = wait::until_within(Duration::from_secs(2), "the end", || Ok(self.child.try_wait()?));
        if gone.is_err() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// What a script calls an error.
pub fn error_of(result: &Value) -> Option<&str> {
    result.get("error").and_then(Value::as_str)
}

/// Fails if a script ran into an error.
pub fn no_error(result: Value) -> Result<Value> {
    match error_of(&result) {
        Some(error) => bail!("{error}"),
        None => Ok(result),
    }
}
