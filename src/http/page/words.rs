//! The small parts of all pages: times, states, bars, commands.

use jiff::{SignedDuration, Timestamp};
use maud::{Markup, html};

use crate::domain::job::{JobStatus, Outcome, Priority};
use crate::domain::overview::{Amber, JobState, JobView, Tone, spoken};
use crate::telemetry::report::{harmless, percent};

/// What somebody has to look at, in a few words and in full.
pub(super) struct Matter {
    pub(super) short: String,
    pub(super) full: Markup,
}

pub(super) fn ago(time: Timestamp, now: Timestamp) -> String {
    spoken(now.duration_since(time))
}

/// The same, which the script counts on.
pub(super) fn since(time: Timestamp, now: Timestamp) -> Markup {
    html! { time.since datetime=(stamp(time)) { (ago(time, now)) } }
}

/// The same of the last look at something, which is no news by itself.
pub(super) fn looked(time: Timestamp, now: Timestamp) -> Markup {
    html! { time.since.looked datetime=(stamp(time)) { (ago(time, now)) } }
}

/// A point in time, which the script shows in the reader's own time zone.
pub(super) fn at(time: Timestamp) -> Markup {
    html! { time.at datetime=(stamp(time)) { (time.strftime("%Y-%m-%d %H:%M:%S UTC")) } }
}

pub(super) fn stamp(time: Timestamp) -> String {
    format!("{time:.0}")
}

pub(super) fn or_dash(text: &str) -> Markup {
    html! { @if text.is_empty() { span.dim { "–" } } @else { (harmless(text)) } }
}

/// What a job is called: by its client or, if that says nothing, by the beginning of its id.
pub(super) fn name(job: &JobView) -> Markup {
    let id = job.id.to_string();
    html! { @if job.reference.is_empty() { code { (id[..8]) } } @else { (harmless(&job.reference)) } }
}

/// A link to a job's page.
pub(super) fn link(job: &JobView) -> Markup {
    html! { a.name href={ "/jobs/" (job.id) } title={ (harmless(&job.reference)) " " (job.id) } { (name(job)) } }
}

fn badge(amber: Amber) -> Markup {
    html! { " " span.badge title=(amber.meaning()) { (amber.word()) } }
}

/// The name of a state's dot: its shape and its colour.
pub(super) fn dot(job: &JobView, now: Timestamp) -> &'static str {
    match job.state {
        _ if Amber::of(job, now).is_some() => "amber",
        JobState::Ended(outcome) => match JobState::Ended(outcome).tone() {
            Tone::Good => "good",
            Tone::Bad => "bad",
            Tone::Dim | Tone::Plain => "off",
        },
        JobState::Live(_) if job.turn.as_ref().is_some_and(|turn| turn.on_hold) => "hold",
        JobState::Live(JobStatus::Registered) => "held",
        JobState::Live(JobStatus::Submitted) => "waits",
        JobState::Live(JobStatus::Running) => match &job.step {
            Some(step) if step.started_at.is_none() => "waits",
            Some(_) | None => "runs",
        },
    }
}

/// The class of a text about an outcome.
pub(super) fn tone(outcome: Option<Outcome>) -> &'static str {
    match outcome.map(|outcome| JobState::Ended(outcome).tone()) {
        None | Some(Tone::Plain) => "",
        Some(Tone::Good) => "good",
        Some(Tone::Dim) => "dim",
        Some(Tone::Bad) => "bad",
    }
}

/// The state of a job, with its dot, its step, its place and its priority.
pub(super) fn state(job: &JobView, now: Timestamp) -> Markup {
    html! {
        span class={ "state " (dot(job, now)) } {
            span {
                (harmless(&job.state_text()))
                @if let Some(position) = job.position { span.dim { " no. " (position) } }
                @if let (JobState::Live(_), Some(priority @ (Priority::High | Priority::Low))) = (job.state, job.priority) {
                    span.dim { ", " (priority_text(priority)) } }
                @if let Some(amber) = Amber::of(job, now) { (badge(amber)) }
            }
        }
    }
}

pub(super) fn priority_text(priority: Priority) -> &'static str {
    match priority {
        Priority::Low => "low priority",
        Priority::Medium => "medium",
        Priority::High => "high priority",
    }
}

/// A job's progress, cut into its steps where it has several.
pub(super) fn bar(job: &JobView, fraction: f64) -> Markup {
    let done = percent(fraction);
    // Said once for all of its parts.
    let label = format!("Progress: {done}");
    let whole = [(1.0, fraction.clamp(0.0, 1.0))];
    let steps = job.step.as_ref().filter(|step| step.shares.len() > 1);
    let parts = steps.map_or(whole.to_vec(), |step| step.parts(fraction));
    html! {
        span.bar {
            span.steps role="progressbar" aria-label="Progress" aria-valuemin="0" aria-valuemax="100"
                aria-valuenow=(format!("{:.0}", fraction.clamp(0.0, 1.0) * 100.0)) aria-valuetext=(label)
                title=[steps.map(|step| harmless(&step.name()))] {
                @for (share, done) in parts {
                    span style=(format!("flex-grow: {share:.4}")) { span style=(format!("width: {:.1}%", done * 100.0)) {} }
                }
            }
            span.number { (done) }
        }
    }
}

/// How long it may run.
pub(super) fn timeout(job: &JobView) -> Markup {
    let limit = job.timeout_ms.filter(|timeout| *timeout > 0);
    html! { @if let Some(limit) = limit { span.dim { " of " (spoken(SignedDuration::from_millis(limit))) } } }
}

/// A command, with a button that copies it.
pub(super) fn command(text: &str) -> Markup {
    html! {
        span.command { code { (harmless(text)) }
            " " button.copy type="button" hidden data-copy=(harmless(text)) aria-label={ "Copy: " (harmless(text)) } { "Copy" } }
    }
}
