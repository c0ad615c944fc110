//! `jobs`: what the status page shows, and cancelling.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::Subcommand;
use clap_complete::ArgValueCandidates;
use comfy_table::{Cell, Table};
use console::Style;
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::actions::jobs;
use omotes_orchestrator::actions::names::resolve;
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{
    AttemptView, JobName, JobState, JobView, Overview, Story, Tone, Why, spoken,
};
use omotes_orchestrator::store::{Connection, TurnChange};
use omotes_orchestrator::telemetry::report::{one_line, percent};
use uuid::Uuid;

use self::list::{DEFAULT_LIMIT, Selection};
use super::{
    Agreed, complete, connect, overview, print, say_aside, table, told_of, turns,
    watch as watch_queues,
};

mod cancel;
mod compare;
pub(super) mod origin;
mod rerun;
mod result;
mod story;

mod list;
mod watch;

#[derive(Subcommand)]
pub(crate) enum Action {
    /// List jobs that have not ended, in the order in which workers take them, or those that have.
    ///
    /// Estimates are from the last successful runs of the same workflow; there are none before it
    /// has had five.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator jobs list --state running\n  \
        omotes-orchestrator jobs list --finished --workflow simulator --limit 10\n  \
        omotes-orchestrator jobs list --state timed-out\n  \
        omotes-orchestrator jobs list --json | jq -r '.jobs[].id'")]
    List {
        #[command(flatten)]
        list: Selection,
        /// As JSON, the same as `/api/jobs`.
        #[arg(long)]
        json: bool,
    },
    /// Show one job in full. Exits with 1 when it is not known.
    Show {
        /// The job's id, or its beginning.
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: JobName,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Run a job again as its client submitted it; for KEEP_INPUTS_SEC that is kept.
    ///
    /// No client waits for its result: --output takes it, and otherwise KEEP_RESULTS_SEC keeps it.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator jobs rerun 0e9b… --param discount_rate=4\n  \
        omotes-orchestrator jobs rerun 0e9b… --output again.esdl")]
    Rerun(rerun::Rerun),
    /// Compare two jobs: parameters, durations, messages. What differs is marked.
    Compare {
        /// The one job's id, or its beginning.
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        one: JobName,
        /// The other's.
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        other: JobName,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the output ESDL of a job whose client had gone; for KEEP_RESULTS_SEC it is kept.
    Result {
        /// The job's id, or its beginning.
        #[arg(add = ArgValueCandidates::new(complete::jobs))]
        id: JobName,
        /// File for it.
        #[arg(long)]
        output: Option<PathBuf>,
    },
    /// Cancel jobs, as their clients would: those with these ids, or all that match.
    ///
    /// Exits with 1 when one of the ids is not known or has ended. All that match are only listed
    /// without --yes.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator jobs cancel 0e9b…\n  \
        omotes-orchestrator jobs cancel --reference study-7/ --state held --yes\n  \
        omotes-orchestrator jobs cancel --workflow simulator --older-than 2h")]
    Cancel {
        /// The jobs' ids, or their beginnings.
        #[arg(
            required_unless_present_any = ["reference", "workflow", "state", "older_than"],
            add = ArgValueCandidates::new(complete::live_jobs)
        )]
        ids: Vec<JobName>,
        #[command(flatten)]
        matching: cancel::Matching,
    },
    /// Change the priority of a job that waits for its turn.
    Priority {
        /// The job's id, or its beginning.
        #[arg(add = ArgValueCandidates::new(complete::live_jobs))]
        id: JobName,
        /// Its new priority.
        level: turns::Level,
    },
    /// Move a job that waits for its turn.
    Move {
        /// The job's id, or its beginning.
        #[arg(add = ArgValueCandidates::new(complete::live_jobs))]
        id: JobName,
        /// Before all others of its queue, of whatever owner and priority.
        #[arg(long, required = true)]
        first: bool,
    },
    /// Do not let jobs go that wait for their turn.
    Hold {
        /// The jobs' ids, or their beginnings.
        #[arg(required = true, add = ArgValueCandidates::new(complete::live_jobs))]
        ids: Vec<JobName>,
    },
    /// Let jobs wait for their turn again that are on hold.
    Release {
        /// The jobs' ids, or their beginnings.
        #[arg(required_unless_present = "all", add = ArgValueCandidates::new(complete::live_jobs))]
        ids: Vec<JobName>,
        /// Hand everything over that waits for its turn, whatever is allowed: before the Python
        /// service takes over, which knows nothing of turns.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        #[command(flatten)]
        agreed: Agreed,
    },
    /// Show the list on the whole screen and keep it up to date; scroll, filter and cancel there.
    ///
    /// The arrows, j and k move; Page Up and Page Down, Home and End go further. `/` narrows the list to what
    /// has a text, `f` shows those that have ended, Enter shows one job, `c` cancels it after `y`, and `q`
    /// ends this. Where standard output is no terminal, the list is printed anew every two seconds.
    Watch(Selection),
}

