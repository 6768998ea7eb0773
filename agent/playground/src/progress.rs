//! What a long command tells meanwhile: a spinner on a terminal, plain lines elsewhere.

use std::{
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use owo_colors::OwoColorize;

/// The steps of a command, told on standard error.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    step: String,
    since: Instant,
}

impl Progress {
    pub fn new() -> Self {
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner:.cyan} {msg}") {
                bar.set_style(style.tick_chars("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏ "));
            }
            bar.enable_steady_tick(Duration::from_millis(80));
            bar
        });
        Self {
            bar,
            step: String::new(),
            since: Instant::now(),
        }
    }

    /// The next step begins, and the last one went well.
    pub fn step(&mut self, text: &str) {
        self.end_step();
        text.clone_into(&mut self.step);
        self.since = Instant::now();
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{text} …"));
        }
    }

    /// How far the step is.
    pub fn detail(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(format!("{} … {}", self.step, text.dimmed()));
        }
    }

    /// A line that stays.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }

    fn end_step(&mut self) {
        if self.step.is_empty() {
            return;
        }
        let took = format!("{:.1} s", self.since.elapsed().as_secs_f32());
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{} {} {}", "✓".green(), self.step, took.dimmed())),
            None => eprintln!("{} ({took})", self.step),
        }
        self.step.clear();
    }

    /// All went well.
    pub fn done(mut self) {
        self.end_step();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
