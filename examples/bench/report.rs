//! The figures of a run, as a table and as JSON, and how they have changed.

use std::fs;
use std::path::Path;

use anyhow::Context;
use serde::{Deserialize, Serialize};

#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// What it was measured on.
    machine: String,
    figures: Vec<Figure>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Figure {
    name: String,
    value: f64,
    /// What the least that can do the same reaches; for rates only.
    floor: Option<f64>,
    more_is_better: bool,
}

impl Report {
    /// A rate, and the floor's.
    pub fn rate(&mut self, name: &str, value: f64, floor: f64) {
        self.add(name, value, Some(floor), true);
    }

    /// A rate to which no floor compares.
    pub fn bare_rate(&mut self, name: &str, value: f64) {
        self.add(name, value, None, true);
    }

    /// Something that is better smaller.
    pub fn cost(&mut self, name: &str, value: f64) {
        self.add(name, value, None, false);
    }

    fn add(&mut self, name: &str, value: f64, floor: Option<f64>, more_is_better: bool) {
        eprintln!("{name}: {value:.2}");
        self.figures.push(Figure {
            name: name.to_owned(),
            value,
            floor,
            more_is_better,
        });
    }

    pub fn value(&self, name: &str) -> Option<f64> {
        let figure = self.figures.iter().find(|figure| figure.name == name)?;
        Some(figure.value)
    }

    pub fn print(&self) {
        println!(
            "{:62} {:>10} {:>10} {:>6}",
            "", "measured", "floor", "share"
        );
        for figure in &self.figures {
            print!("{:62} {:>10.2}", figure.name, figure.value);
            match figure.floor {
                Some(floor) => println!(" {floor:>10.2} {:>5.0}%", figure.value / floor * 100.0),
                None => println!(),
            }
        }
    }

    /// # Errors
    /// The file cannot be written.
    pub fn save(&mut self, path: &Path) -> anyhow::Result<()> {
        self.machine = machine();
        let json = serde_json::to_string_pretty(self)?;
        fs::write(path, json + "\n").with_context(|| path.display().to_string())
    }

    /// # Errors
    /// The file cannot be read, or is no report.
    pub fn load(path: &Path) -> anyhow::Result<Report> {
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    }

    /// Prints the change of every figure that both have.
    pub fn compare(&self, before: &Report) {
        println!("\ncompared with {}:", before.machine);
        for figure in &self.figures {
            let Some(old) = before.figures.iter().find(|old| old.name == figure.name) else {
                continue;
            };
            let ratio = figure.value / old.value;
            let better = (ratio > 1.0) == figure.more_is_better;
            let word = match (0.95..=1.05).contains(&ratio) {
                true => "",
                false if better => "better",
                false => "worse",
            };
            println!(
                "{:62} {:>10.2} {:>10.2} {ratio:>6.2} {word}",
                figure.name, old.value, figure.value
            );
        }
    }
}

/// What names the rate of a backlog, and what its costs, by whom.
const RATE: &str = " per second";
const COSTS: [&str; 3] = [
    ", CPU ms each of the service",
    ", CPU ms each of RabbitMQ",
    ", CPU ms each of Postgres",
];

impl Report {
    /// Everything as tables in Markdown: the rates with what each message costs, and the rest.
    pub fn markdown(&self) -> String {
        let mut text = format!("\nMeasured on {}.\n\n", self.machine);
        text += "| backlog | per second | of the floor | CPU ms each: service | RabbitMQ | Postgres |\n";
        text += "|---|---:|---:|---:|---:|---:|\n";
        let mut others = String::new();
        for figure in &self.figures {
            if let Some(what) = figure.name.strip_suffix(RATE) {
                let floor = figure.floor.map_or_else(String::new, |floor| {
                    format!("{:.0} %", figure.value / floor * 100.0)
                });
                let costs = COSTS.map(|cost| {
                    let value = self.value(&format!("{what}{cost}"));
                    value.map_or_else(String::new, |value| format!("{value:.2}"))
                });
                let costs = costs.join(" | ");
                text += &format!("| {what} | {:.0} | {floor} | {costs} |\n", figure.value);
            } else if !COSTS.iter().any(|cost| figure.name.ends_with(cost)) {
                others += &format!("| {} | {:.1} |\n", figure.name, figure.value);
            }
        }
        text + "\n| | |\n|---|---:|\n" + &others + "\n"
    }
}

/// Processor, cores and memory of this machine.
fn machine() -> String {
    let field = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or_else(String::new, |(_, value)| value.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!(
        "{cores} cores of {}, {} of memory",
        field("/proc/cpuinfo", "model name"),
        field("/proc/meminfo", "MemTotal")
    )
}
