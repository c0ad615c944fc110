//! The status page: what [`crate::domain::overview`] has, as HTML. It shows no ESDLs.

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};
use uuid::Uuid;

use crate::config::Config;
use crate::domain::activity::{Activity, Sizes};
use crate::domain::job::JobStatus;
use crate::domain::overview::{
    Filter, JobState, JobView, Overview, Page, QueueView, Queues, Tone, WorkflowRows, WorkflowView,
};
use crate::domain::switch::Remark;
use crate::telemetry::report::{harmless, one_line};
use crate::telemetry::trouble::trouble;

pub(super) mod acting;
mod attention;
mod charts;
mod compare;
mod job;
mod layout;
mod letters;
mod list;
mod prose;
mod settings;
mod story;
mod submit;
mod words;
mod workers;

use acting::Acting;
pub(super) use compare::compare;
pub(super) use job::job;
pub(super) use layout::{Frame, Sheet, refused};
use layout::{parts, troubles};
pub(super) use letters::letters;
use prose::prose;
pub(super) use submit::submit;
use words::{Matter, command, looked, since};

/// The overview: how all is, what is wrong, all jobs, and what they run on.
pub(super) fn overview(
    frame: &Frame<'_>,
    overview: &Overview,
    filter: &Filter,
    page: &Page,
    // Those that come first of all that have not ended.
    first: &[JobView],
    activity: Option<&Activity>,
    // What holds here, and what is in the way of another service's taking this place.
    (config, sizes, way_back): (&Config, Option<&Sizes>, Option<&[Remark]>),
) -> Sheet {
    let now = frame.now;
    let workflows = overview.workflows();
    let names: Vec<_> = workflows
        .iter()
        .map(|workflow| workflow.name.as_str())
        .collect();
    let matters = attention::matters(frame, overview, first);
    let turns = overview
        .turns
        .iter()
        .any(|queue| queue.held + queue.on_hold > 0);
    let content = html! {
        h1.hidden { "Jobs" }
        (status(frame, overview, filter, activity, &matters))
        (troubles(frame, &matters))
        (list::section(filter, page, &names, now, frame.acting.map(|acting| (acting, turns))))
        @if let Some(activity) = activity { (charts::charts(activity)) }
        (workflow_table(&workflows, now))
        @if !overview.turns.is_empty() { (turns_table(&overview.turns, frame.acting)) }
        @if let Some(acting) = frame.acting { (acting.any_queue(overview)) }
        @if let Some(all) = &overview.workers { (workers::table(all, now, frame.acting)) }
        @if let Some(queues) = &overview.queues { (queue_table(queues, now)) }
        (settings::section(config, sizes))
        @if let Some(remarks) = way_back { (settings::way_back(frame, remarks)) }
    };
    Sheet::new("OMOTES jobs", content).live(events(filter))
}

/// A job that has waited for longer is told of at the top.
const OLD: SignedDuration = SignedDuration::from_mins(30);
/// Where dead letters are shown.
pub(super) const LETTERS: &str = "/dead-letters";

/// The longest list that is followed.
const MAX_FOLLOWED: u16 = 200;

/// Whether the changes of a list are told. A search goes through all of the history, and a list may be
/// long: that is too much to do again and again.
pub(super) fn is_followed(filter: &Filter) -> bool {
    filter.text.is_none() && filter.limit <= MAX_FOLLOWED
}

/// Where the changes of a list are told, if they are.
pub(super) fn events(filter: &Filter) -> String {
    match (is_followed(filter), filter.query(filter.offset)) {
        (false, _) => String::new(),
        (true, query) if query.is_empty() => "/events".to_owned(),
        (true, query) => format!("/events?{query}"),
    }
}

/// Where those of a job are told.
pub(super) fn events_of(job: Uuid) -> String {
    format!("/events/jobs/{job}")
}

