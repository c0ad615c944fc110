//! What is around every page: its head, its bars above and below, and the one box of trouble.

use jiff::Timestamp;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::prose::prose;
use super::words::{Matter, at, since};
use crate::VERSION;
use crate::http::form::Back;
use crate::store::migrate::REVISIONS;
use crate::telemetry::health::PartView;
use crate::telemetry::report::readable;
use crate::telemetry::trouble::{Trouble, trouble};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

/// What each form carries.
pub(in crate::http) struct Acting {
    /// Says that this service has shown the form.
    pub(in crate::http) token: String,
    /// Where the operator goes back to.
    pub(in crate::http) back: Back,
}

/// What is on every page.
pub(in crate::http) struct Frame<'a> {
    /// The script nonce, fresh for each page; None for one that must not change by itself.
    pub(in crate::http) nonce: Option<&'a str>,
    pub(in crate::http) now: Timestamp,
    /// Which of the replicas answers.
    pub(in crate::http) host: &'a str,
    pub(in crate::http) parts: &'a [PartView],
    /// What was done before this page was shown.
    pub(in crate::http) note: Option<&'a str>,
    /// None for whoever only looks.
    pub(in crate::http) acting: Option<&'a Acting>,
}

/// A page without what is around it, which is all of it that changes.
pub(in crate::http) struct Sheet {
    title: String,
    /// Where its changes are told; None for one that does not change.
    live: Option<String>,
    content: Markup,
}

impl Sheet {
    pub(super) fn new(title: impl Into<String>, content: Markup) -> Sheet {
        Sheet {
            title: title.into(),
            live: None,
            content,
        }
    }

    /// One that changes, as is told there.
    pub(super) fn live(self, events: String) -> Sheet {
        Sheet {
            live: Some(events),
            ..self
        }
    }

    /// Whether it changes.
    pub(in crate::http) fn is_live(&self) -> bool {
        self.live.is_some()
    }

    pub(in crate::http) fn content(self) -> String {
        self.content.into_string()
    }

    pub(in crate::http) fn document(self, frame: &Frame<'_>) -> String {
        let Sheet {
            title,
            live,
            content,
        } = self;
        let page = html! {
                    (DOCTYPE)
                    html lang="en" {
                        (head(&title))
                        body {
                            (bar(frame.acting.is_some()))
                            (note(frame.note))
                            div #stale role="status" { p.alarm hidden { "The orchestrator does not answer. What is shown is not up to date." } }
                            main #main tabindex="-1" data-live=[live.as_deref()] { (content) }
                            footer {
        span {
                                    "As of " span #as-of { (at(frame.now)) } ", " (frame.host) ", version " (VERSION)
                                    ", tables at revision " (revision())
                                }
                                @if live.is_some() { " " a href="" { "Refresh" } }
                            }
                            @if let Some(nonce) = frame.nonce { script nonce=(nonce) { (PreEscaped(SCRIPT)) } }
                        }
                    }
                };
        page.into_string()
    }
}

/// That of the tables, which this version needs them to be at.
fn revision() -> &'static str {
    REVISIONS.last().map_or("none", |last| last.id)
}

fn head(title: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta name="viewport" content="width=device-width, initial-scale=1";
            meta name="color-scheme" content="light dark";
            link rel="icon" href="data:,";
            title { (title) }
            style { (PreEscaped(STYLE)) }
        }
    }
}

fn bar(may_act: bool) -> Markup {
    html! {
        a.skip href="#main" { "Skip to the content" }
        header {
            a.brand href="/" { "OMOTES jobs" }
            @if may_act { nav aria-label="Site" { a.button href="/submit" { "Submit a job" } } }
        }
    }
}

/// What was done, on top of the page that the operator has come back to.
fn note(note: Option<&str>) -> Markup {
    html! { @if let Some(note) = note { p.alarm.note role="status" { (readable(note)) } } }
}

/// Why a request got nothing, for a browser. It shows nothing of the deployment, for it may be for
/// somebody without an account.
pub(in crate::http) fn refused(title: &str, why: &str) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            (head(title))
            body {
                (bar(false))
                main #main tabindex="-1" {
                    h1 { (title) }
                    p.alarm.message role="alert" { (readable(why)) }
                    nav aria-label="Back" { a href="/" { "← all jobs" } }
                }
            }
        }
    };
    page.into_string()
}

/// In one box, first what does not work, by its cause and with what to do first, and what else
/// somebody has to look at.
pub(super) fn troubles(frame: &Frame<'_>, others: &[Matter]) -> Markup {
    let trouble = trouble(frame.parts);
    let is_bad = trouble.is_some();
    let count = others.len() + usize::from(is_bad);
    html! {
        @if count > 0 {
            section.trouble.bad[is_bad] aria-label="Trouble" {
                @if let Some(trouble) = trouble { (lead(&trouble, frame.now)) }
                @if !others.is_empty() { ul { @for other in others { li { (other.full) } } } }
            }
        }
    }
}

/// What to do first, with what follows from the same cause out of the way.
fn lead(trouble: &Trouble, now: Timestamp) -> Markup {
    let fault = |part: &PartView| {
        let why = part.why.as_deref().unwrap_or_default();
        html! { b { (part.part.name()) } " for " (since(part.since, now)) ": " (readable(why)) }
    };
    html! {
        div.lead {
            p { b { (trouble.what) } " for " (since(trouble.since, now)) ". " (prose(trouble.remedy)) }
            p.dim.message { (readable(&trouble.why)) }
            @if !trouble.follows.is_empty() {
                details.follows {
                    summary { "What follows from it: " (trouble.follows.len()) }
                    ul { @for part in &trouble.follows { li { (fault(part)) } } }
                }
            }
        }
        @for part in &trouble.others { p { (fault(part)) } }
    }
}

/// Which parts work, in a row of small marks.
pub(super) fn parts(frame: &Frame<'_>) -> Markup {
    html! {
        ul.parts aria-label="Parts" {
            @for part in frame.parts {
                li.bad[part.why.is_some()] {
                    (part.part.name()) span.hidden { @if part.why.is_some() { ": does not work" } @else { ": works" } }
                }
            }
        }
    }
}
