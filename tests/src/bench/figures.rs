//! Figures, their medians and ratios.

use std::fmt::Write as _;

/// All figures so far.
#[derive(Debug)]
pub(super) struct Figures {
    runtimes: Vec<String>,
    /// What, unit, and one list of values for each runtime.
    rows: Vec<(String, &'static str, Vec<Vec<f64>>)>,
}

impl Figures {
    /// No figures yet, of these runtimes; the first one is what the others are compared with.
    pub(super) fn new(runtimes: Vec<String>) -> Self {
        Self { runtimes, rows: Vec::new() }
    }

    /// Takes one value.
    pub(super) fn add(&mut self, what: &str, unit: &'static str, runtime: &str, value: f64) {
        let Some(column) = self.runtimes.iter().position(|name| name == runtime) else { return };
        let row = self.rows.iter().position(|(name, ..)| name == what).unwrap_or_else(|| {
            self.rows.push((what.to_owned(), unit, vec![Vec::new(); self.runtimes.len()]));
            self.rows.len() - 1
        });
        self.rows[row].2[column].push(value);
    }

    /// The table, in Markdown.
    pub(super) fn table(&self) -> String {
        let mut text = format!("\nMedians on {}.\n\n| what | unit |", super::machine());
        for (column, name) in self.runtimes.iter().enumerate() {
            let ratio = if column > 0 { " ratio |" } else { "" };
            write!(text, " {name} |{ratio}").expect("writing to a String cannot fail");
        }
        text.push_str("\n| --- | --- |");
        text.push_str(&" ---: |".repeat(self.runtimes.len() * 2 - 1));
        for (what, unit, columns) in &self.rows {
            let medians: Vec<_> = columns.iter().map(|values| median(values)).collect();
            write!(text, "\n| {what} | {unit} |").expect("writing to a String cannot fail");
            for (column, value) in medians.iter().enumerate() {
                let cell = value.map_or_else(|| "-".into(), shown);
                let ratio = value.zip(medians[0]).map(|(ours, base)| ours / base);
                let ratio = ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.2}"));
                let ratio = if column > 0 { format!(" {ratio} |") } else { String::new() };
                write!(text, " {cell} |{ratio}").expect("writing to a String cannot fail");
            }
        }
        text
    }
}

fn shown(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(if sorted.len() % 2 == 1 { upper } else { f64::midpoint(sorted[middle - 1], upper) })
}

#[cfg(test)]
mod tests {
    use super::{Figures, median};

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
        assert_eq!(median(&[9.0, 1.0, 5.0]), Some(5.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn a_figure_that_one_runtime_lacks_has_no_ratio() {
        let mut figures = Figures::new(vec!["runc".into(), "ours".into()]);
        figures.add("both", "s", "runc", 2.0);
        figures.add("both", "s", "ours", 3.0);
        figures.add("one", "s", "ours", 1.0);
        let table = figures.table();
        assert!(table.contains("| both | s | 2.00 | 3.00 | 1.50 |"), "{table}");
        assert!(table.contains("| one | s | - | 1.00 | - |"), "{table}");
    }
}
