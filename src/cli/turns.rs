//! What operators do about turns: limits of task queues, and jobs that wait for their turn.

use std::fmt::Write;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, ValueEnum};
use clap_complete::ArgValueCandidates;
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::actions::jobs::{self, Became};
use omotes_orchestrator::actions::names::resolve;
use omotes_orchestrator::actions::queues;
use omotes_orchestrator::config::{self, Config};
use omotes_orchestrator::domain::job::Priority;
use omotes_orchestrator::domain::overview::{JobName, spoken};
use omotes_orchestrator::store::{LimitChange, QueueChange, TurnChange};
use omotes_orchestrator::telemetry::report::one_line;

use super::jobs::origin::origin;
use super::{Agreed, NOTHING_DONE, complete, connect, print, say, say_aside, table};

/// Another limit for a queue.
#[derive(Args)]
pub(super) struct Limit {
    /// The task queue: the workflow's name, or the task of one of its steps.
    #[arg(add = ArgValueCandidates::new(complete::tasks))]
    name: String,
    /// Tasks that may be handed to RabbitMQ and not started: a number, `unlimited`, or `default` for
    /// what the definition file says.
    #[arg(long, value_name = "NUMBER", value_parser = queues::parse_change, required_unless_present = "max_running")]
    window: Option<QueueChange>,
    /// Tasks that may be handed to RabbitMQ and not ended, such as a licence has seats; likewise.
    #[arg(long, value_name = "NUMBER", value_parser = queues::parse_change)]
    max_running: Option<QueueChange>,
}

/// A priority by its name.
#[derive(Clone, Copy, ValueEnum)]
pub(super) enum Level {
    Low,
    Medium,
    High,
}

impl Level {
    pub(super) fn priority(self) -> Priority {
        match self {
            Level::Low => Priority::Low,
            Level::Medium => Priority::Medium,
            Level::High => Priority::High,
        }
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
    let limit = queues::change_limits(&catalogue, &mut connection, name, (changes, &origin()))?;
    say(format_args!("{}: {limit}", one_line(name)))?;
    Ok(ExitCode::SUCCESS)
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
        "changed",
        "oldest waits",
        "held",
        "on hold",
        "waiting",
        "running",
    ]);
    let now = Timestamp::now();
    for queue in queues {
        let oldest = queue.oldest_waiting;
        let oldest = oldest.map(|at| spoken(now.duration_since(at).max(SignedDuration::ZERO)));
        table.add_row([
            one_line(&queue.name),
            queue.limit.to_string(),
            queue.changes().join("; "),
            oldest.unwrap_or_default(),
            queue.held.to_string(),
            queue.on_hold.to_string(),
            queue.waiting.to_string(),
            queue.running.to_string(),
        ]);
    }
    print(&(table.trim_fmt() + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

/// Changes what waits for its turn, and says of each job whether it did. Exits with 1 if one did
/// not.
///
/// # Errors
/// Postgres is not there, or holds a lock for too long.
pub(super) fn change(
    config: &Config,
    names: &[JobName],
    change: TurnChange,
) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let ids = resolve(&mut connection, names)?;
    tell(&jobs::change_turns(
        &mut connection,
        &ids,
        change,
        &origin(),
    )?)
}

/// Says what became of each job. Exits with 1 if it was not what was asked for.
pub(super) fn tell(all: &[Became]) -> anyhow::Result<ExitCode> {
    let mut text = String::new();
    for one in all {
        let _ = writeln!(text, "{one}");
    }
    print(&text)?;
    Ok(match all.iter().all(|one| one.is_done) {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

/// # Errors
/// Postgres is not there.
pub(super) fn release_all(config: &Config, agreed: Agreed) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    if !agreed.yes {
        let queues = queues::at_rest(&mut connection)?;
        if queues.is_empty() {
            say(format_args!("no job waits for its turn"))?;
            return Ok(ExitCode::SUCCESS);
        }
        for queue in queues {
            let held = queue.held + queue.on_hold;
            say(format_args!("{}: {held} held", one_line(&queue.name)))?;
        }
        say_aside(format_args!(
            "these would be handed over, whatever is allowed; {NOTHING_DONE}"
        ));
        return Ok(ExitCode::FAILURE);
    }
    let released = connection.release_all(&origin()).context("releasing all")?;
    let (count, them) = match released {
        1 => ("1 job is".to_owned(), "it"),
        more => (format!("{more} jobs are"), "them"),
    };
    say(format_args!(
        "{count} released; a running orchestrator hands {them} over"
    ))?;
    Ok(ExitCode::SUCCESS)
}
