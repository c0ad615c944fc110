//! `workers`: which Celery workers there are and what they do; draining one and sending it back.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use clap_complete::ArgValueCandidates;
use comfy_table::{Cell, CellAlignment};
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::spoken;
use omotes_orchestrator::domain::worker::{TaskView, Wish, WorkerView, Workers};
use omotes_orchestrator::service::workers::{find, steering};
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::one_line;
use omotes_orchestrator::threads::Signal;

use super::{complete, connect, print, say, say_aside, table, warn};

/// How many looks may be missed, and how old one may be at least, before that is worth a warning.
const MISSED_LOOKS: i32 = 3;
const RECENT: SignedDuration = SignedDuration::from_secs(20);

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Command {
    #[command(subcommand)]
    action: Option<Action>,
    /// As JSON, the same as `/api/workers`.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
enum Action {
    /// Have a worker finish what it computes and take nothing more, as before an update of it.
    ///
    /// It stays so until `resume`, or until it is started again. Exits with 1 when it has not confirmed
    /// it.
    Drain {
        /// The worker's name, or what follows the `@` of it.
        #[arg(add = ArgValueCandidates::new(complete::workers))]
        host: String,
    },
    /// Have a drained worker take tasks again.
    Resume {
        /// The worker's name, or what follows the `@` of it.
        #[arg(add = ArgValueCandidates::new(complete::workers))]
        host: String,
    },
}

/// # Errors
/// Postgres or, to drain and to resume, RabbitMQ is not there; or the worker is not known, or does not
/// do as it is told.
pub(crate) fn run(config: &Config, command: &Command) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let (host, wish) = match &command.action {
        None => {
            list(config, &mut connection, command.json)?;
            return Ok(ExitCode::SUCCESS);
        }
        Some(Action::Drain { host }) => (host, Wish::Drained),
        Some(Action::Resume { host }) => (host, Wish::Resumed),
    };
    let worker = find(&mut connection, host)?;
    // Whoever runs the command may interrupt it.
    let (_running, never) = Signal::pending();
    let steered = steering::steer(config, connection, &worker, wish, &never)?;
    say(format_args!("{}", steered.in_words(wish)))?;
    Ok(ExitCode::SUCCESS)
}

fn list(config: &Config, connection: &mut Connection, json: bool) -> anyhow::Result<()> {
    let workers = connection.workers()?;
    let now = Timestamp::now();
    let period = SignedDuration::try_from(config.workers_period.unwrap_or_default());
    let recent = RECENT.max(period.unwrap_or_default() * MISSED_LOOKS);
    match workers.looked_at.map(|at| now.duration_since(at)) {
        None => warn("nobody has looked at the workers yet"),
        Some(age) if age > recent => warn(&format!(
            "nobody has looked at the workers for {}: this is how they were then. It takes an orchestrator with a \
             session with RabbitMQ, and WORKERS_PERIOD_SEC",
            spoken(age)
        )),
        Some(_) => {}
    }
    if json {
        return print(&(serde_json::to_string_pretty(&workers)? + "\n"));
    }
    if workers.workers.is_empty() {
        say_aside(format_args!("no worker is known"));
    }
    print(&text(&workers, now))
}

fn text(workers: &Workers, now: Timestamp) -> String {
    let mut table = table(&[
        "worker", "state", "for", "queues", "pool", "celery", "computes", "tasks/h", "ended",
        "failed",
    ]);
    let number = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    for worker in &workers.workers {
        let queues: Vec<_> = worker.queues.iter().map(|one| one_line(one)).collect();
        table.add_row([
            Cell::new(one_line(&worker.host)),
            Cell::new(worker.state.text()),
            Cell::new(spoken(now.duration_since(worker.since))),
            Cell::new(queues.join(", ")),
            Cell::new(pool(worker)),
            Cell::new(worker.celery.as_deref().map(one_line).unwrap_or_default()),
            Cell::new(tasks(&worker.tasks, now)),
            number(
                worker
                    .tasks_per_hour
                    .map(|rate| format!("{rate:.1}"))
                    .unwrap_or_default(),
            ),
            number(worker.ended.to_string()),
            number(worker.failed.to_string()),
        ]);
    }
    let mut text = match workers.workers.is_empty() {
        true => String::new(),
        false => format!("{}\n", table.trim_fmt()),
    };
    if let Some(at) = workers.looked_at.filter(|_| !workers.workers.is_empty()) {
        text += &format!("seen {} ago\n", spoken(now.duration_since(at)));
    }
    for lost in &workers.lost_tasks {
        text += &format!(
            "job {}: no worker has its task {} for {}{}\n",
            lost.job_id,
            one_line(&lost.task_id),
            spoken(now.duration_since(lost.since)),
            match lost.never_begun {
                true => ", which none has ever begun, and it is in no queue",
                false => "",
            }
        );
    }
    if let Some(more) = workers.more_lost(usize::MAX) {
        text += &format!("{more}\n");
    }
    for in_vain in workers.in_vain() {
        text += &format!("{}; if it goes on, restart it\n", in_vain.in_words(now));
    }
    text
}

fn pool(worker: &WorkerView) -> String {
    let kind = worker.pool.as_deref().map(one_line).unwrap_or_default();
    match worker.pool_size {
        Some(size) => format!("{kind} {size}"),
        None => kind,
    }
}

fn tasks(tasks: &[TaskView], now: Timestamp) -> String {
    let task = |task: &TaskView| {
        let what = match (&task.reference, task.job_id) {
            (Some(reference), _) => one_line(reference),
            (None, Some(id)) => id.to_string(),
            (None, None) => format!("{} {}", one_line(&task.name), one_line(&task.id)),
        };
        let step = task
            .step
            .as_deref()
            .map(|step| format!(" ({})", one_line(step)));
        let ended = task.ended.as_ref().map(|end| {
            let ago = spoken(now.duration_since(end.at));
            format!(", which {} {ago} ago", end.in_words())
        });
        format!(
            "{what}{} for {}{}",
            step.unwrap_or_default(),
            spoken(now.duration_since(task.since)),
            ended.unwrap_or_default()
        )
    };
    tasks.iter().map(task).collect::<Vec<_>>().join("; ")
}
