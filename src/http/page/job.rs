//! One job in full.

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};

use super::layout::{Frame, Sheet, troubles};
use super::list::ESTIMATE;
use super::prose::{prose, said};
use super::words::{at, bar, name, or_dash, priority_text, since, state, timeout, tone};
use crate::domain::overview::{AttemptView, JobState, JobView, Story, spoken};
use crate::telemetry::report::{harmless, one_line, readable};

pub(in crate::http) fn job(frame: &Frame<'_>, story: &Story) -> Sheet {
    let (job, now) = (&story.job, frame.now);
    let title = match job.reference.is_empty() {
        true => format!("Job {}", job.id),
        false => one_line(&job.reference),
    };
    let content = html! {
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        div.headline {
            h1.name { @if job.reference.is_empty() { "Job " } (name(job)) }
            (state(job, now))
        }
        p.dim { code { (job.id) } " "
            button.copy type="button" hidden data-copy=(job.id) aria-label="Copy the id" { "Copy" } }
        @if let Some(why) = &job.why {
            p.why { b { (said(&why.sentence, why.moments())) } }
            @if !why.evidence.is_empty() {
                ul.why.dim { @for (fact, moments) in why.facts() { li { (said(fact, moments)) } } }
            }
        }
        @if let Some(progress) = &job.progress {
            @if matches!(job.state, JobState::Live(_)) {
                p.progress { (bar(job, progress.fraction)) " " span.message { (readable(&progress.message)) }
                    span.dim { " " (since(progress.at, now)) " ago" } }
            }
        }
        @if let Some(acting) = frame.acting { (acting.job(job)) }
        (course(story, now))
        (facts(story, now))
        @if !story.attempts.is_empty() { (steps(job, &story.attempts, now)) }
        (super::story::section(frame, story))
    };
    let sheet = Sheet::new(title, content);
    match job.state {
        // Nothing of it changes any more.
        JobState::Ended(_) if job.ends.is_told => sheet,
        JobState::Live(_) | JobState::Ended(_) => sheet.live(super::events_of(job.id)),
    }
}

/// When it came how far, with the time between.
fn course(story: &Story, now: Timestamp) -> Markup {
    let job = &story.job;
    let mut points: Vec<(&str, Timestamp)> = Vec::new();
    let mut add = |what, time: Option<Timestamp>| points.extend(time.map(|time| (what, time)));
    add("Registered", job.registered_at);
    add("Submitted", job.submitted_at);
    add("First started", job.running_at);
    for started_at in &story.started_at {
        let is_first = job.running_at.is_none_or(|first| *started_at <= first);
        add("Started again", Some(*started_at).filter(|_| !is_first));
    }
    add("Finished", job.finished_at);
    points.sort_by_key(|(_, time)| *time);
    let before = |place: usize| Some(points.get(place.checked_sub(1)?)?.1);
    html! {
        ol.course aria-label="Its course" {
            @for (place, (what, time)) in points.iter().enumerate() {
                li {
                    b { (what) }
                    span { (at(*time)) }
                    span.dim {
                        @match before(place) {
                            Some(before) => { "after " (spoken(time.duration_since(before))) }
                            None => { (since(*time, now)) " ago" }
                        }
                    }
                }
            }
        }
    }
}

