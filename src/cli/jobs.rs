//! `jobs`: what the status page shows, and cancelling.

use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use comfy_table::{Cell, Table};
use console::{Style, Term, style};
use crossbeam_channel::{after, select, unbounded};
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::overview::{
    AttemptView, Filter, JobState, JobView, MAX_LIMIT, Overview, Page, Tone, Why, spoken,
};
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::store::{Connection, TurnChange};
use omotes_orchestrator::telemetry::report::{one_line, percent};
use signal_hook::consts::SIGINT;
use uuid::Uuid;

use super::{Agreed, connect, has_room, overview, print, table, turns, watch as watch_queues};

mod cancel;
mod compare;
pub(super) mod origin;
mod rerun;
mod result;
mod story;

const WATCH_PERIOD: Duration = Duration::from_secs(2);

#[derive(Subcommand)]
pub(crate) enum Action {
    /// List jobs that have not ended, in the order in which workers take them, or those that have.
    ///
    /// Estimates are from the last successful runs of the same workflow; there are none before it
    /// has had five.
    #[command(after_help = "Examples:\n  \
        omotes-orchestrator jobs list --state running\n  \
        omotes-orchestrator jobs list --finished --workflow simulator --limit 10\n  \
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
        id: Uuid,
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
        one: Uuid,
        other: Uuid,
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Print the output ESDL of a job whose client had gone; for KEEP_RESULTS_SEC it is kept.
    Result {
        id: Uuid,
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
        omotes-orchestrator jobs cancel --reference study-7/ --state registered --yes\n  \
        omotes-orchestrator jobs cancel --workflow simulator --older-than 2h")]
    Cancel {
        #[arg(required_unless_present_any = ["reference", "workflow", "state", "older_than"])]
        ids: Vec<Uuid>,
        #[command(flatten)]
        matching: cancel::Matching,
    },
    /// Change the priority of a job that waits for its turn.
    Priority { id: Uuid, level: turns::Level },
    /// Move a job that waits for its turn.
    Move {
        id: Uuid,
        /// Before all others of its queue, of whatever owner and priority.
        #[arg(long, required = true)]
        first: bool,
    },
    /// Do not let jobs go that wait for their turn.
    Hold {
        #[arg(required = true)]
        ids: Vec<Uuid>,
    },
    /// Let jobs wait for their turn again that are on hold.
    Release {
        #[arg(required_unless_present = "all")]
        ids: Vec<Uuid>,
        /// Hand everything over that waits for its turn, whatever is allowed: before the Python
        /// service takes over, which knows nothing of turns.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
        #[command(flatten)]
        agreed: Agreed,
    },
    /// Show the list and keep it up to date, until Ctrl-C.
    Watch(Selection),
}

#[derive(Args)]
pub(crate) struct Selection {
    /// In this state: registered, submitted or running, or an outcome such as succeeded.
    #[arg(long, value_parser = state)]
    state: Option<JobState>,
    #[arg(long)]
    workflow: Option<String>,
    /// With this text in the id, the reference or the last message.
    #[arg(long)]
    text: Option<String>,
    /// Finished jobs, the last one first.
    #[arg(long)]
    finished: bool,
    /// At most this many.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_LIMIT)))]
    limit: u16,
}

fn state(name: &str) -> Result<JobState, String> {
    JobState::named(name).ok_or_else(|| format!("expected one of {}", JobState::names()))
}

impl Selection {
    fn filter(&self) -> Filter {
        Filter {
            finished: self.finished || matches!(self.state, Some(JobState::Ended(_))),
            state: self.state,
            workflow: self.workflow.clone(),
            text: self.text.clone(),
            limit: self.limit,
            ..Filter::default()
        }
    }
}

/// # Errors
/// Postgres or, to cancel, RabbitMQ is not there.
pub(crate) fn run(config: &Config, action: Action) -> anyhow::Result<ExitCode> {
    match action {
        Action::List { list, json } => {
            let mut connection = connect(config)?;
            let filter = list.filter();
            let watch = match filter.finished {
                true => None,
                false => watch_queues(config),
            };
            let page = jobs(config, &mut connection, watch.as_ref(), &filter)?;
            print(&if json {
                serde_json::to_string_pretty(&page)? + "\n"
            } else {
                list_text(&page, &list, Space::Paper)
            })?;
            Ok(ExitCode::SUCCESS)
        }
        Action::Show { id, json } => show(config, id, json),
        Action::Rerun(rerun) => rerun::run(config, rerun),
        Action::Compare { one, other, json } => compare::run(config, [one, other], json),
        Action::Result { id, output } => result::run(config, id, output.as_deref()),
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
        Action::Watch(list) => watch(config, &list),
    }
}

fn jobs(
    config: &Config,
    connection: &mut Connection,
    watch: Option<&Watch>,
    filter: &Filter,
) -> anyhow::Result<Page> {
    let mut page = connection.jobs(filter)?;
    let overview = match filter.finished {
        true => Overview::default(),
        false => overview(config, connection, watch)?,
    };
    overview.explain(&mut page.jobs, Timestamp::now());
    Ok(page)
}

/// Where a list goes.
#[derive(Clone, Copy)]
enum Space {
    /// No further than to its end.
    Screen,
    Paper,
}

fn list_text(page: &Page, list: &Selection, space: Space) -> String {
    let filter = list.filter();
    let now = Timestamp::now();
    let mut table = match filter.finished {
        true => finished_table(&page.jobs, now),
        false => live_table(&page.jobs, now),
    };
    if let Space::Screen = space
        && has_room()
    {
        // As many jobs were asked for as there are lines.
        for row in table.row_iter_mut() {
            row.max_height(1);
        }
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    let shown = i64::try_from(page.jobs.len()).unwrap_or(i64::MAX);
    if shown < page.total {
        let _ = writeln!(text, "{shown} of {}; --limit shows more", page.total);
    }
    text
}

fn live_table(jobs: &[JobView], now: Timestamp) -> Table {
    let mut table = table(&[
        "id",
        "reference",
        "workflow",
        "state",
        "for",
        "progress",
        "estimate",
    ]);
    for job in jobs {
        let progress = job.progress.as_ref().map_or_else(String::new, |progress| {
            format!(
                "{} {}",
                percent(progress.fraction),
                one_line(&progress.message)
            )
        });
        let mut state = one_line(&job.state_text());
        if let Some(position) = job.position {
            let _ = write!(state, ", no. {position}");
        }
        table.add_row([
            Cell::new(job.id),
            Cell::new(one_line(&job.reference)),
            Cell::new(one_line(job.workflow.as_deref().unwrap_or("-"))),
            Cell::new(state),
            Cell::new(
                job.ran(now)
                    .or_else(|| job.waited(now))
                    .map_or_else(String::new, spoken),
            ),
            Cell::new(progress),
            Cell::new(job.expectation().unwrap_or_default()),
        ]);
    }
    with_sentences(table, jobs)
}

fn finished_table(jobs: &[JobView], now: Timestamp) -> Table {
    let mut table = table(&[
        "id",
        "reference",
        "workflow",
        "outcome",
        "finished",
        "waited",
        "ran",
    ]);
    let time = |time: Option<SignedDuration>| time.map_or_else(String::new, spoken);
    for job in jobs {
        let finished = job
            .finished_at
            .map_or_else(String::new, |at| format!("{at:.0}"));
        table.add_row([
            Cell::new(job.id),
            Cell::new(one_line(&job.reference)),
            Cell::new(one_line(job.workflow.as_deref().unwrap_or("-"))),
            Cell::new(job.state.text()),
            Cell::new(finished),
            Cell::new(time(job.waited(now))),
            Cell::new(time(job.ran(now))),
        ]);
    }
    with_sentences(table, jobs)
}

/// With why each of the jobs is as it is, where there is room.
fn with_sentences(mut table: Table, jobs: &[JobView]) -> Table {
    if has_room() {
        if let Some(mut header) = table.header().cloned() {
            header.add_cell(Cell::new("WHY"));
            table.set_header(header);
        }
        for (row, job) in table.row_iter_mut().zip(jobs) {
            let sentence = job.why.as_ref().map_or("", |why| &why.sentence);
            row.add_cell(Cell::new(sentence));
        }
    }
    table
}

fn show(config: &Config, id: Uuid, json: bool) -> anyhow::Result<ExitCode> {
    let mut connection = connect(config)?;
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
    if json {
        print(&(serde_json::to_string_pretty(&story)? + "\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = format!("{:<19}{id}\n", "job");
    if let Some(Why { sentence, evidence }) = &story.job.why {
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
    if !story.attempts.is_empty() {
        let _ = write!(text, "\n{}\n", attempts(&story.attempts, now).trim_fmt());
    }
    text += &story::text(&story);
    print(&text)?;
    Ok(ExitCode::SUCCESS)
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

/// Overwrites the list with the next one, on a terminal.
fn watch(config: &Config, list: &Selection) -> anyhow::Result<ExitCode> {
    let terminal = Term::stdout();
    if !terminal.is_term() {
        bail!("this is for a terminal; `jobs list` is for everything else");
    }
    let (interrupt, interrupted) = unbounded();
    let mut signals = signal_hook::iterator::Signals::new([SIGINT])?;
    let handle = signals.handle();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for signal in signals.forever() {
                // Its receiver lives as long as signals can come.
                let _ = interrupt.send(signal);
            }
        });
        let outcome = (|| {
            let (mut connection, mut queues) = (None, None);
            loop {
                // Both may reconnect.
                queues = queues
                    .filter(|watch: &Watch| watch.look(config, &[]).is_ok())
                    .or_else(|| Watch::open(config).ok());
                let (rows, _) = terminal.size();
                let limit = rows.saturating_sub(4).clamp(1, list.limit);
                let filter = Filter {
                    limit,
                    ..list.filter()
                };
                let text = connection
                    .take()
                    .map_or_else(|| connect(config), Ok)
                    .and_then(|mut open| {
                        let page = jobs(config, &mut open, queues.as_ref(), &filter)?;
                        connection = Some(open);
                        Ok(list_text(&page, list, Space::Screen))
                    })
                    .unwrap_or_else(|error| format!("{error:#}"));
                let head = style(format!("{:.0}  Ctrl-C ends this", Timestamp::now())).dim();
                terminal.clear_screen()?;
                let rows = usize::from(rows.saturating_sub(2));
                let shown: Vec<_> = text.lines().take(rows).collect();
                terminal.write_line(&format!("{head}\n{}", shown.join("\n")))?;
                select! {
                    recv(interrupted) -> _ => return Ok(ExitCode::SUCCESS),
                    recv(after(WATCH_PERIOD)) -> _ => {}
                }
            }
        })();
        handle.close();
        outcome
    })
}