/// # Errors
/// Postgres or, to cancel, RabbitMQ is not there.
pub(crate) fn run(config: &Config, action: Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::List { list, json } => {
            let mut connection = connect(config)?;
            let watch = match list.filter().finished {
                true => None,
                false => watch_queues(config),
            };
            let (page, oldest) = list::jobs(
                config,
                &mut connection,
                watch.as_ref(),
                &list,
                list.limit(DEFAULT_LIMIT),
            )?;
            match json {
                true => print(&(serde_json::to_string_pretty(&page)? + "\n"))?,
                false if page.jobs.is_empty() => say_aside(format_args!("{}", list.nothing())),
                false => print(&(list::text(&page, &list) + &list::oldest(oldest, &page, &list)))?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Action::Show { id, json } => show(config, &id, json),
        Action::Rerun(rerun) => rerun::run(config, rerun),
        Action::Compare { one, other, json } => compare::run(config, &[one, other], json),
        Action::Result { id, output } => result::run(config, &id, output.as_deref()),
        Action::Cancel { ids, matching } => cancel::run(config, &ids, &matching),
        Action::Priority { id, level } => {
            turns::change(config, &[id], TurnChange::Priority(level.priority()))
        }
        Action::Move { id, first: _ } => turns::change(config, &[id], TurnChange::First),
        Action::Hold { ids } => turns::change(config, &ids, TurnChange::Hold),
        Action::Release {
            all: true, agreed, ..
        } => turns::release_all(config, agreed),
        Action::Release { ids, .. } => turns::change(config, &ids, TurnChange::Release),
        Action::Watch(list) => watch::run(config, list),
    }
}

fn show(config: &Config, name: &JobName, json: bool) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
    let id = the_one(&mut connection, name)?;
    let Some(mut story) = connection.story(id)? else {
        bail!("job {id} is unknown");
    };
    let now = Timestamp::now();
    let overview = match story.job.state {
        JobState::Live(_) => {
            let watch = watch_queues(config);
            overview(config, &mut connection, watch.as_ref())?
        }
        // Of one that has ended nothing depends on others.
        JobState::Ended(_) => Overview::default(),
    };
    overview.explain(std::slice::from_mut(&mut story.job), now);
    story::name_parameters(config, &mut story);
    tell_whereabouts(config, &mut story);
    if json {
        print(&(serde_json::to_string_pretty(&story)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{:<19}{id}\n", "job");
    if let Some(Why {
        sentence, evidence, ..
    }) = &story.job.why
    {
        let _ = writeln!(text, "{:<19}{sentence}", "why");
        for fact in evidence {
            let _ = writeln!(text, "{:<19}- {fact}", "");
        }
    }
    for (name, value) in facts(&story.job, now) {
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            let _ = writeln!(text, "{name:<19}{value}");
        }
    }
    let runs = story.run_again_as.iter().map(Uuid::to_string);
    let runs = runs.collect::<Vec<_>>().join(", ");
    let of = story.runs_again.map(|of| of.to_string());
    for (name, told) in [
        ("output", story.whereabouts.clone()),
        ("client", story.client.clone()),
        ("runs again", of),
        ("run again as", Some(runs)),
    ] {
        if let Some(told) = told.filter(|told| !told.is_empty()) {
            let _ = writeln!(text, "{name:<19}{told}");
        }
    }
    if !story.attempts.is_empty() {
        let _ = write!(text, "\n{}\n", attempts(&story.attempts, now).trim_fmt());
    }
    text += &story::text(&story);
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

/// Says where its output is; RabbitMQ is asked where that may say more.
fn tell_whereabouts(config: &Config, story: &mut Story) {
    let id = story.job.id;
    let is_asked = story.asks_its_queue();
    let queue = is_asked.then(|| told_of("RabbitMQ", || jobs::client_queue(config, id)));
    story.tell_whereabouts(config.keep_results, queue.flatten());
}

/// A line for each task that a job of several steps has had.
fn attempts(attempts: &[AttemptView], now: Timestamp) -> Table {
    let mut table = table(&["step", "title", "task", "state", "waited", "ran", "logs"]);
    let time = |time: Option<SignedDuration>| time.map_or_else(String::new, spoken);
    for attempt in attempts {
        let number = match attempt.attempt {
            1 => attempt.step.to_string(),
            again => format!("{}, attempt {again}", attempt.step),
        };
        let logs = attempt.logs.as_deref().unwrap_or_default();
        table.add_row([
            Cell::new(number),
            Cell::new(one_line(&attempt.title)),
            Cell::new(one_line(&attempt.task)),
            Cell::new(attempt.state()),
            Cell::new(time(attempt.waited(now))),
            Cell::new(time(attempt.ran(now))),
            Cell::new(one_line(logs.lines().next().unwrap_or_default())),
        ]);
    }
    table
}

/// The id of the job that is named so.
fn the_one(connection: &mut Connection, name: &JobName) -> anyhow::Result<Uuid> {
    let ids = resolve(connection, std::slice::from_ref(name))?;
    Ok(ids[0])
}

/// What is known of a job, by name.
fn facts(job: &JobView, now: Timestamp) -> Vec<(&'static str, Option<String>)> {
    let time = |time: Option<Timestamp>| time.map(|time| format!("{time:.0}"));
    vec![
        ("reference", Some(one_line(&job.reference))),
        ("workflow", job.workflow.as_deref().map(one_line)),
        (
            "state",
            Some(
                colour(job.state)
                    .apply_to(one_line(&job.state_text()))
                    .to_string(),
            ),
        ),
        (
            "priority",
            job.priority.map(|priority| priority.name().to_lowercase()),
        ),
        (
            "place in its queue",
            job.position.map(|position| position.to_string()),
        ),
        ("registered", time(job.registered_at)),
        ("submitted", time(job.submitted_at)),
        ("first started", time(job.running_at)),
        ("finished", time(job.finished_at)),
        ("waited", job.waited(now).map(spoken)),
        ("ran", job.ran(now).map(spoken)),
        (
            "timeout",
            job.timeout_ms
                .map(|timeout| spoken(SignedDuration::from_millis(timeout))),
        ),
        (
            "progress",
            job.progress.as_ref().map(|progress| {
                format!(
                    "{}, {:.0}: {}",
                    percent(progress.fraction),
                    progress.at,
                    one_line(&progress.message)
                )
            }),
        ),
        ("estimate", job.expectation()),
        ("starts", Some(job.starts.to_string())),
        (
            "result",
            job.result_bytes.map(|bytes| format!("{bytes} bytes")),
        ),
        ("Celery task", job.task_id.as_deref().map(one_line)),
    ]
}

fn colour(state: JobState) -> Style {
    match state.tone() {
        Tone::Plain => Style::new(),
        Tone::Good => Style::new().green(),
        Tone::Dim => Style::new().dim(),
        Tone::Bad => Style::new().red(),
    }
}
