//! `jobs list`: which jobs, and how they are shown.

use std::fmt::Write;

use clap::Args;
use clap_complete::ArgValueCandidates;
use comfy_table::{Cell, ColumnConstraint, Table, Width};
use jiff::{SignedDuration, Timestamp};
use omotes_orchestrator::config::Config;
use omotes_orchestrator::domain::job::JobStatus;
pub(super) use omotes_orchestrator::domain::overview::DEFAULT_LIMIT;
use omotes_orchestrator::domain::overview::{
    Filter, JobState, JobView, MAX_LIMIT, Overview, Page, QueueView, SHOWN, is_said, short_ids,
    spoken, state_words,
};
use omotes_orchestrator::service::queues::Watch;
use omotes_orchestrator::store::Connection;
use omotes_orchestrator::telemetry::report::{one_line, percent};

use crate::cli::{complete, overview, table, width};

#[derive(Args, Clone)]
pub(crate) struct Selection {
    /// In this state, as the list says it: registered, waiting, running, held or on-hold, or how they
    /// ended, such as succeeded or timed-out.
    #[arg(long, value_parser = state, add = ArgValueCandidates::new(complete::states))]
    pub(super) state: Option<State>,
    /// Of this workflow.
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(complete::workflows))]
    pub(super) workflow: Option<String>,
    /// With this text in the id, the reference or the last message.
    #[arg(long)]
    pub(super) text: Option<String>,
    /// Finished jobs, the last one first.
    #[arg(long)]
    pub(super) finished: bool,
    /// At most this many: 50, or 1000 on the screen of `watch`.
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_LIMIT)))]
    limit: Option<u16>,
}

/// A state as lists show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// One of [`SHOWN`].
    Live(&'static str),
    Ended(JobState),
}

impl State {
    /// What the database can tell of it.
    pub(super) fn stored(self) -> Option<JobState> {
        match self {
            State::Ended(state) => Some(state),
            // What waits or runs may be a step of a job that runs.
            State::Live("registered") => Some(JobState::Live(JobStatus::Registered)),
            State::Live("running") => Some(JobState::Live(JobStatus::Running)),
            State::Live(_) => None,
        }
    }

    pub(super) fn is_of(self, job: &JobView) -> bool {
        match self {
            State::Ended(state) => job.state == state,
            State::Live(word) => job.shown() == word,
        }
    }
}

/// By one of the words that lists show, or by the name that the API has.
pub(super) fn state(text: &str) -> Result<State, String> {
    if let Some(word) = SHOWN.into_iter().find(|word| is_said(word, text)) {
        return Ok(State::Live(word));
    }
    match JobState::named(text) {
        Some(JobState::Ended(outcome)) => Ok(State::Ended(JobState::Ended(outcome))),
        Some(live @ JobState::Live(_)) => Ok(State::Live(live.text())),
        None => Err(format!("expected one of {}", state_words().join(", "))),
    }
}

impl Selection {
    pub(super) fn filter(&self) -> Filter {
        Filter {
            finished: self.finished || matches!(self.state, Some(State::Ended(_))),
            state: self.state.and_then(State::stored),
            workflow: self.workflow.clone(),
            text: self.text.clone(),
            ..Filter::default()
        }
    }

    /// How many at most, where nobody says.
    pub(super) fn limit(&self, unless: u16) -> u16 {
        self.limit.unwrap_or(unless)
    }

    /// Whether anything but all jobs is asked for.
    fn is_narrow(&self) -> bool {
        self.state.is_some() || self.workflow.is_some() || self.text.is_some()
    }

    /// What is said where there is no job.
    pub(super) fn nothing(&self) -> &'static str {
        match (self.is_narrow(), self.filter().finished) {
            (true, true) => "no job that has ended matches",
            (true, false) => "no job matches that has not ended; --finished lists those that have",
            (false, true) => "no job has ended yet, or none is kept",
            (false, false) => "no job waits or runs; --finished lists those that have ended",
        }
    }
}

/// The jobs that are selected, at most `limit`, with why they are as they are; and since when the oldest job
/// waits, of the workflow that is asked for or of all.
pub(super) fn jobs(
    config: &Config,
    connection: &mut Connection,
    watch: Option<&Watch>,
    list: &Selection,
    limit: u16,
) -> anyhow::Result<(Page, Option<Timestamp>)> {
    let filter = Filter {
        limit,
        ..list.filter()
    };
    let overview = match filter.finished {
        true => Overview::default(),
        false => overview(config, connection, watch)?,
    };
    let turns = &overview.turns;
    let mut page = match list.state {
        Some(state @ State::Live(_)) if !filter.finished => {
            shown_so(connection, &filter, turns, state, limit)?
        }
        Some(State::Live(_) | State::Ended(_)) | None => connection.jobs(&filter, turns)?,
    };
    overview.explain(&mut page.jobs, Timestamp::now());
    let oldest = match &list.workflow {
        Some(name) => overview.rows.get(name).and_then(|rows| rows.oldest_waiting),
        None => overview.oldest_waiting(),
    };
    Ok((page, oldest))
}

/// Those that are in this state by the word that is shown, which more than one column decides.
fn shown_so(
    connection: &mut Connection,
    filter: &Filter,
    turns: &[QueueView],
    state: State,
    limit: u16,
) -> anyhow::Result<Page> {
    let all = Filter {
        limit: u16::MAX,
        ..filter.clone()
    };
    let mut jobs = connection.jobs(&all, turns)?.jobs;
    jobs.retain(|job| state.is_of(job));
    let total = i64::try_from(jobs.len()).unwrap_or(i64::MAX);
    jobs.truncate(limit.into());
    Ok(Page { jobs, total })
}

