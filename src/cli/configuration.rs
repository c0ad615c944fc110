//! `config`: which configuration is in force, and where it comes from.

use std::collections::HashSet;
use std::process::ExitCode;

use clap::Args;
use comfy_table::Cell;
use omotes_orchestrator::config::{Config, Setting};
use serde_json::json;

use super::{print, table};

#[derive(Args)]
pub(crate) struct Configuration {
    /// As JSON.
    #[arg(long)]
    json: bool,
}

/// `from_file` are the variables that the `.env` file has set.
///
/// # Errors
/// The configuration is faulty; what is in force is shown all the same.
pub(crate) fn run(
    configuration: &Configuration,
    from_file: &HashSet<String>,
) -> anyhow::Result<ExitCode> {
    let settings = Config::settings(&Config::variable);
    let source = |setting: &Setting| match setting.is_given {
        true if from_file.contains(&setting.name) => ".env",
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
            let row = [&setting.name, &setting.value, source(setting)];
            table.add_row(row.map(Cell::new));
        }
        print(&format!("{}\n", table.trim_fmt()))?;
    }
    Config::from_environment()?;
    Ok(ExitCode::SUCCESS)
}
