//! How the demo looks: plain text, with colour on a terminal.

use std::io::{IsTerminal, Write, stdout};

use owo_colors::{OwoColorize, Style};

/// The terminal, and the claims that did not hold.
pub(super) struct Stage {
    colour: bool,
    claims: u32,
    failed: u32,
}

impl Stage {
    pub fn new() -> Self {
        Self {
            colour: stdout().is_terminal(),
            claims: 0,
            failed: 0,
        }
    }

    fn print(&self, text: &str, style: Style) {
        // Nobody reads any more: the claims are still checked.
        let _ = if self.colour {
            writeln!(stdout(), "{}", text.style(style))
        } else {
            writeln!(stdout(), "{text}")
        };
    }

    pub fn title(&self, text: &str) {
        self.print(
            &format!("\n{text}\n{}", "═".repeat(text.chars().count())),
            Style::new().bold().cyan(),
        );
    }

    pub fn heading(&self, text: &str) {
        self.print(
            &format!("\n{text}\n{}", "─".repeat(text.chars().count())),
            Style::new().bold(),
        );
    }

    pub fn say(&self, text: &str) {
        self.print(text, Style::new());
    }

    pub fn code(&self, text: &str) {
        self.print(&format!("    {text}"), Style::new().yellow());
    }

    pub fn command(&self, command: &str, what: &str) {
        let padded = format!("    {command:<64}");
        let line = if self.colour {
            format!("{}{}", padded.cyan(), what.dimmed())
        } else {
            format!("{padded}{what}")
        };
        self.print(&line, Style::new());
    }

    pub fn table<R: IntoIterator<Item = String>>(&self, header: &[&str], rows: impl IntoIterator<Item = R>) {
        let rows: Vec<Vec<String>> = rows.into_iter().map(|row| row.into_iter().collect()).collect();
        let width = |column: usize| {
            let cells = rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count());
            cells.chain([header[column].len()]).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..header.len()).map(width).collect();
        let line = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = "    ".to_owned();
            for (cell, width) in cells.zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            line.trim_end().to_owned()
        };
        self.print(&line(&mut header.iter().copied()), Style::new().dimmed());
        for row in &rows {
            self.print(&line(&mut row.iter().map(String::as_str)), Style::new());
        }
    }

    /// Says something that was checked.
    pub fn claim(&mut self, holds: bool, text: &str) {
        self.claims += 1;
        if holds {
            self.print(&format!("  ✓ {text}"), Style::new().green());
        } else {
            self.failed += 1;
            self.print(&format!("  ✗ NOT SO: {text}"), Style::new().red().bold());
        }
    }

    /// The end; how many claims did not hold.
    pub fn end(self) -> u32 {
        let good = self.claims - self.failed;
        self.print(
            &format!("\n{good} of {} claims hold.", self.claims),
            Style::new().bold(),
        );
        self.failed
    }
}
