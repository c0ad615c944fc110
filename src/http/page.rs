//! The status page: what [`crate::domain::overview`] has, as HTML. It shows no ESDLs.

use jiff::{SignedDuration, Timestamp};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use uuid::Uuid;

use crate::domain::job::Priority;
use crate::domain::overview::{
    AttemptView, Filter, JobState, JobView, MAX_COUNT, Overview, Page, QueueView, Queues, Story,
    Tone, WorkflowView, spoken,
};
use crate::telemetry::health::{Part, PartView};
use crate::telemetry::report::{harmless, percent, readable};
use crate::telemetry::trouble::{Trouble, trouble};
use crate::wire::DEAD_LETTERS_QUEUE;

pub(super) mod acting;
mod story;
mod workers;

use acting::Acting;

const STYLE: &str = include_str!("page/style.css");
const SCRIPT: &str = include_str!("page/script.js");

/// The explanation of an estimate's two times.
const ESTIMATE: &str =
    "Half of the last runs like this stayed below the first time, nine of ten below the second.";

/// What is on every page.
pub(super) struct Frame<'a> {
    /// The script nonce, fresh for each page; None for one that must not change by itself.
    pub(super) nonce: Option<&'a str>,
    pub(super) now: Timestamp,
    /// Which of the replicas answers.
    pub(super) host: &'a str,
    pub(super) parts: &'a [PartView],
    /// What was done before this page was shown.
    pub(super) note: Option<&'a str>,
    /// None for whoever only looks.
    pub(super) acting: Option<&'a Acting>,
}

/// The overview: all jobs, workflows, queues, health.
pub(super) fn overview(
    frame: &Frame<'_>,
    overview: &Overview,
    filter: &Filter,
    page: &Page,
) -> String {
    let now = frame.now;
    let workflows = overview.workflows();
    let names: Vec<_> = workflows
        .iter()
        .map(|workflow| workflow.name.as_str())
        .collect();
    let busy = workflows.iter().filter(|workflow| {
        workflow.waiting + workflow.running > 0 || workflow.workers.is_some_and(|count| count > 0)
    });
    let shown: Vec<_> = busy.collect();
    let queues = overview.queues.as_ref();
    let mut faults = frame.parts.iter().filter(|part| part.why.is_some());
    let rabbitmq_works = !faults.any(|part| part.part == Part::Broker);
    let dead_letters = queues.map_or(0, |queues| queues.messages_in(DEAD_LETTERS_QUEUE));
    document(
        frame,
        "OMOTES jobs",
        html! {
            @for workflow in &workflows {
                @if let Some(since) = workflow.without_worker_since {
                    p.alarm.warn {
                        b { (workflow.name) } " has no worker, and " (workflow.waiting)
                        @if workflow.waiting == 1 { " job waits" } @else { " jobs wait" }
                        " since " (ago(since, now)) "."
                    }
                }
            }
            @if dead_letters > 0 {
                p.alarm.warn {
                    (dead_letters) @if dead_letters == 1 { " message" } @else { " messages" }
                    " could not be handled: see " code { "omotes-orchestrator dead-letters list" } "."
                    @if let Some(acting) = frame.acting { (acting.letters()) }
                }
            }
            // Without RabbitMQ nobody knows.
            @if let (Some(all), true) = (&overview.workers, rabbitmq_works) { (workers::alarms(all, now)) }
            (workflow_table(&shown, workflows.len() - shown.len(), now))
            @if !overview.turns.is_empty() { (turns_table(&overview.turns, frame.acting)) }
            @if let Some(acting) = frame.acting { (acting.any_queue(overview)) }
            @if let Some(all) = &overview.workers { (workers::table(all, now, frame.acting)) }
            (filters(filter, &names))
            nav {
                (tab("Not finished", !filter.finished, "/"))
                (tab("Finished", filter.finished, "/?finished=true"))
            }
            @if filter.finished { (finished_table(&page.jobs, now)) } @else { (live_table(&page.jobs, now, frame.acting)) }
            (paging(filter, page))
            @if let Some(acting) = frame.acting { (acting.matching(filter, page.total)) }
            @if let Some(queues) = queues { (queue_table(queues, now)) }
        },
    )
}

/// The page when the database does not answer.
pub(super) fn without_database(frame: &Frame<'_>) -> String {
    document(
        frame,
        "OMOTES jobs",
        html! {
            p.dim { "No jobs can be shown." }
        },
    )
}

