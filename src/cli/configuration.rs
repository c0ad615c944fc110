//! `config`: which configuration is in force, and where it comes from.

use std::process::ExitCode;

use clap::Args;
use comfy_table::Cell;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::config::{Config, Setting};
use omotes_orchestrator::telemetry::report::harmless;
use serde_json::json;

use super::{print, table, warn};

#[derive(Args)]
pub(crate) struct Configuration {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// # Errors
/// The configuration is faulty; what is in force is shown all the same.
pub(crate) fn run(
    configuration: &Configuration,
    environment: &Environment,
) -> anyhow::Result<ExitCode> {
    let settings = Config::settings(&|name| environment.variable(name));
    let source = |setting: &Setting| match setting.is_given {
        true if environment.is_from_file(&setting.name) => ".env",
        true => "environment",
        false => "default",
    };
    if configuration.json {
        let settings: Vec<_> = settings
            .iter()
            .map(|one| json!({"name": one.name, "value": one.value, "source": source(one)}))
            .collect();
        print(&(serde_json::to_string_pretty(&settings)? + "\n"))?;
    } else {
        let mut table = table(&["variable", "value", "from"]);
        for setting in &settings {
            let value = harmless(&setting.value);
            let row = [&setting.name, value.as_str(), source(setting)];
            table.add_row(row.map(Cell::new));
        }
        print(&format!("{}\n", table.trim_fmt()))?;
    }
    for near_miss in environment.near_misses() {
        warn(&near_miss);
    }
    environment.config()?;
    Ok(ExitCode::SUCCESS)
}
