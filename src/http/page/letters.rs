//! Dead letters, for whoever wants to know what they are before anything is done about them.

use maud::{Markup, html};

use super::layout::{Frame, Sheet, troubles};
use crate::actions::counted;
use crate::actions::letters::Names;
use crate::domain::text::to_the_second;
use crate::domain::vhost::Vhost;
use crate::telemetry::report::one_line;

/// A dead letter, as pages show it.
pub(in crate::http) struct Letter {
    /// See [`crate::actions::letters::name`].
    pub(in crate::http) name: String,
    pub(in crate::http) time: String,
    pub(in crate::http) vhost: Vhost,
    pub(in crate::http) queue: String,
    pub(in crate::http) bytes: usize,
    pub(in crate::http) reason: String,
}

/// What becomes of one that is put back as it is.
const ONCE_MORE: &str = "What could not be read comes straight back here if it is requeued; what could not be done \
                         for another reason may succeed now.";

/// The first of all that there are, which have these names.
pub(in crate::http) fn letters(frame: &Frame<'_>, first: &[Letter], names: &Names) -> Sheet {
    let count = names.all.len();
    let content = html! {
        (troubles(frame, &[]))
        nav aria-label="Back" { a href="/" { "← all jobs" } }
        h1 { (counted(count, "dead letter")) }
        @if count == 0 {
            div.empty { p { "There is none, or somebody else is looking at them now." } }
        } @else {
            p { "Messages that could not be handled, as they came. " (ONCE_MORE) }
            (table(first, names, None))
            @if let Some(acting) = frame.acting { div.actions { (acting.letters()) } }
        }
    };
    Sheet::new("Dead letters", content)
}

/// With what is to be done about each, if anything is.
pub(super) fn table(
    first: &[Letter],
    names: &Names,
    act: Option<&dyn Fn(&Letter) -> Markup>,
) -> Markup {
    html! {
        div.card tabindex="0" role="region" aria-label="Dead letters" { table {
            thead { tr {
                th scope="col" { "From" } th scope="col" { "Time" } th.number scope="col" { "Bytes" }
                th scope="col" { "Reason" } th scope="col" { "Id" }
                @if act.is_some() { th scope="col" { "Actions" } }
            } }
            tbody { @for letter in first { tr {
                th.nowrap scope="row" { (one_line(&letter.queue)) span.dim { ", " (letter.vhost.name()) } }
                td.nowrap { (to_the_second(&letter.time)) }
                td.number { (letter.bytes) }
                td.message { (one_line(&letter.reason)) }
                td { code { (one_line(names.shown(&letter.name))) } }
                @if let Some(act) = act { td { (act(letter)) } }
            } } }
        } }
        @if names.all.len() > first.len() { p.dim { "and " (names.all.len() - first.len()) " more" } }
    }
}
