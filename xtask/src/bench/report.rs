//! What was measured, as rows of samples by contender: medians, ratios, JSON, Markdown and the terminal's table.

use std::fmt::Write as _;

use owo_colors::{OwoColorize, Stream};
use serde::Serialize;

use super::measure::{Better, Sample};

/// All rows of a benchmark.
#[derive(Debug, Serialize)]
pub struct Report {
    /// When and on what it ran.
    pub machine: Vec<(String, String)>,
    /// Name and description of each contender, in the order of the columns.
    pub contenders: Vec<(String, String)>,
    /// In the order in which they were first measured.
    pub rows: Vec<Row>,
    /// Measurements that failed: contender, measurement, why.
    pub failures: Vec<String>,
}

/// One row.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub name: String,
    /// Of the values.
    pub unit: &'static str,
    /// Which is better.
    pub better: Better,
    /// Values of each contender, in the order of the runs.
    pub samples: Vec<(String, Vec<f64>)>,
}

impl Row {
    /// The middle of a contender's values.
    pub fn median(&self, contender: &str) -> Option<f64> {
        let (_, values) = self.samples.iter().find(|(name, _)| name == contender)?;
        let mut values = values.clone();
        values.sort_by(f64::total_cmp);
        match values.len() {
            0 => None,
            odd if odd % 2 == 1 => Some(values[odd / 2]),
            even => Some(f64::midpoint(values[even / 2 - 1], values[even / 2])),
        }
    }

    /// By how much `one` is better than `other`: above 1 it is ahead.
    pub fn ratio(&self, one: &str, other: &str) -> Option<f64> {
        let (one, other) = (self.median(one)?, self.median(other)?);
        let ratio = if self.better == Better::Higher {
            one / other
        } else {
            other / one
        };
        ratio.is_finite().then_some(ratio)
    }
}

/// The row of a quiet pod's p99.
fn quiet(beside: &str) -> String {
    format!("quiet pod {beside}, p99")
}

/// The column that the others are compared with.
const OURS: &str = "undercurrent";
/// The ceiling: no ratio is made with it.
const BASE: &str = "no-mesh";

impl Report {
    /// Without values yet.
    pub fn new(machine: Vec<(String, String)>, contenders: Vec<(String, String)>) -> Self {
        Report {
            machine,
            contenders,
            rows: Vec::new(),
            failures: Vec::new(),
        }
    }

    /// Takes in what one measurement of one contender gave.
    pub fn add(&mut self, contender: &str, samples: Vec<Sample>) {
        for sample in samples {
            let at = self
                .rows
                .iter()
                .position(|row| row.name == sample.row && row.unit == sample.unit);
            let at = at.unwrap_or_else(|| {
                let Sample {
                    row: name,
                    unit,
                    better,
                    ..
                } = sample.clone();
                self.rows.push(Row {
                    name,
                    unit,
                    better,
                    samples: Vec::new(),
                });
                self.rows.len() - 1
            });
            let columns = &mut self.rows[at].samples;
            match columns.iter_mut().find(|(name, _)| name == contender) {
                Some((_, values)) => values.push(sample.value),
                None => columns.push((contender.to_owned(), vec![sample.value])),
            }
        }
    }

    /// Adds what a noisy neighbour does to each contender's quiet pod: how many times its p99 is that of the pod alone.
    pub fn add_slowdowns(&mut self) {
        let Some(alone) = self.rows.iter().position(|row| row.name == quiet("alone")) else {
            return;
        };
        let beside = |row: &&Row| row.name.starts_with("quiet pod beside") && row.name.ends_with("p99");
        let slowdown = |row: &Row| {
            let times = |name: &String| Some(row.median(name)? / self.rows[alone].median(name)?);
            let of = |(name, _): &(String, Vec<f64>)| Some((name.clone(), vec![times(name)?]));
            Row {
                name: format!("{}, of alone", row.name),
                unit: "×",
                better: Better::Lower,
                samples: row.samples.iter().filter_map(of).collect(),
            }
        };
        let slowdowns: Vec<Row> = self.rows.iter().filter(beside).map(slowdown).collect();
        for row in slowdowns.into_iter().rev() {
            let beside = self.rows.iter().position(|other| row.name.starts_with(&other.name));
            self.rows.insert(beside.map_or(self.rows.len(), |at| at + 1), row);
        }
    }

