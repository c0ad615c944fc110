//! The story of a job, on its own page: what has happened to it, what it was given, and what it has left.

use maud::{Markup, html};
use uuid::Uuid;

use super::layout::Frame;
use super::prose::prose;
use super::words::at;
use crate::domain::overview::Story;
use crate::telemetry::report::{harmless, readable};

pub(super) fn section(frame: &Frame<'_>, story: &Story) -> Markup {
    html! {
        @if let Some(bytes) = story.kept_result {
            p { a href={ "/api/jobs/" (story.job.id) "/result" } download { "The output ESDL" } ", "
                (bytes) " bytes" }
        }
        @if let (Some(acting), true) = (frame.acting, story.can_run_again) {
            div.actions { (acting.again(&story.job)) }
        }
        (runs(story))
        h2 #story { "Story" }
        div.card tabindex="0" role="region" aria-label="Story" { table.story {
            tbody { @for event in &story.events { tr {
                td.nowrap { (at(event.at)) }
                td { (prose(&event.what)) @for fact in &event.evidence { div.dim { (prose(fact)) } } }
            } } }
        } }
        @if !story.parameters.is_empty() {
            h2 { "Parameters" }
            div.card tabindex="0" role="region" aria-label="Parameters" { table.parameters {
                tbody { @for one in &story.parameters { tr {
                    td title=(harmless(&one.key)) { (harmless(one.name())) }
                    td { (one.text()) }
                } } }
            } }
        }
        @if !story.esdl_messages.is_empty() {
            h2 { "Messages" }
            div.card tabindex="0" role="region" aria-label="Messages" { table.messages {
                thead { tr { th { "Severity" } th { "Asset" } th { "Message" } } }
                tbody { @for one in &story.esdl_messages { tr {
                    td class=(tone(one.severity)) { (one.severity) }
                    td { @if let Some(asset) = &one.asset { code { (harmless(asset)) } } }
                    td.message { (readable(&one.text)) }
                } } }
            } }
        }
        @if let Some(logs) = &story.logs {
            h2 { "Logs" }
            details { summary { (logs.lines().count()) " lines" } pre { (readable(logs)) } }
        }
    }
}

/// Which jobs are runs of the same, with how they differ.
fn runs(story: &Story) -> Markup {
    let short = |id: Uuid| id.to_string()[..8].to_owned();
    let job = |id: Uuid| html! { a href={ "/jobs/" (id) } { code { (short(id)) } } };
    let compared = |one: Uuid, other: Uuid| {
        html! { a href={ "/jobs/" (one) "/compare/" (other) } { "what differs" } }
    };
    html! {
        @if let Some(of) = story.runs_again {
            p { "Runs again what " (job(of)) " was: " (compared(of, story.job.id)) "." }
        }
        @if !story.run_again_as.is_empty() {
            p { "Was run again as "
                @for (place, id) in story.run_again_as.iter().enumerate() {
                    @if place > 0 { ", " }
                    (job(*id)) " (" (compared(story.job.id, *id)) ")"
                } "." }
        }
    }
}

fn tone(severity: &str) -> &'static str {
    match severity {
        "error" => "bad",
        "warning" => "warn",
        _ => "dim",
    }
}