/// In one sentence how all is, with counts that lead to what they count.
fn status(
    frame: &Frame<'_>,
    overview: &Overview,
    filter: &Filter,
    activity: Option<&Activity>,
    matters: &[Matter],
) -> Markup {
    let (class, verdict) = match (trouble(frame.parts), matters) {
        (Some(trouble), _) => ("bad", format!("{}.", trouble.what)),
        (None, []) => ("good", attention::verdict(matters)),
        (None, _) => ("amber", attention::verdict(matters)),
    };
    let oldest = overview.oldest_waiting();
    let oldest = oldest.filter(|oldest| frame.now.duration_since(*oldest) > OLD);
    let sum = |of: fn(&WorkflowRows) -> i64| overview.rows.values().map(of).sum::<i64>();
    let live = [
        (JobStatus::Running, sum(|rows| rows.running)),
        (JobStatus::Submitted, sum(|rows| rows.submitted)),
        (JobStatus::Registered, sum(|rows| rows.registered)),
    ];
    let on_hold: i64 = overview.turns.iter().map(|queue| queue.on_hold).sum();
    html! {
        section.status aria-label="How all is" {
            p.verdict.(class) role="status" { (verdict) }
            p.counts {
                @for (status, count) in live {
                    @if count > 0 || status == JobStatus::Running {
                        (count_of(JobState::Live(status), count, filter)) " "
                    }
                }
                @if on_hold > 0 { span.dim { "(" (on_hold) " on hold) " } }
                @if let Some(oldest) = oldest { span.warn { "the oldest waits for " (since(oldest, frame.now)) } " " }
                @if let Some(activity) = activity {
                    span.dim { "in the last hour " }
                    @for (outcome, count) in &activity.ended {
                        (count_of(JobState::Ended(*outcome), *count, filter)) " "
                    }
                    @if activity.ended.is_empty() { span.dim { "none has ended" } }
                }
            }
            (parts(frame))
        }
    }
}

fn count_of(state: JobState, count: i64, filter: &Filter) -> Markup {
    let only = Filter {
        finished: matches!(state, JobState::Ended(_)),
        state: Some(state),
        ..Filter::default()
    };
    let current = (filter.state == Some(state)).then_some("true");
    let class = match state {
        JobState::Live(JobStatus::Running) => "runs",
        JobState::Live(JobStatus::Submitted) => "waits",
        JobState::Live(JobStatus::Registered) => "held",
        JobState::Ended(_) => match state.tone() {
            Tone::Good => "good",
            Tone::Bad => "bad",
            Tone::Plain | Tone::Dim => "off",
        },
    };
    let text = match state {
        // Their tasks are not handed to RabbitMQ: they wait for their turn, as a rule.
        JobState::Live(JobStatus::Registered) => "held",
        state => state.text(),
    };
    html! {
        a.count.state.(class) href=(list::path(&only)) aria-current=[current] { span { b { (count) } " " (text) } }
    }
}

/// The page when the database does not answer.
pub(super) fn without_database(frame: &Frame<'_>, events: String) -> Sheet {
    let content = html! {
        h1.hidden { "Jobs" }
        section.status aria-label="How all is" {
            @let what = trouble(frame.parts).map_or("Postgres does not answer", |trouble| trouble.what);
            p.verdict.bad role="status" { (what) "." }
            (parts(frame))
        }
        (troubles(frame, &[]))
        div.empty {
            p { b { "No jobs can be shown." } " They are in Postgres, and this page shows them when it answers." }
            p { "What is wrong, and what to do: " (command("omotes-orchestrator doctor")) }
        }
    };
    Sheet::new("OMOTES jobs", content).live(events)
}

/// The page in place of one that would have taken too long, with what helps.
pub(super) fn in_vain(frame: &Frame<'_>, why: &str) -> Sheet {
    let content = html! {
        h1.hidden { "Jobs" }
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        p.alarm { (why) }
    };
    Sheet::new("OMOTES jobs", content)
}

/// The page of a job that is not known, or not any more; by its id if that is a whole one.
pub(super) fn unknown_job(frame: &Frame<'_>, name: &str, id: Option<Uuid>) -> Sheet {
    let text = format!(
        "omotes-orchestrator jobs list --finished --text {}",
        one_line(name)
    );
    let content = html! {
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { "job " (one_line(name)) " is unknown" }
        div.empty {
            p { "It was never submitted here, or its submission has not arrived yet, or its history has been deleted." }
            p { (command(&text)) }
        }
    };
    let sheet = Sheet::new("Unknown job", content);
    match id {
        Some(id) => sheet.live(events_of(id)),
        None => sheet,
    }
}