/// The page in place of one that would have taken too long, with what helps.
pub(super) fn in_vain(frame: &Frame<'_>, why: &str) -> String {
    document(
        frame,
        "OMOTES jobs",
        html! {
            nav { a href="/" { "← all jobs" } }
            p.alarm { (why) }
        },
    )
}

/// The page of a job that is not known, or not any more.
pub(super) fn unknown_job(frame: &Frame<'_>, id: Uuid) -> String {
    document(
        frame,
        "OMOTES jobs",
        html! {
            nav { a href="/" { "← all jobs" } }
            p.alarm { "job " (id) " is unknown" }
        },
    )
}

/// One job in full.
pub(super) fn job(frame: &Frame<'_>, story: &Story) -> String {
    let (job, now) = (&story.job, frame.now);
    let when = |time: Option<Timestamp>| {
        html! {
            @match time {
                Some(time) => { (exactly(time)) " " span.dim { "(" (ago(time, now)) " ago)" } }
                None => span.dim { "–" }
            }
        }
    };
    document(
        frame,
        &format!("Job {}", job.id),
        html! {
            nav { a href="/" { "← all jobs" } }
            h2 { "Job " code { (job.id) } }
            @if let Some(why) = &job.why {
                p.why { b { (why.sentence) } }
                @if !why.evidence.is_empty() { ul.why.dim { @for fact in &why.evidence { li { (fact) } } } }
            }
            @if let Some(acting) = frame.acting { (acting.job(job)) }
            div.card { dl {
                dt { "Reference" } dd { (or_dash(&job.reference)) }
                dt { "Workflow" } dd { (job.workflow.as_deref().map_or(or_dash(""), or_dash)) }
                dt { "State" } dd { (live_state(job)) }
                @if let Some(priority) = job.priority { dt { "Priority" } dd { (priority_text(priority)) } }
                @if let Some(position) = job.position { dt { "Place in its queue" } dd { (position) } }
                dt { "Registered" } dd { (when(job.registered_at)) }
                dt { "Submitted" } dd { (when(job.submitted_at)) }
                dt { "First started" } dd { (when(job.running_at)) }
                dt { "Finished" } dd { (when(job.finished_at)) }
                @if let Some(waited) = job.waited(now) { dt { "Waited" } dd { (spoken(waited)) } }
                @if let Some(ran) = job.ran(now) { dt { "Ran" } dd { (spoken(ran)) (timeout(job)) } }
                @if let Some(progress) = &job.progress {
                    dt { "Progress" }
                    dd { (steps_bar(job, progress.fraction)) div.message { (readable(&progress.message)) } div.dim { (ago(progress.at, now)) " ago" } }
                }
                @if let Some(estimate) = job.expectation() { dt title=(ESTIMATE) { "Estimate" } dd { (estimate) } }
                dt { "Starts" } dd {
                    (job.starts)
                    @for started_at in &story.started_at { div.dim { (exactly(*started_at)) } }
                }
                @if let Some(bytes) = job.result_bytes { dt { "Size of the result" } dd { (bytes) " bytes" } }
                dt { "Celery task" } dd { @match &job.task_id { Some(id) => code { (harmless(id)) }, None => span.dim { "–" } } }
            } }
            @if !story.attempts.is_empty() { (time_line(&story.attempts, now)) }
            (story::section(frame, story))
        },
    )
}

/// The steps of a job and their attempts, with how long each waited and ran.
fn time_line(attempts: &[AttemptView], now: Timestamp) -> Markup {
    let length =
        |time: Option<SignedDuration>| time.map_or(0.0, |time| time.as_secs_f64().max(0.0));
    let whole: f64 = attempts
        .iter()
        .map(|one| length(one.waited(now)) + length(one.ran(now)))
        .sum();
    let part = |time: f64| format!("flex-grow: {:.4}", time / whole.max(0.001));
    html! {
        h2 { "Steps" }
        div.timeline aria-hidden="true" {
            @for one in attempts {
                span.waits style=(part(length(one.waited(now)))) title={ (harmless(&one.title)) ": waits" } {}
                span class={ "runs " (tone(one)) } style=(part(length(one.ran(now)))) title={ (harmless(&one.title)) ": " (one.state()) } {}
            }
        }
        div.card { table {
            thead { tr {
                th { "Step" } th { "Task" } th { "State" } th { "Waited" } th { "Ran" } th.number { "Starts" } th { "Logs" }
            } }
            tbody {
                @for one in attempts { tr id={ "step-" (one.step) "-" (one.attempt) } {
                    td { (one.step) ". " (harmless(&one.title))
                        @if one.attempt > 1 { span.dim { ", attempt " (one.attempt) } } }
                    td { (harmless(&one.task)) @if let Some(id) = &one.task_id { div.dim { code { (harmless(id)) } } } }
                    td { span class=(tone(one)) { (one.state()) }
                        @if let (Some(due), None) = (one.due_at, one.submitted_at) { div.dim { "at " (exactly(due)) } } }
                    td.nowrap { @if let Some(time) = one.waited(now) { (spoken(time)) } }
                    td.nowrap { @if let Some(time) = one.ran(now) { (spoken(time)) } }
                    td.number { @if let Some(starts) = one.starts { (starts) } }
                    td { @if let Some(logs) = &one.logs { details { summary { "logs" } pre { (readable(logs)) } } } }
                } }
            }
        } }
    }
}

