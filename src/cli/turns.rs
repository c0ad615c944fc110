//! What operators do about turns: limits of task queues, and jobs that wait for their turn.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::job::Priority;
use omotes_orchestrator::domain::overview::{JobState, QueueView};
use omotes_orchestrator::domain::turns::Limits;
use omotes_orchestrator::domain::workflow::Catalogue;
use omotes_orchestrator::store::{Connection, LimitChange, QueueChange, TurnChange};
use omotes_orchestrator::telemetry::report::one_line;
use uuid::Uuid;

use super::{Agreed, NOTHING_DONE, connect, print, say, say_aside, table};

/// Another limit for a queue.
#[derive(Args)]
pub(super) struct Limit {
    /// The task queue: the workflow's name, or the task of one of its steps.
    name: String,
    /// Tasks that may be handed to RabbitMQ and not started: a number, `unlimited`, or `default` for
    /// what the definition file says.
    #[arg(long, value_parser = change, required_unless_present = "max_running")]
    window: Option<QueueChange>,
    /// Tasks that may be handed to RabbitMQ and not ended, such as a licence has seats; likewise.
    #[arg(long, value_parser = change)]
    max_running: Option<QueueChange>,
}

/// A priority by its name.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Level {
    Low,
    Medium,
    High,
}

fn change(text: &str) -> Result<QueueChange, String> {
    match text {
        "default" => Ok(QueueChange::AsDefined),
        "unlimited" => Ok(QueueChange::Unlimited),
        number => match number.parse() {
            Ok(limit) if limit > 0 && i32::try_from(limit).is_ok() => Ok(QueueChange::To(limit)),
            Ok(_) | Err(_) => {
                Err("expected a number of tasks, at least 1, unlimited or default".to_owned())
            }
        },
    }
}

/// # Errors
/// Nobody knows the queue, or Postgres is not there.
pub(super) fn limit(config: &Config, limit: &Limit) -> anyhow::Result<ExitCode> {
    let window = limit.window.map(LimitChange::Window);
    let max_running = limit.max_running.map(LimitChange::MaxRunning);
    let changes: Vec<_> = window.into_iter().chain(max_running).collect();
    change_limits(config, &limit.name, &changes)
}

/// # Errors
/// The same.
pub(super) fn pause(config: &Config, name: &str, paused: bool) -> anyhow::Result<ExitCode> {
    change_limits(config, name, &[LimitChange::Paused(paused)])
}

fn change_limits(config: &Config, name: &str, changes: &[LimitChange]) -> anyhow::Result<ExitCode> {
    let catalogue = config::read_catalogue(&config.workflow_config_path)?;
    let mut connection = connect(config)?;
    check_name(&catalogue, &mut connection, name)?;
    connection.change_limits(name, changes)?;
    let limits = connection.queue_limits(catalogue.queue_limits())?;
    let limit = limits.get(name).copied().unwrap_or_default();
    say(format_args!("{}: {limit}", one_line(name)))?;
    Ok(ExitCode::SUCCESS)
}

/// Whether anything may wait at this queue.
fn check_name(
    catalogue: &Catalogue,
    connection: &mut Connection,
    name: &str,
) -> anyhow::Result<()> {
    let tasks = catalogue.tasks();
    if tasks.contains(name) || at_rest(connection)?.iter().any(|queue| queue.name == name) {
        return Ok(());
    }
    let listed = |names: BTreeSet<&str>| {
        let names: Vec<_> = names.into_iter().map(one_line).collect();
        names.join(", ")
    };
    match catalogue.definition(name) {
        Some(definition) => bail!(
            "{} has steps: name one of their tasks, {}",
            one_line(name),
            listed(definition.steps.tasks().collect())
        ),
        None => bail!(
            "no workflow has the task {}; there are {}",
            one_line(name),
            listed(tasks)
        ),
    }
}

/// The queues at which something waits or has had its turn, whatever their limits.
fn at_rest(connection: &mut Connection) -> anyhow::Result<Vec<QueueView>> {
    Ok(connection.turns(&Limits::new(), Duration::ZERO)?)
}

/// A line for each queue at which something waits or might have to.
///
/// # Errors
/// Postgres is not there.
pub(super) fn limits(config: &Config) -> anyhow::Result<ExitCode> {
    let catalogue = config::read_catalogue(&config.workflow_config_path)?;
    let mut connection = connect(config)?;
    let limits = connection.queue_limits(catalogue.queue_limits())?;
    let queues = connection.turns(&limits, config.priority_aging)?;
    if queues.is_empty() {
        say(format_args!(
            "no task queue has limits; `workflows limit NAME --window N` sets one"
        ))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = table(&[
        "task queue",
        "limits",
        "held",
        "on hold",
        "waiting",
        "running",
    ]);
    for queue in queues {
        table.add_row([
            one_line(&queue.name),
            queue.limit.to_string(),
            queue.held.to_string(),
            queue.on_hold.to_string(),
            queue.waiting.to_string(),
            queue.running.to_string(),
        ]);
    }
    print(&(table.trim_fmt() + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// # Errors
/// Postgres is not there, or holds a lock for too long.
pub(super) fn priority(config: &Config, id: Uuid, level: Level) -> anyhow::Result<ExitCode> {
    let (priority, word) = match level {
        Level::Low => (Priority::Low, "low"),
        Level::Medium => (Priority::Medium, "medium"),
        Level::High => (Priority::High, "high"),
    };
    let done = format!("has the priority {word}");
    change_turns(config, &[id], TurnChange::Priority(priority), &done)
}

/// # Errors
/// The same.
pub(super) fn first(config: &Config, id: Uuid) -> anyhow::Result<ExitCode> {
    change_turns(config, &[id], TurnChange::First, "is the next of its queue")
}

/// # Errors
/// The same.
pub(super) fn hold(config: &Config, ids: &[Uuid], holds: bool) -> anyhow::Result<ExitCode> {
    match holds {
        true => change_turns(
            config,
            ids,
            TurnChange::Hold,
            "is held until it is released",
        ),
        false => change_turns(config, ids, TurnChange::Release, "waits for its turn"),
    }
}

/// Changes what waits for its turn, and says of each job whether it did. Exits with 1 if one did
/// not.
fn change_turns(
    config: &Config,
    ids: &[Uuid],
    change: TurnChange,
    done: &str,
) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let changed = connection.change_turns(ids, change)?;
    let mut text = String::new();
    for id in ids {
        let what = match changed.contains(id) {
            true => done,
            false => match connection.story(*id)?.map(|story| story.job.state) {
                Some(JobState::Live(_)) => {
                    "does not wait for its turn: its task has been handed over to RabbitMQ"
                }
                Some(JobState::Ended(_)) => "has ended already",
                None => "is unknown",
            },
        };
        let _ = writeln!(text, "job {id} {what}");
    }
    print(&text)?;
    Ok(match ids.iter().all(|id| changed.contains(id)) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// # Errors
/// Postgres is not there.
pub(super) fn release_all(config: &Config, agreed: Agreed) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    if !agreed.yes {
        for queue in at_rest(&mut connection)? {
            let held = queue.held + queue.on_hold;
            say(format_args!("{}: {held} held", one_line(&queue.name)))?;
        }
        say_aside(format_args!(
            "these would be handed over, whatever is allowed; {NOTHING_DONE}"
        ));
        return Ok(ExitCode::FAILURE);
    }
    let released = connection.release_all().context("releasing all")?;
    say(format_args!(
        "{released} jobs are released; a running orchestrator hands them over"
    ))?;
    Ok(ExitCode::SUCCESS)
}