    /// Contenders that ours is compared with.
    pub fn rivals(&self) -> impl Iterator<Item = &str> {
        let ours = self.contenders.iter().any(|(name, _)| name == OURS);
        self.contenders
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(move |name| ours && *name != OURS && *name != BASE)
    }

    fn header(&self) -> Vec<String> {
        let mut header = vec!["measure".to_owned(), "unit".to_owned()];
        header.extend(self.contenders.iter().map(|(name, _)| name.clone()));
        header.extend(self.rivals().map(|rival| format!("ahead of {rival}")));
        header
    }

    fn cells(&self, row: &Row) -> Vec<String> {
        let mut cells = vec![row.name.clone(), row.unit.to_owned()];
        cells.extend(
            self.contenders
                .iter()
                .map(|(name, _)| row.median(name).map_or_else(|| "–".to_owned(), number)),
        );
        let ratio = |rival| {
            row.ratio(OURS, rival)
                .map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}×"))
        };
        cells.extend(self.rivals().map(ratio));
        cells
    }

    /// For people, and to be kept.
    pub fn markdown(&self) -> String {
        let mut text = "# L4 benchmark\n\n".to_owned();
        for (name, value) in &self.machine {
            let _ = writeln!(text, "- {name}: {value}");
        }
        text += "\nMedians. \"Ahead\" is how many times better undercurrent is: faster, or cheaper; above 1 it is ahead.\n\n";
        let header = self.header();
        let _ = writeln!(text, "| {} |", header.join(" | "));
        let _ = writeln!(text, "|---|---|{}", "--:|".repeat(header.len() - 2));
        for row in &self.rows {
            let _ = writeln!(text, "| {} |", self.cells(row).join(" | "));
        }
        text += "\n## What was compared\n\n";
        for (name, about) in &self.contenders {
            let _ = writeln!(text, "- **{name}**: {about}.");
        }
        for failure in &self.failures {
            let _ = writeln!(text, "- **Failed**: {failure}");
        }
        text += METHOD;
        text
    }

    /// For the terminal: aligned, and coloured by who is ahead.
    pub fn table(&self) -> String {
        let mut lines = vec![self.header()];
        lines.extend(self.rows.iter().map(|row| self.cells(row)));
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
        let mut text = String::new();
        for (at, line) in lines.iter().enumerate() {
            for (column, cell) in line.iter().enumerate() {
                let pad = " ".repeat(widths[column] - cell.chars().count());
                let padded = if column < 2 {
                    format!("{cell}{pad}")
                } else {
                    format!("{pad}{cell}")
                };
                let _ = write!(
                    text,
                    "{}  ",
                    coloured(&padded, at == 0, column >= 2 + self.contenders.len())
                );
            }
            text.truncate(text.trim_end_matches(' ').len());
            text.push('\n');
        }
        text
    }
}

fn coloured(cell: &str, head: bool, ratio: bool) -> String {
    let value: Option<f64> = cell.trim().trim_end_matches('×').parse().ok();
    match value {
        _ if head => cell.if_supports_color(Stream::Stdout, |text| text.bold()).to_string(),
        Some(ahead) if ratio && ahead >= 1.0 => cell.if_supports_color(Stream::Stdout, |text| text.green()).to_string(),
        Some(_) if ratio => cell.if_supports_color(Stream::Stdout, |text| text.red()).to_string(),
        _ => cell.to_owned(),
    }
}

const METHOD: &str = "
## How

- One lab, made by the playground: two nodes, a client's pod on the first and a server's on the second, the same links
  for every contender. The load generator and server are single-threaded programs on bare epoll. Everything shares the
  machine's cores, so the load's own cost is part of every result.