fn tone(attempt: &AttemptView) -> &'static str {
    match attempt
        .outcome
        .map(|outcome| JobState::Ended(outcome).tone())
    {
        None | Some(Tone::Plain) => "",
        Some(Tone::Good) => "good",
        Some(Tone::Dim) => "dim",
        Some(Tone::Bad) => "bad",
    }
}

/// Of every page.
fn head(title: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            link rel="icon" href="data:,";
            title { (title) }
            style { (PreEscaped(STYLE)) }
        }
    }
}

fn document(frame: &Frame<'_>, title: &str, content: Markup) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            (head(title))
            body {
                p.alarm #stale hidden { "The orchestrator does not answer. What is shown is not up to date." }
                main {
                    header {
                        h1 { a href="/" { "OMOTES jobs" } }
                        ul.parts {
                            @for part in frame.parts {
                                li class={ "part" @if part.why.is_some() { " bad" } } { (part.part.name()) }
                            }
                        }
                    }
                    @if let Some(trouble) = trouble(frame.parts) { (lead(&trouble, frame.now)) }
                    (acting::note(frame.note))
                    (content)
                    footer { (exactly(frame.now)) ", " (frame.host) ", version " (env!("CARGO_PKG_VERSION")) }
                }
                @if let Some(nonce) = frame.nonce { script nonce=(nonce) { (PreEscaped(SCRIPT)) } }
            }
        }
    };
    page.into_string()
}

/// What to do first, with what follows from the same cause out of the way.
fn lead(trouble: &Trouble, now: Timestamp) -> Markup {
    let fault = |part: &PartView| {
        let why = part.why.as_deref().unwrap_or_default();
        html! { b { (part.part.name()) } " since " (ago(part.since, now)) ": " (readable(why)) }
    };
    html! {
        div.alarm.lead {
            b { (trouble.what) } " since " (ago(trouble.since, now)) ". " (trouble.remedy)
            div.dim.message { (readable(&trouble.why)) }
            @if !trouble.follows.is_empty() {
                details.follows {
                    summary { "What follows from it: " (trouble.follows.len()) }
                    ul { @for part in &trouble.follows { li { (fault(part)) } } }
                }
            }
        }
        @for part in &trouble.others { p.alarm { (fault(part)) } }
    }
}

fn workflow_table(workflows: &[&WorkflowView], hidden: usize, now: Timestamp) -> Markup {
    html! {
        h2 { "Workflows" }
        div.card { table {
            thead { tr {
                th { "Workflow" } th.number { "Waiting" } th.number { "Running" } th.number { "Workers" }
                th { "Oldest waits" } th title=(ESTIMATE) { "Takes (estimate)" }
            } }
            tbody {
                @for workflow in workflows {
                    tr id={ "workflow-" (workflow.name) } {
                        td { a href={ "/?" (of_workflow(&workflow.name)) } { (harmless(&workflow.name)) }
                            @if !workflow.defined { " " span.warn { "not defined" } } }
                        td.number { (workflow.waiting) }
                        td.number { (workflow.running) }
                        td.number class=[workflow.without_worker_since.map(|_| "bad")] {
                            @match workflow.workers { Some(workers) => (workers), None => "?" } }
                        td.nowrap { @if let Some(since) = workflow.oldest_waiting { (ago(since, now)) } }
                        td.nowrap.dim { @if let Some(run) = workflow.run { (run) } }
                    }
                }
                @if workflows.is_empty() { tr { td.dim colspan="6" { "No jobs and no workers." } } }
            }
        } }
        @if hidden > 0 { p.dim { (hidden) " more without jobs or workers." } }
    }
}

