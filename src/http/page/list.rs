//! The list of jobs: which are shown, one line each, and what to do where there are none.

use jiff::Timestamp;
use maud::{Markup, html};

use super::acting::Acting;
use super::prose::said;
use super::words::{bar, command, link, since, state, timeout};
use crate::domain::overview::{Filter, JobState, JobView, MAX_COUNT, Page, spoken};
use crate::telemetry::report::{harmless, readable};

/// The explanation of an estimate's two times.
pub(super) const ESTIMATE: &str =
    "Half of the last runs like this stayed below the first time, nine of ten below the second.";

/// The tabs, the filter, the jobs, and the way to the next ones. Whoever may act, and whether any job
/// waits for its turn, is in `acting`.
pub(super) fn section(
    filter: &Filter,
    page: &Page,
    workflows: &[&str],
    now: Timestamp,
    acting: Option<(&Acting, bool)>,
) -> Markup {
    let (acting, turns) = (
        acting.map(|(acting, _)| acting),
        acting.is_some_and(|(_, turns)| turns),
    );
    html! {
        section #jobs aria-label="Jobs" {
            div.above {
                (tabs(filter))
                (filters(filter, workflows))
            }
            @if page.jobs.is_empty() { (nothing(filter, acting.is_some())) }
            @else if filter.finished { (finished_table(&page.jobs, now)) }
            @else { (live_table(&page.jobs, now, acting)) }
            div.below {
                (paging(filter, page))
                @if let Some(acting) = acting { (acting.matching(filter, page.total, turns)) }
            }
        }
    }
}

/// The same filter for the other half of the jobs, as far as it can be.
fn tabs(filter: &Filter) -> Markup {
    let tab = |finished: bool, title: &str| {
        let other = Filter {
            finished,
            state: filter.state.filter(|_| finished == filter.finished),
            ..filter.clone()
        };
        let current = (finished == filter.finished).then_some("page");
        html! { a href=(path(&other)) aria-current=[current] { (title) } }
    };
    html! { nav.tabs aria-label="Which jobs" { (tab(false, "Not finished")) (tab(true, "Finished")) } }
}

/// The page with this filter, from its beginning.
pub(super) fn path(filter: &Filter) -> String {
    match filter.query(0) {
        query if query.is_empty() => "/".to_owned(),
        query => format!("/?{query}"),
    }
}

fn filters(filter: &Filter, workflows: &[&str]) -> Markup {
    let states =
        JobState::all().filter(|state| matches!(state, JobState::Ended(_)) == filter.finished);
    let is_filtered = filter.text.is_some() || filter.state.is_some() || filter.workflow.is_some();
    let whole = Filter {
        finished: filter.finished,
        ..Filter::default()
    };
    html! {
        form.filter action="/" role="search" data-keep="" {
            @if filter.finished { input type="hidden" name="finished" value="true"; }
            input type="search" name="text" placeholder="Id, reference or message" aria-label="Id, reference or message"
                value=(filter.text.as_deref().unwrap_or_default());
            select name="state" aria-label="State" {
                option value="" { "Any state" }
                @for state in states {
                    option value=(state.name()) selected[filter.state == Some(state)] { (state.text()) }
                }
            }
            select name="workflow" aria-label="Workflow" {
                option value="" { "Any workflow" }
                @for name in workflows {
                    option value=(name) selected[filter.workflow.as_deref() == Some(name)] { (harmless(name)) }
                }
            }
            button { "Filter" }
            @if is_filtered { a href=(path(&whole)) { "Clear" } }
        }
    }
}

/// Instead of an empty table: why it is, and what to do next.
fn nothing(filter: &Filter, may_act: bool) -> Markup {
    let is_filtered = filter.text.is_some() || filter.state.is_some() || filter.workflow.is_some();
    let is_whole = !is_filtered && filter.offset == 0;
    html! {
        div.empty {
            @if is_whole && filter.finished {
                p { b { "No job has ended yet." } }
                p { "Those that have not are in the other tab." }
            } @else if is_whole {
                p { b { "No such jobs." } " Nothing waits and nothing runs." }
                p {
                    @if may_act { a.button href="/submit" { "Submit a job" } " or, from a terminal: " }
                    @else { "To submit one: " }
                    (command("omotes-orchestrator submit model.esdl --workflow NAME"))
                }
            } @else {
                p { b { "No such jobs." } @if filter.offset > 0 { " The list has become shorter." } @else { " None matches the filter." } }
                p {
                    @if filter.offset > 0 { a.button href=(path(filter)) { "To its beginning" } }
                    @else {
                        a.button href=(path(&Filter { finished: filter.finished, ..Filter::default() })) { "Clear the filter" }
                        " or look among "
                        @let other = Filter { finished: !filter.finished, state: None, ..filter.clone() };
                        a href=(path(&other)) { @if filter.finished { "those that have not finished" } @else { "those that have finished" } }
                        "."
                    }
                }
            }
        }
    }
}