fn facts(story: &Story, now: Timestamp) -> Markup {
    let job = &story.job;
    html! {
        div.card { dl {
            dt { "Workflow" } dd { (job.workflow.as_deref().map_or(or_dash(""), or_dash)) }
            @if let Some(priority) = job.priority { dt { "Priority" } dd { (priority_text(priority)) } }
            @if let Some(position) = job.position { dt { "Place in its queue" } dd { (position) } }
            @if let Some(waited) = job.waited(now) { dt { "Waited" } dd { (spoken(waited)) } }
            @if let Some(ran) = job.ran(now) { dt { "Ran" } dd {
                @match (job.running_at, job.finished_at) {
                    (Some(began), None) => (since(began, now)),
                    _ => (spoken(ran)),
                }
                (timeout(job)) } }
            @if let Some(progress) = &job.progress {
                @if matches!(job.state, JobState::Ended(_)) {
                    dt { "Last progress" }
                    dd { (bar(job, progress.fraction)) " " span.message { (readable(&progress.message)) } }
                }
            }
            @if let Some(estimate) = job.expectation() { dt title=(ESTIMATE) { "Estimate" } dd { (estimate) } }
            dt { "Starts" } dd { (job.starts) }
            @if let Some(bytes) = job.result_bytes { dt { "Size of the result" } dd { (bytes) " bytes" } }
            @if let Some(whereabouts) = &story.whereabouts { dt { "Output ESDL" } dd { (prose(whereabouts)) } }
            @if let Some(client) = &story.client { dt { "Client" } dd { (prose(client)) } }
            dt { "Celery task" } dd { @match &job.task_id { Some(id) => code { (harmless(id)) }, None => span.dim { "–" } } }
        } }
    }
}

/// The steps of a job and their attempts, with how long each waited and ran.
fn steps(job: &JobView, attempts: &[AttemptView], now: Timestamp) -> Markup {
    let length =
        |time: Option<SignedDuration>| time.map_or(0.0, |time| time.as_secs_f64().max(0.0));
    let whole: f64 = attempts
        .iter()
        .map(|one| length(one.waited(now)) + length(one.ran(now)))
        .sum();
    // Of one that has not ended, what is still to come belongs to it, as far as anybody knows.
    let done = job.progress.as_ref().map(|progress| progress.fraction);
    let done = done.filter(|done| matches!(job.state, JobState::Live(_)) && *done > 0.0);
    let left = done.map_or(0.0, |done| whole / done.clamp(0.01, 1.0) - whole);
    let part = |time: f64| format!("flex-grow: {:.4}", time / (whole + left).max(0.001));
    html! {
        h2 { "Steps" }
        div.timeline aria-hidden="true" {
            @for one in attempts {
                span.waits style=(part(length(one.waited(now)))) title={ (harmless(&one.title)) ": waits" } {}
                span class={ "runs " (tone(one.outcome)) } style=(part(length(one.ran(now)))) title={ (harmless(&one.title)) ": " (one.state()) } {}
            }
            @if left > 0.0 { span style=(part(left)) title="To come, as far as its progress says" {} }
        }
        div.card tabindex="0" role="region" aria-label="Steps" { table {
            thead { tr {
                th scope="col" { "Step" } th scope="col" { "Task" } th scope="col" { "State" } th scope="col" { "Waited" }
                th scope="col" { "Ran" } th.number scope="col" { "Starts" } th scope="col" { "Logs" }
            } }
            tbody { @for one in attempts { (step(one, now)) } }
        } }
    }
}

fn step(one: &AttemptView, now: Timestamp) -> Markup {
    html! {
        tr id={ "step-" (one.step) "-" (one.attempt) } {
            th scope="row" { (one.step) ". " (harmless(&one.title))
                @if one.attempt > 1 { span.dim { ", attempt " (one.attempt) } } }
            td { (harmless(&one.task)) @if let Some(id) = &one.task_id { div.dim { code { (harmless(id)) } } } }
            td { span class=(tone(one.outcome)) { (one.state()) }
                @if let (Some(due), None) = (one.due_at, one.submitted_at) { div.dim { "at " (at(due)) } } }
            td.nowrap { @if let Some(time) = one.waited(now) { (spoken(time)) } }
            td.nowrap { @if let Some(time) = one.ran(now) { (spoken(time)) } }
            td.number { @if let Some(starts) = one.starts { (starts) } }
            td { @if let Some(logs) = &one.logs { details { summary { "logs" } pre tabindex="0" { (readable(logs)) } } } }
        }
    }
}
