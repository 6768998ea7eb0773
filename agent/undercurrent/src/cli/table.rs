//! Text in columns.

use owo_colors::{OwoColorize, Style};

/// A cell: its text, and how it looks on a terminal.
#[derive(Clone)]
pub struct Cell(pub String, pub Style);

impl Cell {
    /// Nothing particular.
    pub fn plain(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new())
    }

    /// As it should be.
    pub fn good(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new().green())
    }

    /// Worth a look.
    pub fn warn(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new().yellow())
    }

    /// Not as it should be.
    pub fn bad(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new().red())
    }

    /// Beside the point.
    pub fn dim(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new().dimmed())
    }

    /// A heading.
    pub fn bold(text: impl Into<String>) -> Self {
        Self(text.into(), Style::new().bold())
    }

    /// With or without its colour.
    pub fn shown(&self, colours: bool) -> String {
        let text = clean(&self.0);
        if colours { text.style(self.1).to_string() } else { text }
    }
}

/// Nothing that came from elsewhere may move a terminal's cursor.
fn clean(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(plain).collect()
}

/// Columns as wide as their widest cell; the last is as long as it is.
pub fn table(header: &[&str], rows: Vec<Vec<Cell>>, colours: bool) -> String {
    let header = header.iter().map(|name| Cell::bold(*name)).collect();
    lines(
        &std::iter::once(header).chain(rows).collect::<Vec<Vec<Cell>>>(),
        colours,
    )
}

/// The same without a header.
pub fn lines(rows: &[Vec<Cell>], colours: bool) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells.map(|cell| cell.0.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
            line.push_str(&cell.shown(colours));
            if index + 1 < row.len() {
                line.push_str(&" ".repeat(width - cell.0.chars().count() + 2));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Text in lines of at most so many characters; a word that is longer has its own.
pub fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().map_or(0, |line| line.chars().count());
        if line > 0 && line + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_nothing_moves_the_cursor() {
        let rows = vec![
            vec![Cell::plain("a"), Cell::plain("b")],
            vec![Cell::plain("long\u{1b}[2J"), Cell::bad("x")],
        ];
        assert_eq!(
            table(&["ONE", "TWO"], rows, false),
            "ONE       TWO\na         b\nlong\u{fffd}[2J  x\n"
        );
    }

    #[test]
    fn lines_are_not_longer_than_they_may_be() {
        let text = "one two three four five";
        assert_eq!(wrap(text, 9), ["one two", "three", "four five"]);
        assert_eq!(wrap("unbreakable", 3), ["unbreakable"]);
        assert_eq!(wrap("", 3), [""]);
    }
}
