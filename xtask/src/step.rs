//! Steps that take a while: one line that moves on a terminal, plain lines elsewhere, the whole output in a file.
//!
//! A step that fails prints the tail of its output and says where the rest is. It never asks: standard input is closed.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, IsTerminal, Write};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use owo_colors::{OwoColorize, Stream};

use crate::workspace::Workspace;

/// Lines of a failed step's output that are printed.
const TAIL: usize = 40;
/// Without a terminal: how often a long step says that it is alive.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Runs steps, one after the other.
pub struct Steps {
    workspace: Workspace,
    terminal: bool,
}

impl Steps {
    /// Steps whose logs go to `target/xtask/`.
    pub fn new(workspace: &Workspace) -> Self {
        Steps {
            workspace: workspace.clone(),
            terminal: std::io::stderr().is_terminal(),
        }
    }

    /// Runs a command to its end, showing only that and how it goes on. `name` is the log file's.
    pub fn run(&self, name: &str, title: &str, command: &mut Command) -> Result<()> {
        let start = Instant::now();
        let progress = self.progress(title);
        let mut last_sign = Instant::now();
        let outcome = self.pump(name, command, |line| {
            if self.terminal {
                progress.set_message(line.trim().to_owned());
            } else if last_sign.elapsed() > HEARTBEAT {
                last_sign = Instant::now();
                eprintln!("    … {title}, {} s: {}", start.elapsed().as_secs(), line.trim());
            }
        });
        progress.finish_and_clear();
        let took = start.elapsed();
        match outcome {
            Ok(Outcome { success: true, .. }) => {
                done(&format!("{title} ({})", seconds(took)));
                Ok(())
            }
            Ok(outcome) => {
                failed(title);
                for line in &outcome.tail {
                    eprintln!("    {line}");
                }
                bail!(
                    "{title} failed ({}); all of its output: {}",
                    outcome.status,
                    self.log(name).display()
                )
            }
            Err(error) => {
                failed(title);
                Err(error)
            }
        }
    }

    /// Runs a command whose output is what the user wants to see: each line is printed and given to `each`.
    /// Returns whether it succeeded.
    pub fn show(&self, name: &str, title: &str, command: &mut Command, mut each: impl FnMut(&str)) -> Result<bool> {
        eprintln!("{} {title}", "▸".if_supports_color(Stream::Stderr, |mark| mark.cyan()));
        let outcome = self.pump(name, command, |line| {
            println!("{line}");
            each(line);
        })?;
        Ok(outcome.success)
    }

    fn progress(&self, title: &str) -> ProgressBar {
        if !self.terminal {
            eprintln!("▸ {title}");
            return ProgressBar::hidden();
        }
        let style = ProgressStyle::with_template("{spinner:.cyan} {prefix} {elapsed:.dim} {wide_msg:.dim}");
        let bar = ProgressBar::new_spinner().with_style(style.expect("the template is a constant that parses"));
        bar.set_prefix(title.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }

    fn log(&self, name: &str) -> std::path::PathBuf {
        self.workspace.target(&format!("xtask/{name}.log"))
    }

    fn pump(&self, name: &str, command: &mut Command, mut each: impl FnMut(&str)) -> Result<Outcome> {
        let path = self.log(name);
        std::fs::create_dir_all(path.parent().context("a log has a directory")?)?;
        let mut log = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        writeln!(log, "$ {}", words(command))?;
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        let program = command.get_program().to_owned();
        let mut child = command
            .spawn()
            .with_context(|| format!("start {}", program.display()))?;
        // The command keeps the pipe's write ends: without this the read below would never end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let mut tail = VecDeque::with_capacity(TAIL);
        for line in BufReader::new(reader).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(log, "{line}")?;
            each(&line);
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(line);
        }
        let status = child.wait()?;
        Ok(Outcome {
            success: status.success(),
            status: status.to_string(),
            tail,
        })
    }
}

struct Outcome {
    success: bool,
    status: String,
    tail: VecDeque<String>,
}

/// Says that something stands.
pub fn done(what: &str) {
    eprintln!("{} {what}", "✓".if_supports_color(Stream::Stderr, |mark| mark.green()));
}

/// Says that something went wrong.
pub fn failed(what: &str) {
    eprintln!("{} {what}", "✗".if_supports_color(Stream::Stderr, |mark| mark.red()));
}

/// Says something that the user should know and that is not an error.
pub fn note(what: &str) {
    eprintln!("{} {what}", "!".if_supports_color(Stream::Stderr, |mark| mark.yellow()));
}

/// A command as a person would type it.
pub fn words(command: &Command) -> String {
    let mut words: Vec<String> = Vec::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            words.push(format!("{}={}", name.display(), value.display()));
        }
    }
    words.push(command.get_program().display().to_string());
    words.extend(command.get_args().map(|word| word.display().to_string()));
    words.join(" ")
}

fn seconds(took: Duration) -> String {
    match took.as_secs() {
        0..60 => format!("{:.1} s", took.as_secs_f64()),
        whole => format!("{} min {} s", whole / 60, whole % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_typed() {
        let mut command = Command::new("cargo");
        command.args(["install", "x"]).env("LLVM", "22").env_remove("RUSTC");
        assert_eq!(words(&command), "LLVM=22 cargo install x");
    }

    #[test]
    fn output_is_seen_line_by_line_and_a_failure_is_told() {
        let steps = Steps::new(&Workspace::here());
        let mut lines = Vec::new();
        let mut script = Command::new("sh");
        script.args(["-c", "echo one; echo two >&2; exit 3"]);
        let good = steps
            .show("test-step", "a script", &mut script, |line| lines.push(line.to_owned()))
            .unwrap();
        assert!(!good);
        assert_eq!(lines, ["one", "two"]);
        let error = steps.run("test-step", "a script", &mut script).unwrap_err().to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("test-step.log"),
            "{error}"
        );
    }
}
