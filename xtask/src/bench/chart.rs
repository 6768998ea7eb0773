//! The report as a picture: one panel for each headline row, a bar for each contender.

use std::fmt::Write as _;

use super::measure::Better;
use super::report::{Report, Row, number};

const COLOURS: [&str; 6] = ["#9aa5b1", "#1f77b4", "#e0852d", "#3f9b6d", "#8a5fb0", "#b5504c"];
const WIDTH: usize = 980;
const PANEL: usize = 310;
const BAR: usize = 18;
const COLUMNS: usize = 3;

/// Rows worth a panel: the sums, not each side.
fn headline(row: &Row) -> bool {
    !row.name.contains("'s proxy") && !row.name.contains("whole machine") && !row.name.contains("p50")
        || row.name.starts_with("memory per idle conn")
}

/// An SVG document.
pub fn svg(report: &Report) -> String {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| headline(row)).collect();
    let height = 34 + BAR * report.contenders.len();
    let lines = rows.len().div_ceil(COLUMNS);
    let total = 60 + lines * (height + 14);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{total}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let mut x = 20;
    for (at, (name, _)) in report.contenders.iter().enumerate() {
        let _ = writeln!(
            svg,
            "<rect x=\"{x}\" y=\"18\" width=\"12\" height=\"12\" fill=\"{}\"/>",
            colour(at)
        );
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"28\" fill=\"#222\">{}</text>",
            x + 18,
            escape(name)
        );
        x += 40 + name.len() * 8;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{x}\" y=\"28\" fill=\"#888\">↑ more is better, ↓ less is better</text>"
    );
    for (at, row) in rows.iter().enumerate() {
        let (left, top) = (20 + (at % COLUMNS) * (PANEL + 12), 50 + (at / COLUMNS) * (height + 14));
        panel(&mut svg, report, row, left, top);
    }
    svg + "</svg>\n"
}

fn panel(svg: &mut String, report: &Report, row: &Row, left: usize, top: usize) {
    let medians: Vec<Option<f64>> = report.contenders.iter().map(|(name, _)| row.median(name)).collect();
    let most = medians.iter().flatten().copied().fold(f64::MIN_POSITIVE, f64::max);
    let arrow = if row.better == Better::Higher { "↑" } else { "↓" };
    let _ = writeln!(
        svg,
        "<text x=\"{left}\" y=\"{}\" fill=\"#222\" font-weight=\"600\">{}, {} <tspan fill=\"#888\" \
         font-weight=\"400\">{arrow}</tspan></text>",
        top + 14,
        escape(&row.name),
        escape(row.unit)
    );
    for (at, median) in medians.iter().enumerate() {
        let y = top + 22 + at * BAR;
        let Some(value) = median else {
            let _ = writeln!(svg, "<text x=\"{left}\" y=\"{}\" fill=\"#aaa\">–</text>", y + 12);
            continue;
        };
        let length = ((value / most) * (PANEL - 70) as f64).max(1.0);
        let _ = writeln!(
            svg,
            "<rect x=\"{left}\" y=\"{y}\" width=\"{length:.1}\" height=\"{}\" fill=\"{}\"/>",
            BAR - 4,
            colour(at)
        );
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{}\" fill=\"#222\">{}</text>",
            left as f64 + length + 5.0,
            y + 11,
            number(*value)
        );
    }
}

fn colour(at: usize) -> &'static str {
    COLOURS[at % COLOURS.len()]
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::Sample;

    #[test]
    fn the_longest_bar_belongs_to_the_largest_value_and_names_are_escaped() {
        let names = ["a<b".to_owned(), "c".to_owned()].map(|name| (name, String::new()));
        let mut report = Report::new(Vec::new(), names.to_vec());
        let value = |value| {
            vec![Sample {
                row: "bulk".into(),
                unit: "Gb/s",
                better: Better::Higher,
                value,
            }]
        };
        report.add("a<b", value(2.0));
        report.add("c", value(1.0));
        let svg = svg(&report);
        assert!(
            svg.contains("width=\"240.0\"") && svg.contains("width=\"120.0\""),
            "{svg}"
        );
        assert!(svg.contains("a&lt;b") && !svg.contains("a<b"), "{svg}");
    }
}
