//! Completions: the shells ask this program, which knows workflows, states and ids. Whoever presses a key
//! is not to wait, and is told nothing: without an answer in time there are no candidates.

use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::engine::CompletionCandidate;
use clap_complete::env::Shells;
use clap_complete::{CompleteEnv, Shell};
use crossbeam_channel::bounded;
use omotes_orchestrator::config::environment::Environment;
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::overview::{Filter, JobView, state_words};
use omotes_orchestrator::store::{Connection, Store};
use omotes_orchestrator::telemetry::report::one_line;

use super::Cli;

/// By which the shells' scripts ask; its value is the shell.
const VARIABLE: &str = "OMOTES_ORCHESTRATOR_COMPLETE";
/// How long Postgres may take.
const PATIENCE: Duration = Duration::from_millis(800);
/// Jobs that are offered of each kind.
const MOST: u16 = 200;

/// Answers a shell, and ends the process, if one asks.
pub(crate) fn answer() {
    CompleteEnv::with_factory(Cli::command)
        .var(VARIABLE)
        .complete();
}

/// What a shell reads to have completions.
///
/// # Errors
/// The shell is none that has them.
pub(crate) fn script(shell: Shell) -> anyhow::Result<String> {
    let command = Cli::command();
    let name = command.get_name();
    let shells = Shells::builtins();
    let completer = shells
        .completer(&shell.to_string())
        .context("no such shell")?;
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, name, name, name, &mut script)
        .map_err(|error: io::Error| anyhow::anyhow!(error))?;
    Ok(String::from_utf8_lossy(&script).into_owned())
}

/// All commands, as they are shown in manuals.
pub(crate) fn commands() -> Command {
    Cli::command()
}

pub(crate) fn states() -> Vec<CompletionCandidate> {
    state_words()
        .into_iter()
        .map(CompletionCandidate::new)
        .collect()
}

pub(crate) fn workflows() -> Vec<CompletionCandidate> {
    catalogue_names(|catalogue| catalogue.names())
}

/// The task queues that may have limits.
pub(crate) fn tasks() -> Vec<CompletionCandidate> {
    catalogue_names(|catalogue| catalogue.tasks().into_iter().map(str::to_owned).collect())
}

fn catalogue_names(
    names: impl Fn(&omotes_orchestrator::domain::workflow::Catalogue) -> Vec<String>,
) -> Vec<CompletionCandidate> {
    let catalogue = configuration()
        .and_then(|config| config::read_catalogue(&config.workflow_config_path).ok());
    let names = catalogue.map(|catalogue| names(&catalogue));
    names
        .unwrap_or_default()
        .into_iter()
        .map(CompletionCandidate::new)
        .collect()
}

pub(crate) fn live_jobs() -> Vec<CompletionCandidate> {
    asked(|connection| listed(connection, &[false]))
}

pub(crate) fn jobs() -> Vec<CompletionCandidate> {
    asked(|connection| listed(connection, &[false, true]))
}

pub(crate) fn workers() -> Vec<CompletionCandidate> {
    asked(|connection| {
        let workers = connection.workers().ok()?.workers.into_iter();
        let candidate = |host: String, state: &'static str| {
            CompletionCandidate::new(host).help(Some(state.into()))
        };
        Some(
            workers
                .map(|worker| candidate(worker.host, worker.state.text()))
                .collect(),
        )
    })
}

fn listed(connection: &mut Connection, kinds: &[bool]) -> Option<Vec<CompletionCandidate>> {
    let mut candidates = Vec::new();
    for finished in kinds {
        let filter = Filter {
            finished: *finished,
            limit: MOST,
            ..Filter::default()
        };
        let jobs = connection.jobs(&filter, &[]).ok()?.jobs;
        candidates.extend(jobs.iter().map(candidate));
    }
    Some(candidates)
}

fn candidate(job: &JobView) -> CompletionCandidate {
    let help = format!("{} {}", job.shown(), one_line(&job.reference));
    CompletionCandidate::new(job.id.to_string()).help(Some(help.into()))
}

fn configuration() -> Option<Config> {
    let environment = Environment::with_file(Path::new(".env")).ok()?;
    environment.config().ok()
}

/// What Postgres says, if it does so in time. The thread ends with the process.
fn asked(
    ask: impl FnOnce(&mut Connection) -> Option<Vec<CompletionCandidate>> + Send + 'static,
) -> Vec<CompletionCandidate> {
    let (answer, answered) = bounded(1);
    let spawned = thread::Builder::new()
        .name("complete".to_owned())
        .spawn(move || {
            let found = configuration().and_then(|config| {
                let store = Store::for_viewers(&config.postgres).impatient(PATIENCE);
                ask(&mut store.connection().ok()?)
            });
            // The shell may have been answered.
            let _ = answer.send(found.unwrap_or_default());
        });
    match spawned {
        Ok(_) => answered.recv_timeout(PATIENCE).unwrap_or_default(),
        Err(_) => Vec::new(),
    }
}