- In turn: each measurement is made on every contender before the next one, and all of them again in each run.
- Requests and responses have 128 bytes, one in flight per connection. New connections: 16 at a time, one request each,
  closed by the server.
- A quiet pod sends one request after the other, alone and beside a neighbour of its own kind on the same two nodes: behind
  the same agents, with sidecars of its own (Envoy), or without either. Where the machine has few cores, much of what
  the neighbour costs is the kernel's scheduling: what it does without a mesh is the measure.
- CPU of a proxy is the user and system time of its process. What the kernel does in softirq on its behalf is counted
  where it happens to run; \"whole machine\" has it all, with the load's.
- Memory is what is resident (RSS) of fresh proxies, before any other load; once.
";

/// Three significant digits, thousands in `k`.
pub fn number(value: f64) -> String {
    match value.abs() {
        high if high >= 100_000.0 => format!("{:.0}k", value / 1e3),
        high if high >= 10_000.0 => format!("{:.1}k", value / 1e3),
        high if high >= 100.0 => format!("{value:.0}"),
        high if high >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let names = ["no-mesh", "undercurrent", "envoy"].map(|name| (name.to_owned(), "about".to_owned()));
        let mut report = Report::new(Vec::new(), names.to_vec());
        for (contender, speeds, cost) in [
            ("no-mesh", [40.0, 42.0, 41.0], None),
            ("undercurrent", [9.0, 30.0, 12.0], Some(0.5)),
            ("envoy", [8.0, 6.0, 7.0], Some(1.0)),
        ] {
            for value in speeds {
                let sample = Sample {
                    row: "bulk".into(),
                    unit: "Gb/s",
                    better: Better::Higher,
                    value,
                };
                report.add(contender, vec![sample]);
            }
            let cost = cost.map(|value| Sample {
                row: "bulk".into(),
                unit: "CPU s/GB",
                better: Better::Lower,
                value,
            });
            report.add(contender, cost.into_iter().collect());
        }
        report
    }

    #[test]
    fn medians_and_ratios_know_which_way_is_better() {
        let report = report();
        assert_eq!(report.rows[0].median("undercurrent"), Some(12.0));
        assert_eq!(report.rows[0].ratio("undercurrent", "envoy"), Some(12.0 / 7.0));
        assert_eq!(report.rows[1].ratio("undercurrent", "envoy"), Some(2.0));
        assert_eq!(report.rows[1].ratio("undercurrent", "no-mesh"), None);
    }

    #[test]
    fn markdown_has_a_column_for_each_and_a_ratio_for_each_rival() {
        let text = report().markdown();
        assert!(
            text.contains("| measure | unit | no-mesh | undercurrent | envoy | ahead of envoy |"),
            "{text}"
        );
        assert!(text.contains("| bulk | Gb/s | 41.0 | 12.0 | 7.00 | 1.71× |"), "{text}");
        assert!(text.contains("| bulk | CPU s/GB | – | 0.50 | 1.00 | 2.00× |"), "{text}");
    }

    #[test]
    fn a_noisy_neighbour_is_told_by_what_it_does_to_each() {
        let mut report = report();
        for (row, values) in [("alone", [20.0, 50.0]), ("beside noise", [30.0, 200.0])] {
            for (contender, value) in ["no-mesh", "undercurrent"].into_iter().zip(values) {
                let sample = Sample {
                    row: quiet(row),
                    unit: "µs",
                    better: Better::Lower,
                    value,
                };
                report.add(contender, vec![sample]);
            }
        }
        report.add_slowdowns();
        let row = report.rows.last().unwrap();
        assert_eq!(row.name, "quiet pod beside noise, p99, of alone");
        assert_eq!(
            (row.median("no-mesh"), row.median("undercurrent")),
            (Some(1.5), Some(4.0))
        );
    }

    #[test]
    fn the_table_is_aligned() {
        let table = report().table();
        let widths: Vec<usize> = table.lines().map(|line| line.chars().count()).collect();
        assert!(widths.windows(2).all(|pair| pair[0] == pair[1]), "{table}");
    }
}