fn of_workflow(name: &str) -> String {
    let filter = Filter {
        workflow: Some(name.to_owned()),
        ..Filter::default()
    };
    filter.query(0)
}

fn filters(filter: &Filter, workflows: &[&str]) -> Markup {
    let states =
        JobState::all().filter(|state| matches!(state, JobState::Ended(_)) == filter.finished);
    html! {
        form action="/" data-keep="" {
            @if filter.finished { input type="hidden" name="finished" value="true"; }
            input type="search" name="text" placeholder="id, reference or message" aria-label="text"
                value=(filter.text.as_deref().unwrap_or_default());
            select name="state" aria-label="state" {
                option value="" { "any state" }
                @for state in states {
                    option value=(state.name()) selected[filter.state == Some(state)] { (state.text()) }
                }
            }
            select name="workflow" aria-label="workflow" {
                option value="" { "any workflow" }
                @for name in workflows {
                    option value=(name) selected[filter.workflow.as_deref() == Some(name)] { (harmless(name)) }
                }
            }
            button { "Filter" }
        }
    }
}

fn tab(title: &str, current: bool, target: &str) -> Markup {
    html! { @if current { b { (title) } } @else { a href=(target) { (title) } } }
}

fn turns_table(queues: &[QueueView], acting: Option<&Acting>) -> Markup {
    html! {
        h2 { "Turns" }
        div.card { table {
            thead { tr {
                th { "Task queue" } th { "Limits" } th.number { "Held" } th.number { "On hold" }
                th.number { "Waiting" } th.number { "Running" } @if acting.is_some() { th { "Actions" } }
            } }
            tbody { @for queue in queues { tr id={ "turns-" (queue.name) } {
                td { (harmless(&queue.name)) }
                td class=[queue.limit.is_paused.then_some("warn")] { (queue.limit) }
                td.number { (queue.held) }
                td.number { (queue.on_hold) }
                td.number { (queue.waiting) }
                td.number { (queue.running) }
                @if let Some(acting) = acting { (acting.queue(queue)) }
            } } }
        } }
    }
}

fn live_table(jobs: &[JobView], now: Timestamp, acting: Option<&Acting>) -> Markup {
    html! {
        div.card { table.jobs {
            thead { tr {
                th { "Job" } th { "Workflow" } th { "State" } th { "Progress" } th { "Since" }
                th.number { "Starts" } th title=(ESTIMATE) { "Estimate" } @if acting.is_some() { th { "Actions" } }
            } }
            tbody {
                @for job in jobs { tr id={ "job-" (job.id) } {
                    td data-label="Job" { span { (name(job)) (why(job)) } }
                    td data-label="Workflow" { (harmless(job.workflow.as_deref().unwrap_or("–"))) }
                    td.nowrap data-label="State" {
                        span { (live_state(job))
                            @if let Some(position) = job.position { span.dim { " no. " (position) } }
                            @if let Some(priority @ (Priority::High | Priority::Low)) = job.priority {
                                span.dim { ", " (priority_text(priority)) } } }
                    }
                    td data-label="Progress" { span {
                        @if let Some(progress) = &job.progress {
                            (steps_bar(job, progress.fraction)) div.message.dim { (readable(&progress.message)) }
                        } } }
                    td.nowrap data-label="Since" { span {
                        @match (job.ran(now), job.waited(now)) {
                            (Some(ran), _) => { (spoken(ran)) (timeout(job)) }
                            (None, Some(waited)) => (spoken(waited)),
                            (None, None) => "–",
                        } } }
                    td.number data-label="Starts" { (job.starts) }
                    td.dim data-label="Estimate" { span { @if let Some(estimate) = job.expectation() { (estimate) } } }
                    @if let Some(acting) = acting { (acting.cell(job)) }
                } }
                @if jobs.is_empty() { tr { td.dim colspan="8" { "No such jobs." } } }
            }
        } }
    }
}