fn live_table(jobs: &[JobView], now: Timestamp, acting: Option<&Acting>) -> Markup {
    html! {
        div.card { table.jobs {
            thead { tr {
                th.job scope="col" { "Job, workflow" } th.of-state scope="col" { "State" } th.progress scope="col" { "Progress" }
                th.time scope="col" title=(ESTIMATE) { "Since, estimate" } th.why scope="col" { "Why" }
                @if acting.is_some() { th.does scope="col" { "Actions" } }
            } }
            tbody { @for job in jobs { tr id={ "job-" (job.id) } {
                (called(job))
                td.of-state { (state(job, now)) (starts(job)) }
                td.progress { @if let Some(progress) = &job.progress {
                    (bar(job, progress.fraction))
                    span.second.message title=(readable(&progress.message)) { (readable(&progress.message)) }
                } }
                td.time {
                    @match (job.running_at, job.waited(now)) {
                        (Some(began), _) => { (since(began, now)) (timeout(job)) }
                        (None, Some(_)) => { @if let Some(began) = waits_since(job) { (since(began, now)) } }
                        (None, None) => "–",
                    }
                    @if let Some(estimate) = job.expectation() { span.second { (estimate) } }
                }
                (why(job))
                @if let Some(acting) = acting { (acting.cell(job)) }
            } } }
        } }
    }
}

/// A job's name, and the workflow below it.
fn called(job: &JobView) -> Markup {
    html! {
        th.job scope="row" {
            (link(job))
            span.second { (harmless(job.workflow.as_deref().unwrap_or("–"))) }
        }
    }
}

/// How often it was started, if that says anything.
fn starts(job: &JobView) -> Markup {
    html! { @if job.starts > 1 { span.second { "started " (job.starts) " times" } } }
}

fn why(job: &JobView) -> Markup {
    html! {
        td.why { @if let Some(why) = &job.why {
            (said(&why.sentence, why.moments()))
        } }
    }
}

/// What [`JobView::waited`] counts from.
fn waits_since(job: &JobView) -> Option<Timestamp> {
    job.submitted_at
        .or(job.turn.as_ref().map(|turn| turn.since))
}

fn finished_table(jobs: &[JobView], now: Timestamp) -> Markup {
    html! {
        div.card { table.jobs.finished {
            thead { tr {
                th.job scope="col" { "Job, workflow" } th.of-state scope="col" { "Outcome" } th.time scope="col" { "Finished" }
                th.waited scope="col" { "Waited" } th.ran scope="col" { "Ran" } th.why scope="col" { "Why" }
            } }
            tbody { @for job in jobs { tr id={ "job-" (job.id) } {
                (called(job))
                td.of-state { (state(job, now)) (starts(job)) }
                td.time { @if let Some(at) = job.finished_at { (since(at, now)) " ago" } }
                td.waited { @if let Some(time) = job.waited(now) { (spoken(time)) } }
                td.ran { @if let Some(time) = job.ran(now) { (spoken(time)) } }
                (why(job))
            } } }
        } }
    }
}

fn paging(filter: &Filter, page: &Page) -> Markup {
    let (first, limit) = (i64::from(filter.offset), i64::from(filter.limit));
    let last = first + i64::try_from(page.jobs.len()).unwrap_or(0);
    let part = |offset: u32| format!("/?{}", filter.query(offset));
    html! {
        nav.paging aria-label="Parts of the list" {
            @if filter.offset > 0 {
                a href=(part(filter.offset.saturating_sub(filter.limit.into()))) { "← previous" }
            }
            @if !page.jobs.is_empty() {
                span.dim { (first + 1) "–" (last) " of " (page.total) @if page.total == MAX_COUNT { " or more" } }
            }
            @if first + limit < page.total {
                a href=(part(filter.offset + u32::from(filter.limit))) { "next →" }
            }
        }
    }
}