/// Columns from which on a line has room for what a job says and for how long it takes.
const WIDE: u16 = 120;
/// And for a sentence.
const VERY_WIDE: u16 = 160;

/// What a line has room for; without a terminal for everything, on as long a line as it takes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Room {
    is_narrow: bool,
    has_sentences: bool,
    has_whole_ids: bool,
}

impl Room {
    fn of(width: Option<u16>) -> Room {
        Room {
            is_narrow: width.is_some_and(|width| width < WIDE),
            has_sentences: width.is_none_or(|width| width >= VERY_WIDE),
            has_whole_ids: width.is_none(),
        }
    }
}

/// A line for each job and what is left out, or that there is none.
pub(super) fn text(page: &Page, list: &Selection) -> String {
    if page.jobs.is_empty() {
        return format!("{}\n", list.nothing());
    }
    let mut text = lines(&page.jobs, list, Timestamp::now());
    let shown = i64::try_from(page.jobs.len()).unwrap_or(i64::MAX);
    if shown < page.total {
        let _ = writeln!(text, "{shown} of {}; --limit shows more", page.total);
    }
    text
}

/// For how long the oldest has waited, unless it is the only one, or only some of those that wait are asked
/// for.
pub(super) fn oldest(since: Option<Timestamp>, page: &Page, list: &Selection) -> String {
    let is_asked = list.state.is_none() && list.text.is_none() && page.total > 1;
    let Some(since) = since.filter(|_| is_asked) else {
        return String::new();
    };
    let waited = spoken(Timestamp::now().duration_since(since));
    format!("the oldest that waits has waited for {waited}\n")
}

/// A heading, and a line for each job.
pub(super) fn lines(jobs: &[JobView], list: &Selection, now: Timestamp) -> String {
    let room = Room::of(width());
    let mut table = match list.filter().finished {
        true => finished_table(jobs, room, now),
        false => live_table(jobs, room, now),
    };
    if room.has_sentences {
        add_sentences(&mut table, jobs);
    }
    for row in table.row_iter_mut() {
        row.max_height(1);
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// Lets columns be as wide as what is in them, up to a bound; the others share the rest.
fn fix(table: &mut Table, columns: &[(usize, Option<u16>)]) {
    for (place, most) in columns {
        let constraint = match most {
            None => ColumnConstraint::ContentWidth,
            Some(most) => ColumnConstraint::UpperBoundary(Width::Fixed(*most)),
        };
        if let Some(column) = table.column_mut(*place) {
            column.set_constraint(constraint);
        }
    }
}

fn ids(jobs: &[JobView], room: Room) -> Vec<String> {
    let ids: Vec<_> = jobs.iter().map(|job| job.id).collect();
    match room.has_whole_ids {
        true => ids.iter().map(ToString::to_string).collect(),
        false => short_ids(&ids),
    }
}

fn live_table(jobs: &[JobView], room: Room, now: Timestamp) -> Table {
    let mut header = vec!["id", "reference", "workflow", "state", "for", "progress"];
    if !room.is_narrow {
        header.push("estimate");
    }
    let mut table = table(&header);
    for (job, id) in jobs.iter().zip(ids(jobs, room)) {
        let progress = job.progress.as_ref().map_or_else(String::new, |progress| {
            let done = percent(progress.fraction);
            match room.is_narrow {
                true => done,
                false => format!("{done} {}", one_line(&progress.message)),
            }
        });
        let mut state = one_line(&job.state_text());
        if let Some(position) = job.position {
            let _ = write!(state, ", no. {position}");
        }
        let mut row = vec![
            id,
            one_line(&job.reference),
            one_line(job.workflow.as_deref().unwrap_or("-")),
            state,
            job.ran(now)
                .or_else(|| job.waited(now))
                .map_or_else(String::new, spoken),
            progress,
        ];
        if !room.is_narrow {
            row.push(job.expectation().unwrap_or_default());
        }
        table.add_row(row);
    }
    if room.is_narrow {
        fix(
            &mut table,
            &[(0, None), (3, Some(22)), (4, None), (5, None)],
        );
    }
    table
}

fn finished_table(jobs: &[JobView], room: Room, now: Timestamp) -> Table {
    let mut header = vec!["id", "reference", "workflow", "outcome", "finished", "ran"];
    if !room.is_narrow {
        header.push("waited");
    }
    let mut table = table(&header);
    let time = |time: Option<SignedDuration>| time.map_or_else(String::new, spoken);
    for (job, id) in jobs.iter().zip(ids(jobs, room)) {
        let finished = job
            .finished_at
            .map_or_else(String::new, |at| match room.is_narrow {
                true => format!("{} ago", spoken(now.duration_since(at))),
                false => format!("{at:.0}"),
            });
        let mut row = vec![
            id,
            one_line(&job.reference),
            one_line(job.workflow.as_deref().unwrap_or("-")),
            job.state.text().to_owned(),
            finished,
            time(job.ran(now)),
        ];
        if !room.is_narrow {
            row.push(time(job.waited(now)));
        }
        table.add_row(row);
    }
    if room.is_narrow {
        fix(&mut table, &[(0, None), (3, None), (4, None), (5, None)]);
    }
    table
}

/// Why each of the jobs is as it is.
fn add_sentences(table: &mut Table, jobs: &[JobView]) {
    if let Some(mut header) = table.header().cloned() {
        header.add_cell(Cell::new("WHY"));
        table.set_header(header);
    }
    for (row, job) in table.row_iter_mut().zip(jobs) {
        let sentence = job.why.as_ref().map_or("", |why| &why.sentence);
        row.add_cell(Cell::new(sentence));
    }
}