fn finished_table(jobs: &[JobView], now: Timestamp) -> Markup {
    html! {
        div.card { table.jobs {
            thead { tr {
                th { "Job" } th { "Workflow" } th { "Outcome" } th { "Finished" } th { "Waited" } th { "Ran" }
                th.number { "Starts" }
            } }
            tbody {
                @for job in jobs { tr id={ "job-" (job.id) } {
                    td data-label="Job" { span { (name(job)) (why(job)) } }
                    td data-label="Workflow" { (harmless(job.workflow.as_deref().unwrap_or("–"))) }
                    td data-label="Outcome" { (state(job.state)) }
                    td.nowrap data-label="Finished" { @if let Some(at) = job.finished_at { span { (ago(at, now)) " ago" } } }
                    td.nowrap data-label="Waited" { @if let Some(time) = job.waited(now) { (spoken(time)) } }
                    td.nowrap data-label="Ran" { @if let Some(time) = job.ran(now) { (spoken(time)) } }
                    td.number data-label="Starts" { (job.starts) }
                } }
                @if jobs.is_empty() { tr { td.dim colspan="7" { "No such jobs." } } }
            }
        } }
    }
}

fn paging(filter: &Filter, page: &Page) -> Markup {
    let (first, limit) = (i64::from(filter.offset), i64::from(filter.limit));
    let last = first + i64::try_from(page.jobs.len()).unwrap_or(0);
    html! {
        nav {
            @if filter.offset > 0 {
                a href={ "/?" (filter.query(filter.offset.saturating_sub(filter.limit.into()))) } { "← previous" }
            }
            @if !page.jobs.is_empty() {
                span.dim { (first + 1) "–" (last) " of " (page.total) @if page.total == MAX_COUNT { " or more" } }
            }
            @if first + limit < page.total {
                a href={ "/?" (filter.query(filter.offset + u32::from(filter.limit))) } { "next →" }
            }
        }
    }
}

fn queue_table(queues: &Queues, now: Timestamp) -> Markup {
    html! {
        h2 { "Queues " span.dim { (ago(queues.at, now)) " ago" } }
        div.card { table {
            thead { tr { th { "Connection" } th { "Queue" } th.number { "Messages" } th.number { "Consumers" } } }
            tbody {
                @for queue in &queues.queues { @if let Some(depth) = queue.depth {
                    tr id={ "queue-" (queue.vhost.name()) "-" (queue.name) } {
                        td.dim { (queue.vhost.name()) } td { (harmless(&queue.name)) }
                        td.number { (depth.messages) } td.number { (depth.consumers) }
                    }
                } }
            }
        } }
    }
}

fn name(job: &JobView) -> Markup {
    let id = job.id.to_string();
    html! { a href={ "/jobs/" (id) } title=(id) {
    @if job.reference.is_empty() { code { (id[..8]) } } @else { (harmless(&job.reference)) } } }
}

/// Why it is as it is, below its name.
fn why(job: &JobView) -> Markup {
    html! { @if let Some(why) = &job.why { div.why.dim { (why.sentence) } } }
}

fn state(state: JobState) -> Markup {
    let class = match state.tone() {
        Tone::Plain => "",
        Tone::Good => "good",
        Tone::Dim => "dim",
        Tone::Bad => "bad",
    };
    html! { span class=(class) { (state.text()) } }
}

fn priority_text(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low priority",
        Priority::Medium => "medium",
        Priority::High => "high priority",
    }
}

fn bar(fraction: f64) -> Markup {
    html! { div.nowrap { progress max="1" value=(fraction.clamp(0.0, 1.0)) {} " " (percent(fraction)) } }
}

/// A job's progress, cut into its steps where it has several.
fn steps_bar(job: &JobView, fraction: f64) -> Markup {
    let Some(step) = job.step.as_ref().filter(|step| step.shares.len() > 1) else {
        return bar(fraction);
    };
    html! { div.nowrap {
        span.steps title=(step.name()) {
            @for (share, done) in step.parts(fraction) {
                progress max="1" value=(done) style=(format!("flex-grow: {share:.4}")) {}
            }
        }
        " " (percent(fraction))
    } }
}

/// The state of a job, with its step.
fn live_state(job: &JobView) -> Markup {
    html! {
        @match (&job.step, &job.turn) {
            (Some(_), _) | (None, Some(_)) => (harmless(&job.state_text())),
            (None, None) => (state(job.state)),
        }
    }
}

fn timeout(job: &JobView) -> Markup {
    let limit = job.timeout_ms.filter(|timeout| *timeout > 0);
    html! { @if let Some(limit) = limit { span.dim { " of " (spoken(SignedDuration::from_millis(limit))) } } }
}

fn ago(time: Timestamp, now: Timestamp) -> String {
    spoken(now.duration_since(time))
}

fn exactly(time: Timestamp) -> String {
    format!("{time:.0}")
}

fn or_dash(text: &str) -> Markup {
    html! { @if text.is_empty() { span.dim { "–" } } @else { (harmless(text)) } }
}