/// Those whose ids begin so.
pub(super) fn several_jobs(frame: &Frame<'_>, name: &str, jobs: &[(Uuid, String)]) -> Sheet {
    let content = html! {
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { "Jobs whose ids begin with " (one_line(name)) }
        ul { @for (id, reference) in jobs { li {
            a href={ "/jobs/" (id) } { code { (id) } } " " (harmless(reference))
        } } }
    };
    Sheet::new("Several jobs", content)
}

fn workflow_table(all: &[WorkflowView], now: Timestamp) -> Markup {
    let busy = all.iter().filter(|workflow| {
        workflow.waiting + workflow.running > 0 || workflow.workers.is_some_and(|count| count > 0)
    });
    let shown: Vec<_> = busy.collect();
    let hidden = all.len() - shown.len();
    html! {
        section {
            h2 { "Workflows" }
            @if shown.is_empty() {
                div.empty { p { b { "No jobs and no workers." } " The workflows that are defined: " (command("omotes-orchestrator workflows list")) } }
            } @else {
                div.card tabindex="0" role="region" aria-label="Workflows" { table {
                    thead { tr {
                        th scope="col" { "Workflow" } th.number scope="col" { "Waiting" } th.number scope="col" { "Running" }
                        th.number scope="col" { "Workers" } th scope="col" { "Oldest waits" }
                        th scope="col" title=(list::ESTIMATE) { "Takes (estimate)" }
                    } }
                    tbody { @for workflow in shown { (workflow_row(workflow, now)) } }
                } }
            }
            @if hidden > 0 { p.dim { (hidden) " more without jobs or workers." } }
        }
    }
}

fn workflow_row(workflow: &WorkflowView, now: Timestamp) -> Markup {
    let of_it = Filter {
        workflow: Some(workflow.name.clone()),
        ..Filter::default()
    };
    html! {
        tr id={ "workflow-" (workflow.name) } {
            th scope="row" { a href=(list::path(&of_it)) { (harmless(&workflow.name)) }
                @if !workflow.defined { " " span.badge { "not defined" } } }
            td.number { (workflow.waiting) }
            td.number { (workflow.running) }
            td.number class=[workflow.without_worker_since.map(|_| "bad")] {
                @match workflow.workers { Some(workers) => (workers), None => "?" } }
            td.nowrap { @if let Some(oldest) = workflow.oldest_waiting { (since(oldest, now)) } }
            td.nowrap.dim { @if let Some(run) = workflow.run { (run) } }
        }
    }
}

fn turns_table(queues: &[QueueView], acting: Option<&Acting>) -> Markup {
    html! {
        section {
            h2 { "Turns" }
            div.card tabindex="0" role="region" aria-label="Turns" { table {
                thead { tr {
                    th scope="col" { "Task queue" } th scope="col" { "Limits" } th.number scope="col" { "Held" }
                    th.number scope="col" { "On hold" } th.number scope="col" { "Waiting" } th.number scope="col" { "Running" }
                    @if acting.is_some() { th scope="col" { "Actions" } }
                } }
                tbody { @for queue in queues { tr id={ "turns-" (queue.name) } {
                    th scope="row" { (harmless(&queue.name)) }
                    td class=[queue.limit.is_paused.then_some("warn")] { (queue.limit)
                        @for change in queue.changes() { div.dim { (prose(&change)) } } }
                    td.number { (queue.held) }
                    td.number { (queue.on_hold) }
                    td.number { (queue.waiting) }
                    td.number { (queue.running) }
                    @if let Some(acting) = acting { (acting.queue(queue)) }
                } } }
            } }
        }
    }
}

/// RabbitMQ's queues, for whoever looks into it; closed at first.
fn queue_table(queues: &Queues, now: Timestamp) -> Markup {
    html! {
        details.queues {
            summary { "RabbitMQ's queues " span.dim { (looked(queues.at, now)) " ago" } }
            div.card tabindex="0" role="region" aria-label="RabbitMQ's queues" { table {
                thead { tr { th scope="col" { "Connection" } th scope="col" { "Queue" } th.number scope="col" { "Messages" }
                    th.number scope="col" { "Consumers" } } }
                tbody {
                    @for queue in &queues.queues { @if let Some(depth) = queue.depth {
                        tr id={ "queue-" (queue.vhost.name()) "-" (queue.name) } {
                            td.dim { (queue.vhost.name()) } th scope="row" { (harmless(&queue.name)) }
                            td.number { (depth.messages) } td.number { (depth.consumers) }
                        }
                    } }
                }
            } }
        }
    }
}
