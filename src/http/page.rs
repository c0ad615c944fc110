//! The status page: what [`crate::domain::overview`] has, as HTML. It shows no ESDLs.

use jiff::Timestamp;
use maud::{Markup, html};
use uuid::Uuid;

use crate::domain::activity::Activity;
use crate::domain::job::JobStatus;
use crate::domain::overview::{
    Filter, JobState, Overview, Page, QueueView, Queues, Tone, WorkflowRows, WorkflowView,
};
use crate::telemetry::health::Part;
use crate::telemetry::report::harmless;
use crate::wire::DEAD_LETTERS_QUEUE;

pub(super) mod acting;
mod charts;
mod compare;
mod job;
mod layout;
mod list;
mod story;
mod submit;
mod words;
mod workers;

use acting::Acting;
pub(super) use compare::compare;
pub(super) use job::job;
pub(super) use layout::{Frame, Sheet, refused};
use layout::{parts, troubles};
pub(super) use submit::submit;
use words::{command, looked, since};

/// The overview: how all is, what is wrong, all jobs, and what they run on.
pub(super) fn overview(
    frame: &Frame<'_>,
    overview: &Overview,
    filter: &Filter,
    page: &Page,
    activity: Option<&Activity>,
) -> Sheet {
    let now = frame.now;
    let workflows = overview.workflows();
    let names: Vec<_> = workflows
        .iter()
        .map(|workflow| workflow.name.as_str())
        .collect();
    let warnings = warnings(frame, overview, &workflows);
    let turns = overview
        .turns
        .iter()
        .any(|queue| queue.held + queue.on_hold > 0);
    let content = html! {
        h1.hidden { "Jobs" }
        (status(frame, overview, filter, activity, warnings.len()))
        (troubles(frame, &warnings))
        (list::section(filter, page, &names, now, frame.acting.map(|acting| (acting, turns))))
        @if let Some(activity) = activity { (charts::charts(activity)) }
        (workflow_table(&workflows, now))
        @if !overview.turns.is_empty() { (turns_table(&overview.turns, frame.acting)) }
        @if let Some(acting) = frame.acting { (acting.any_queue(overview)) }
        @if let Some(all) = &overview.workers { (workers::table(all, now, frame.acting)) }
        @if let Some(queues) = &overview.queues { (queue_table(queues, now)) }
    };
    Sheet::new("OMOTES jobs", content).live(events(filter))
}

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
    warnings: usize,
) -> Markup {
    let is_bad = frame.parts.iter().any(|part| part.why.is_some());
    let (class, verdict) = match (is_bad, warnings) {
        (true, _) => ("bad", "Something does not work."),
        (false, 0) => ("good", "All is well."),
        (false, _) => ("amber", "Something needs a look."),
    };
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

/// What somebody has to look at though all parts work.
fn warnings(frame: &Frame<'_>, overview: &Overview, workflows: &[WorkflowView]) -> Vec<Markup> {
    let now = frame.now;
    let mut all = Vec::new();
    for workflow in workflows {
        if let Some(without) = workflow.without_worker_since {
            all.push(html! {
                b { (harmless(&workflow.name)) } " has no worker, and " (workflow.waiting)
                @if workflow.waiting == 1 { " job waits" } @else { " jobs wait" }
                " since " (since(without, now)) ". Start one, or see what keeps it away: "
                (command("omotes-orchestrator doctor"))
            });
        }
    }
    let queues = overview.queues.as_ref();
    let dead_letters = queues.map_or(0, |queues| queues.messages_in(DEAD_LETTERS_QUEUE));
    if dead_letters > 0 {
        all.push(html! {
            (dead_letters) @if dead_letters == 1 { " message" } @else { " messages" }
            " could not be handled: " (command("omotes-orchestrator dead-letters list"))
            @if let Some(acting) = frame.acting { (acting.letters()) }
        });
    }
    let mut faults = frame.parts.iter().filter(|part| part.why.is_some());
    // Without RabbitMQ nobody knows.
    let rabbitmq_works = !faults.any(|part| part.part == Part::Broker);
    if let (Some(workers), true) = (&overview.workers, rabbitmq_works) {
        all.extend(workers::warnings(workers, now));
    }
    all
}

/// The page when the database does not answer.
pub(super) fn without_database(frame: &Frame<'_>, events: String) -> Sheet {
    let content = html! {
        h1.hidden { "Jobs" }
        section.status aria-label="How all is" {
            p.verdict.bad role="status" { "Something does not work." }
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

/// The page of a job that is not known, or not any more.
pub(super) fn unknown_job(frame: &Frame<'_>, id: Uuid) -> Sheet {
    let text = format!("omotes-orchestrator jobs list --finished --text {id}");
    let content = html! {
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { "job " (id) " is unknown" }
        div.empty {
            p { "It was never submitted here, or its submission has not arrived yet, or its history has been deleted." }
            p { (command(&text)) }
        }
    };
    Sheet::new("Unknown job", content).live(events_of(id))
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
                        @for change in queue.changes() { div.dim { (change) } } }
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
