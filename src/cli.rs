//! What the commands share: their way to the deployment, and how they print.

use std::io::{self, ErrorKind, IsTerminal, Write};

use anyhow::Context;
use comfy_table::{ContentArrangement, Table, presets};
use console::Term;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{Overview, Queues};
use omotes_orchestrator::domain::workflow::Catalogue;
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::store::{Connection, Store};
use omotes_orchestrator::text_file;

pub(crate) mod configuration;
pub(crate) mod doctor;
pub(crate) mod jobs;
pub(crate) mod queues;

/// # Errors
/// Postgres is not there.
pub(crate) fn connect(config: &Config) -> anyhow::Result<Connection> {
    let store = Store::new(&config.postgres, 1);
    store
        .connection()
        .with_context(|| config.postgres.to_string())
}

/// What is going on in the deployment. Without RabbitMQ there are no workers in it, and without the
/// workflow definitions only the workflows of jobs.
///
/// # Errors
/// The connection is lost.
pub(crate) fn overview(
    config: &Config,
    connection: &mut Connection,
    watch: Option<&Watch>,
) -> anyhow::Result<Overview> {
    let defined = defined(config);
    let rows = connection.workflows(&defined)?;
    let names: Vec<_> = rows.keys().cloned().collect();
    let queues = watch.and_then(|watch| watch.look(config, &names).ok());
    Ok(Overview {
        has_rows: true,
        rows,
        defined,
        queues: queues.map(|queues| Queues {
            at: jiff::Timestamp::now(),
            queues,
            without_worker: Default::default(),
        }),
        ..Overview::default()
    })
}

/// The workflows that the definitions have, none where those cannot be read.
pub(crate) fn defined(config: &Config) -> Vec<String> {
    let text = text_file::read(&config.workflow_config_path).ok();
    let catalogue = text.and_then(|text| Catalogue::parse(&text).ok());
    catalogue.map_or_else(Vec::new, |catalogue| catalogue.names())
}

/// A table as wide as the terminal; without wrapping where there is none.
pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(|text| text.to_uppercase()));
    if io::stdout().is_terminal() {
        let (_, columns) = Term::stdout().size();
        table.set_content_arrangement(ContentArrangement::Dynamic);
        table.set_width(columns);
    }
    table
}

/// A warning beside what the command prints.
pub(crate) fn say_aside(warning: &str) {
    // Nobody may be there to read it.
    let _ = writeln!(io::stderr(), "warning: {warning}");
}

/// Prints to standard output. That its reader has gone, as `head` does, is no failure.
///
/// # Errors
/// It cannot be written to.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        written => written.context("standard output"),
    }
}
