//! `jobs compare`: two jobs beside each other.

use std::process::ExitCode;

use anyhow::bail;
use comfy_table::Cell;
use jiff::Timestamp;
use omotes_orchestrator::actions::names::resolve;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::JobName;
use omotes_orchestrator::domain::overview::{Overview, Story, compare};
use omotes_orchestrator::store::Connection;
use uuid::Uuid;

use super::story::name_parameters;
use crate::cli::{connect, print, table};

/// # Errors
/// Postgres is not there, or one of them is not known.
pub(super) fn run(config: &Config, names: &[JobName; 2], json: bool) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let ids = resolve(&mut connection, names)?;
    let one = story(config, &mut connection, ids[0])?;
    let other = story(config, &mut connection, ids[1])?;
    let lines = compare(&one, &other, Timestamp::now());
    if json {
        print(&(serde_json::to_string_pretty(&lines)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let short = |id: Uuid| id.to_string()[..8].to_owned();
    let mut table = table(&[]);
    // Ids are written in small letters, also where other headings are not.
    table.set_header([String::new(), short(ids[0]), short(ids[1])]);
    for line in &lines {
        let text = |text: &Option<String>| Cell::new(text.as_deref().unwrap_or("-"));
        let mark = if line.one == line.other { " " } else { "*" };
        let name = format!("{mark} {}", line.what);
        table.add_row([Cell::new(name), text(&line.one), text(&line.other)]);
    }
    print(&format!("{}\n", table.trim_fmt()))?;
    Ok(ExitCode::SUCCESS)
}

fn story(config: &Config, connection: &mut Connection, id: Uuid) -> anyhow::Result<Story> {
    let Some(mut story) = connection.story(id)? else {
        bail!("job {id} is unknown");
    };
    // Of others nothing is to be known.
    Overview::default().explain(std::slice::from_mut(&mut story.job), Timestamp::now());
    name_parameters(config, &mut story);
    Ok(story)
}
